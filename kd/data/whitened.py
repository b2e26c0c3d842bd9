"""Data sets seen through a whitening, for networks that need inputs of one scale."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd.config import ConfigDict
from kd.data import sources, whitening


class WhitenedSource(sources.Source):
    """A source whose images are whitened.

    Attributes:
      whitening: the transformation.
    """

    def __init__(self, source: sources.Source, fitted: whitening.Whitening):
        # Everything but the images is the source's; its own initialisation would open it again.
        self._source = source
        self.whitening = fitted
        self.name, self.split, self.spec = source.name, source.split, source.spec
        self.num_classes, self.class_names = source.num_classes, source.class_names

    def __len__(self) -> int:
        return len(self._source)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with 'input' whitened."""
        batch = self._source.fetch(indices)
        # In NumPy: batches are made on the host, by threads.
        images = batch['input'].reshape(len(batch['input']), -1)
        flat = (images - np.asarray(self.whitening.mean)) @ np.asarray(self.whitening.matrix)
        return {**batch, 'input': flat.reshape(batch['input'].shape)}

    def to_pixels(self, images: ArrayLike) -> np.ndarray:
        """Whitened images [N, H, W, C] as pixels in about [-1, 1]."""
        return np.asarray(self.whitening.invert(jnp.asarray(images)))


def whitened(
    split: str,
    config: ConfigDict,
    workdir: Path | None,
    *,
    of: str,
    fit_on: str = 'train',
    eps: float = 0.1,
) -> WhitenedSource:
    """For `data=dict(source=dict(name='kd.data.whitened.whitened', of='digits'), train=...)`.

    Args:
      split: of the data set.
      config: the recipe, for its `data_dir`.
      workdir: unused; sources made from the files of a stage need it.
      of: name of an image data set, see `kd.data.sources.load`.
      fit_on: split whose mean and covariance are used.
      eps: added to the variances; pixels that hardly vary are not blown up to unit variance.
    """
    data_dir = config.get('data_dir', None) or None
    train = sources.load(of, fit_on, data_dir=data_dir)
    fitted = whitening.fit(train.fetch(np.arange(len(train)))['input'], eps)
    return WhitenedSource(sources.load(of, split, data_dir=data_dir), fitted)
