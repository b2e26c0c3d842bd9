"""Rewards that err, to see what false verdicts do to a policy that learns from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd import config as config_lib
from kd.context import Context
from kd.errors import UserError
from kd.method import Batch
from kd.ranges import Fraction
from kd.rewards.reward import KEYS, Reward


def mistaken(
    rewards: jax.Array,
    keys: jax.Array,
    false_positives: ArrayLike = 0.0,
    false_negatives: ArrayLike = 0.0,
) -> jax.Array:
    """R' = 1 - R with the probability of a mistake, else R.

        E[R'] = false_positives + (1 - false_positives - false_negatives) R

    At an equal rate e of both, differences of rewards shrink to 1 - 2 e in expectation.

    Args:
      rewards: float32 [B], verdicts 0 and 1; one of .5 or more is a 1. NaN, no verdict, stays.
      keys: [B], one for each answer: mistakes are independent.
      false_positives, false_negatives: probabilities of a 1 for a 0 and of a 0 for a 1; numbers, or
        [B] of each answer.

    Source: AceReason-Nemotron, arXiv 2505.16400, which tries both kinds on rewards of code.
    """
    rate = jnp.where(rewards >= 0.5, false_negatives, false_positives)
    drawn = jax.vmap(jax.random.uniform)(keys)
    return jnp.where(drawn < rate, 1 - rewards, rewards)


def noisy(
    context: Context,
    *,
    reward: Mapping[str, Any],
    false_positives: Fraction | str = 0.0,
    false_negatives: Fraction | str = 0.0,
) -> Reward:
    """Another reward with mistakes, drawn anew for every answer: see `mistaken`.

    For the method alone: evaluators and writers judge by the reward itself.

    Args:
      context: the stage.
      reward: block of the reward.
      false_positives, false_negatives: probabilities, or fields of the batch, float [B], that have
        those of each problem.

    Raises:
      UserError: asked by other than a method; data without the field.
    """
    exact = config_lib.build(reward, context, where=f'{context.stage}.reward')
    rates = {'false_positives': false_positives, 'false_negatives': false_negatives}
    for argument, rate in rates.items():
        if isinstance(rate, str) and rate not in context.spec:
            raise UserError(
                f"{context.stage}: {argument}='{rate}' is no field of the data, which have only "
                f'{", ".join(context.spec)}.'
            )

    def judge(tokens: jax.Array, mask: jax.Array, batch: Batch) -> jax.Array:
        if KEYS not in batch:
            raise UserError('a noisy reward is for methods to learn from; judge by an exact one.')
        each = {
            name: batch[rate] if isinstance(rate, str) else rate for name, rate in rates.items()
        }
        return mistaken(exact(tokens, mask, batch), batch[KEYS], **each)

    return judge
