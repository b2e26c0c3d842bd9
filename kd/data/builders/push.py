"""Boxes pushed to their goals on a grid of 5 x 5: states, optima, demonstrators and texts.

An agent, a box and a goal lie on three cells. An action U, R, D or L moves the agent by one, and
the box with it if it stands there; what would leave the grid, or push the box out of it, does
nothing. The level is won when the box lies on the goal. A box in a corner stays there for good, one
at an edge stays at that edge.

    BOS PUSH goal [block of 7]   OBS agent box U   OBS agent box R   ...

Every turn the environment says three tokens and the policy one, `kd.rewards.push` plays it. Blocks
tell of an episode (`skill`) or of the best one (`told`).
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd.data import sources
from kd.data.builders import symbols

SIDE, CELLS, HORIZON, BLOCK = 5, 25, 12, 7
ACTIONS = (symbols.UP, symbols.RIGHT, symbols.DOWN, symbols.LEFT)
# Tokens of a turn, of which the last is the policy's.
TURN = 4
# Optima of levels.
SHORTEST, LONGEST = 2, 10
# Further than any way is long.
FAR = 99
# Levels of each split, and the seed that draws them.
SPLITS = {'train': (96, 11), 'test': (64, 12), 'validation': (64, 13)}
# How often who demonstrates acts at random: while the next push of the best way goes up or left,
# and while it goes right or down.
CARELESS: dict[str, tuple[float, float]] = {
    'plain': (0.85, 0.30),
    'skill': (0.20, 0.15),
    'full': (0.35, 0.20),
    'moves': (0.45, 0.20),
    'hint': (0.55, 0.20),
    'expert': (0.0, 0.0),
}
Told = Literal['full', 'moves', 'hint']
Kind = Literal['plain', 'skill', 'full', 'moves', 'hint', 'expert']


class Levels(NamedTuple):
    """Cells 0 .. 24, row by row, int [N] each."""

    agent: np.ndarray
    box: np.ndarray
    goal: np.ndarray


class Ways(NamedTuple):
    """What there is to know of all states [goal, agent, box], int8 [25, 25, 25].

    Attributes:
      optimum: actions that the shortest way takes; `FAR` where there is none.
      action: its first action, 0 .. 3, the first in the order U, R, D, L.
      push: the direction of its next push, 0 .. 3; -1 where there is none.
      dead: bool [goal, box], no way leads from there, wherever the agent is.
    """

    optimum: np.ndarray
    action: np.ndarray
    push: np.ndarray
    dead: np.ndarray


@functools.cache
def table() -> np.ndarray:
    """(agent, box) after each action: int32 [agent, box, action, 2]."""
    made = np.zeros((CELLS, CELLS, 4, 2), np.int32)
    moves = ((-1, 0), (0, 1), (1, 0), (0, -1))

    def moved(cell, move):
        row, column = cell // SIDE + move[0], cell % SIDE + move[1]
        inside = 0 <= row < SIDE and 0 <= column < SIDE
        return row * SIDE + column if inside else None

    for agent, box, action in np.ndindex(CELLS, CELLS, 4):
        to = moved(agent, moves[action])
        pushed = moved(box, moves[action]) if to == box else box
        stays = to is None or pushed is None or agent == box
        made[agent, box, action] = (agent, box) if stays else (to, pushed)
    return made


@functools.cache
def ways() -> Ways:
    """Shortest ways from everywhere, found backwards from the goals, a step at a time."""
    goals, agents, boxes = np.ogrid[:CELLS, :CELLS, :CELLS]
    after = table()
    optimum = np.where(boxes == goals, 0, np.full((CELLS,) * 3, FAR))
    while True:
        further = 1 + optimum[:, after[..., 0], after[..., 1]]
        better = np.where(agents == boxes, FAR, np.minimum(optimum, further.min(-1)))
        better = np.where(boxes == goals, 0, np.minimum(better, FAR))
        if (better == optimum).all():
            break
        optimum = better
    action = further.argmin(-1)
    next_agent, next_box = np.moveaxis(after[agents, boxes, action], -1, 0)
    push = np.full_like(optimum, -1)
    for _ in range(int(optimum[optimum < FAR].max())):
        push = np.where(next_box != boxes, action, push[goals, next_agent, next_box])
    push = np.where((optimum > 0) & (optimum < FAR), push, -1)
    dead = optimum.min(1) == FAR
    return Ways(optimum.astype(np.int8), action.astype(np.int8), push.astype(np.int8), dead)


@functools.cache
def levels(split: str) -> Levels:
    """The levels of a split of `SPLITS`; no level is in two of them.

    Raises:
      DataError: an unknown split.
    """
    if split not in SPLITS:
        raise sources.DataError(f'push has the splits {list(SPLITS)}, not {split!r}')
    taken: set[int] = set()
    for name, (size, seed) in SPLITS.items():
        found = drawn(np.random.default_rng(seed), size, taken, distinct=True)
        if name == split:
            break
        taken |= set(code(found).tolist())
    return found


def code(levels: Levels) -> np.ndarray:
    """A number for each level, int [N]."""
    return (levels.goal * CELLS + levels.agent) * CELLS + levels.box


def drawn(rng: np.random.Generator, size: int, but: set[int], *, distinct: bool = False) -> Levels:
    """Levels drawn uniformly from those with an optimum of 2 to 10 whose `code` is not in `but`."""
    optimum = ways().optimum
    fits = (optimum >= SHORTEST) & (optimum <= LONGEST)
    goals, agents, boxes = np.ogrid[:CELLS, :CELLS, :CELLS]
    fits &= (goals != agents) & (agents != boxes) & ~_corner(boxes)
    fits.reshape(-1)[sorted(but)] = False
    chosen = rng.choice(np.flatnonzero(fits), size, replace=not distinct)
    goal, agent, box = np.unravel_index(chosen, fits.shape)
    return Levels(agent, box, goal)


def _corner(cells: np.ndarray) -> np.ndarray:
    return np.isin(cells, (0, SIDE - 1, CELLS - SIDE, CELLS - 1))


# Episodes


class Episode(NamedTuple):
    """States before and after H turns, and actions.

    Attributes:
      agent, box: int [N, H + 1].
      action: int [N, H], 0 .. 3; -1 after the end.
    """

    agent: np.ndarray
    box: np.ndarray
    action: np.ndarray


def demonstrated(rng: np.random.Generator, levels: Levels, kind: str = 'plain') -> Episode:
    """Episodes of one who takes the best action, but acts at random as `CARELESS` has it."""
    known, after = ways(), table()
    weak, strong = CARELESS[kind]
    agent, box = levels.agent, levels.box
    agents, boxes, actions = [agent], [box], []
    for _ in range(HORIZON):
        state = levels.goal, agent, box
        push = known.push[state]
        careless = np.where((push == 0) | (push == 3), weak, strong)
        # Where nothing leads to the goal any more, anything is as good.
        lost = rng.random(len(agent)) < np.where(push < 0, 1.0, careless)
        action = np.where(lost, rng.integers(4, size=len(agent)), known.action[state])
        over = box == levels.goal
        agent, box = (
            np.where(over, old, new)
            for old, new in zip((agent, box), after[agent, box, action].T, strict=True)
        )
        agents.append(agent)
        boxes.append(box)
        actions.append(np.where(over, -1, action))
    return Episode(*(np.stack(x, 1) for x in (agents, boxes, actions)))


def replay(
    agent: ArrayLike, box: ArrayLike, goal: ArrayLike, action: ArrayLike
) -> tuple[jax.Array, jax.Array]:
    """(agent, box) int32 [B, H + 1] each, of levels [B] and actions [B, H]; -1 does nothing, and
    neither does anything after the goal is reached."""
    after, goal = jnp.asarray(table()), jnp.asarray(goal)

    def one(state, action):
        agent, box = state
        stays = (action < 0) | (box == goal)
        moved = after[agent, box, jnp.maximum(action, 0)]
        new = jnp.where(stays, agent, moved[:, 0]), jnp.where(stays, box, moved[:, 1])
        return new, new

    first = jnp.asarray(agent, jnp.int32), jnp.asarray(box, jnp.int32)
    _, later = jax.lax.scan(one, first, jnp.asarray(action).T)
    agents, boxes = (
        jnp.concatenate([x[None], rest]).T for x, rest in zip(first, later, strict=True)
    )
    return agents, boxes


def acted(token: jax.Array, mask: jax.Array) -> jax.Array:
    """The action 0 .. 3 that a token is; -1 where it is none, or not there: int32 [...]."""
    action = token - ACTIONS[0]
    return jnp.where(mask & (action >= 0) & (action < 4), action, -1)


def actions_of(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Actions 0 .. 3 of episodes in tokens [B, 4 H]; -1 where there is none: int32 [B, H]."""
    return acted(*(x.reshape(x.shape[0], -1, TURN)[..., -1] for x in (tokens, mask)))


