"""A stage that writes every class of a data set as a few weighted points, for later stages.

In a recipe:

    config.clusters = stage(
        method=dict(name='kd.methods.cache.nothing'), steps=1, batch_size=64,
        writers={'clusters': dict(
            name='kd.methods.dataset.class_clusters.class_clusters', clusters=10)})
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.context import Context
from kd.context import Writer as StageWriter
from kd.data import sources
from kd.data.distilled import clusters as stored
from kd.data.distilled import coreset, synthetic
from kd.errors import UserError
from kd.io.progress import say
from kd.methods import batches
from kd.parallel import distributed
from kd.ranges import Count
from kd.state import State

AUTOENCODER = 'autoencoder'


def class_clusters(context: Context, *, clusters: Count = 10, split: str = 'train') -> StageWriter:
    """Writes centres of K-means within each class, and their shares, to `DIRECTORY/clusters/`.

    With the reference `autoencoder` (`kd.models.autoencoder_kl`) they are of latents, the means
    that it says, scaled as networks of latents take them; else of the data as they are. A class is
    encoded and clustered at a time. Every example counts once and as it is: the released code of
    DMGD drops the last batch and mirrors at random.

    Args:
      context: the stage, with labelled data.
      clusters: of each class, at most its examples.
      split: of the stage's data.

    Raises:
      UserError: data without labels, or a class that is too small.

    Source: DMGD, arXiv:2605.03877.
    """
    if context.num_classes is None:
        raise UserError(f'{context.stage}: clusters of classes need data with class labels.')
    encoder: Any = context.references.get(AUTOENCODER)

    def encoded(variables, batch):
        mean, _ = encoder.module.apply(variables, batch['input'], method='encode')
        return encoder.module.scaled(mean)

    def features(state: State, source: sources.Source) -> np.ndarray:
        if encoder is None:
            return source.fetch(np.arange(len(source)))['input']
        size, variables = context.batch_size, state.frozen[AUTOENCODER]
        ask = batches.asking(encoded, variables, source, size, fields=('input',))
        parts = [ask(number) for number in range(-(-len(source) // size))]
        return np.concatenate(parts)[: len(source)]

    def write(state: State, step: int, directory: Path) -> None:
        del step
        source = context.source(split)
        if distributed.from_first(stored.file_of(directory).exists):
            return
        label, found = synthetic.labels_of(source), []
        for name in range(source.num_classes or 0):
            members = features(state, _Rows(source, np.flatnonzero(label == name)))
            try:
                found.append(coreset.clusters(members, clusters, seed=context.recipe.seed))
            except ValueError as error:
                raise UserError(f'{context.stage}, class {name}: {error}') from error
        centroids, mass = (np.stack(parts) for parts in zip(*found, strict=True))
        if distributed.is_first():
            stored.write(directory, centroids, mass, sources.fingerprint(source))
            say(context.stage, f'{clusters} clusters of each of {len(centroids)} classes')
        distributed.agree(lambda: None)

    return write


class _Rows(sources.Derived):
    """Some of the examples of another source."""

    def __init__(self, source: sources.Source, rows: Sequence[int] | np.ndarray) -> None:
        super().__init__(source, {})
        self._rows = np.asarray(rows)

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`."""
        return self._source.fetch(self._rows[indices])
