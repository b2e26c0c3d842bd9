"""Chains of arithmetic (`kd.data.builders.chain`) as a source of prompts or of rows."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import numpy as np

from kd.data import sources
from kd.data.builders import arithmetic, chain
from kd.data.builders.arithmetic import LawName, Third
from kd.data.builders.symbols import TOKENS
from kd.data.context import SourceContext
from kd.ranges import Count, Fraction, Size

_PLAIN = {'plain': 1.0}


def chains(
    context: SourceContext,
    *,
    tasks: Mapping[chain.Task, Fraction] | None = None,
    operations: Mapping[str, Fraction] | None = None,
    law: LawName | Fraction = 'truth',
    kinds: Mapping[str, Fraction] | None = None,
    styles: Count = 1,
    third: Third = 'affine',
    layout: Literal['prompts', 'rows'] = 'prompts',
    size: Size = 0,
    cliffs: Fraction | None = None,
) -> sources.Source:
    """Chains as a source; the recipe's seed decides the draws and the misconceptions.

    Fields: those of `kd.data.builders.chain.rows`, or of `asked` and `printed` int32 [n], what an
    answer has to print ([2, n] by style of the kind 'order', see `kd.data.builders.chain.passes`).
    And `operations` int32, L; with `cliffs` also `cliff` bool, which problems are ones.

    Args:
      context: names the split, or a slice; from two operations on no problem is in two of them.
      tasks: {task: share} of problems; {'chain': 1} by default.
      operations: {L: share} of problems with so many operations; {3: 1} by default.
      law: who answers, see `kd.data.builders.arithmetic.law`.
      kinds: {kind: share} of rows, see `kd.data.builders.chain.part`; {'plain': 1} by default.
        Bases learn from `kd.data.builders.chain.BASE`.
      styles: of the kinds 'free' and 'shift'.
      third: what the operator @ is, see `kd.data.builders.arithmetic`.
      layout: 'prompts' to sample answers to, with one of the law beside; or 'rows' to learn.
      size: examples; 0 for `kd.data.builders.chain.SIZES`.
      cliffs: the share of problems whose right way goes through a fact that the law 'cliff' hardly
        ever says rightly; None for as many as there are.

    Raises:
      DataError: a split, a kind or a law that is not there.
    """
    split, seed = context.split, context.recipe.seed
    named = [base for base in chain.SIZES if base in split] or [split]
    arrays = {
        base: make(
            base, size, tasks=tasks, operations=operations, law=arithmetic.law(law, seed, third),
            kinds=kinds, styles=styles, third=third, layout=layout, seed=seed, cliffs=cliffs,
        )
        for base in named
    }  # fmt: skip
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype)
        for name, value in arrays[named[0]].items()
    }
    sizes = {base: len(of['input']) for base, of in arrays.items()}
    data = sources.DataSet(
        'chains', sizes, lambda base: sources.in_memory(arrays[base]), spec, TOKENS
    )
    return sources.Source(data, split)


def make(
    split: str,
    size: int = 0,
    *,
    law: np.ndarray,
    tasks: Mapping[chain.Task, float] | None = None,
    operations: Mapping[Any, float] | None = None,
    kinds: Mapping[str, float] | None = None,
    styles: int = 1,
    third: Third = 'affine',
    layout: str = 'prompts',
    seed: int = 0,
    cliffs: float | None = None,
) -> sources.Batch:
    """The arrays of `chains`, in an order drawn at random; `law` float [3, 10, 10, 10].

    Raises:
      DataError: see `chains`; prompts that ask for different numbers of symbols.
    """
    if split not in chain.SIZES:
        raise sources.DataError(f'chains have the splits {list(chain.SIZES)}, not {split!r}')
    rng = np.random.default_rng([seed, 77, list(chain.SIZES).index(split)])
    size, parts, keys, lengths, met = size or chain.SIZES[split], [], [], [], []
    facts, truth = arithmetic.cliffs(seed, third), arithmetic.truth_of(third)
    tasks, operations, kinds = tasks or {'chain': 1.0}, operations or {3: 1.0}, kinds or _PLAIN
    for task, steps, kind in itertools.product(tasks, operations, kinds):
        count = round(size * tasks[task] * operations[steps] * kinds[kind])
        if cliffs is None:
            asks = chain.problems(rng, count, int(steps), split)
        else:
            asks = chain.mixed(rng, count, facts, cliffs, int(steps), split, truth=truth)
            met.append(chain.meets(asks, facts, truth))
        parts.append(chain.part(kind, asks, law, rng, task, styles=styles, third=third))
        keys.append(chain.key_of(asks, kind, task, third))
        lengths += [int(steps)] * count
    if layout == 'rows':
        made = chain.rows(parts)
    elif len({key.shape[1:] for key in keys}) > 1:
        raise sources.DataError('prompts of chains have to ask for one number of symbols')
    else:
        made = {**chain.asked(parts), 'printed': np.concatenate(keys)}
    made['operations'] = np.asarray(lengths, np.int32)
    if cliffs is not None:
        made['cliff'] = np.concatenate(met)
    order = rng.permutation(len(lengths))
    return {name: value[order] for name, value in made.items()}
