"""Shapes in 3-D on a small grid: spheres, boxes and tori, as soft occupancies."""

from __future__ import annotations

import jax
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.ranges import Count

SIZES = {'train': 8_000, 'test': 2_000}
KINDS = ('sphere', 'box', 'torus')
# Width of a surface, in sides of the cube [-1, 1]^3.
SOFT = 0.15


def distance(kind: str, points: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Signed distances of points [..., 3] to the surface of a shape at 0, negative inside.

    `size` has the radius; halves of three sides; or the radius of the ring and of its tube, for a
    ring about the third axis.
    """
    if kind == 'sphere':
        return np.linalg.norm(points, axis=-1) - size[0]
    if kind == 'box':
        beyond = np.abs(points) - size
        outside = np.linalg.norm(np.maximum(beyond, 0), axis=-1)
        return outside + np.minimum(beyond.max(-1), 0)
    ring = np.linalg.norm(points[..., :2], axis=-1) - size[0]
    return np.hypot(ring, points[..., 2]) - size[1]


def make(split: str, seed: int = 0, count: int | None = None, side: int = 8) -> sources.Batch:
    """'input' float32 [N, side, side, side, 1], tanh(-distance / .15), and 'label' of `KINDS`.

    Radii are even on .45 to .85, halves of sides on .35 to .75; rings have .5 to .6 and tubes .2 to
    .3; centres are within .1 of the middle along each axis.

    Raises:
      DataError: a split that is not there.
    """
    if split not in SIZES:
        raise sources.DataError(f'shapes have the splits {list(SIZES)}, not {split!r}')
    rng = np.random.default_rng([seed, list(SIZES).index(split)])
    middle = (2 * np.arange(side) + 1) / side - 1
    grid = np.stack(np.meshgrid(middle, middle, middle, indexing='ij'), axis=-1)
    size = count or SIZES[split]
    label = rng.integers(len(KINDS), size=size)
    bounds = {'sphere': ((0.45, 0.85),), 'box': ((0.35, 0.75),) * 3,
              'torus': ((0.5, 0.6), (0.2, 0.3))}  # fmt: skip
    found = np.empty((size, side, side, side, 1), np.float32)
    for i in range(size):
        kind = KINDS[label[i]]
        low, high = np.array(bounds[kind]).T
        centre = rng.uniform(-0.1, 0.1, 3)
        away = distance(kind, grid - centre, rng.uniform(low, high))
        found[i, ..., 0] = np.tanh(-away / SOFT)
    return {'input': found, 'label': label.astype(np.int32)}


def shapes(context: SourceContext, *, side: Count = 8) -> sources.Source:
    """`make` as a source, for the key `source` of a recipe's data."""
    arrays = make(context.split, context.recipe.seed, side=side)
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in arrays.items()
    }
    sizes = {context.split: SIZES[context.split]}
    data = sources.DataSet('shapes', sizes, lambda _: sources.in_memory(arrays), spec, len(KINDS))
    return sources.Source(data, context.split)
