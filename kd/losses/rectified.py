"""What rectified flows are distilled with, beyond the flow itself. Time 0 is noise and 1 data."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses.flow_map import VelocityFunction
from kd.losses.interpolant import expand_times

__all__ = ['two_step_target', 'vp_mix']


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
