"""Image operations with given parameters, from which the random augmentations are made.

Images are [B, H, W, C]. A parameter has a leading axis of B, or of 1 for all images alike.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.scipy.ndimage import map_coordinates


def check_images(images: jax.Array) -> None:
    """Raises ValueError unless `images` has the axes [B, H, W, C]."""
    if images.ndim != 4:
        raise ValueError(f'Images have the shape [B, H, W, C], got {list(images.shape)}.')


def mirror(images: jax.Array, mirrored: jax.Array) -> jax.Array:
    """Flips left to right the images where `mirrored`, bool [B or 1], is true."""
    return jnp.where(mirrored[:, None, None, None], images[:, :, ::-1], images)


def crop(
    images: jax.Array, padding: tuple[int, int], corners: jax.Array, fill: float | None
) -> jax.Array:
    """Pads by (rows, columns) on each side and cuts H x W windows at `corners`.

    Args:
      images: [B, H, W, C].
      padding: pixels added above and below, and left and right.
      corners: int [B or 1, 2], row and column of the window's first pixel in the padded image.
      fill: value of the added pixels, or None to mirror the image at its border.
    """
    count, height, width, channels = images.shape
    pads = ((0, 0), (padding[0], padding[0]), (padding[1], padding[1]), (0, 0))
    if fill is None:
        padded = jnp.pad(images, pads, mode='reflect')
    else:
        padded = jnp.pad(images, pads, constant_values=fill)

    def window(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(window)(padded, jnp.broadcast_to(corners, (count, 2)))


def erase(
    images: jax.Array,
    size: tuple[int, int] | jax.Array,
    corners: jax.Array,
    fill: float | jax.Array,
) -> jax.Array:
    """Overwrites a rectangle of each image, clipped at the border.

    Args:
      images: [B, H, W, C].
      size: rows and columns of the rectangle, or int [B or 1, 2].
      corners: int [B or 1, 2], its first row and column; may lie outside the image.
      fill: value written, or images to take the rectangle from.
    """
    covered = rectangle(images.shape[1:3], size, corners)
    return jnp.where(covered, jnp.asarray(fill, images.dtype), images)


def rectangle(
    space: tuple[int, ...], size: tuple[int, int] | jax.Array, corners: jax.Array
) -> jax.Array:
    """Which pixels of a space lie in a rectangle, bool [B or 1, H, W, 1]; see `erase`."""
    inside = []
    sizes = jnp.atleast_2d(jnp.asarray(size))
    for axis in range(2):
        places = jnp.arange(space[axis])
        first = corners[:, axis, None]
        inside.append((places >= first) & (places < first + sizes[:, axis, None]))
    return inside[0][:, :, None, None] & inside[1][:, None, :, None]


def affine(images: jax.Array, matrices: jax.Array, shifts: jax.Array | None = None) -> jax.Array:
    """Resamples each image at linearly transformed places about its centre, bilinearly.

        out(p) = in(centre + matrix (p - centre) + shift),   in = 0 outside the image

    Places are pixel centres in (row, column), so a matrix is a true rotation on any shape.

    Args:
      images: float [B, H, W, C].
      matrices: float [B or 1, 2, 2].
      shifts: float [B or 1, 2], in pixels; None for none.

    Returns:
      [B, H, W, C]; linear in `images`. No gradient flows to `matrices` through the choice of the
      four neighbours, as usual for bilinear interpolation.
    """
    count, height, width, _ = images.shape
    centre = jnp.asarray([(height - 1) / 2, (width - 1) / 2], images.dtype)
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing='ij')
    places = jnp.stack([rows, columns], -1).astype(images.dtype) - centre

    def one(image, matrix, shift):
        # HIGHEST: accelerators would otherwise round the places to a few bits.
        at = jnp.einsum('ij,hwj->ihw', matrix, places, precision='highest')
        at += (centre + shift)[:, None, None]
        return jax.vmap(lambda channel: map_coordinates(channel, list(at), order=1), -1, -1)(image)

    matrices = jnp.broadcast_to(matrices.astype(images.dtype), (count, 2, 2))
    shifts = jnp.zeros((1, 2)) if shifts is None else shifts
    return jax.vmap(one)(
        images, matrices, jnp.broadcast_to(shifts, (count, 2)).astype(images.dtype)
    )


def resize(
    images: jax.Array, corners: jax.Array, sizes: jax.Array, *, method: str = 'bilinear'
) -> jax.Array:
    """Resizes a rectangle of each image to the whole of it, without aliasing.

        out(i) = sum_j w(i, j) in(j) / sum_j w(i, j),   w(i, j) = f(|j - c_i| / max(1, s))

    along rows and along columns, over the pixels j of the rectangle, with s its length over that
    of the image and c_i = first + (i + 1/2) s - 1/2, the place where the centre of pixel i lies;
    f(u) = max(0, 1 - u), or the cubic of Keys (1981) with a = -1/2.

    Args:
      images: float [B, H, W, C].
      corners: int [B or 1, 2], first row and column of the rectangle, which lies in the image.
      sizes: int [B or 1, 2], its rows and columns, at least 1.
      method: 'bilinear' or 'bicubic'.

    Returns:
      [B, H, W, C]; linear in `images`. The same numbers as Pillow's BILINEAR or BICUBIC, which crop
      first; of the latter before they are clipped.

    Raises:
      ValueError: another method.
    """
    if method not in _FILTERS:
        raise ValueError(f'resize: method={method!r} must be one of {", ".join(_FILTERS)}.')
    rows, columns = (
        _weights(method, images.shape[1 + axis], corners[:, axis], sizes[:, axis], images.dtype)
        for axis in range(2)
    )
    rows, columns = (jnp.broadcast_to(w, (len(images), *w.shape[1:])) for w in (rows, columns))
    # HIGHEST: accelerators would otherwise round the pixels to a few bits.
    return jnp.einsum('bij,bjkc,blk->bilc', rows, images, columns, precision='highest')


def _weights(
    method: str, length: int, first: jax.Array, size: jax.Array, dtype: jnp.dtype
) -> jax.Array:
    """Weights [B or 1, length, length] of old pixels (last axis) in new ones; see `resize`."""
    first, size = first[:, None, None], size[:, None, None]
    scale = (size / length).astype(dtype)
    old = jnp.arange(length)[None, None, :]
    centre = first + (jnp.arange(length, dtype=dtype)[None, :, None] + 0.5) * scale - 0.5
    weights = _FILTERS[method](jnp.abs(old - centre) / jnp.maximum(scale, 1.0))
    weights = jnp.where((old >= first) & (old < first + size), weights, 0.0)
    return weights / weights.sum(-1, keepdims=True)


def _cubic(u: jax.Array) -> jax.Array:
    near = (1.5 * u - 2.5) * u**2 + 1.0
    far = -0.5 * (((u - 5.0) * u + 8.0) * u - 4.0)
    return jnp.where(u < 1, near, jnp.where(u < 2, far, 0.0))


_FILTERS = {'bilinear': lambda u: jnp.maximum(0.0, 1.0 - u), 'bicubic': _cubic}
