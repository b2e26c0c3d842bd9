"""The flow-map losses a config can name, under one signature, and the batch loss they enter."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd.losses.flow_map import (
    StopGradient,
    VelocityFunction,
    diagonal_residual,
    esd_residual,
    lsd_residual,
    psd_residual,
    sample_diagonal,
    sample_triangle,
    squared_error,
)
from kd.losses.flow_map_family import (
    fmm_residuals,
    meanflow_residual,
    pfmm_residual,
    sample_dyadic,
    sampled_velocity,
    shortcut_residual,
)
from kd.losses.interpolant import Interpolant

__all__ = ['ALGORITHMS', 'Algorithm', 'flow_map_errors', 'get_algorithm']

_Pairs = tuple[jax.Array, jax.Array]
_Residual = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """An off-diagonal loss under one signature.

    Attributes:
      times: (key, n, end) -> (s, t), each [n]; x_s is a point of the interpolant.
      residual: (vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient) -> [n, ...].
      needs_teacher: whether a frozen teacher must be given.
      stop_gradient: the choice made where the caller makes none; None where there is no choice.
    """

    times: Callable[[jax.Array, int, float], _Pairs]
    residual: _Residual
    needs_teacher: bool = False
    stop_gradient: StopGradient | None = None


def _triangle(key, n, end):
    return sample_triangle(key, n, end=end)


def _to_data(key, n, end):
    return sample_diagonal(key, n, end=end), jnp.ones(n)


def _dyadic(key, n, end):
    s, t = sample_dyadic(key, n)
    return jnp.minimum(s, end), t


def _square(key, n, end):
    s, t = jax.random.split(key)
    return sample_diagonal(s, n, end=end), jax.random.uniform(t, (n,))


def _lagrangian(vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient):
    return lsd_residual(vfn, s, t, x_s, teacher=teacher, stop_gradient=stop_gradient)


def _eulerian(vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient):
    return esd_residual(vfn, s, t, x_s, teacher=teacher, stop_gradient=stop_gradient)


def _uniform(vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient):
    fraction = jax.random.uniform(key, s.shape, s.dtype)
    return psd_residual(vfn, s, t, x_s, fraction, teacher=teacher, stop_gradient=stop_gradient)


def _midpoint(vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient):
    return psd_residual(vfn, s, t, x_s, 0.5, teacher=teacher, stop_gradient=stop_gradient)


def _progressive(vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient, steps):
    return pfmm_residual(vfn, s, t, x_s, teacher=teacher, steps=steps)


def _flow_map_matching(vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient):
    # Squares are summed over the last axis, so that the two errors add up. The jump goes to t and
    # back: t is the start of the map whose velocity is matched at s.
    return jnp.concatenate(fmm_residuals(vfn, t, s, x_s, dx_s), axis=-1)


def _meanflow(vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient):
    return meanflow_residual(vfn, s, t, x_s, dx_s)


def _shortcut(vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient):
    return shortcut_residual(vfn, s, t, x_s)


def _consistency(vfn, s, t, x_s, *, dx_s, key, teacher, stop_gradient):
    field = teacher or sampled_velocity(dx_s)
    return esd_residual(vfn, s, t, x_s, teacher=field, stop_gradient='target')


ALGORITHMS: dict[str, Algorithm] = {
    'lsd': Algorithm(_triangle, _lagrangian, stop_gradient='convex'),
    'esd': Algorithm(_triangle, _eulerian, stop_gradient='full'),
    'psd_uniform': Algorithm(_triangle, _uniform, stop_gradient='convex'),
    'psd_midpoint': Algorithm(_triangle, _midpoint, stop_gradient='convex'),
    'lmd': Algorithm(_triangle, _lagrangian, needs_teacher=True, stop_gradient='none'),
    'emd': Algorithm(_triangle, _eulerian, needs_teacher=True, stop_gradient='none'),
    'pfmm': Algorithm(_triangle, functools.partial(_progressive, steps=2), needs_teacher=True),
    'fmm': Algorithm(_square, _flow_map_matching),
    'meanflow': Algorithm(_triangle, _meanflow),
    'shortcut': Algorithm(_dyadic, _shortcut),
    # Training without a teacher, distillation with one.
    'consistency': Algorithm(_to_data, _consistency),
}


def get_algorithm(
    name: str, *, teacher: bool = False, stop_gradient: StopGradient | None = None
) -> Algorithm:
    """The algorithm a config names, its options checked.

    Args:
      name: a key of ALGORITHMS.
      teacher: whether a frozen teacher will be given.
      stop_gradient: None for the algorithm's own choice; see `kd.losses.flow_map`.

    Raises:
      ValueError: unknown name; a teacher missing, or given where it would be ignored; a
        stop_gradient for an algorithm that leaves no choice.
    """
    if name not in ALGORITHMS:
        raise ValueError(f'unknown algorithm {name!r}, expected one of {sorted(ALGORITHMS)}.')
    algorithm = ALGORITHMS[name]
    if algorithm.needs_teacher and not teacher:
        raise ValueError(f'algorithm {name!r} distils a frozen flow: give a teacher.')
    if teacher and name in ('fmm', 'meanflow', 'shortcut'):
        raise ValueError(f'algorithm {name!r} has no teacher: remove it, or use emd or lmd.')
    if stop_gradient is None:
        return algorithm
    if algorithm.stop_gradient is None:
        raise ValueError(f'algorithm {name!r} fixes where the gradient stops: drop stop_gradient.')
    return dataclasses.replace(algorithm, stop_gradient=stop_gradient)


def flow_map_errors(
    key: jax.Array,
    vfn: VelocityFunction,
    x0: jax.Array,
    x1: jax.Array,
    *,
    interpolant: Interpolant,
    algorithm: Algorithm,
    diagonal: int,
    off_diagonal_vfn: VelocityFunction | None = None,
    teacher: VelocityFunction | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Squared errors of a batch: flow matching on the first examples, the algorithm on the rest.

    The mean over the batch is (Md mean_b + Mo mean_D) / M, the paper's loss, with Md = `diagonal`
    examples of M on the diagonal (eta = Md / M; 0.75 in the paper, M for plain flow matching).

    Args:
      key: draws the times.
      vfn: the student, called on the `diagonal` first examples.
      x0: noise [B, ...].
      x1: data [B, ...].
      interpolant: the path between them.
      algorithm: from `get_algorithm`.
      diagonal: number of examples on the diagonal, from 0 to B.
      off_diagonal_vfn: the student for the other examples, where it differs: dropout off in the
        branches that are differentiated in time, labels of these examples. None is `vfn`.
      teacher: frozen velocity function for the other examples, or None.

    Returns:
      (error, s, t), each [B]: summed squared residuals and the times they belong to, s = t on the
      diagonal; the caller applies `uncertainty_weight` and the mean.
    """
    batch = x0.shape[0]
    if not 0 <= diagonal <= batch:
        raise ValueError(f'diagonal={diagonal}, expected 0 to {batch}, the batch size.')
    diagonal_key, times_key, residual_key = jax.random.split(key, 3)
    parts = []
    if diagonal:
        noise, data = x0[:diagonal], x1[:diagonal]
        t = sample_diagonal(diagonal_key, diagonal, end=interpolant.end)
        x_t, dx_t = interpolant.point(t, noise, data), interpolant.velocity(t, noise, data)
        parts.append((squared_error(diagonal_residual(vfn, t, x_t, dx_t)), t, t))
    if diagonal < batch:
        noise, data = x0[diagonal:], x1[diagonal:]
        s, t = algorithm.times(times_key, batch - diagonal, interpolant.end)
        residual = algorithm.residual(
            off_diagonal_vfn or vfn,
            s,
            t,
            interpolant.point(s, noise, data),
            dx_s=interpolant.velocity(s, noise, data),
            key=residual_key,
            teacher=teacher,
            stop_gradient=algorithm.stop_gradient,
        )
        parts.append((squared_error(residual), s, t))
    error, s, t = (jnp.concatenate(column) for column in zip(*parts, strict=True))
    return error, s, t
