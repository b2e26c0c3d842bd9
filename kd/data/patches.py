"""Patches of pictures, alone or with what is left of them at a lower resolution.

data=dict(source=dict(name='kd.data.patches.patches', of='DIV2K', scale=2, size=96),
          train='DIV2K_train_HR', validation='DIV2K_valid_HR')

have `low` and `target`; `crops` have the pictures' own pixels, as `input`, of which
`kd.data.transforms.low_resolution` makes something less.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

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
# Of R, G and B in grey, ITU-R BT.601.
_GREY = np.array([0.299, 0.587, 0.114], np.float32)


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
    whole = _opened(context, of, scale * size, augment)

    @functools.cache
    def pair(place: int) -> tuple[np.ndarray, np.ndarray]:
        return degraded(whole()[place], scale, convention)

    def read(rows: np.ndarray) -> sources.Batch:
        sides = [tuple(side // scale for side in x.shape[:2]) for x in whole()]
        places = [_drawn(sides, size, seed, int(row)) for row in rows]
        cuts = [
            [_cut(pair(place.number)[part], place, by, size, augment) for place in places]
            for part, by in enumerate((1, scale))
        ]
        low, target = (
            to_unit(np.stack(cut)) if cut else np.zeros((0, *shape), np.float32)
            for cut, shape in zip(cuts, shapes, strict=True)
        )
        return {LOW: low, TARGET: target}

    shapes = [(side, side, 3) for side in (size, scale * size)]
    spec = zip((LOW, TARGET), shapes, strict=True)
    return _source(context, f'{of}:x{scale}', count, read, dict(spec))


def crops(
    context: SourceContext,
    *,
    of: str,
    size: Count,
    count: Count = 1_000_000,
    channels: Literal['rgb', 'grey'] = 'rgb',
    augment: Sequence[str] = (),
    seed: Seed = 0,
) -> sources.Source:
    """`input` [size, size, 3], or 1 where it is grey, float32 in [-1, 1].

    Args:
      context, of, count, augment, seed: as of `patches`.
      size: of a crop.
      channels: 'grey' is .299 R + .587 G + .114 B.

    Raises:
      UserError, DataError: as of `patches`.
    """
    whole = _opened(context, of, size, augment)
    shape = (size, size, 1 if channels == 'grey' else 3)
    # Small ones are kept: drawing them takes longer than what is learnt of them.
    keep = count * size * size * 3 <= sources.CACHE_BYTES
    kept: dict[int, np.ndarray] = {}

    def cut(row: int) -> np.ndarray:
        sides = [x.shape[:2] for x in whole()]
        place = _drawn(sides, size, seed, row)
        return _cut(whole()[place.number], place, 1, size, augment)

    def read(rows: np.ndarray) -> sources.Batch:
        found = np.zeros((len(rows), size, size, 3), np.uint8)
        for i, row in enumerate(map(int, rows)):
            if keep and row not in kept:
                kept[row] = cut(row).copy()
            found[i] = kept[row] if keep else cut(row)
        crop = to_unit(found)
        return {'input': (crop @ _GREY)[..., None] if channels == 'grey' else crop}

    return _source(context, f'{of}:{channels}', count, read, {'input': shape})


def _opened(
    context: SourceContext, of: str, side: int, augment: Sequence[str]
) -> Callable[[], list[np.ndarray]]:
    """The pictures, read once: at once in a run, and never where a recipe is only checked."""
    unknown = set(augment) - set(AUGMENTATIONS)
    if unknown:
        raise UserError(f'There is no augmentation {sorted(unknown)}, only {list(AUGMENTATIONS)}.')

    @functools.cache
    def whole() -> list[np.ndarray]:
        shown = pictures(of, context.split, context.recipe.data_dir)
        for name, picture in shown.items():
            if min(picture.shape[:2]) < side:
                raise DataError(
                    f'{name} of {of!r} has {picture.shape[0]} x {picture.shape[1]} pixels, and a '
                    f'patch {side} x {side}'
                )
        return list(shown.values())

    if context.workdir is not None:
        whole()
    return whole


def _source(
    context: SourceContext,
    name: str,
    count: int,
    read: sources.Reader,
    shapes: dict[str, tuple[int, ...]],
) -> sources.Source:
    data = sources.DataSet(
        name=name,
        sizes={context.split: count},
        reader=lambda split: read,
        spec={field: jax.ShapeDtypeStruct(shape, np.float32) for field, shape in shapes.items()},
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


class _Place(NamedTuple):
    """Of a patch: which picture, where in it, and which coins of `AUGMENTATIONS` fell so."""

    number: int
    top: int
    left: int
    coins: dict[str, bool]


def _drawn(sides: Sequence[tuple[int, ...]], size: int, seed: int, row: int) -> _Place:
    """Of example `row`, in one of pictures of these sides."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, row])))
    number = int(rng.integers(len(sides)))
    top, left = (int(rng.integers(side - size + 1)) for side in sides[number])
    coins = rng.integers(2, size=len(AUGMENTATIONS)).astype(bool)
    return _Place(number, top, left, dict(zip(AUGMENTATIONS, coins.tolist(), strict=True)))


def _cut(
    picture: np.ndarray, place: _Place, by: int, size: int, augment: Sequence[str]
) -> np.ndarray:
    """The patch at a place in units of `by` pixels, turned."""
    turned = [name for name in AUGMENTATIONS if name in augment and place.coins[name]]
    top, left = place.top, place.left
    patch = picture[by * top : by * (top + size), by * left : by * (left + size)]
    patch = patch[:, ::-1] if 'flip' in turned else patch
    patch = patch[::-1] if 'flop' in turned else patch
    return patch.swapaxes(0, 1) if 'transpose' in turned else patch
