"""Patches of pictures and of what is left of them at a lower resolution: `low` and `target`.

data=dict(source=dict(name='kd.data.patches.patches', of='DIV2K', scale=2, size=96),
          train='DIV2K_train_HR', validation='DIV2K_valid_HR')
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np

from kd import resample
from kd.data import sources
from kd.data.context import SourceContext
from kd.data.pictures import pictures
from kd.data.sources import DataError
from kd.errors import UserError
from kd.ranges import Count, Seed
from kd.resample import Convention

LOW, TARGET = 'low', 'target'
# Each done to half of the patches: left and right exchanged, above and below, rows and columns.
AUGMENTATIONS = ('flip', 'flop', 'transpose')


def patches(
    context: SourceContext,
    *,
    of: str,
    scale: Count,
    size: Count,
    count: Count = 1_000_000,
    convention: Convention = 'matlab',
    augment: Sequence[str] = AUGMENTATIONS,
    seed: Seed = 0,
) -> sources.Source:
    """`low` [size, size, 3] and `target` [scale size, scale size, 3], float32 in [-1, 1].

    Example i is drawn by (seed, i): a picture, a place in it, and which augmentations. A whole
    picture is made small, and both are cut at the same place: the border of a patch knows what lay
    beyond it, as it does where a picture is restored.

    Args:
      context: of a split, which says of which folder, see `kd.data.pictures.pictures`.
      of: see there.
      scale: by which a picture is made small; it is cut to multiples of that first.
      size: of a low patch.
      count: how many examples there are.
      convention: of resampling.
      augment: some of `AUGMENTATIONS`.
      seed: as above.

    Raises:
      UserError: another augmentation.
      DataError: no such pictures, or one smaller than a patch. A recipe that is only checked needs
        none.
    """
    unknown = set(augment) - set(AUGMENTATIONS)
    if unknown:
        raise UserError(f'There is no augmentation {sorted(unknown)}, only {list(AUGMENTATIONS)}.')

    @functools.cache
    def whole() -> list[np.ndarray]:
        shown = pictures(of, context.split, context.recipe.data_dir)
        for name, picture in shown.items():
            if min(picture.shape[:2]) < scale * size:
                raise DataError(
                    f'{name} of {of!r} has {picture.shape[0]} x {picture.shape[1]} pixels, and a '
                    f'patch {scale * size} x {scale * size}'
                )
        return list(shown.values())

    @functools.cache
    def pair(place: int) -> tuple[np.ndarray, np.ndarray]:
        return degraded(whole()[place], scale, convention)

    def read(rows: np.ndarray) -> sources.Batch:
        drawn = [_draw(whole(), pair, scale, size, augment, seed, int(row)) for row in rows]
        low, target = (
            np.stack([one[part] for one in drawn]) if drawn else np.zeros((0, *shape), np.uint8)
            for part, shape in enumerate(shapes)
        )
        return {LOW: to_unit(low), TARGET: to_unit(target)}

    shapes = [(side, side, 3) for side in (size, scale * size)]
    if context.workdir is not None:
        whole()
    spec = zip((LOW, TARGET), shapes, strict=True)
    data = sources.DataSet(
        name=f'{of}:x{scale}',
        sizes={context.split: count},
        reader=lambda split: read,
        spec={name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in spec},
        num_classes=None,
    )
    return sources.Source(data, context.split)


def degraded(
    picture: np.ndarray, scale: int, convention: Convention = 'matlab'
) -> tuple[np.ndarray, np.ndarray]:
    """(low, target) of a picture, uint8 [H, W, 3]; the target is cut to multiples of `scale`.

    Conventions of floats are rounded once, at the end.
    """
    height, width = (side // scale * scale for side in picture.shape[:2])
    target = picture[:height, :width]
    size = (height // scale, width // scale)
    if convention in ('matlab', 'pillow'):
        return resample.resize(target, size, convention), target
    low = np.rint(resample.resize(target.astype(np.float64), size, convention))
    return np.clip(low, 0, 255).astype(np.uint8), target


def to_unit(picture: np.ndarray) -> np.ndarray:
    """uint8 as float32 in [-1, 1]."""
    return np.asarray(picture, np.float32) / 127.5 - 1


def _draw(
    whole: Sequence[np.ndarray],
    pair: Callable[[int], tuple[np.ndarray, np.ndarray]],
    scale: int,
    size: int,
    augment: Sequence[str],
    seed: int,
    row: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Example `row`."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, row])))
    low, target = pair(int(rng.integers(len(whole))))
    top, left = (rng.integers(side - size + 1) for side in low.shape[:2])
    coins = dict(zip(AUGMENTATIONS, rng.integers(2, size=len(AUGMENTATIONS)), strict=True))
    found = []
    for picture, by in ((low, 1), (target, scale)):
        patch = picture[by * top : by * (top + size), by * left : by * (left + size)]
        if 'flip' in augment and coins['flip']:
            patch = patch[:, ::-1]
        if 'flop' in augment and coins['flop']:
            patch = patch[::-1]
        if 'transpose' in augment and coins['transpose']:
            patch = patch.swapaxes(0, 1)
        found.append(patch)
    return found[0], found[1]
