"""Image data sets standardised by statistics of their training split, and back to pixels."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.data.transforms import whitening
from kd.data.transforms.mapped import MappedSource
from kd.ranges import Finite, NonNegative, Positive

KINDS = ('zca', 'channels', 'mean', 'none')
# Images from which the mean and deviation of channels are taken at a time.
_CHUNK = 4096


class StandardisedSource(MappedSource):
    """A source of standardised images; see `standardised`."""

    def __init__(
        self,
        source: sources.Source,
        fit_on: sources.Source,
        kind: str,
        eps: float,
        moments: tuple[np.ndarray, np.ndarray] | None,
    ) -> None:
        seen = f'kind={kind!r}'
        if moments is not None:
            seen += f', mean={moments[0].tolist()}, deviation={moments[1].tolist()}'
        elif kind != 'none':
            seen += f', fit_on={fit_on.split!r}' + (f', eps={eps}' if kind == 'zca' else '')
        super().__init__(source, self.from_pixels, source.spec['input'].shape, seen)
        self.fit_on, self.kind, self.eps, self.moments = fit_on, kind, eps, moments

    def from_pixels(self, images: np.ndarray) -> np.ndarray:
        """Images [N, H, W, C] in [-1, 1] as networks see them, float32."""
        shift, scale, _ = self._fitted
        flat = images.reshape(len(images), -1) - shift
        flat = flat @ scale if scale.ndim == 2 else flat * scale
        return flat.reshape(images.shape).astype(np.float32)

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """The inverse of `from_pixels`; images that were trained may leave [-1, 1]."""
        shift, _, inverse = self._fitted
        flat = np.asarray(images).reshape(len(images), -1)
        flat = flat @ inverse if inverse.ndim == 2 else flat * inverse
        return (flat + shift).reshape(images.shape).astype(np.float32)

    @functools.cached_property
    def _fitted(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Shift [d], scale and inverse, each [d] or [d, d]. Fitted when pixels are first read."""
        shape = self.spec['input'].shape
        size = int(np.prod(shape))
        if self.kind == 'none':
            return np.zeros(size, np.float32), *2 * (np.ones(size, np.float32),)
        if self.moments is not None:
            return _per_channel(*self.moments, shape)
        images = everything(self.fit_on)['input']
        if self.kind == 'zca':
            fitted = whitening.fit(images, self.eps)
            return np.asarray(fitted.mean), np.asarray(fitted.matrix), np.asarray(fitted.inverse)
        rows = images.reshape(len(images), -1)
        if self.kind == 'mean':
            mean = rows.mean(0, dtype=np.float64).astype(np.float32)
            return mean, *2 * (np.ones(size, np.float32),)
        channels = rows.reshape(-1, shape[-1])
        mean, deviation = channels.mean(0, dtype=np.float64), channels.std(0, dtype=np.float64)
        return _per_channel(mean, deviation, shape)


def _per_channel(
    mean: np.ndarray, deviation: np.ndarray, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Shift, scale and inverse of every pixel, [d], from those of its channel."""
    shift, scale = (
        np.broadcast_to(x, shape).reshape(-1).astype(np.float32) for x in (mean, deviation)
    )
    return shift, 1 / scale, scale


def standardised(
    context: SourceContext,
    *,
    of: str,
    kind: str,
    fit_on: str = 'train',
    eps: NonNegative = 0.4,
    mean: Sequence[Finite] = (),
    deviation: Sequence[Positive] = (),
) -> StandardisedSource:
    """For the key `source` of a recipe's data: a split seen through a linear map.

        zca:       decorrelated pixels, see `kd.data.transforms.whitening.fit`
        channels:  (x - mean) / deviation, one of each per channel
        mean:      x - mean image
        none:      x in [-1, 1]

    Args:
      context: of a split of the data set.
      of: name of an image data set, see `kd.data.catalogue.load`.
      kind: one of the above.
      fit_on: the split whose statistics are used.
      eps: added to the variances of 'zca', see `kd.data.transforms.whitening.fit`.
      mean, deviation: for 'channels', one number per channel of pixels in [0, 1], instead of those
        of `fit_on`.

    Raises:
      ValueError: on another kind, on a mean or deviation for it, or on other than one per channel.
    """
    if kind not in KINDS:
        raise ValueError(f'Data is standardised by one of {", ".join(KINDS)}, got {kind!r}.')
    load = functools.partial(context.load, of)
    source, moments = load(), None
    if len(mean) or len(deviation):
        channels = source.spec['input'].shape[-1]
        if kind != 'channels' or (len(mean), len(deviation)) != (channels, channels):
            raise ValueError(
                f"mean and deviation are those of kind='channels', {channels} numbers each; got "
                f'{len(mean)} and {len(deviation)} for kind={kind!r}.'
            )
        moments = 2 * np.asarray(mean) - 1, 2 * np.asarray(deviation)
    return StandardisedSource(source, load(fit_on), kind, eps, moments)


def everything(source: sources.Source) -> sources.Batch:
    """All examples of a source, in order."""
    parts = [
        source.fetch(np.arange(i, min(i + _CHUNK, len(source))))
        for i in range(0, len(source), _CHUNK)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
