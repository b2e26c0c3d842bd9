"""What a network loses with each of its parts, and which of them go first.

    gates = [gates_without(blocks, [part]) for part in parts_of(blocks)]
    costs = removal_costs(loss, gates)
    gone = prune_to_budget(score, sizes, ratio * total)

A part is a block or a branch of one, by name: 'block3', 'block5/mlp'. The network without it is
that with gates of zero (`kd.models.stack`), and `kd.models.stack.restricted` makes it smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

__all__ = [
    *('Level', 'gates_without', 'parts_of', 'place_of', 'prune_to_budget', 'removal_costs'),
    *('sizes_of', 'whole_costs'),
]

Level = Literal['branch', 'block']
Blocks = Mapping[str, Sequence[str]]


def parts_of(blocks: Blocks, level: Level = 'branch') -> list[str]:
    """Names of all parts, in order.

    Args:
      blocks: {block: its branches}, in order.
      level: whole blocks or branches.
    """
    if level == 'block':
        return list(blocks)
    return [f'{block}/{branch}' for block, branches in blocks.items() for branch in branches]


def place_of(blocks: Blocks, part: str) -> int:
    """Number of the block that a part is of."""
    return list(blocks).index(part.partition('/')[0])


def gates_without(blocks: Blocks, parts: Sequence[str]) -> np.ndarray:
    """Gates [blocks, most branches] float32: 0 for the parts, 1 for all else."""
    gates = np.ones((len(blocks), max(map(len, blocks.values()))), np.float32)
    for part in parts:
        block, _, branch = part.partition('/')
        row = list(blocks).index(block)
        gates[row, list(blocks[block]).index(branch) if branch else slice(None)] = 0.0
    return gates


def removal_costs(loss: Callable[[jax.Array], jax.Array], gates: np.ndarray) -> jax.Array:
    """How much a loss rises by each removal: loss(gates_p) - loss(ones), [parts].

    One program for all parts, one after the other.

    Args:
      loss: of gates [blocks, branches], a scalar.
      gates: [parts, blocks, branches], without each part.
    """
    every = jnp.concatenate([jnp.ones_like(gates[:1]), jnp.asarray(gates)])
    found = jax.lax.map(loss, every)
    return found[1:] - found[0]


def prune_to_budget(
    score: Mapping[str, float], sizes: Mapping[str, int], budget: float
) -> tuple[str, ...]:
    """The parts of highest score, as few as have `budget` parameters, in the order of `sizes`.

    What goes for a budget goes for every larger one.

    Args:
      score: of each part, the highest goes first; the last of equals.
      sizes: parameters of each part.
      budget: parameters to be removed at least.

    Raises:
      ValueError: there are not as many.
    """
    names, total, gone = list(sizes), 0, []
    if budget > sum(sizes.values()):
        raise ValueError(
            f'prune_to_budget: {budget:,.0f} parameters are to go, and all parts have '
            f'{sum(sizes.values()):,}.'
        )
    for name in sorted(names, key=lambda part: (-score[part], -names.index(part))):
        if total >= budget:
            break
        total += sizes[name]
        gone.append(name)
    return tuple(sorted(gone, key=names.index))


def sizes_of(sizes: Mapping[str, int], level: Level) -> dict[str, int]:
    """Parameters of branches, or of whole blocks."""
    if level == 'branch':
        return dict(sizes)
    found: dict[str, int] = {}
    for part, size in sizes.items():
        block = part.partition('/')[0]
        found[block] = found.get(block, 0) + size
    return found


def whole_costs(cost: Any, blocks: Blocks, parts: Sequence[str]) -> np.ndarray:
    """Costs [parts] as a table [blocks, most branches], NaN where there is no part."""
    table = np.full((len(blocks), max(map(len, blocks.values()))), np.nan)
    for value, part in zip(np.asarray(cost), parts, strict=True):
        block, _, branch = part.partition('/')
        table[list(blocks).index(block), list(blocks[block]).index(branch) if branch else 0] = value
    return table
