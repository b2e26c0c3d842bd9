"""Networks of pictures on pictures that are too large, or of sides that they do not take."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

# Pixels that parts of a picture share.
SHAVE, OVERLAP = 32, 32
# Pictures [B, H, W, C] to pictures of `scale` times their sides.
Restore = Callable[[Any], Any]


def adaptive_crop(fn: Restore, x: Any, *, shave: int = SHAVE, multiple: int = 4) -> Any:
    """A picture by its four quarters, each seen with `shave` pixels of the others and then cut.

    Source: IMDN 2019, arXiv 1909.11856, and its release: for networks from and to the same
    size that take sides of certain multiples. The parts are one batch of four.

    Args:
      fn: keeps sizes.
      x: [1, H, W, C], of NumPy or JAX, as what is returned.
      shave: as above, less what the multiple takes.
      multiple: of the sides that `fn` gets.

    Raises:
      ValueError: more pictures, or one whose sides are too short for parts of such a size.
    """
    count, height, width = x.shape[:3]
    parts = [side // 2 + shave - (side // 2 + shave) % multiple for side in (height, width)]
    if count != 1:
        raise ValueError(f'adaptive_crop takes one picture, got {count}')
    if parts[0] > height or parts[1] > width or shave < multiple:
        raise ValueError(
            f'{height} x {width} pixels have no parts of {parts[0]} x {parts[1]}; sides must be '
            f'about twice shave={shave}, and that at least {multiple}'
        )
    starts = [(0, side - part) for side, part in zip((height, width), parts, strict=True)]
    corners = [(top, left) for top in starts[0] for left in starts[1]]
    cut = [x[0, top : top + parts[0], left : left + parts[1]] for top, left in corners]
    xp: Any = jnp if isinstance(x, jax.Array) else np
    out = fn(xp.stack(cut))
    down, right = height // 2, width // 2
    halves = [(0, down), (down, height)], [(0, right), (right, width)]
    places = [(rows, columns) for rows in halves[0] for columns in halves[1]]
    quarters = [
        part[rows[0] - top : rows[1] - top, columns[0] - left : columns[1] - left]
        for part, (top, left), (rows, columns) in zip(out, corners, places, strict=True)
    ]
    upper, lower = (xp.concatenate(quarters[i : i + 2], 1) for i in (0, 2))
    return xp.concatenate([upper, lower])[None]


def tiled(
    fn: Restore,
    x: np.ndarray,
    *,
    scale: int,
    tile: int,
    overlap: int = OVERLAP,
    said: Callable[[int], None] = lambda done: None,
) -> np.ndarray:
    """A picture by tiles of one size, so that there is one program, of whatever size it is.

    Tiles overlap; of two the one counts whose middle is nearer. A network that looks no further
    than overlap / 2 and takes no statistics of the whole does not see that there are tiles.

    Args:
      fn: [1, h, w, C] to [1, scale h, scale w, D].
      x: [1, H, W, C], on the host.
      scale: of `fn`.
      tile: largest side of a tile.
      overlap: pixels that neighbours share at least.
      said: is told how many tiles are done, of `count`.

    Returns:
      [1, scale H, scale W, D].

    Raises:
      ValueError: tiles of no more than their overlap.
    """
    if tile <= overlap:
        raise ValueError(f'tile={tile} must be larger than overlap={overlap}')
    height, width = x.shape[1:3]
    rows, columns = list(_spans(height, tile, overlap)), list(_spans(width, tile, overlap))
    found, done = np.empty(0), 0
    for top, first_row, last_row in rows:
        for left, first, last in columns:
            part = x[:, top : top + tile, left : left + tile]
            out = np.asarray(fn(jnp.asarray(part)))
            if not done:
                shape = (1, scale * height, scale * width, out.shape[-1])
                found = np.empty(shape, np.float32)
            found[:, scale * first_row : scale * last_row, scale * first : scale * last] = out[
                :,
                scale * (first_row - top) : scale * (last_row - top),
                scale * (first - left) : scale * (last - left),
            ]
            done += 1
            said(done)
    return found


def count(size: Sequence[int], tile: int, overlap: int = OVERLAP) -> int:
    """How many tiles a picture of `size` (height, width) has."""
    return math.prod(len(list(_spans(side, tile, overlap))) for side in size)


def _spans(side: int, tile: int, overlap: int) -> Iterator[tuple[int, int, int]]:
    """(start of a tile, first and last pixel that are taken of it) along an axis."""
    count = 1 if side <= tile else -(-(side - overlap) // (tile - overlap))
    starts = np.linspace(0, max(side - tile, 0), count).round().astype(int).tolist()
    ends = [(a + tile + b) // 2 for a, b in itertools.pairwise(starts)]
    yield from zip(starts, [0, *ends], [*ends, side], strict=True)
