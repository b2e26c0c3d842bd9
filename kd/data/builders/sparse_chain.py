"""A language of order 2 in which most symbols cannot follow: each pair has a few successors.

Its true law judges what a model says: how much of it is impossible, how probable the rest is.
"""

from __future__ import annotations

import jax
import numpy as np

from kd.data import sources
from kd.data.builders import markov
from kd.data.context import SourceContext
from kd.ranges import Count, Size

TOKENS, SUCCESSORS, LENGTH = 12, 4, 32
SIZES = {'train': 20_000, 'validation': 1_000, 'test': 2_000}


def law(seed: int, tokens: int = TOKENS, successors: int = SUCCESSORS) -> np.ndarray:
    """Log-probabilities of the next symbol, float32 [V, V, V] over the two before and itself.

    -inf but for the successors of a pair, whose probabilities are softmax of N(0, 1).
    """
    rng = np.random.default_rng([seed, 54])
    scores = rng.normal(size=(tokens, tokens, tokens))
    order = rng.random((tokens, tokens, tokens)).argsort(-1)
    scores = np.where(order < successors, scores, -np.inf)
    total = np.log(np.exp(scores).sum(-1, keepdims=True))
    return (scores - total).astype(np.float32)


def log_probs(table: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """log p of each symbol but the first two, [N, L - 2], of sequences int [N, L]."""
    return table[tokens[:, :-2], tokens[:, 1:-1], tokens[:, 2:]]


def make(
    split: str,
    *,
    tokens: int = TOKENS,
    successors: int = SUCCESSORS,
    length: int = LENGTH,
    size: int = 0,
    seed: int = 0,
) -> np.ndarray:
    """Sequences of a split, int32 [N, L], the first two symbols uniform.

    Raises:
      DataError: an unknown split, or no room for the successors.
    """
    if split not in SIZES:
        raise sources.DataError(f'the chain has the splits {list(SIZES)}, not {split!r}')
    if successors > tokens:
        raise sources.DataError(f'of {tokens} symbols no {successors} can follow')
    rng = np.random.default_rng([seed, 55, list(SIZES).index(split)])
    return markov.draw(law(seed, tokens, successors), size or SIZES[split], rng, length)


def sparse_chain(
    context: SourceContext,
    *,
    tokens: Count = TOKENS,
    successors: Count = SUCCESSORS,
    length: Count = LENGTH,
    size: Size = 0,
) -> sources.Source:
    """Sequences as a source, `input` int32 [L]; the recipe's seed decides the law and the draws.

    Args:
      context: names the split.
      tokens: size of the vocabulary.
      successors: of each pair of symbols.
      length: of a sequence.
      size: training sequences; 0 for `SIZES`.

    Raises:
      DataError: as of `make`.
    """
    split = context.split
    array = make(
        split, tokens=tokens, successors=successors, length=length,
        size=size if split == 'train' else 0, seed=context.recipe.seed,
    )  # fmt: skip
    spec = {'input': jax.ShapeDtypeStruct((length,), np.int32)}
    data = sources.DataSet(
        'sparse_chain', {split: len(array)}, lambda _: sources.in_memory({'input': array}), spec,
        tokens,
    )  # fmt: skip
    return sources.Source(data, split)
