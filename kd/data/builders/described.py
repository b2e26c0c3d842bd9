"""Data sets by their description alone: shapes to compile for, and nothing to read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NoReturn

import jax
import numpy as np
import tensorflow_datasets as tfds

from kd.data import sources
from kd.data.builders import prepared

# Examples of every split where only shapes count.
EXAMPLES = 10_000_000
# Data sets that recipes name and tfds lacks, as the recipes ask for them: shape and classes.
UNLISTED = {
    'afhq_64': ((64, 64, 3), 3),
    'ffhq_64': ((64, 64, 3), None),
    'ffhq_256': ((256, 256, 3), None),
    'imagefruit': ((128, 128, 3), 10),
    'imagenet_224': ((224, 224, 3), 1000),
    'imagenet_256': ((256, 256, 3), 1000),
    'imagenette_256': ((256, 256, 3), 10),
    'imagewoof_256': ((256, 256, 3), 10),
    'tiny_imagenet': ((64, 64, 3), 200),
}


def source(name: str, split: str) -> sources.Source:
    """A split of the data set's shapes, of any length, that cannot be read.

    Args:
      name: `digits`, a tfds name, one of `UNLISTED`, or of a copy in the default data directory.
      split: as of `kd.data.catalogue.load`; every named split has `EXAMPLES` examples.

    Raises:
      DataError: a data set whose shapes are not known, or images that differ in size.
    """
    spec, classes = _shapes(name)
    return of_spec(name, split, spec, classes)


def of_spec(
    name: str, split: str, spec: Mapping[str, jax.ShapeDtypeStruct], classes: int | None = None
) -> sources.Source:
    """A split of examples of these fields, of any length, that cannot be read."""
    names = [part.partition('[')[0].strip() for part in split.split('+')]

    def reader(_: str) -> sources.Reader:
        return _unreadable

    # Which splits `all` would be does not matter.
    sizes = dict.fromkeys(['train' if base == 'all' else base for base in names], EXAMPLES)
    return sources.Source(sources.DataSet(name, sizes, reader, spec, classes), split)


def _unreadable(rows: np.ndarray) -> NoReturn:
    raise sources.DataError('this data is known by its shapes alone and cannot be read')


def _shapes(name: str):
    """Spec of an example, and the number of classes."""
    if name == 'digits':
        return sources.example_spec((8, 8, 1)), 10
    if name in UNLISTED:
        shape, classes = UNLISTED[name]
        return sources.example_spec(shape), classes
    try:
        builder = tfds.builder(name, data_dir='/nonexistent')
    except (tfds.core.DatasetNotFoundError, ValueError):
        data = prepared.open_dataset(name, sources.default_data_dir())
    else:
        data = prepared.describe(name, builder)
    return data.spec, data.num_classes
