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


def erase(images: jax.Array, size: tuple[int, int], corners: jax.Array, fill: float) -> jax.Array:
    """Overwrites a rectangle of each image, clipped at the border.

    Args:
      images: [B, H, W, C].
      size: rows and columns of the rectangle.
      corners: int [B or 1, 2], its first row and column; may lie outside the image.
      fill: value written.
    """
    inside = []
    for axis in range(2):
        places = jnp.arange(images.shape[1 + axis])
        first = corners[:, axis, None]
        inside.append((places >= first) & (places < first + size[axis]))
    covered = inside[0][:, :, None, None] & inside[1][:, None, :, None]
    return jnp.where(covered, jnp.asarray(fill, images.dtype), images)


def affine(images: jax.Array, matrices: jax.Array) -> jax.Array:
    """Resamples each image at linearly transformed places about its centre, bilinearly.

        out(p) = in(centre + matrix (p - centre)),   in = 0 outside the image

    Places are pixel centres in (row, column), so a matrix is a true rotation on any shape.

    Args:
      images: float [B, H, W, C].
      matrices: float [B or 1, 2, 2].

    Returns:
      [B, H, W, C]; linear in `images`. No gradient flows to `matrices` through the choice of the
      four neighbours, as usual for bilinear interpolation.
    """
    count, height, width, _ = images.shape
    centre = jnp.asarray([(height - 1) / 2, (width - 1) / 2], images.dtype)
    rows, columns = jnp.meshgrid(jnp.arange(height), jnp.arange(width), indexing='ij')
    places = jnp.stack([rows, columns], -1).astype(images.dtype) - centre

    def one(image, matrix):
        # HIGHEST: accelerators would otherwise round the places to a few bits.
        at = jnp.einsum('ij,hwj->ihw', matrix, places, precision='highest')
        at += centre[:, None, None]
        return jax.vmap(lambda channel: map_coordinates(channel, list(at), order=1), -1, -1)(image)

    matrices = jnp.broadcast_to(matrices.astype(images.dtype), (count, 2, 2))
    return jax.vmap(one)(images, matrices)


def resize(images: jax.Array, corners: jax.Array, sizes: jax.Array) -> jax.Array:
    """Resizes a rectangle of each image to the whole of it, bilinearly and without aliasing.

        out(i) = sum_j w(i, j) in(j) / sum_j w(i, j),   w(i, j) = max(0, 1 - |j - c_i| / max(1, s))

    along rows and along columns, over the pixels j of the rectangle, with s its length over that
    of the image and c_i = first + (i + 1/2) s - 1/2, the place where the centre of pixel i lies.

    Args:
      images: float [B, H, W, C].
      corners: int [B or 1, 2], first row and column of the rectangle, which lies in the image.
      sizes: int [B or 1, 2], its rows and columns, at least 1.

    Returns:
      [B, H, W, C]; linear in `images`. The same numbers as Pillow's BILINEAR, which crops first.
    """
    rows, columns = (
        _triangle(images.shape[1 + axis], corners[:, axis], sizes[:, axis], images.dtype)
        for axis in range(2)
    )
    rows, columns = (jnp.broadcast_to(w, (len(images), *w.shape[1:])) for w in (rows, columns))
    # HIGHEST: accelerators would otherwise round the pixels to a few bits.
    return jnp.einsum('bij,bjkc,blk->bilc', rows, images, columns, precision='highest')


def _triangle(length: int, first: jax.Array, size: jax.Array, dtype) -> jax.Array:
    """Weights [B or 1, length, length] of old pixels (last axis) in new ones; see `resize`."""
    first, size = first[:, None, None], size[:, None, None]
    scale = (size / length).astype(dtype)
    old = jnp.arange(length)[None, None, :]
    centre = first + (jnp.arange(length, dtype=dtype)[None, :, None] + 0.5) * scale - 0.5
    weights = jnp.maximum(0.0, 1.0 - jnp.abs(old - centre) / jnp.maximum(scale, 1.0))
    weights = jnp.where((old >= first) & (old < first + size), weights, 0.0)
    return weights / weights.sum(-1, keepdims=True)
