"""Backward simulation: the state at which a generator of several steps is asked, made by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd.losses.schedule import Schedule
from kd.sampling import diffusion


class Rollout(NamedTuple):
    """What one call with gradient came from, and what it said.

    Attributes:
      input: what the generator was asked about, [B, ...], a constant.
      time: [B].
      x: what it said, [B, ...], with gradient.
    """

    input: jax.Array
    time: jax.Array
    x: jax.Array


def rollout(
    schedule: Schedule,
    denoise: diffusion.Denoise,
    times: Sequence[float],
    z: jax.Array,
    key: jax.Array,
    exit: jax.Array,
    *,
    step: diffusion.Step | None = None,
    call: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
) -> Rollout:
    """Runs a generator without gradient to one of its times, and asks it there with gradient.

    One program for all exits, and as many calls as an exit needs: a loop of a length that is known
    when it runs, and the one call after it.

    Args:
      schedule: of the generator.
      denoise: the generator, `(x_t, t [B]) -> x0`.
      times: its own, [N], decreasing.
      z: noise at the first time, [B, ...].
      key: of fresh noise.
      exit: int32, one for the batch; 0 asks at z itself.
      step: `restart()` if None.
      call: the generator of the one call with gradient, where it is not `denoise`.

    Source: DMD2, arXiv:2405.14867, section 4.5.
    """
    step = step or diffusion.restart()
    grid = jnp.asarray(times, jnp.promote_types(z.dtype, jnp.float32))

    def body(i, x):
        moved, _ = step.move(
            schedule, denoise, x, grid[i], grid[i + 1], jax.random.fold_in(key, i), ()
        )
        return moved.astype(x.dtype)

    # Its length is not known before, so there is no gradient through it.
    x = z if len(times) == 1 else jax.lax.fori_loop(0, exit, body, z)
    x = jax.lax.stop_gradient(x)
    time = jnp.broadcast_to(grid[exit], x.shape[:1])
    return Rollout(x, time, (call or denoise)(x, time))
