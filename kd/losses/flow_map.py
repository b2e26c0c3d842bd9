"""Flow maps: per-sample residuals whose zeros are the jumps of a probability-flow ODE.

A two-time velocity function v(s, t, x) is at once the velocity field of the flow, v(t, t, x), and
its solution operator, X_{s,t}(x) = x + (t - s) v(s, t, x), which carries a point at time s to time
t in one evaluation. X is the flow map of the field b if and only if the diagonal matches b and any
one of these holds for all s <= u <= t:

  Lagrangian   d_t X_{s,t}(x) = v(t, t, X_{s,t}(x))
  Eulerian     d_s X_{s,t}(x) + grad X_{s,t}(x) v(s, s, x) = 0
  semigroup    X_{u,t}(X_{s,u}(x)) = X_{s,t}(x)

Each gives a residual, and each residual a loss: self-distillation where the right-hand side is the
network itself (`teacher=None`), distillation where it is a frozen flow or flow map.

Source: Boffi, Albergo, Vanden-Eijnden, "How to build a consistency model: Learning flow maps via
self-distillation", arXiv 2505.18825; the teacher versions are from "Flow map matching with
stochastic interpolants", arXiv 2406.07507.

Conventions of every function here: time 0 is noise and 1 is data; `vfn` and `teacher` take
(s[B], t[B], x[B, ...]) and return [B, ...]; s and t are [B] or scalars; residuals are [B, ...] in
the type of x, unreduced. What `stop_gradient` names:

  'none'    nothing is stopped: the gradient of the squared residual itself
  'convex'  the teacher's part is stopped, the derivatives of the student keep their gradient
  'full'    (Eulerian) grad X v is stopped as a whole, d_s X keeps its gradient
  'target'  everything but the term v(s, t, x) is stopped: a regression onto a moving target

A frozen teacher's parameters receive no gradient as long as they are not differentiated; with
every choice but 'none' they receive exactly zero even then.
"""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses.interpolant import expand_times

__all__ = [
    'StopGradient',
    'VelocityFunction',
    'along_flow',
    'diagonal_residual',
    'esd_residual',
    'flow_map',
    'lsd_residual',
    'normalised',
    'psd_residual',
    'psd_times',
    'sample_diagonal',
    'sample_triangle',
    'squared_error',
    'uncertainty_weight',
]

VelocityFunction = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
StopGradient = Literal['none', 'convex', 'full', 'target']


def flow_map(vfn: VelocityFunction, s: ArrayLike, t: ArrayLike, x: jax.Array) -> jax.Array:
    """X_{s,t}(x) = x + (t - s) v(s, t, x), shape [B, ...]; exactly x where s = t."""
    s, t = _times(s, x), _times(t, x)
    return x + expand_times(t - s, x) * vfn(s, t, x)


def diagonal_residual(
    vfn: VelocityFunction, t: jax.Array, x_t: jax.Array, dx_t: jax.Array
) -> jax.Array:
    """Flow matching: v(t, t, x_t) - dx_t, shape [B, ...].

    Args:
      vfn: the student.
      t: times [B], uniform on [0, 1] in the paper.
      x_t: points of the interpolant at t, [B, ...].
      dx_t: its velocity there, [B, ...] (a sample, or the field of a teacher).

    Source: arXiv 2505.18825, L_b. The gradient flows through v only.
    """
    t = _times(t, x_t)
    return vfn(t, t, x_t) - dx_t


def lsd_residual(
    vfn: VelocityFunction,
    s: jax.Array,
    t: jax.Array,
    x_s: jax.Array,
    *,
    teacher: VelocityFunction | None = None,
    stop_gradient: StopGradient = 'convex',
) -> jax.Array:
    """Lagrangian: d_t X_{s,t}(x_s) - v(t, t, X_{s,t}(x_s)), shape [B, ...].

    d_t X = v(s, t, x) + (t - s) d_t v(s, t, x) by one `jax.jvp` in t.

    Args:
      vfn: the student.
      s: start times [B].
      t: end times [B], s <= t.
      x_s: points of the interpolant at the START s, [B, ...].
      teacher: velocity function read on its diagonal; None is the student itself.
      stop_gradient: 'convex' (the paper's) stops the velocity and the point X it is taken at;
        'target' also stops d_t v (the Lagrangian loss of "Align your flow", arXiv 2506.14603);
        'none' stops nothing, so the loss is differentiated through the teacher's evaluation.

    Raises:
      ValueError: for another `stop_gradient`.

    Source: arXiv 2505.18825, Lagrangian self-distillation; with a teacher arXiv 2406.07507, LMD.
    """
    _check_choice('lsd_residual', stop_gradient, ('none', 'convex', 'target'))
    s, t = _times(s, x_s), _times(t, x_s)
    step = expand_times(t - s, x_s)
    velocity, dt_velocity = jax.jvp(lambda t: vfn(s, t, x_s), (t,), (jnp.ones_like(t),))
    end = x_s + step * velocity
    if stop_gradient == 'none':
        return velocity + step * dt_velocity - (teacher or vfn)(t, t, end)
    field = jax.lax.stop_gradient((teacher or vfn)(t, t, jax.lax.stop_gradient(end)))
    if stop_gradient == 'target':
        dt_velocity = jax.lax.stop_gradient(dt_velocity)
    return velocity + step * dt_velocity - field


