"""Pushed boxes (`kd.data.builders.push`) as a source of levels to play or of demonstrations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from kd.data import sources
from kd.data.builders import push as world
from kd.data.builders.symbols import TOKENS
from kd.data.context import SourceContext
from kd.ranges import Count, Fraction

# Shares of what the base is trained on.
BASE = {'plain': 0.5, 'skill': 0.27, 'full': 0.13, 'moves': 0.05, 'hint': 0.05}


def push(
    context: SourceContext,
    *,
    layout: Literal['prompts', 'rows'] = 'prompts',
    told: Literal['', 'full', 'moves', 'hint'] = '',
    kinds: Mapping[str, Fraction] | None = None,
    size: Count = 48_000,
    pool: bool = False,
) -> sources.Source:
    """Levels to play, or demonstrations of how others play.

    Fields of 'prompts': `input` int32 [3] and `prompt_mask` bool [3]; `agent`, `box`, `goal` and
    `level` int32, the number of the level; and `told` int32 [7], `told_mask` bool [7], what an
    expert says of it. Of 'rows': as `kd.data.builders.push.rows` has them, in a random order; the
    recipe's seed decides the draws.

    Args:
      context: names the split, or a slice. Levels of a split are in no other.
      layout: 'prompts' or 'rows'.
      told: how much the expert says, see `kd.data.builders.push.told`; '' for nothing.
      kinds: {kind: share} of rows, see `kd.data.builders.push.part`; {'plain': 1} by default. The
        base learns from `BASE`.
      size: rows of 'train'; other splits have 2,000.
      pool: whether demonstrations of 'train' are of its 96 levels, and not of all that no other
        split has.

    Raises:
      DataError: a split or a kind that is not there.
    """
    split, seed = context.split, context.recipe.seed
    named = [base for base in world.SPLITS if base in split] or [split]
    if layout == 'prompts':
        arrays = {base: levels(base, told) for base in named}
    else:
        shares = dict(kinds or {'plain': 1.0})
        if unknown := set(shares) - set(world.CARELESS):
            raise sources.DataError(f'rows of push are {list(world.CARELESS)}, not {unknown}')
        arrays = {
            base: rows(base, shares, size if base == 'train' else 2_000, pool=pool, seed=seed)
            for base in named
        }
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
        for name, value in arrays[named[0]].items()
    }
    sizes = {base: len(of['input']) for base, of in arrays.items()}
    data = sources.DataSet(
        'push', sizes, lambda base: sources.in_memory(arrays[base]), spec, TOKENS
    )
    return sources.Source(data, split)


def levels(split: str, told: Literal['', 'full', 'moves', 'hint'] = '') -> sources.Batch:
    """The arrays of the layout 'prompts'."""
    found = world.levels(split)
    made = {name: x.astype(np.int32) for name, x in found._asdict().items()}
    made['level'] = np.arange(len(found.goal), dtype=np.int32)
    made['input'] = world.prompts(found)
    made['prompt_mask'] = np.ones(made['input'].shape, bool)
    if told:
        made['told'] = world.told(found, told)
        made['told_mask'] = np.ones(made['told'].shape, bool)
    return made


def rows(
    split: str, kinds: Mapping[Any, float], size: int, *, pool: bool = False, seed: int = 0
) -> sources.Batch:
    """The arrays of the layout 'rows'."""
    rng = np.random.default_rng([seed, 78, list(world.SPLITS).index(split)])
    others = {n for name in world.SPLITS if name != 'train' for n in world.code(world.levels(name))}
    own = world.levels(split)
    parts = []
    for kind, share in kinds.items():
        count = round(size * share)
        if split == 'train' and not pool:
            taken = world.drawn(rng, count, others)
        else:
            which = np.arange(count) % len(own.goal)
            taken = world.Levels(*(x[which] for x in own))
        parts.append(world.part(rng, taken, kind))
    made = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    order = rng.permutation(len(made['input']))
    return {name: value[order] for name, value in made.items()}
