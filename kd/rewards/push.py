"""The world of pushed boxes (`kd.data.builders.push`) as an environment, and what it rewards."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.builders import push as world
from kd.errors import UserError
from kd.method import Batch
from kd.ranges import Count
from kd.rewards.reward import Reward, Summary
from kd.sampling.environment import Environment

FIELDS = ('agent', 'box', 'goal')


def environment(context: Context, *, horizon: Count = world.HORIZON) -> Environment:
    """Levels that are played turn by turn; over when the box lies on the goal.

    Args:
      context: the stage; data of `kd.data.push.push`.
      horizon: turns at most.

    Raises:
      UserError: data without levels.
    """
    _needed(context)
    after = world.table()

    def start(batch):
        return tuple(batch[name] for name in FIELDS)

    def act(state, said, mask):
        agent, box, goal = state
        action = world.acted(said[:, -1], mask[:, -1])
        moved = jnp.asarray(after)[agent, box, jnp.maximum(action, 0)]
        acts = action >= 0
        return jnp.where(acts, moved[:, 0], agent), jnp.where(acts, moved[:, 1], box), goal

    return Environment(
        horizon=horizon,
        start=start,
        observe=lambda state: world.observed(state[0], state[1]),
        act=act,
        over=lambda state: state[1] == state[2],
    )


def push(context: Context, *, of: Literal['success', 'completion'] = 'success') -> Reward:
    """1 for an episode whose box came to lie on the goal, else 0; its actions are played again.

    Args:
      context: the stage; data of `kd.data.push.push`.
      of: 'completion' for how far the box came at best, see `kd.data.builders.push.completion`.

    Raises:
      UserError: data without levels.
    """
    _needed(context)

    def reward(tokens: jax.Array, mask: jax.Array, batch: Batch) -> jax.Array:
        goal = batch['goal']
        box = played(tokens, mask, batch)[1]
        if of == 'completion':
            return world.completion(goal, box)
        return (box == goal[:, None]).any(1).astype(jnp.float32)

    return reward


def summary(context: Context) -> Summary:
    """What an episode teaches, see `kd.data.builders.push.skill`; the best is the one whose box
    came nearest to the goal, and of these the shortest.

    Args:
      context: the stage; data of `kd.data.push.push`.

    Raises:
      UserError: data without levels.
    """
    _needed(context)

    def of(batch: Batch) -> tuple[jax.Array, jax.Array]:
        action, box = played(batch['tokens'], batch['mask'], batch)
        # Two completions of a level are further apart than any two lengths.
        score = world.completion(batch['goal'], box) - 1e-3 * (action >= 0).sum(1)
        return world.skill(batch['goal'], box, action), score

    return Summary(world.BLOCK, of)


def played(tokens: jax.Array, mask: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Actions int32 [B, H] and boxes [B, H + 1] of episodes."""
    action = world.actions_of(tokens, mask)
    return action, world.replay(batch['agent'], batch['box'], batch['goal'], action)[1]


def _needed(context: Context) -> None:
    missing = [name for name in FIELDS if name not in context.spec]
    if missing:
        raise UserError(
            f"{context.stage}: levels of push have '{missing[0]}', and the data have only "
            f'{", ".join(context.spec)}; kd.data.push.push brings it.'
        )