def esd_residual(
    vfn: VelocityFunction,
    s: jax.Array,
    t: jax.Array,
    x_s: jax.Array,
    *,
    teacher: VelocityFunction | None = None,
    stop_gradient: StopGradient = 'full',
    step: float | None = None,
    constant: float | None = None,
) -> jax.Array:
    """Eulerian: d_s X_{s,t}(x_s) + grad X_{s,t}(x_s) v(s, s, x_s), shape [B, ...].

    In terms of the network: v(s, s, x) - v(s, t, x) + (t - s) D v(s, t, x), where D is the
    derivative along (ds, dx) = (1, v(s, s, x)), taken by one `jax.jvp`. 'full' takes the same
    derivative in two parts, because the part along x is stopped and the part along s is not.

    Args:
      vfn: the student.
      s: start times [B].
      t: end times [B], s <= t.
      x_s: points of the interpolant at s, [B, ...].
      teacher: velocity function read on its diagonal at (s, s, x_s); None is the student itself.
        A constant function returning the sample dI_s gives MeanFlow and consistency training.
      stop_gradient: 'full' (the paper's) stops grad X v(s, s); 'convex' only v(s, s); 'target'
        everything but the leading v(s, t, x_s); 'none' nothing.
      step: of 'target': D as a difference over so much time, see `along_flow`.
      constant: of 'target': D is `normalised` with it; None leaves it as it is.

    Raises:
      ValueError: for another `stop_gradient`; a step or a constant of another than 'target'.

    Source: arXiv 2505.18825, Eulerian self-distillation; with a teacher arXiv 2406.07507, EMD.
    """
    _check_choice('esd_residual', stop_gradient, ('none', 'convex', 'full', 'target'))
    if stop_gradient != 'target' and not step is constant is None:
        raise ValueError("esd_residual: step and constant are of stop_gradient='target'.")
    s, t = _times(s, x_s), _times(t, x_s)
    length = expand_times(t - s, x_s)
    field = (teacher or vfn)(s, s, x_s)
    if stop_gradient != 'none':
        field = jax.lax.stop_gradient(field)
    if stop_gradient == 'full':
        velocity, ds_velocity = jax.jvp(lambda s: vfn(s, t, x_s), (s,), (jnp.ones_like(s),))
        _, dx_velocity = jax.jvp(lambda x: vfn(s, t, x), (x_s,), (field,))
        transport = field + length * jax.lax.stop_gradient(dx_velocity)
        return length * ds_velocity - velocity + transport
    velocity, along = along_flow(vfn, s, t, x_s, field, step=step)
    if constant is not None:
        along = normalised(along, constant=constant)
    if stop_gradient == 'target':
        along = jax.lax.stop_gradient(along)
    return field - velocity + length * along


