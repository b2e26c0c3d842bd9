"""Data sets with wrong labels, for studies of what a method does with them."""

from __future__ import annotations

import zlib

import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.ranges import Fraction, Seed


def noisy_labels(
    context: SourceContext,
    *,
    dataset: str,
    fraction: Fraction,
    seed: Seed = 0,
    clean: tuple[str, ...] = ('test',),
) -> sources.Source:
    """A split in which labels are replaced by uniformly drawn ones.

    For the key `source` of a recipe's data. Which labels are replaced depends on the text of the
    split, its length and the seed, so every stage sees the same wrong labels.

    Args:
      context: of a split of `dataset`, such as 'train[:80%]'.
      dataset: name for `kd.data.catalogue.load`.
      fraction: probability in [0, 1] that a label is drawn anew; of these 1 / K are right again.
      seed: of the noise.
      clean: splits, as written in the recipe, that keep their labels.

    Raises:
      DataError: a fraction outside [0, 1], or data without labels.
    """
    if not 0 <= fraction <= 1:
        raise sources.DataError(f'label noise: fraction must lie in [0, 1], got {fraction}')
    source = context.load(dataset)
    if source.num_classes is None:
        raise sources.DataError(f'label noise: data set {dataset!r} has no labels')
    split = context.split
    if split in clean:
        return source
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    drawn = rng.integers(source.num_classes, size=len(source)).astype(np.int32)
    replaced = rng.random(len(source)) < fraction

    def read(rows: np.ndarray) -> sources.Batch:
        batch = source.fetch(rows)
        del batch['index']
        return batch | {'label': np.where(replaced[rows], drawn[rows], batch['label'])}

    spec = {name: field for name, field in source.spec.items() if name != 'index'}
    data = sources.DataSet(
        dataset, {'noisy': len(source)}, lambda _: read, spec, source.num_classes,
        source.class_names,
    )  # fmt: skip
    noisy = sources.Source(data, 'noisy')
    noisy.split = f'{split} with {fraction:.0%} of the labels drawn anew'
    return noisy
