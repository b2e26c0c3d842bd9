"""Images beside what is left of them at a lower resolution, at their own size: `input` and `low`.

    data=dict(source=dict(name='kd.data.transforms.low_resolution.low_resolution', scales=(4,),
                          of=dict(name='kd.data.patches.crops', of='china_flower', size=8)),
              train='train', validation='test')

A flow or a diffusion model of restoration is told `low`, as further channels of its input.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from kd import config as config_lib
from kd import resample
from kd.config import Block
from kd.data import sources
from kd.data.context import SourceContext
from kd.data.patches import LOW
from kd.errors import UserError
from kd.ranges import Count, NonNegative, Seed

# What is left at the scale before the last: of an easier task.
EASIER = 'easier'
Down = Literal['box', 'matlab', 'torch_antialias', 'torch']
Up = Literal['repeat', 'matlab', 'torch_antialias', 'torch']


class LowResolution(sources.Derived):
    """A source of images and of what is left of them; see `low_resolution`.

    Attributes:
      scales, down, up: as of `low_resolution`.
    """

    def __init__(
        self,
        source: sources.Source,
        scales: Sequence[int],
        down: Down,
        up: Up,
        noise: float,
        seed: int,
    ) -> None:
        image = source.spec.get('input')
        if image is None or len(image.shape) != 3:
            raise UserError(
                f"data.source.of must have images, an 'input' [H, W, C]; the data have "
                f'{ {name: x.shape for name, x in source.spec.items()} }.'
            )
        height, width = image.shape[:2]
        if any(b % a or a == b for a, b in itertools.pairwise((1, *scales))):
            raise UserError(f'data.source.scales={tuple(scales)} must each be so many times the '
                            'one before, above 1.')  # fmt: skip
        if not scales or height % scales[-1] or width % scales[-1]:
            raise UserError(
                f'data.source.scales={tuple(scales)}: images of {height} x {width} pixels need one '
                'at least, of which their sides are multiples.'
            )
        if noise and len(scales) > 1:
            raise UserError(
                f'data.source.noise={noise:g} is of one scale: of {tuple(scales)} the smaller '
                'images would not be made of the larger ones, which have noise of their own.'
            )
        self.scales, self.down, self.up = tuple(scales), down, up
        self._noise, self._seed = noise, seed
        self._names = (EASIER, LOW) if len(scales) > 1 else (LOW,)
        super().__init__(source, dict.fromkeys(self._names, image))

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with `low`, and `easier` where there are several scales."""
        batch = self._source.fetch(indices)
        noise = None
        if self._noise:
            rngs = [np.random.default_rng([self._seed, int(i)]) for i in indices]
            shape = self.spec['input'].shape
            noise = self._noise * np.stack([rng.standard_normal(shape) for rng in rngs])
        found = lowered(batch['input'], self.scales, self.down, self.up, noise)
        named = zip(self._names, found[-len(self._names) :], strict=True)
        return {**batch, **{name: x.astype(np.float32) for name, x in named}}

    def lowered(self, images: Any) -> np.ndarray:
        """What would be left of images [B, H, W, C], at their size and without noise."""
        return lowered(np.asarray(images), self.scales, self.down, self.up)[-1].astype(np.float32)


def low_resolution(
    context: SourceContext,
    *,
    of: str | Block,
    scales: tuple[Count, ...] = (4,),
    down: Down = 'torch_antialias',
    up: Up = 'torch_antialias',
    noise: NonNegative = 0.0,
    seed: Seed = 0,
) -> LowResolution:
    """Images x as `input`, and U(D(x) + noise) like x as `low`.

    Several scales are nested: what is left at 4 is made of what is left at 2. `low` is at the last,
    and `easier` at the one before.

    Args:
      context: of a split.
      of: a data set of images by name, see `kd.data.catalogue.load`, or the block of a source.
      scales: by which images are made small.
      down: 'box' for means of squares, or a convention of `kd.resample`.
      up: 'repeat' for each pixel again, or a convention.
      noise: deviation of Gaussian noise on the small images, drawn once for each example; for
        one scale alone.
      seed: of it.

    Raises:
      UserError: no images; scales that do not divide these or each other; noise at several.
    """
    where = 'data.source.of'
    source = context.load(of) if isinstance(of, str) else config_lib.build(of, context, where=where)
    return LowResolution(source, scales, down, up, noise, seed)


def lowered(
    images: np.ndarray,
    scales: Sequence[int],
    down: Down,
    up: Up,
    noise: np.ndarray | None = None,
) -> list[np.ndarray]:
    """What is left of images [B, H, W, C] at each of the scales, at their size.

    Args:
      images: of sides that are multiples of the last scale.
      scales, down, up: see `low_resolution`.
      noise: like `images`; so much of it as a small image has pixels is added to that.
    """
    height, width = images.shape[1:3]
    small, before, found = images.astype(np.float64), 1, []
    for scale in scales:
        size = (height // scale, width // scale)
        if down == 'box':
            small = resample.box(small, scale // before)
        else:
            small = resample.resize(small, size, down)
        before, seen = scale, small
        if noise is not None:
            seen = small + noise[:, : size[0], : size[1]]
        if up == 'repeat':
            found.append(resample.repeat(seen, scale))
        else:
            found.append(resample.resize(seen, (height, width), up))
    return found
