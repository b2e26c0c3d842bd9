"""What rectified flows are distilled with, beyond the flow itself. Time 0 is noise and 1 data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses.flow_map import VelocityFunction
from kd.losses.interpolant import expand_times

__all__ = ['rk2_slope', 'start_slope_target', 'two_step_target', 'vp_mix']


def vp_mix(x: jax.Array, noise: jax.Array, share: ArrayLike) -> jax.Array:
    """sqrt(1 - b^2) x + b noise, [B, ...], b = `share`, a number or [B].

    Of two independent unit Gaussians it is one too, for every b: x itself for 0, bit for bit.

    Source: SlimFlow, arXiv 2407.12718, annealing reflow.
    """
    b = expand_times(jnp.asarray(share, x.dtype), x)
    return jnp.sqrt(1 - b * b) * x + b * noise


def two_step_target(
    first: jax.Array, teacher: VelocityFunction, x0: jax.Array, t: jax.Array
) -> jax.Array:
    """x0 + t a + (1 - t) b(t, x0 + t a), [B, ...], a constant: two Euler steps from noise.

    Args:
      first: a, the velocity of the first step, [B, ...]: the student's own, or the teacher's.
      teacher: b, read on its diagonal.
      x0: noise, [B, ...].
      t: where the second step begins, [B].

    Source: SlimFlow, arXiv 2407.12718, flow-guided distillation.
    """
    far = expand_times(t, x0)
    middle = x0 + far * first
    return jax.lax.stop_gradient(middle + (1 - far) * teacher(t, t, middle))


def rk2_slope(
    field: VelocityFunction, x: jax.Array, t: jax.Array, dt: ArrayLike, ratio: float = 0.5
) -> jax.Array:
    """The slope of one step of dt from x at t, [B, ...]: of Euler, or of two stages.

        (1 - 1 / (2 r)) k1 + 1 / (2 r) k2,   k1 = b(t, x),   k2 = b(t + r dt, x + r dt k1)

    r = `ratio`, 1/2 is the midpoint, 2/3 Ralston's, 1 Heun's; 0 is k1, Euler's. The error of a step
    is O(dt^3), Euler's O(dt^2). Nothing is stopped.

    Args:
      field: b, read on its diagonal.
      x: [B, ...].
      t: [B].
      dt: [B] or a number.
      ratio: 0, or up to 1.

    Source: OFTSR, arXiv 2412.09465.
    """
    first = field(t, t, x)
    if not ratio:
        return first
    then = t + ratio * dt
    second = field(then, then, x + expand_times(ratio * jnp.asarray(dt, x.dtype), x) * first)
    weight = 1 / (2 * ratio)
    return (1 - weight) * first + weight * second


def start_slope_target(
    velocity: jax.Array, slope: jax.Array, t: jax.Array, dt: ArrayLike
) -> jax.Array:
    """v_t + dt / (t + dt) (slope - v_t), [B, ...], a constant.

    What a velocity from the start, x_t = x_0 + t v_t, is at t + dt if the path goes on from x_t
    with this slope: (t + dt) target = t v_t + dt slope.

    Args:
      velocity: v_t, [B, ...].
      slope: [B, ...].
      t: [B].
      dt: [B] or a number, above 0 where t is 0.

    Source: OFTSR, arXiv 2412.09465, distillation loss; as dt goes to 0, (t + dt) / dt times its
    residual is the Lagrangian one of `kd.losses.flow_map` from 0 to t.
    """
    share = expand_times(jnp.asarray(dt / (t + dt), velocity.dtype), velocity)
    return jax.lax.stop_gradient(velocity + share * (slope - velocity))
