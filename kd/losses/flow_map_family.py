"""Relatives of the flow-map losses, each in a few lines of the three residuals of `flow_map`.

Consistency models, MeanFlow, shortcut models, consistency trajectory models, "Align your flow" and
progressive distillation differ from Lagrangian, Eulerian and progressive self-distillation in three
choices: who supplies the velocity (a sample, the student, a frozen teacher), which times are drawn,
and where the gradient stops. The conventions are those of `kd.losses.flow_map`: time 0 is noise and
1 is data, so a paper that runs time the other way enters with v(s, t, x) = -u(x, 1 - t, 1 - s).
"""

from typing import Literal

import jax
import jax.numpy as jnp

from kd.losses.flow_map import (
    VelocityFunction,
    esd_residual,
    flow_map,
    lsd_residual,
    psd_residual,
)

__all__ = [
    'align_your_flow_residual',
    'consistency_distillation_residual',
    'consistency_training_residual',
    'consistency_trajectory_residual',
    'emd_residual',
    'fmm_residuals',
    'lmd_residual',
    'meanflow_residual',
    'pfmm_residual',
    'progressive_residual',
    'sample_dyadic',
    'sampled_velocity',
    'shortcut_residual',
]


# Distillation of a given flow or map ("Flow map matching", arXiv 2406.07507).


def lmd_residual(
    vfn: VelocityFunction, s: jax.Array, t: jax.Array, x_s: jax.Array, *, teacher: VelocityFunction
) -> jax.Array:
    """Lagrangian map distillation: d_t X_{s,t}(x_s) - b_t(X_{s,t}(x_s)), shape [B, ...].

    b_t(x) = teacher(t, t, x). The gradient flows through the teacher's argument, as in the paper;
    `lsd_residual(..., teacher=teacher)` is the variant that stops it. arXiv 2406.07507, LMD.
    """
    return lsd_residual(vfn, s, t, x_s, teacher=teacher, stop_gradient='none')


def emd_residual(
    vfn: VelocityFunction, s: jax.Array, t: jax.Array, x_s: jax.Array, *, teacher: VelocityFunction
) -> jax.Array:
    """Eulerian map distillation: d_s X_{s,t}(x_s) + grad X_{s,t}(x_s) b_s(x_s), shape [B, ...].

    b_s(x) = teacher(s, s, x). The gradient flows through both derivatives of the student, as in
    the paper. arXiv 2406.07507, EMD.
    """
    return esd_residual(vfn, s, t, x_s, teacher=teacher, stop_gradient='none')


