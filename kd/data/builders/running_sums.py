"""Digits and their running sums: answers that can be verified, each symbol of which needs the last.

    input      x_1 .. x_n y_1 .. y_n,   y_i = (y_{i-1} + x_i) mod m

Small digits are more probable than large ones: a sum of uniform digits says nothing of any of its
parts alone, and networks do not find out what it is.
"""

from __future__ import annotations

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.ranges import Count, Fraction, Size

MODULUS, LENGTH, DECAY = 4, 12, 0.52
SIZES = {'train': 20_000, 'validation': 1_000, 'test': 2_000}


def answers(digits: np.ndarray, modulus: int = MODULUS) -> np.ndarray:
    """Running sums int [N, n] of digits [N, n]."""
    return digits.cumsum(1) % modulus


def make(
    split: str,
    *,
    modulus: int = MODULUS,
    length: int = LENGTH,
    decay: float = DECAY,
    size: int = 0,
    seed: int = 0,
) -> sources.Batch:
    """A split: `input` int32 [N, 2 n]; `prompt_length` int32 [N], n; `response_mask` bool [N, 2 n].

    Args:
      split: of `SIZES`.
      modulus: m.
      length: n.
      decay: a digit d has a probability proportional to decay^d.
      size: examples; 0 for `SIZES[split]`.
      seed: of the draws.

    Raises:
      DataError: an unknown split.
    """
    if split not in SIZES:
        raise sources.DataError(f'running sums have the splits {list(SIZES)}, not {split!r}')
    rng = np.random.default_rng([seed, 56, list(SIZES).index(split)])
    law = decay ** np.arange(modulus)
    size = size or SIZES[split]
    digits = rng.choice(modulus, size=(size, length), p=law / law.sum())
    rows = np.concatenate([digits, answers(digits, modulus)], axis=1).astype(np.int32)
    answer = np.broadcast_to(np.arange(2 * length) >= length, rows.shape)
    return {
        'input': rows,
        'prompt_length': np.full(size, length, np.int32),
        'response_mask': answer,
    }


def running_sums(
    context: SourceContext,
    *,
    modulus: Count = MODULUS,
    length: Count = LENGTH,
    decay: Fraction = DECAY,
    size: Size = 0,
) -> sources.Source:
    """`make` as a source; the recipe's seed decides the draws, `size` is of the training split."""
    split = context.split
    arrays = make(
        split, modulus=modulus, length=length, decay=decay,
        size=size if split == 'train' else 0, seed=context.recipe.seed,
    )  # fmt: skip
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in arrays.items()
    }
    data = sources.DataSet(
        'running_sums', {split: len(arrays['input'])}, lambda _: sources.in_memory(arrays), spec,
        modulus,
    )  # fmt: skip
    return sources.Source(data, split)
