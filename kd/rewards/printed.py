"""Rewards of the small worlds, whose answers are verified inside the compiled step."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.builders import chain
from kd.errors import UserError
from kd.method import Batch
from kd.rewards.reward import Reward


def printed(context: Context, *, field: str = 'printed') -> Reward:
    """1 for an answer that prints what it has to and ends, else 0: `kd.data.builders.chain.passes`.

    Args:
      context: the stage.
      field: of the batch, int [B, n] or [B, S, n], the tokens to be printed.

    Raises:
      UserError: data without the field.
    """
    if field not in context.spec:
        raise UserError(
            f"{context.stage}: the reward goes by '{field}', and the data have only "
            f'{", ".join(context.spec)}; kd.data.chains.chains brings it.'
        )

    def reward(tokens: jax.Array, mask: jax.Array, batch: Batch) -> jax.Array:
        return chain.passes(tokens, mask, batch[field]).astype(jnp.float32)

    return reward
