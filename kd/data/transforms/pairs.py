"""Two digits side by side: a task of one hundred classes out of the ten of `digits`."""

from __future__ import annotations

import functools

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.data.transforms import standardised

# Digits that a split draws from, number of pairs, and seed.
_SPLITS = {
    'train': ('train[:1200]', 8000, 1),
    'validation': ('train[1200:]', 1500, 2),
    'test': ('test', 1500, 3),
}


def digit_pairs(context: SourceContext) -> sources.Source:
    """Images [8, 16, 1] in [-1, 1] of two digits a and b, with the label 10 a + b.

    Every class has equally many pairs; the digits of the splits are disjoint. For the key `source`
    of a recipe's data.

    Args:
      context: of 'train' (8,000), 'validation' or 'test' (1,500 each), or slices of them.
    """

    def reader(name: str) -> sources.Reader:
        of, count, seed = _SPLITS[name]
        source = context.load('digits', of)

        @functools.cache
        def arrays() -> sources.Batch:
            return _paired(standardised.everything(source), count, np.random.default_rng(seed))

        return lambda rows: {field: array[rows] for field, array in arrays().items()}

    data = sources.DataSet(
        'digit_pairs',
        {name: count for name, (_, count, _) in _SPLITS.items()},
        reader,
        {
            'input': jax.ShapeDtypeStruct((8, 16, 1), np.float32),
            'label': jax.ShapeDtypeStruct((), np.int32),
        },
        100,
    )
    return sources.Source(data, context.split)


def _paired(digits: sources.Batch, count: int, rng: np.random.Generator) -> sources.Batch:
    """`count` pairs of digits, drawn anew for each."""
    label = np.arange(count, dtype=np.int32) % 100
    members = [np.flatnonzero(digits['label'] == k) for k in range(10)]
    sides = [
        np.array([rng.choice(members[k]) for k in digit]) for digit in (label // 10, label % 10)
    ]
    return {'input': np.concatenate([digits['input'][rows] for rows in sides], 2), 'label': label}
