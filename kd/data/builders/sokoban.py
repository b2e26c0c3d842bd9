"""Sokoban of our own: two boxes on 6 x 6 cells with walls, levels drawn at random and solved.

A level is walls (all of the border, and some inside), two goals, two boxes and an agent. Actions
U, R, D and L move the agent by a cell and push a box that stands there, unless a wall or another
box is behind it; what cannot be does nothing. Solved when both boxes lie on goals. Levels of a
split are ordered by the length of their shortest solution.

`kd.data.text.sokoban` puts them into words, `kd.rewards.sokoban` plays them.
"""

from __future__ import annotations

import functools
from collections import deque
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.data import sources

SIDE, CELLS, BOXES, HORIZON = 6, 36, 2, 40
# Up, right, down, left.
MOVES = (-SIDE, 1, SIDE, -1)
# Levels of each split, and the seed that draws them.
SPLITS = {'train': (96, 21), 'test': (64, 22), 'validation': (64, 23)}
# Actions of the shortest solution, and how likely a cell inside is a wall.
SHORTEST, LONGEST, WALL = 2, 20, 0.15
# What a cell holds, in this order: see `board`.
SIGNS = ('#', '_', '.', '$', '*', '@', '+')


class Levels(NamedTuple):
    """Arrays of N levels; cells are 0 .. 35, row by row.

    Attributes:
      walls, goals: bool [N, 36].
      boxes: int32 [N, 2].
      agent: int32 [N].
      plan: int32 [N, 20], a shortest solution in actions 0 .. 3, -1 after its end.
    """

    walls: np.ndarray
    goals: np.ndarray
    boxes: np.ndarray
    agent: np.ndarray
    plan: np.ndarray


@functools.cache
def levels(split: str) -> Levels:
    """The levels of a split of `SPLITS`; no level is in two of them.

    Raises:
      DataError: an unknown split.
    """
    if split not in SPLITS:
        raise sources.DataError(f'sokoban has the splits {list(SPLITS)}, not {split!r}')
    taken: set[bytes] = set()
    for name, (size, seed) in SPLITS.items():
        found = drawn(np.random.default_rng(seed), size, taken)
        if name == split:
            break
    return found


def drawn(rng: np.random.Generator, size: int, taken: set[bytes] | None = None) -> Levels:
    """So many different levels, none of `taken`, which these join; the shortest ones first."""
    taken = set() if taken is None else taken
    found: list[tuple] = []
    border = np.ones((SIDE, SIDE), bool)
    border[1:-1, 1:-1] = False
    while len(found) < size:
        walls = border.reshape(-1) | (rng.random(CELLS) < WALL)
        free = rng.permutation(np.flatnonzero(~walls))
        if len(free) < 2 * BOXES + 1:
            continue
        goals = np.isin(np.arange(CELLS), free[:BOXES])
        boxes, agent = np.sort(free[BOXES : 2 * BOXES]), free[2 * BOXES]
        code = np.concatenate([walls, goals, boxes, [agent]]).astype(np.int32).tobytes()
        plan = None if code in taken else solution(walls, goals, boxes, int(agent))
        if plan is not None and len(plan) >= SHORTEST:
            taken.add(code)
            padded = np.pad(plan, (0, LONGEST - len(plan)), constant_values=-1)
            found.append((walls, goals, boxes, agent, padded))
    found.sort(key=lambda level: int((level[-1] >= 0).sum()))
    walls, goals, boxes, agents, plans = (np.stack(x) for x in zip(*found, strict=True))
    return Levels(walls, goals, *(x.astype(np.int32) for x in (boxes, agents, plans)))


def solution(
    walls: np.ndarray, goals: np.ndarray, boxes: np.ndarray, agent: int, longest: int = LONGEST
) -> list[int] | None:
    """A shortest solution by breadth-first search; None if there is none of at most `longest`."""
    blocked, wanted = walls.tolist(), frozenset(np.flatnonzero(goals).tolist())
    start = agent, frozenset(boxes.tolist())
    came: dict[tuple, tuple] = {start: ()}
    queue = deque([start])
    while queue:
        state = queue.popleft()
        agent, lying = state
        if lying == wanted:
            return list(came[state])
        if len(came[state]) == longest:
            return None
        for action, move in enumerate(MOVES):
            to, beyond = agent + move, agent + 2 * move
            if blocked[to] or (to in lying and (blocked[beyond] or beyond in lying)):
                continue
            new = to, (lying - {to}) | {beyond} if to in lying else lying
            if new not in came:
                came[new] = (*came[state], action)
                queue.append(new)
    return None


# Play


class Position(NamedTuple):
    """Of B levels: agent int32 [B], boxes int32 [B, 2], and their walls and goals bool [B, 36]."""

    agent: jax.Array
    boxes: jax.Array
    walls: jax.Array
    goals: jax.Array


def moved(at: Position, action: jax.Array) -> Position:
    """The position after actions int [B] of 0 .. 3; -1 does nothing."""
    move = jnp.asarray(MOVES)[jnp.maximum(action, 0)]
    to = at.agent + move
    # The border keeps `to` on the board; what is behind a box there is never looked at.
    beyond = jnp.clip(to + move, 0, CELLS - 1)

    def wall(cell):
        return jnp.take_along_axis(at.walls, cell[:, None], axis=1)[:, 0]

    pushed = at.boxes == to[:, None]
    stuck = wall(beyond) | (at.boxes == beyond[:, None]).any(1)
    goes = (action >= 0) & ~wall(to) & ~(pushed.any(1) & stuck)
    boxes = jnp.where(goes[:, None] & pushed, beyond[:, None], at.boxes)
    return at._replace(agent=jnp.where(goes, to, at.agent), boxes=boxes)


def at_goals(at: Position) -> jax.Array:
    """How many boxes lie on goals, int32 [B]."""
    return jnp.take_along_axis(at.goals, at.boxes, axis=1).sum(1)


def board(at: Position) -> jax.Array:
    """What every cell holds, int32 [B, 36]: places in `SIGNS`, of wall, floor, goal, box, box on a
    goal, agent, agent on a goal."""
    cells = jnp.arange(CELLS)
    agent = cells == at.agent[:, None]
    box = (cells == at.boxes[..., None]).any(1)
    thing = jnp.where(agent, 5, jnp.where(box, 3, 1))
    return jnp.where(at.walls, 0, thing + at.goals)