def along_flow(
    vfn: VelocityFunction,
    s: jax.Array,
    t: jax.Array,
    x: jax.Array,
    field: jax.Array,
    *,
    step: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """v(s, t, x) and its derivative along (ds, dx) = (1, field), each [B, ...].

    One `jax.jvp`; or with a step h, for networks whose kernels have no forward derivative,
    (v(s + h, t, x + h field) - v(s, t, x)) / h, whose error is O(h).
    """
    if step is None:
        return jax.jvp(lambda s, x: vfn(s, t, x), (s, x), (jnp.ones_like(s), field))
    velocity = vfn(s, t, x)
    return velocity, (vfn(s + step, t, x + step * field) - velocity) / step


def normalised(derivative: jax.Array, *, constant: float) -> jax.Array:
    """d / (||d|| + constant), [B, ...], the norm that of each example over all its axes.

    A map that has its fixed point without this does not have it with: it trades that for
    derivatives that no guidance blows up. arXiv 2410.11081; arXiv 2509.04406, as released.
    """
    norm = jnp.sqrt(squared_error(derivative))
    return derivative / (expand_times(norm, derivative) + constant)


def psd_residual(
    vfn: VelocityFunction,
    s: jax.Array,
    t: jax.Array,
    x_s: jax.Array,
    fraction: ArrayLike,
    *,
    teacher: VelocityFunction | None = None,
    stop_gradient: StopGradient = 'convex',
) -> jax.Array:
    """Progressive: one jump against two, as velocities, shape [B, ...].

    v(s, t, x) - [(1 - g) v(s, u, x) + g v(u, t, X_{s,u}(x))], with g = `fraction` and
    u = g s + (1 - g) t. Times (t - s) this is X_{s,t}(x) - X_{u,t}(X_{s,u}(x)); the division keeps
    the gradient of short jumps from vanishing like (t - s)^4.

    Args:
      vfn: the student.
      s: start times [B].
      t: end times [B], s <= t.
      x_s: points of the interpolant at s, [B, ...].
      fraction: g in [0, 1], [B] or a scalar: uniform draws give PSD-U, 1/2 gives PSD-M.
      teacher: two-time velocity function that makes the two short jumps; None is the student.
      stop_gradient: 'convex' (the paper's) stops the two short jumps; 'none' nothing.

    Raises:
      ValueError: for another `stop_gradient`.

    Source: arXiv 2505.18825, progressive self-distillation.
    """
    _check_choice('psd_residual', stop_gradient, ('none', 'convex'))
    s, t = _times(s, x_s), _times(t, x_s)
    u = psd_times(s, t, fraction)
    jump = teacher or vfn
    first = jump(s, u, x_s)
    second = jump(u, t, x_s + expand_times(u - s, x_s) * first)
    g = expand_times(jnp.asarray(fraction, s.dtype), x_s)
    target = (1.0 - g) * first + g * second
    if stop_gradient == 'convex':
        target = jax.lax.stop_gradient(target)
    return vfn(s, t, x_s) - target


def psd_times(s: jax.Array, t: jax.Array, fraction: ArrayLike) -> jax.Array:
    """The middle time u = g s + (1 - g) t [B] of a progressive pair: u - s = (1 - g)(t - s)."""
    # Written as a step from s, so that g = 1 gives exactly s and never less.
    return s + (1.0 - fraction) * (t - s)


def squared_error(residual: jax.Array, *, where: jax.Array | None = None) -> jax.Array:
    """||r||^2, summed (not averaged) over all dimensions but the first, [B, ...] -> [B].

    Accumulated in float32, or float64 for float64 input. `where` [B, ...] masks entries, whose
    value and gradient are then exactly zero even if not finite.
    """
    residual = residual.astype(jnp.promote_types(residual.dtype, jnp.float32))
    if where is not None:
        residual = jnp.where(where, residual, 0.0)
    return jnp.sum(jnp.square(residual), axis=tuple(range(1, residual.ndim)))


def uncertainty_weight(error: jax.Array, log_variance: jax.Array) -> jax.Array:
    """exp(-w) error + w, [B], with w = `log_variance` [B] learned as a function of (s, t).

    Minimal at w = log E[error], where its value is 1 + w: every pair of times then contributes
    equally to the gradient whatever the size of its error. The gradient flows to both arguments.
    Source: arXiv 2505.18825, after Kendall et al., arXiv 1705.07115.
    """
    return jnp.exp(-log_variance) * error + log_variance


def sample_diagonal(
    key: jax.Array, n: int, *, end: float = 1.0, dtype: jnp.dtype | None = None
) -> jax.Array:
    """Times [n], uniform on [0, end)."""
    return jax.random.uniform(key, (n,), dtype or jnp.float32, maxval=end)


def sample_triangle(
    key: jax.Array, n: int, *, end: float = 1.0, dtype: jnp.dtype | None = None
) -> tuple[jax.Array, jax.Array]:
    """Times (s, t), each [n], uniform on the triangle 0 <= s <= t < end: a sorted pair of draws."""
    pair = jax.random.uniform(key, (2, n), dtype or jnp.float32, maxval=end)
    return jnp.min(pair, axis=0), jnp.max(pair, axis=0)


def _times(t: ArrayLike, x: jax.Array) -> jax.Array:
    """Times as [B]: networks and derivatives in time always see one time for each example."""
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        t = t.astype(jnp.float32)
    return jnp.broadcast_to(t, x.shape[:1])


def _check_choice(function: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f'{function}: stop_gradient={value!r}, expected one of {allowed}.')