def completion(goal: ArrayLike, box: ArrayLike) -> jax.Array:
    """1 - min_t |b_t - g|_1 / |b_0 - g|_1, of boxes [B, H + 1]: float32 [B] in [0, 1]."""
    goal, box = jnp.asarray(goal), jnp.asarray(box)
    goal = goal[:, None]
    apart = jnp.abs(box // SIDE - goal // SIDE) + jnp.abs(box % SIDE - goal % SIDE)
    return jnp.clip(1 - apart.min(1) / apart[:, 0], 0, 1)


# Text


def skill(goal: ArrayLike, box: ArrayLike, action: ArrayLike) -> jax.Array:
    """What an episode teaches: `SKILL flag w1 w2 w3 w4 bad`, int32 [B, 7].

    The flag is OK or FAIL; w are the directions of pushes, each run of equal ones once, NONE after
    the last; bad is the cell from which there was first no way for the box, NONE if there was none.

    Args:
      goal: [B].
      box: [B, H + 1].
      action: [B, H].
    """
    goal, box, action = (jnp.asarray(x) for x in (goal, box, action))
    # A push goes where the box does.
    runs = collapsed(action, box[:, 1:] != box[:, :-1], 4)
    marks = jnp.where(runs < 0, symbols.NONE, symbols.PUSHED_UP + runs)
    dead = jnp.asarray(ways().dead)[goal[:, None], box]
    cell = jnp.take_along_axis(box, dead.argmax(1)[:, None], axis=1)[:, 0]
    bad = jnp.where(dead.any(1), symbols.CELL + cell, symbols.NONE)
    flag = jnp.where((box == goal[:, None]).any(1), symbols.OK, symbols.FAIL)
    ends = jnp.full_like(flag, symbols.SKILL), flag
    return jnp.concatenate([jnp.stack(ends, 1), marks, bad[:, None]], 1).astype(jnp.int32)


def collapsed(action: jax.Array, where: jax.Array, count: int) -> jax.Array:
    """The first `count` actions [B, H] of those `where` they are others than the one before among
    them: int32 [B, count], -1 after the last."""
    last = jax.lax.cummax(jnp.where(where, jnp.arange(action.shape[1]), -1), axis=1)
    before = jnp.pad(last[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    previous = jnp.take_along_axis(action, jnp.maximum(before, 0), axis=1)
    new = where & ((before < 0) | (previous != action))
    slots = new[..., None] & ((jnp.cumsum(new, axis=1) - 1)[..., None] == jnp.arange(count))
    found = jnp.where(slots, action[..., None], 0).sum(1)
    return jnp.where(slots.any(1), found, -1).astype(jnp.int32)


def told(levels: Levels, kind: Told) -> np.ndarray:
    """What an expert says of levels: HINT and six tokens, NONE after the last, int32 [N, 7].

    'full' is the first six actions of the best way, 'moves' the directions of its pushes, each run
    once, 'hint' the first of these.
    """
    best = demonstrated(np.random.default_rng(0), levels, 'expert')
    made = np.full((len(levels.goal), BLOCK), symbols.NONE, np.int32)
    made[:, 0] = symbols.HINT
    if kind == 'full':
        first = best.action[:, : BLOCK - 1]
        made[:, 1:] = np.where(first >= 0, ACTIONS[0] + first, symbols.NONE)
    else:
        marks = np.asarray(skill(levels.goal, best.box, best.action))[:, 2:6]
        count = 4 if kind == 'moves' else 1
        made[:, 1 : 1 + count] = marks[:, :count]
    return made


def prompts(levels: Levels) -> np.ndarray:
    """int32 [N, 3]."""
    ends = np.broadcast_to(np.asarray((symbols.BOS, symbols.PUSH)), (len(levels.goal), 2))
    return np.concatenate([ends, symbols.CELL + levels.goal[:, None]], 1).astype(np.int32)


def observed(agent: ArrayLike, box: ArrayLike) -> jax.Array:
    """`OBS agent box`, int32 [..., 3] of cells [...]."""
    agent, box = jnp.asarray(agent), jnp.asarray(box)
    said = jnp.full_like(agent, symbols.OBS), symbols.CELL + agent, symbols.CELL + box
    return jnp.stack(said, -1).astype(jnp.int32)


def rows(levels: Levels, episode: Episode, block: np.ndarray | None = None) -> sources.Batch:
    """Episodes as text to learn the actions of, as `kd.text.packing.unpacked` has it, [N, 58]."""
    size, horizon = episode.action.shape
    acted = episode.action >= 0
    seen = np.asarray(observed(episode.agent[:, :-1], episode.box[:, :-1]))
    turns = np.concatenate([seen, ACTIONS[0] + episode.action[..., None]], -1)
    said = np.where(acted[..., None], turns, symbols.PAD).reshape(size, -1)
    asked = prompts(levels)
    if block is not None:
        asked = np.concatenate([asked, block], 1)
    read, length = asked.shape[1], 3 + BLOCK + TURN * horizon
    slots, used = np.arange(length), (read + TURN * acted.sum(1))[:, None]
    there = slots < used
    tokens = np.concatenate([asked, said], 1)
    return {
        'input': np.pad(tokens, ((0, 0), (0, length - tokens.shape[1]))).astype(np.int32),
        'positions': np.where(there, slots, 0).astype(np.int32),
        'segments': there.astype(np.int32),
        'response_mask': there & (slots >= read) & ((slots - read) % TURN == TURN - 1),
    }


def part(rng: np.random.Generator, levels: Levels, kind: Kind) -> sources.Batch:
    """Demonstrations of a kind of `CARELESS`, with the block that goes with it.

    'skill' has what the demonstration itself teaches, 'full', 'moves' and 'hint' what an expert
    says, 'plain' and 'expert' nothing.
    """
    episode = demonstrated(rng, levels, kind)
    if kind == 'skill':
        return rows(levels, episode, np.asarray(skill(levels.goal, episode.box, episode.action)))
    if kind == 'full' or kind == 'moves' or kind == 'hint':
        return rows(levels, episode, told(levels, kind))
    return rows(levels, episode)
