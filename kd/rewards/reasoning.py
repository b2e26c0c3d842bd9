"""Answers to problems of `reasoning-gym`, judged by the task that made them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd import packages
from kd.context import Context
from kd.data.builders import gym
from kd.errors import UserError
from kd.method import Batch
from kd.ranges import Count, Positive, Seed
from kd.rewards.host import Question, host
from kd.rewards.reward import Reward
from kd.text.tokenizer import Tokenizer


def reasoning_gym(
    context: Context,
    *,
    task: str,
    levels: Sequence[Mapping[str, Any]] = (),
    problems: Seed = 0,
    partial: bool = False,
    limit: Positive = 10.0,
    workers: Count = 4,
) -> Reward:
    """1 for an answer to which the task gives all there is, else 0.

    What stands last between <answer> and </answer> is the answer, or all of it. One that has come
    to no end (`truncated`) is wrong, whatever it says.

    Args:
      context: the stage; data of `kd.data.reasoning.reasoning_gym`.
      task, levels, problems: as of the data.
      partial: what the task gives for a part of the answer, as it is.
      limit, workers: see `kd.rewards.host.host`. A process makes each problem again.

    Raises:
      UserError: data without `number`; `reasoning-gym` is not installed.
    """
    if 'number' not in context.spec:
        raise UserError(
            f"{context.stage}: the reward needs to know problems by 'number', as the data of "
            'kd.data.reasoning.reasoning_gym have it.'
        )
    # None where the data are only described.
    taken: Tokenizer | None = getattr(context.source('train'), 'tokenizer', None)
    kind = gym.levels_of(levels)
    if taken is not None:
        packages.need('reasoning_gym', extra='gym')

    def encode(tokens: np.ndarray, row: Mapping[str, np.ndarray]) -> Question:
        assert taken is not None
        return (taken.decode(tokens), task, kind, problems, int(row['number'])), {}

    judge = host(
        'kd.data.builders.gym.score', fields=('number',), encode=encode, mesh=context.mesh,
        limit=limit, workers=workers,
    )  # fmt: skip

    def reward(tokens: jax.Array, mask: jax.Array, batch: Batch) -> jax.Array:
        cut = batch.get('truncated', jnp.zeros(tokens.shape[0], bool))
        found = judge(tokens, mask & ~cut[:, None], batch)
        # NaN, for no verdict, stays what it is.
        return found if partial else jnp.where(found < 1, 0.0, found)

    return reward
