"""A language of which the next token depends on the two before, in a public and a private dialect.

    public    softmax G(a, b)                             a table as of `kd.data.builders.table`
    domain    softmax D(a, b),   D = .5 G + .8 H          H another table: the private records
    teacher   softmax (.85 D + .15 G)                     one that knows the domain well, by others

A record is a sequence of `LENGTH` tokens that begins with two drawn uniformly. The world of an
experiment on privacy: a student that speaks the public dialect learns the domain's from records
that nobody may find out about, and from a teacher that has never seen them.
"""

from __future__ import annotations

from typing import Literal

import jax
import numpy as np

from kd.data import sources
from kd.data.builders import table
from kd.data.context import SourceContext
from kd.ranges import Size

TOKENS, LENGTH, FEATURES = 32, 20, 24
# Of the tables, so that a token of the domain has a perplexity of about 5.
SCALE = 0.78
SIZES = {'train': 4_000, 'validation': 1_000, 'test': 2_000}

Dialect = Literal['public', 'domain', 'teacher']


def law(dialect: Dialect, seed: int, domain_share: float = 0.85) -> np.ndarray:
    """Logits of the next token, float32 [V, V, V] over the two before and itself.

    `domain_share` is the teacher's: how much of D there is in it, beside G.
    """
    public, other = (table.logits(2 * seed + i, TOKENS, SCALE, FEATURES) for i in (0, 1))
    domain = np.float32(0.5) * public + np.float32(0.8) * other
    teacher = domain_share * domain + (1 - domain_share) * public
    return {'public': public, 'domain': domain, 'teacher': teacher.astype(np.float32)}[dialect]


def draw(logits: np.ndarray, size: int, rng: np.random.Generator, length: int = LENGTH):
    """Sequences int32 [N, T] of a law [V, V, V]."""
    tokens = np.empty((size, length), np.int32)
    tokens[:, :2] = rng.integers(len(logits), size=(size, 2))
    for t in range(2, length):
        tokens[:, t] = table.answers(logits[tokens[:, t - 2], tokens[:, t - 1]], rng)
    return tokens


def make(split: str, dialect: Dialect = 'domain', *, size: int = 0, seed: int = 0):
    """Records of a split: `input` int32 [N, T] and `response_mask` bool [N, T], from token 2 on.

    Raises:
      DataError: an unknown split.
    """
    if split not in SIZES:
        raise sources.DataError(f'the language has the splits {list(SIZES)}, not {split!r}')
    place = [seed, 53, list(SIZES).index(split), ['public', 'domain', 'teacher'].index(dialect)]
    tokens = draw(law(dialect, seed), size or SIZES[split], np.random.default_rng(place))
    learnt = np.broadcast_to(np.arange(LENGTH) >= 2, tokens.shape)
    return {'input': tokens, 'response_mask': learnt}


def markov(
    context: SourceContext, *, dialect: Dialect = 'domain', size: Size = 0
) -> sources.Source:
    """Records as a source, a row each; the recipe's seed decides the tables and the draws.

    Args:
      context: names the split.
      dialect: whose records.
      size: training records; 0 for `SIZES`.

    Raises:
      DataError: an unknown split.
    """
    split = context.split
    arrays = make(split, dialect, size=size if split == 'train' else 0, seed=context.recipe.seed)
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in arrays.items()
    }
    sizes = {split: len(arrays['input'])}
    data = sources.DataSet(
        f'markov:{dialect}', sizes, lambda _: sources.in_memory(arrays), spec, TOKENS
    )
    return sources.Source(data, split)
