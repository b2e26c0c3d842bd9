"""Scenes seen in part: points of a spiral, and outlines of boxes as a scanner sees them."""

from __future__ import annotations

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext

SIZES = {'train': 20_000, 'validation': 2_000, 'test': 2_000}
# Of the boxes: points of a scene, and rays of the scanner.
POINTS, RAYS = 128, 32
NOISE = 0.35


def spiral(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """A point near a spiral of one and a half turns, 'input' [N, 1, 2], and it blurred, 'partial'.

    Radius .4 + 1.6 u, angle 3 pi u, u even on [0, 1], deviation .05; the blur has .35.
    """
    u = rng.random(count)
    scene = on_spiral(u) + 0.05 * rng.standard_normal((count, 2))
    blurred = scene + NOISE * rng.standard_normal((count, 2))
    return {'input': scene[:, None], 'partial': blurred[:, None]}


def on_spiral(u: np.ndarray) -> np.ndarray:
    """Points [..., 2] of the spiral at u in [0, 1]."""
    radius, angle = 0.4 + 1.6 * u, 3 * np.pi * u
    return radius[..., None] * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def boxes(rng: np.random.Generator, count: int) -> dict[str, np.ndarray]:
    """Outlines of one to three boxes, 'input' [N, 128, 2], and what rays from 0 meet, 'partial'.

    Centres are even on 1 to 2 from the origin, halves of sides on .2 to .5; [N, 32, 2] are points
    of the outlines, the nearest to the origin in each of 32 equal angles, or the nearest of all
    where an angle has none.
    """
    pairs = [_boxes(rng) for _ in range(count)]
    return {
        'input': np.stack([whole for whole, _ in pairs]),
        'partial': np.stack([seen for _, seen in pairs]),
    }


def _boxes(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    number = rng.integers(1, 4)
    angle, radius = 2 * np.pi * rng.random(number), 1 + rng.random(number)
    centre = radius[:, None] * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    half = 0.2 + 0.3 * rng.random((number, 2))
    box = rng.integers(number, size=POINTS)
    side, along = rng.integers(4, size=POINTS), 2 * rng.random(POINTS) - 1
    across = np.where(side % 2 == 0, 1.0, -1.0)
    flat = (side < 2)[:, None]
    square = np.where(flat, np.stack([along, across], 1), np.stack([across, along], 1))
    whole = centre[box] + half[box] * square
    away = np.linalg.norm(whole, axis=1)
    sector = ((np.arctan2(whole[:, 1], whole[:, 0]) + np.pi) / (2 * np.pi) * RAYS).astype(int)
    nearest = np.full(RAYS, away.argmin())
    for ray in range(RAYS):
        met = np.flatnonzero(sector % RAYS == ray)
        if len(met):
            nearest[ray] = met[away[met].argmin()]
    return whole, whole[nearest]


SCENES = {'spiral': spiral, 'boxes': boxes}


def make(kind: str, split: str, seed: int = 0, count: int | None = None) -> sources.Batch:
    """A split of one kind of scene: 'input' and 'partial', float32.

    Raises:
      DataError: a kind or a split that is not there.
    """
    if kind not in SCENES or split not in SIZES:
        raise sources.DataError(
            f'scenes are {list(SCENES)} with splits {list(SIZES)}, not {kind!r} with {split!r}'
        )
    rng = np.random.default_rng([seed, list(SCENES).index(kind), list(SIZES).index(split)])
    drawn = SCENES[kind](rng, count or SIZES[split])
    return {name: value.astype(np.float32) for name, value in drawn.items()}


def scenes(context: SourceContext, *, kind: str) -> sources.Source:
    """`make` as a source, for the key `source` of a recipe's data."""
    arrays = make(kind, context.split, context.recipe.seed)
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in arrays.items()
    }
    sizes = {context.split: SIZES[context.split]}
    data = sources.DataSet(kind, sizes, lambda _: sources.in_memory(arrays), spec, None)
    return sources.Source(data, context.split)
