"""Interpolants between noise and data, the paths along which flows and flow maps are trained.

I_t = a(t) x0 + c(t) x1, with x0 noise, x1 data, t = 0 at the noise and t = 1 at the data
(Albergo, Boffi, Vanden-Eijnden, arXiv 2303.08797).
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    'INTERPOLANTS',
    'Interpolant',
    'check_same_interpolant',
    'expand_times',
    'get_interpolant',
    'linear',
    'trigonometric',
    'variance_preserving',
]

_ENDS_TOLERANCE = 1e-5


def expand_times(t: jax.Array, x: jax.Array) -> jax.Array:
    """Reshapes times [B] (or a scalar) so that they broadcast over x [B, ...]."""
    t = jnp.broadcast_to(jnp.asarray(t), x.shape[:1])
    return t.reshape(t.shape + (1,) * (x.ndim - 1))


@dataclasses.dataclass(frozen=True)
class Interpolant:
    """The path I_t = a(t) x0 + c(t) x1 and its derivative along the path.

    The derivatives of `a` and `c` are taken by forward-mode differentiation, so they cannot
    disagree with the functions. All methods take times t [B] (or a scalar) in [0, end] and arrays
    [B, ...], and work under jit, grad, jvp and vmap. Nothing is stop-gradiented.

    Attributes:
      name: what configs, checkpoints and error messages call it.
      a: coefficient of the noise; elementwise in t, a(0) = 1 and a(1) = 0.
      c: coefficient of the data; elementwise in t, c(0) = 0 and c(1) = 1.
      end: last time with a finite derivative. 1 except where the path ends with infinite speed;
        draw the training times up to it.

    Raises:
      ValueError: when built, if an end is wrong or a derivative on [0, end] is not finite.
    """

    name: str
    a: Callable[[jax.Array], jax.Array]
    c: Callable[[jax.Array], jax.Array]
    end: float = 1.0

    def __post_init__(self):
        if not 0.0 < self.end <= 1.0:
            raise ValueError(f'interpolant {self.name!r}: end = {self.end}, expected 0 < end <= 1.')
        for label, function, wanted in (('a', self.a, (1.0, 0.0)), ('c', self.c, (0.0, 1.0))):
            with jax.ensure_compile_time_eval():
                ends = np.asarray(function(jnp.array([0.0, 1.0])))
                grid = jnp.linspace(0.0, self.end, 65)
                _, slope = jax.jvp(function, (grid,), (jnp.ones_like(grid),))
            if not np.allclose(ends, wanted, atol=_ENDS_TOLERANCE, rtol=0.0):
                raise ValueError(
                    f'interpolant {self.name!r}: {label}(0) = {ends[0]:.6g} and {label}(1) = '
                    f'{ends[1]:.6g}, expected {wanted[0]:g} and {wanted[1]:g}; time 0 is noise and '
                    'time 1 is data.'
                )
            if not np.all(np.isfinite(slope)):
                raise ValueError(
                    f'interpolant {self.name!r}: the derivative of {label} is not finite on '
                    f'[0, {self.end}]; lower `end`.'
                )

    def point(self, t: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
        """I_t = a(t) x0 + c(t) x1, shape [B, ...]."""
        t = expand_times(t, x0)
        return self.a(t) * x0 + self.c(t) * x1

    def velocity(self, t: jax.Array, x0: jax.Array, x1: jax.Array) -> jax.Array:
        """dI_t = a'(t) x0 + c'(t) x1, shape [B, ...]: the target of flow matching."""
        da, dc = self._slopes(expand_times(t, x0))
        return da * x0 + dc * x1

    def to_data(self, t: jax.Array, x: jax.Array, velocity: jax.Array) -> jax.Array:
        """The data x1 [B, ...] of the pair (x0, x1) whose path is at x with this velocity.

        Solves x = a x0 + c x1, velocity = a' x0 + c' x1. With velocity = b_t(x) = E[dI_t | I_t = x]
        it is the denoiser E[x1 | I_t = x], since both equations are linear.
        """
        t = expand_times(t, x)
        a, c = self.a(t), self.c(t)
        da, dc = self._slopes(t)
        return (a * velocity - da * x) / (a * dc - c * da)

    def to_noise(self, t: jax.Array, x: jax.Array, velocity: jax.Array) -> jax.Array:
        """The noise x0 [B, ...] of the pair whose path is at x with this velocity; see to_data.

        With velocity = b_t(x) it is E[x0 | I_t = x]; for unit Gaussian noise the score is
        -E[x0 | I_t = x] / a(t).
        """
        t = expand_times(t, x)
        a, c = self.a(t), self.c(t)
        da, dc = self._slopes(t)
        return (dc * x - c * velocity) / (a * dc - c * da)

    def _slopes(self, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """a'(t) and c'(t)."""
        ones = jnp.ones_like(t)
        return jax.jvp(self.a, (t,), (ones,))[1], jax.jvp(self.c, (t,), (ones,))[1]


# Built by functions, not constants: the checks touch the backend, which an import must not.


def linear() -> Interpolant:
    """a = 1 - t, c = t: the straight path of rectified flow (arXiv 2209.03003)."""
    return Interpolant('linear', lambda t: 1.0 - t, lambda t: t)


def trigonometric() -> Interpolant:
    """a = cos(pi t / 2), c = sin(pi t / 2): constant variance at constant speed."""
    return Interpolant(
        'trigonometric', lambda t: jnp.cos(0.5 * jnp.pi * t), lambda t: jnp.sin(0.5 * jnp.pi * t)
    )


def variance_preserving(end: float = 0.999) -> Interpolant:
    """a = sqrt(1 - t^2), c = t: constant variance with the data growing linearly.

    a' = -t / sqrt(1 - t^2) diverges at the data, and with it the variance of the flow-matching
    target, hence `end`.
    """
    # maximum(): rounding must not turn the root into NaN at t = 1.
    return Interpolant(
        'variance_preserving',
        lambda t: jnp.sqrt(jnp.maximum(1.0 - t * t, 0.0)),
        lambda t: t,
        end=end,
    )


INTERPOLANTS: dict[str, Callable[[], Interpolant]] = {
    'linear': linear,
    'trigonometric': trigonometric,
    'variance_preserving': variance_preserving,
}


def get_interpolant(name: str) -> Interpolant:
    """The interpolant a config names; ValueError lists the known names."""
    if name not in INTERPOLANTS:
        raise ValueError(f'unknown interpolant {name!r}, expected one of {sorted(INTERPOLANTS)}.')
    return INTERPOLANTS[name]()


def check_same_interpolant(student: Interpolant, teacher: Interpolant) -> None:
    """Refuses a teacher whose velocity field belongs to another path.

    The velocity b_t(x) = E[dI_t | I_t = x] depends on a and c, so a flow trained on one path does
    not teach maps along another. Compares values, not names, so a renamed interpolant passes.

    Raises:
      ValueError: if a or c differ by more than 1e-5 anywhere on a grid of [0, 1].
    """
    with jax.ensure_compile_time_eval():
        grid = jnp.linspace(0.0, 1.0, 65)
        gap = max(
            float(jnp.max(jnp.abs(student.a(grid) - teacher.a(grid)))),
            float(jnp.max(jnp.abs(student.c(grid) - teacher.c(grid)))),
        )
    if gap > _ENDS_TOLERANCE:
        raise ValueError(
            f'the teacher was trained on interpolant {teacher.name!r}, the student uses '
            f'{student.name!r} (coefficients differ by up to {gap:.3g}); give both the same one.'
        )
