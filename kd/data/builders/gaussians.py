"""Classes that overlap: 64 Gaussians in 16 dimensions, of which the best answer is often wrong.

Class v has its mean at .95 N(0, 1)^16, an example is N(0, 1)^16 around the mean of its class: the
best classifier is right on four of five, and a network that has 3,000 examples to learn from on
three of four, of which it is far too sure.
"""

from __future__ import annotations

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext

CLASSES, DIMENSION, SCALE = 64, 16, 0.95
SIZES = {'train': 3_000, 'validation': 1_000, 'test': 8_000}


def means(seed: int = 0) -> np.ndarray:
    """The means of the classes, float64 [64, 16]."""
    return SCALE * np.random.default_rng([seed, 64]).normal(size=(CLASSES, DIMENSION))


def make(split: str, seed: int = 0) -> sources.Batch:
    """A split of the seed's world: 'input' float32 [N, 16] and 'label' int32 [N].

    Raises:
      DataError: a split that is not there.
    """
    if split not in SIZES:
        raise sources.DataError(f'the Gaussians have the splits {list(SIZES)}, not {split!r}')
    rng = np.random.default_rng([seed, 65 + list(SIZES).index(split)])
    label = rng.integers(CLASSES, size=SIZES[split])
    inputs = means(seed)[label] + rng.normal(size=(len(label), DIMENSION))
    return {'input': inputs.astype(np.float32), 'label': label.astype(np.int32)}


def gaussians(context: SourceContext) -> sources.Source:
    """`make` as a source, for the key `source` of a recipe's data; the recipe's seed decides."""
    arrays = make(context.split, context.recipe.seed)
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in arrays.items()
    }
    sizes = {context.split: SIZES[context.split]}
    data = sources.DataSet('gaussians', sizes, lambda _: sources.in_memory(arrays), spec, CLASSES)
    return sources.Source(data, context.split)
