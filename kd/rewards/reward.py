"""What a reward is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd.method import Batch


class Summary(NamedTuple):
    """What an episode or answer teaches those who try the same task again, in tokens.

    Attributes:
      length: L, tokens of a summary.
      of: `of(batch) -> (tokens int32 [B, L], score float32 [B])` of answers (`tokens`, `mask`
        [B, R]) and the fields of their prompts; the best of a group has the highest score.
    """

    length: int
    of: Callable[[Batch], tuple[jax.Array, jax.Array]]


# (tokens int32 [B, R], mask bool [B, R], batch) -> float32 [B], NaN where there is no verdict.
Reward = Callable[[jax.Array, jax.Array, Batch], jax.Array]
# Field of the batch in which methods have a key for each answer, for rewards that draw.
KEYS = 'reward_keys'


def judged(rewards: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Rewards float32 [B] with 0 for those that are not finite, and which these are, bool [B]: that
    is no verdict."""
    failed = ~jnp.isfinite(rewards)
    return jnp.where(failed, 0.0, rewards).astype(jnp.float32), failed
