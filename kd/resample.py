"""Resampling of pictures as other programs do it, whose "bicubic" are four different maps.

| convention | kernel | at the border | shrinking | types |
|---|---|---|---|---|
| matlab | a = -1/2 | mirrored | wider kernel | uint8: rounded after each axis; float: not rounded |
| pillow | a = -1/2 | dropped, the rest has sum 1 | wider kernel | uint8, weights to 2^-22 |
| torch_antialias | a = -1/2 | dropped, the rest has sum 1 | wider kernel | float |
| torch | a = -3/4 | clamped | four neighbours | float |

`torch_antialias` is `torch.nn.functional.interpolate(..., mode='bicubic', antialias=True)` and,
up to float32, `jax.image.resize(..., 'cubic')`; `torch` is the same without antialiasing. Each is a
matrix for each axis. An enlargement is the same by all but in its border and the kernel.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

Convention = Literal['matlab', 'pillow', 'torch_antialias', 'torch']
Border = Literal['mirror', 'drop', 'clamp']

# Arguments of `matrix`.
_MATRICES: dict[str, dict[str, Any]] = {
    'matlab': dict(border='mirror'),
    'pillow': dict(border='drop'),
    'torch_antialias': dict(border='drop'),
    'torch': dict(a=-0.75, border='clamp', antialias=False),
}
# Bits behind the point of Pillow's weights.
_BITS = 22


def cubic(x: np.ndarray, a: float = -0.5) -> np.ndarray:
    """Keys' kernel, 0 from |x| = 2 on; float64 as `x`.

    (a + 2)|x|^3 - (a + 3)|x|^2 + 1 up to 1,   a|x|^3 - 5a|x|^2 + 8a|x| - 4a up to 2
    """
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def matrix(
    old: int,
    new: int,
    *,
    a: float = -0.5,
    border: Border = 'mirror',
    antialias: bool = True,
) -> np.ndarray:
    """Weights of the old pixels in each new one, float64 [new, old], rows of sum 1.

    Pixel i of the new ones lies at u = (i + 1/2) old / new - 1/2 and weighs old pixel j by
    cubic((j - u) / w), w the factor by which an axis shrinks, 1 where it grows.

    Args:
      old, new: pixels along the axis.
      a: of the kernel.
      border: what lies outside: the picture in a mirror, nothing, or its last pixel again.
      antialias: False for w = 1 always.

    Raises:
      ValueError: no pixels.
    """
    return _banded(old, new, a, border, antialias).toarray()


@functools.lru_cache(maxsize=64)
def _banded(old: int, new: int, a: float, border: Border, antialias: bool) -> Any:
    """`matrix`, its zeros left out."""
    if min(old, new) < 1:
        raise ValueError(f'pictures have a side of at least 1 pixel, got {old} and {new}')
    ratio = old / new
    width = max(ratio, 1.0) if antialias else 1.0
    centre = (np.arange(new) + 0.5) * ratio - 0.5
    taps = int(np.ceil(4 * width)) + 2
    places = np.floor(centre - 2 * width).astype(int)[:, None] + np.arange(taps)
    weights = cubic((places - centre[:, None]) / width, a)
    if border == 'drop':
        weights = np.where((places >= 0) & (places < old), weights, 0.0)
    weights /= weights.sum(1, keepdims=True)
    if border == 'mirror':
        places = places % (2 * old)
        places = np.minimum(places, 2 * old - 1 - places)
    else:
        places = np.clip(places, 0, old - 1)
    rows = np.repeat(np.arange(new), taps)
    entries = (weights.ravel(), (rows, places.ravel()))
    found = scipy.sparse.csr_array(entries, shape=(new, old))
    found.eliminate_zeros()
    return found


def resize(images: Any, size: tuple[int, int], convention: Convention) -> Any:
    """Pictures of another size.

    Args:
      images: [..., H, W, C]. NumPy's uint8 for 'matlab' and 'pillow', which return uint8; floats
        for all but 'pillow'. Arrays of JAX, traced ones too, become float32 products.
      size: (height, width) of the result.
      convention: see the module.

    Returns:
      [..., *size, C]; NumPy's floats as float64, not clipped.

    Raises:
      ValueError: another convention, or a type that it does not have.
    """
    if convention not in get_args(Convention):
        known = ', '.join(map(repr, get_args(Convention)))
        raise ValueError(f'convention={convention!r} must be one of {known}')
    whole = images.dtype == np.uint8
    if whole != (convention == 'pillow') and not (whole and convention == 'matlab'):
        wanted = 'uint8' if convention == 'pillow' else 'floats'
        raise ValueError(f'{convention!r} takes {wanted}, got {images.dtype}')
    height, width = images.shape[-3:-1]
    if isinstance(images, jax.Array):
        if whole:
            raise ValueError(f'{convention!r} of uint8 is for arrays of NumPy')
        down, right = (
            jnp.asarray(matrix(old, new, **_MATRICES[convention]), jnp.float32)
            for old, new in zip((height, width), size, strict=True)
        )
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum('yh,...hwc,xw->...yxc', down, images, right, precision=exact)
    x = np.asarray(images)
    axes = {-3: (height, size[0]), -2: (width, size[1])}
    for axis in _order(axes, convention):
        old, new = axes[axis]
        if convention == 'pillow' and old == new:
            continue
        x = _along(x, axis, old, new, convention)
        if whole:
            x = _rounded(x, convention)
    return x


def _order(axes: dict[int, tuple[int, int]], convention: Convention) -> list[int]:
    """Pillow goes along rows first; MATLAB along the axis that shrinks most, else down first."""
    if convention == 'pillow':
        return [-2, -3]
    return sorted(axes, key=lambda axis: axes[axis][1] / axes[axis][0])


def _along(x: np.ndarray, axis: int, old: int, new: int, convention: Convention) -> np.ndarray:
    """One axis of `resize`, as numbers that are not rounded yet."""
    settings = dict(a=-0.5, antialias=True) | _MATRICES[convention]
    kind: Any = np.int64 if convention == 'pillow' else np.float64
    weights = _banded(old, new, **settings)
    if convention == 'pillow':
        weights = weights.copy()
        scaled = weights.data * (1 << _BITS)
        weights.data = np.trunc(scaled + np.copysign(0.5, scaled)).astype(kind)
    moved = np.moveaxis(x, axis, 0)
    # Turned round as uint8, where it is: eight times fewer bytes to move.
    flat = np.ascontiguousarray(moved).reshape(old, -1).astype(kind)
    return np.moveaxis((weights @ flat).reshape(new, *moved.shape[1:]), 0, axis)


def _rounded(x: np.ndarray, convention: Convention) -> np.ndarray:
    """To uint8, halves up; Pillow's have `_BITS` bits behind the point. Writes over `x`."""
    if convention == 'pillow':
        x += 1 << _BITS - 1
        x >>= _BITS
    else:
        x += 0.5  # Cut off below: all that is not negative is thereby rounded.
    return np.clip(x, 0, 255, out=x).astype(np.uint8)


def box(x: Any, scale: int) -> Any:
    """Means of squares of `scale` x `scale` pixels: [..., H, W, C] to [..., H / s, W / s, C].

    Raises:
      ValueError: sides that are no multiples.
    """
    *lead, height, width, channels = x.shape
    if height % scale or width % scale:
        raise ValueError(f'{height} x {width} pixels are no multiple of {scale}')
    parts = (*lead, height // scale, scale, width // scale, scale, channels)
    return x.reshape(parts).mean((-4, -2))


def repeat(x: Any, scale: int) -> Any:
    """Each pixel `scale` x `scale` times: what `box` undoes."""
    return x.repeat(scale, -3).repeat(scale, -2)