def fmm_residuals(
    vfn: VelocityFunction, s: jax.Array, t: jax.Array, x_t: jax.Array, dx_t: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Flow map matching, without a teacher: the two residuals, each [B, ...].

    d_t X_{s,t}(X_{t,s}(x_t)) - dx_t, with the inner map held fixed in the t-derivative, and
    X_{s,t}(X_{t,s}(x_t)) - x_t. Times are drawn from the whole square: the map must also run
    backwards. x_t is the point of the interpolant at t and dx_t its velocity. Nothing is stopped.
    arXiv 2406.07507, FMM.
    """
    back = flow_map(vfn, t, s, x_t)
    # Not in the type of the points, which may have too few bits to tell times apart.
    t = jnp.broadcast_to(jnp.asarray(t, jnp.promote_types(x_t.dtype, jnp.float32)), x_t.shape[:1])
    there, dt_there = jax.jvp(lambda t: flow_map(vfn, s, t, back), (t,), (jnp.ones_like(t),))
    return dt_there - dx_t, there - x_t


def pfmm_residual(
    vfn: VelocityFunction,
    s: jax.Array,
    t: jax.Array,
    x_s: jax.Array,
    *,
    teacher: VelocityFunction,
    steps: int,
) -> jax.Array:
    """Progressive flow map matching: one jump against `steps` equal jumps, shape [B, ...].

    X_{s,t}(x_s) - sg[X'_{t_{K-1},t} o ... o X'_{s,t_1}(x_s)], X' the teacher's map and K = `steps`.
    The teacher's calls are unrolled: K is small. arXiv 2406.07507, PFMM.
    """
    if steps < 1:
        raise ValueError(f'pfmm_residual: steps={steps}, expected at least 1.')
    x = x_s
    for k in range(steps):
        start, stop = s + (t - s) * (k / steps), s + (t - s) * ((k + 1) / steps)
        x = flow_map(teacher, start, stop, x)
    return flow_map(vfn, s, t, x_s) - jax.lax.stop_gradient(x)


# Named methods.


def meanflow_residual(
    vfn: VelocityFunction, s: jax.Array, t: jax.Array, x_s: jax.Array, dx_s: jax.Array
) -> jax.Array:
    """MeanFlow: sg[dx_s + (t - s) D v(s, t, x_s)] - v(s, t, x_s), shape [B, ...].

    D is the derivative along (ds, dx) = (1, dx_s), dx_s the velocity of the sampled path: the
    Eulerian residual with the field replaced by the sample and all but the prediction stopped.
    Geng et al., arXiv 2505.13447, algorithm 1 (there t = 1 is noise).
    """
    return esd_residual(vfn, s, t, x_s, teacher=sampled_velocity(dx_s), stop_gradient='target')


def consistency_training_residual(
    vfn: VelocityFunction, s: jax.Array, x_s: jax.Array, dx_s: jax.Array
) -> jax.Array:
    """Continuous-time consistency training, shape [B, ...]: MeanFlow with the end fixed at data.

    With f(x, s) = x + (1 - s) v(s, 1, x) the residual equals df/ds along the sampled path, and the
    gradient of half its square is -(1 - s)^{-1} grad_theta (f . sg[df/ds]): the objective of Song
    et al., arXiv 2303.01469, and Lu & Song, arXiv 2410.11081, up to the weight.
    """
    return meanflow_residual(vfn, s, jnp.ones_like(s), x_s, dx_s)


def consistency_distillation_residual(
    vfn: VelocityFunction,
    s: jax.Array,
    x_s: jax.Array,
    *,
    teacher: VelocityFunction,
    step: float | None = None,
    constant: float | None = None,
) -> jax.Array:
    """Continuous-time consistency distillation, shape [B, ...]: the same along the teacher's field.

    df/ds is taken along dx = teacher(s, s, x_s). arXiv 2303.01469; arXiv 2410.11081. With a `step`
    and a `constant`, see `esd_residual`, it is the velocity matching of MDT-dist, arXiv 2509.04406.
    """
    return esd_residual(
        vfn, s, jnp.ones_like(s), x_s,
        teacher=teacher, stop_gradient='target', step=step, constant=constant,
    )  # fmt: skip


def consistency_trajectory_residual(
    vfn: VelocityFunction,
    s: jax.Array,
    u: jax.Array,
    t: jax.Array,
    x_s: jax.Array,
    x_u: jax.Array,
    *,
    target: VelocityFunction | None = None,
) -> jax.Array:
    """Consistency trajectory: X_{s,t}(x_s) - sg[X'_{u,t}(x_u)], s < u <= t, shape [B, ...].

    x_u is a teacher's solution at u from x_s at s; X' is the map of `target` (a moving average of
    the student; None is the student). u = t is plain regression of the teacher's step, t = 1 is
    discrete consistency distillation, u -> s divided by (u - s) the Eulerian residual.
    Kim et al., arXiv 2310.02279, the soft consistency loss before its map to data.
    """
    end = flow_map(target or vfn, u, t, x_u)
    return flow_map(vfn, s, t, x_s) - jax.lax.stop_gradient(end)


def shortcut_residual(
    vfn: VelocityFunction, s: jax.Array, t: jax.Array, x_s: jax.Array, *, smallest: float = 1 / 128
) -> jax.Array:
    """Shortcut models: v(s, t, x) - sg[mean of the velocities of two half jumps], shape [B, ...].

    The midpoint residual on dyadic times (`sample_dyadic`), except that a half jump no longer than
    `smallest` is read from the diagonal, where flow matching has trained the network.
    Frans et al., arXiv 2410.12557, self-consistency targets, step size d = (t - s) / 2.
    """

    def half_jump(start, stop, x):
        # The slack absorbs rounding: dyadic times are exact, but any times are accepted.
        return vfn(start, jnp.where(stop - start <= 1.001 * smallest, start, stop), x)

    return psd_residual(vfn, s, t, x_s, 0.5, teacher=half_jump)


def align_your_flow_residual(
    vfn: VelocityFunction,
    s: jax.Array,
    t: jax.Array,
    x_s: jax.Array,
    *,
    teacher: VelocityFunction,
    kind: Literal['eulerian', 'lagrangian'] = 'eulerian',
) -> jax.Array:
    """Align Your Flow: the Eulerian or Lagrangian residual with a frozen teacher, shape [B, ...].

    Only the prediction v(s, t, x_s) carries gradient. Sabour, Fidler, Kreis, arXiv 2506.14603,
    AYF-EMD and AYF-LMD, without their tangent normalisation and weights.
    """
    if kind not in ('eulerian', 'lagrangian'):
        raise ValueError(f"kind={kind!r}, expected 'eulerian' or 'lagrangian'.")
    residual = esd_residual if kind == 'eulerian' else lsd_residual
    return residual(vfn, s, t, x_s, teacher=teacher, stop_gradient='target')


def progressive_residual(
    vfn: VelocityFunction, s: jax.Array, t: jax.Array, x_s: jax.Array, *, teacher: VelocityFunction
) -> jax.Array:
    """Progressive distillation: one student step against two of the frozen teacher, [B, ...].

    The midpoint residual with a frozen teacher. A one-time flow b(t, x) enters as
    `lambda s, t, x: b(s, x)`: on the linear path its Euler step is the DDIM step of the paper.
    Salimans & Ho, arXiv 2202.00512, algorithm 2, as a velocity residual.
    """
    return psd_residual(vfn, s, t, x_s, 0.5, teacher=teacher)


def sample_dyadic(key: jax.Array, n: int, *, levels: int = 7) -> tuple[jax.Array, jax.Array]:
    """Aligned dyadic times (s, t), each [n]: t - s = 2^-k, k uniform on 0..levels-1, s = i 2^-k.

    The halves of the shortest jump are 2^-levels long: 7 levels give the 1/128 of arXiv 2410.12557.
    """
    level_key, place_key = jax.random.split(key)
    count = 2.0 ** jax.random.randint(level_key, (n,), 0, levels)
    index = jnp.floor(jax.random.uniform(place_key, (n,)) * count)
    return index / count, (index + 1.0) / count


def sampled_velocity(dx: jax.Array) -> VelocityFunction:
    """The velocity of a sampled path, dx [B, ...], in the place of a velocity function."""
    return lambda s, t, x: jnp.broadcast_to(dx, x.shape)
