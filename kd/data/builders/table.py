"""A language of one token whose law is known: a table of structured logits over contexts.

A context is a pair of tokens (a, b); the teacher's logits are an exact, peaked function of both,
1.2 O tanh(1.5 W [e_a; e_b]) with random e in R^40, W in R^(80 x 40) / sqrt(80) and O in R^(40 x V).
A student with a narrow bottleneck cannot represent them, so that the divergences differ in what
they give up. The world of several papers' small experiments.
"""

from __future__ import annotations

import functools
from typing import Literal

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.ranges import Count, Finite, NonNegative, Positive, Size

TOKENS = 48
# The answers that count as valid are the teacher's most probable ones.
VALID = 3
SIZES = {'train': 100_000, 'validation': TOKENS**2, 'test': TOKENS**2}


@functools.cache
def logits(
    seed: int = 0, tokens: int = TOKENS, scale: float = 1.2, features: int = 40
) -> np.ndarray:
    """The teacher's logits, float32 [V, V, V] over contexts (a, b) and answers, in so many features
    of tokens and contexts."""
    rng = np.random.default_rng([seed, 48])
    embedding = rng.normal(size=(tokens, features))
    inner = rng.normal(size=(2 * features, features)) / np.sqrt(2 * features)
    outer = rng.normal(size=(features, tokens))
    first, second = embedding @ inner[:features], embedding @ inner[features:]
    hidden = np.tanh(1.5 * (first[:, None] + second))
    return (scale * hidden @ outer).astype(np.float32)


def contexts(tokens: int = TOKENS) -> np.ndarray:
    """All contexts, int32 [V^2, 2]; the one of row a V + b is (a, b)."""
    return np.stack(np.divmod(np.arange(tokens**2), tokens), axis=1).astype(np.int32)


def valid(table: np.ndarray, count: int = VALID) -> np.ndarray:
    """Bool like `table`: the `count` most probable answers of each context."""
    least = np.partition(table, -count, axis=-1)[..., -count, None]
    return table >= least


def draw(
    table: np.ndarray, size: int, seed: int, *, temperature: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Contexts drawn uniformly, int32 [N, 2], and an answer of the table to each, int32 [N]."""
    rng = np.random.default_rng([seed, 49])
    pairs = rng.integers(table.shape[0], size=(size, 2)).astype(np.int32)
    return pairs, answers(table[pairs[:, 0], pairs[:, 1]] / temperature, rng)


def answers(rows: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A draw from softmax of each row, int32 [N]; -inf is never drawn."""
    return (rows + rng.gumbel(size=rows.shape)).argmax(-1).astype(np.int32)


def relative(table: np.ndarray, own: float, other: float, seed: int) -> np.ndarray:
    """own * table + other * another table, for who knows something else to begin with."""
    if not other:
        return np.float32(own) * table
    foreign = logits(seed + 1000, table.shape[0])
    return np.float32(own) * table + np.float32(other) * foreign


def draw_pairs(
    table: np.ndarray, size: int, seed: int, count: int = VALID
) -> tuple[np.ndarray, np.ndarray]:
    """Contexts drawn uniformly, int32 [N, 2], and a right and a wrong answer to each, int32 [N, 2].

    Both are the teacher's: drawn from its law on the `count` most probable answers, which are
    valid, and on all the others, its mistakes.
    """
    rng = np.random.default_rng([seed, 51])
    pairs = rng.integers(table.shape[0], size=(size, 2)).astype(np.int32)
    return pairs, right_and_wrong(table[pairs[:, 0], pairs[:, 1]], rng, count)


def right_and_wrong(rows: np.ndarray, rng: np.random.Generator, count: int = VALID) -> np.ndarray:
    """A valid answer and another one drawn from softmax of each row, int32 [N, 2]."""
    right = valid(rows, count)
    kept = (np.where(chosen, rows, -np.inf) for chosen in (right, ~right))
    return np.stack([answers(side, rng) for side in kept], axis=1)


def table(
    context: SourceContext,
    *,
    tokens: Count = TOKENS,
    scale: Positive = 1.2,
    temperature: NonNegative = 1.0,
    size: Size = 0,
    teacher: Literal['logits', 'none'] = 'logits',
    related: tuple[Finite, Finite] = (1.0, 0.0),
) -> sources.Source:
    """Contexts with an answer and the teacher's logits, as a source.

    The splits 'validation' and 'test' are all contexts once. Fields: `input` int32 [2], `label`
    int32 and, unless `teacher` is 'none', `teacher_logits` float32 [V], which methods take for what
    the teacher says.

    Args:
      context: names the split; the recipe's seed decides the table and the draws.
      tokens: size V of the vocabulary.
      scale: of the teacher's logits.
      temperature: at which the answers are drawn; 0 for the most probable one.
      size: training examples; 0 for `SIZES`.
      teacher: whether the logits are part of an example.
      related: (a, b) for answers of another law, whose logits are a times the teacher's and b times
        those of another table.

    Raises:
      DataError: a split that is not there.
    """
    split, seed = _split(context)
    law = logits(seed, tokens, scale)
    said = relative(law, *related, seed)
    if split == 'train':
        pairs, label = draw(said, size or SIZES[split], seed, temperature=temperature or 1e-6)
    else:
        pairs = contexts(tokens)
        rows = said.reshape(-1, tokens) / (temperature or 1e-6)
        label = answers(rows, np.random.default_rng([seed, list(SIZES).index(split)]))
    arrays = {'input': pairs, 'label': label}
    if teacher == 'logits':
        arrays['teacher_logits'] = law[pairs[:, 0], pairs[:, 1]]
    return _source('table', split, arrays, tokens)


def preferences(
    context: SourceContext,
    *,
    tokens: Count = TOKENS,
    scale: Positive = 1.2,
    size: Size = 0,
) -> sources.Source:
    """Contexts with a right and a wrong answer of the teacher, see `draw_pairs`, as a source.

    The splits are those of `table`. Fields: `input` int32 [2, 2], a context twice, `label` int32
    [2], the right answer first, and `teacher_logits` float32 [2, V].

    Args:
      context, tokens, scale, size: as of `table`.

    Raises:
      DataError: a split that is not there.
    """
    split, seed = _split(context)
    law = logits(seed, tokens, scale)
    if split == 'train':
        pairs, label = draw_pairs(law, size or SIZES[split], seed)
    else:
        pairs = contexts(tokens)
        rng = np.random.default_rng([seed, 52, list(SIZES).index(split)])
        label = right_and_wrong(law.reshape(-1, tokens), rng)
    twice = {'input': pairs, 'teacher_logits': law[pairs[:, 0], pairs[:, 1]]}
    arrays = {name: np.stack([value, value], axis=1) for name, value in twice.items()}
    source = _source('table:preferences', split, {**arrays, 'label': label}, tokens)
    source.pairs = True
    return source


def _split(context: SourceContext) -> tuple[str, int]:
    """The split and the seed of the table."""
    if context.split not in SIZES:
        raise sources.DataError(f'the table has the splits {list(SIZES)}, not {context.split!r}')
    return context.split, context.recipe.seed


def _source(name: str, split: str, arrays: sources.Batch, tokens: int) -> sources.Source:
    spec = {
        field: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for field, value in arrays.items()
    }
    sizes = {split: len(arrays['input'])}
    data = sources.DataSet(name, sizes, lambda _: sources.in_memory(arrays), spec, tokens)
    return sources.Source(data, split)
