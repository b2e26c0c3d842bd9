"""The classes of a data set as a few weighted points each: files of them, and a source.

    DIRECTORY/clusters/clusters.npz     centroids [C, K, ...], mass [C, K], and of what they are

An example of the source is a class: whoever goes through it once has done something for each.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd import files
from kd.data import sources
from kd.data.context import SourceContext
from kd.errors import UserError, reason
from kd.ranges import Count, Size, StageName

WRITER = 'kd.methods.dataset.class_clusters.class_clusters'
_FIELDS = ('centroids', 'mass')


def file_of(directory: Path) -> Path:
    """The file in a stage's directory."""
    return directory / 'clusters' / 'clusters.npz'


def write(directory: Path, centroids: np.ndarray, mass: np.ndarray, made_of: str) -> None:
    """Writes centroids [C, K, ...] and mass [C, K] of the data with this fingerprint."""
    file = file_of(directory)
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as partial, partial.open('wb') as stream:
        np.savez(stream, centroids=centroids, mass=mass, made_of=np.asarray(made_of))


def read(directory: Path, made_of: str) -> sources.Batch:
    """`centroids` and `mass` as written.

    Raises:
      UserError: no such file, one that cannot be read, or one of other data.
    """
    file = file_of(directory)
    if not file.exists():
        raise UserError(
            f'{directory} holds no clusters; it must be a finished stage with the writer {WRITER}.'
        )
    try:
        with np.load(file) as stored:
            found, of = {name: stored[name] for name in _FIELDS}, str(stored['made_of'])
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f'{file} cannot be read: {reason(error)}') from error
    if of != made_of:
        raise UserError(f'{file} is of other data than the recipe has; make the stage again.')
    return found


class Classes(sources.Source):
    """Classes as examples; `told` int32 [C] is what a network is told of each."""

    def __init__(
        self, data: sources.DataSet, context: SourceContext, told: np.ndarray, seen: str
    ) -> None:
        super().__init__(data, context.split)
        self.told, self.seen = told, seen


def classes(
    context: SourceContext,
    *,
    stage: StageName = 'clusters',
    shape: Sequence[Count] = (),
    told: Sequence[Size] = (),
) -> sources.Source:
    """An example for every class of the recipe's data, in the order of their labels.

    It has `centroids` float32 [K, ...] and `mass` [K]; `input` float32 [...], their mean; `label`,
    the class in the data; and `told`, the class as the network knows it that makes more of it.
    For the key `source` of a stage's data, with `train='train'`.

    Args:
      context: of the split 'train'.
      stage: the stage of this recipe that writes them.
      shape: of a centroid, where an encoder made it; () for that of the data.
      told: classes by their number in the network, in the order of the data's labels, where it
        knows more of them; () for the labels themselves.

    Raises:
      UserError: no such stage, data without labels, or clusters that do not fit.
    """
    recipe = context.recipe
    block = _writer(recipe.stages[stage].writers if stage in recipe.stages else {}, stage)
    real = context.recipe_data(recipe.data[block.get('split', 'train')])
    if real.num_classes is None:
        raise UserError(f'data.source: {real.name} has no class labels.')
    if told and len(told) != real.num_classes:
        raise UserError(
            f'data.source.told has {len(told)} classes, and {real.name} has {real.num_classes}.'
        )
    count, point = real.num_classes, tuple(shape) or real.spec['input'].shape
    clusters = block.get('clusters', 10)
    known = np.asarray(told or range(count), np.int32)
    arrays = dict(label=np.arange(count, dtype=np.int32), told=known)
    if context.workdir is not None:
        found = read(context.locate(stage), sources.fingerprint(real))
        if found['centroids'].shape != (count, clusters, *point):
            raise UserError(
                f'{file_of(context.locate(stage))} holds centroids '
                f'{list(found["centroids"].shape)}, and the recipe wants '
                f'{[count, clusters, *point]}.'
            )
        mass = found['mass'].reshape(count, clusters, *(1,) * len(point))
        arrays |= dict(found, input=(mass * found['centroids']).sum(1))
    spec = {
        'input': jax.ShapeDtypeStruct(point, np.float32),
        'label': jax.ShapeDtypeStruct((), np.int32),
        'told': jax.ShapeDtypeStruct((), np.int32),
        'centroids': jax.ShapeDtypeStruct((clusters, *point), np.float32),
        'mass': jax.ShapeDtypeStruct((clusters,), np.float32),
    }
    # A network that knows more classes says itself how many.
    known_classes = None if told else count
    data = sources.DataSet(
        real.name, {'train': count}, lambda _: sources.in_memory(arrays), spec, known_classes,
        real.class_names,
    )  # fmt: skip
    return Classes(data, context, known, real.seen)


def _writer(writers: Mapping[str, Mapping[str, Any]], stage: str) -> Mapping[str, Any]:
    for block in writers.values():
        if block['name'] == WRITER:
            return block
    raise UserError(f"data.source names the stage '{stage}', which has no writer {WRITER}.")
