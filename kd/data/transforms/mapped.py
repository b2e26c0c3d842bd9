"""Sources whose inputs are transformed on the host, and one of them: cropped and resized images.

A recipe names it as `data=dict(source=dict(name='kd.data.transforms.mapped.resized', of='celeb_a',
...), train='train', ...)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.ranges import Count


class MappedSource(sources.Derived):
    """Another source with `transform` applied to its inputs.

    Args:
      source: the other one.
      transform: float32 [B, ...] -> float32 [B, *shape], on the host.
      shape: of one transformed input.
      seen: the transform in words, see `kd.data.sources.Source`.
    """

    def __init__(
        self,
        source: sources.Source,
        transform: Callable[[np.ndarray], np.ndarray],
        shape: tuple[int, ...],
        seen: str = '',
    ):
        super().__init__(source, {'input': jax.ShapeDtypeStruct(shape, np.float32)}, seen)
        self._transform = transform

    def from_pixels(self, images: np.ndarray) -> np.ndarray:
        """As `Source.from_pixels`, transformed."""
        return self._transform(self._source.from_pixels(images))

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with 'input' transformed."""
        batch = self._source.fetch(indices)
        return {**batch, 'input': self._transform(batch['input'])}


def resized(
    context: SourceContext,
    *,
    of: str,
    crop: Count,
    size: Count,
) -> MappedSource:
    """The central crop x crop pixels of each image, resized to size x size by area.

    Args:
      context: of a split of the data set.
      of: name of an image data set, see `kd.data.catalogue.load`.
      crop, size: in pixels, `size` at most `crop`.

    Raises:
      ValueError: sizes that do not fit in each other or in the images.
    """
    source = context.load(of)
    height, width, channels = source.spec['input'].shape
    if not 0 < size <= crop <= min(height, width):
        raise ValueError(
            f'size={size} and crop={crop} must satisfy size <= crop <= {min(height, width)}, the '
            f'smaller side of the images of {of!r}.'
        )
    top, left = (height - crop) // 2, (width - crop) // 2
    weights = area_weights(crop, size)

    def transform(images: np.ndarray) -> np.ndarray:
        window = images[:, top : top + crop, left : left + crop]
        return np.einsum('ij,bjkc,lk->bilc', weights, window, weights, optimize=True)

    seen = f'crop={crop}, size={size}'
    return MappedSource(source, transform, (size, size, channels), seen)


def area_weights(old: int, new: int) -> np.ndarray:
    """float32 [new, old]: row i averages the old pixels under new pixel i, by their shares."""
    edges = np.arange(new + 1) * (old / new)
    low = np.maximum(edges[:-1, None], np.arange(old))
    high = np.minimum(edges[1:, None], np.arange(1, old + 1))
    return (np.maximum(high - low, 0.0) * (new / old)).astype(np.float32)
