"""Groups of one real image of every class, as a data source."""

from __future__ import annotations

import functools

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.data.distilled import synthetic


def one_of_each_class(context: SourceContext) -> sources.Source:
    """The recipe's data in groups: example i has `input` float32 [C, ...], image i of every class.

    A batch of m groups is a class-balanced batch of m images per class. The number of examples is
    the size of the smallest class. For the key `source` of a stage's data.

    Args:
      context: of a split of the recipe's data set.

    Raises:
      DataError: data without class labels, or a class without an example.
    """
    source = context.recipe_data(context.split)
    classes = source.num_classes
    if classes is None:
        raise sources.DataError(f'data set {source.name!r} has no classes to make groups of')

    @functools.cache
    def members() -> np.ndarray:
        """Positions [smallest, C]."""
        labels = synthetic.labels_of(source)
        by_class = [np.flatnonzero(labels == k) for k in range(classes)]
        smallest = min(len(positions) for positions in by_class)
        if not smallest:
            empty = next(k for k, positions in enumerate(by_class) if not len(positions))
            raise sources.DataError(
                f'class {empty} has no example in split {context.split!r} of data set '
                f'{source.name!r}, of which groups take one of every class'
            )
        return np.stack([positions[:smallest] for positions in by_class], 1)

    def read(rows: np.ndarray) -> sources.Batch:
        positions = members()[rows]
        images = source.fetch(positions.reshape(-1))['input']
        return {'input': images.reshape(*positions.shape, *images.shape[1:])}

    size = len(source) // classes if context.workdir is None else len(members())
    spec = source.spec['input']
    grouped = jax.ShapeDtypeStruct((classes, *spec.shape), spec.dtype)
    return sources.Source(
        sources.DataSet(
            f'{source.name} by class', {'train': size}, lambda _: read, {'input': grouped},
            classes, source.class_names,
        ),
        'train',
    )  # fmt: skip
