"""Sokoban (`kd.data.builders.sokoban`) as an environment in the words of a chat, and its rewards.

Every turn the policy is shown the board, by the user, and answers with one token, an action:

    <|im_end|>            closes what stands before: the system's rules, or an action
    <|im_start|>user
    ######                36 signs and the ends of five lines, a token each
    #_.$_#
    ...
    <|im_start|>assistant
    R
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kd.context import Context
from kd.data.builders import sokoban as world
from kd.data.builders.push import collapsed
from kd.errors import UserError
from kd.method import Batch
from kd.ranges import Count, Size
from kd.rewards.reward import Reward, Summary
from kd.sampling.environment import Environment
from kd.text.tokenizer import Tokenizer

# Ids of U, R, D, L in the vocabularies of Qwen2, 2.5 and 3.
ACTIONS = (52, 49, 35, 43)
FIELDS = ('agent', 'boxes', 'walls', 'goals')
BEFORE = '<|im_end|>\n<|im_start|>user\n'
AFTER = '<|im_end|>\n<|im_start|>assistant\n'
# Turns of pushes that a summary names, and what it says around them.
RUNS = 8
SAYS = '\nAn earlier try {} by pushing (U, R, D, L, each run once): '


@dataclasses.dataclass(frozen=True)
class Words:
    """Tokens of what an environment says; all 0 where there is no tokenizer, and shapes count."""

    tokenizer: Tokenizer | None

    def of(self, text: str, count: int = 0) -> np.ndarray:
        """int32 [n] of a text; `count` of them where there is no tokenizer."""
        if self.tokenizer is None:
            return np.zeros(count or len(text), np.int32)
        return np.asarray(self.tokenizer.encode(text, special=True, begin=False), np.int32)

    def signs(self, signs: str) -> np.ndarray:
        """The one token of each sign.

        Raises:
          UserError: a sign of several tokens.
        """
        found = [self.of(sign) for sign in signs]
        if any(len(ids) != 1 for ids in found):
            raise UserError(f'sokoban is written in single tokens, and {signs!r} has more.')
        return np.concatenate(found)


def environment(
    context: Context,
    *,
    actions: tuple[Size, Size, Size, Size] = ACTIONS,
    horizon: Count = world.HORIZON,
    before: str = BEFORE,
    after: str = AFTER,
) -> Environment:
    """Levels that are played turn by turn; over when both boxes lie on goals.

    Args:
      context: the stage; data of `kd.data.text.sokoban`.
      actions: ids of up, right, down and left, those that `only` may be said.
      horizon: turns at most.
      before, after: what stands around a board.

    Raises:
      UserError: data without levels, or other ids than those of U, R, D and L.
    """
    words = _words(context, actions)
    ends = words.of(before), words.of(after)
    signs, line = words.signs(''.join(world.SIGNS)), words.signs('\n')

    def observe(at: world.Position) -> jax.Array:
        cells = jnp.asarray(signs)[world.board(at)].reshape(-1, world.SIDE, world.SIDE)
        rows = len(cells)
        lines = jnp.concatenate([cells, jnp.broadcast_to(line, (rows, world.SIDE, 1))], axis=2)
        ahead, behind = (jnp.broadcast_to(x, (rows, len(x))) for x in ends)
        # The last line has no end of its own.
        return jnp.concatenate([ahead, lines.reshape(rows, -1)[:, :-1], behind], 1).astype(
            jnp.int32
        )

    return Environment(
        horizon=horizon,
        start=position,
        observe=observe,
        act=lambda at, said, mask: world.moved(at, acted(said[:, -1], mask[:, -1], actions)),
        over=lambda at: world.at_goals(at) == world.BOXES,
    )


def sokoban(
    context: Context,
    *,
    of: Literal['success', 'completion'] = 'success',
    actions: tuple[Size, Size, Size, Size] = ACTIONS,
    horizon: Count = world.HORIZON,
) -> Reward:
    """1 for an episode that solved its level, else 0; its actions are played again.

    Args:
      context: the stage; data of `kd.data.text.sokoban`.
      of: 'completion' for the largest share of boxes that lay on goals at a time.
      actions, horizon: as of `environment`.

    Raises:
      UserError: see `environment`.
    """
    _words(context, actions)

    def reward(tokens: jax.Array, mask: jax.Array, batch: Batch) -> jax.Array:
        lying = played(batch, tokens, mask, actions, horizon)[1].max(1)
        if of == 'completion':
            return lying / world.BOXES
        return (lying == world.BOXES).astype(jnp.float32)

    return reward


def summary(
    context: Context,
    *,
    actions: tuple[Size, Size, Size, Size] = ACTIONS,
    horizon: Count = world.HORIZON,
) -> Summary:
    """Whether an episode solved its level, and the directions of its pushes, each run once.

    The best of several is the one that brought most boxes to goals, and of these the shortest. It
    stands in the place of what the paper has a large language model write.

    Args:
      context, actions, horizon: as of `sokoban`.
    """
    words = _words(context, actions)
    says = [words.of(SAYS.format(how), 24) for how in ('succeeded', 'failed')]
    if len(says[0]) != len(says[1]):
        width = max(map(len, says))
        # The shorter one begins with ends of lines.
        says = [np.pad(x, (width - len(x), 0), constant_values=words.signs('\n')[0]) for x in says]
    none = words.signs('_')[0]

    def of(batch: Batch) -> tuple[jax.Array, jax.Array]:
        action, lying, pushed = played(batch, batch['tokens'], batch['mask'], actions, horizon)
        runs = collapsed(action, pushed, RUNS)
        letters = jnp.where(runs < 0, none, jnp.asarray(actions)[jnp.maximum(runs, 0)])
        won = lying.max(1) == world.BOXES
        ahead = jnp.where(won[:, None], says[0], says[1])
        score = lying.max(1) - 1e-3 * (action >= 0).sum(1)
        return jnp.concatenate([ahead, letters], 1).astype(jnp.int32), score

    return Summary(len(says[0]) + RUNS, of)


def position(batch: Mapping[str, jax.Array]) -> world.Position:
    """Where the levels of a batch begin."""
    return world.Position(*(batch[name] for name in FIELDS))


def acted(token: jax.Array, mask: jax.Array, actions: tuple[int, ...]) -> jax.Array:
    """The action 0 .. 3 that a token is; -1 where it is none, or not there: int32 [...]."""
    same = token[..., None] == jnp.asarray(actions)
    return jnp.where(mask & same.any(-1), same.argmax(-1), -1).astype(jnp.int32)


def played(
    batch: Batch, tokens: jax.Array, mask: jax.Array, actions: tuple[int, ...], horizon: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Actions int32 [B, H], boxes on goals int32 [B, H + 1], and which actions pushed, bool [B, H].

    The last slot of every turn is the policy's.
    """
    rows = len(tokens)
    said, there = (x.reshape(rows, horizon, -1)[..., -1] for x in (tokens, mask))
    action = acted(said, there, actions)
    first = position(batch)

    def one(at, action):
        new = world.moved(at, jnp.where(world.at_goals(at) == world.BOXES, -1, action))
        return new, (world.at_goals(new), (new.boxes != at.boxes).any(1))

    _, (lying, pushed) = jax.lax.scan(one, first, action.T)
    return action, jnp.concatenate([world.at_goals(first)[None], lying]).T, pushed.T


def _words(context: Context, actions: tuple[int, ...]) -> Words:
    """Raises `UserError` for data without levels or other actions than the tokenizer's."""
    missing = [name for name in FIELDS if name not in context.spec]
    if missing:
        raise UserError(
            f"{context.stage}: levels of sokoban have '{missing[0]}', and the data have only "
            f'{", ".join(context.spec)}; kd.data.text.sokoban brings it.'
        )
    words = Words(getattr(context.source('train'), 'tokenizer', None))
    own = tuple(int(x) for x in words.signs('URDL'))
    if words.tokenizer is not None and own != tuple(actions):
        raise UserError(
            f'{context.stage}: U, R, D, L are the tokens {own} of {words.tokenizer.name}, and '
            f'actions are {tuple(actions)}; give these to sampling.only, environment and rewards.'
        )
    return words
