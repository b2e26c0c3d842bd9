"""Differentiable siamese augmentation: one family of transformations per call, for training sets
that are themselves trained.

Every operation is differentiable in the pixels; the geometric ones are linear in them. Zero is the
value of empty pixels, the mean of standardised or whitened images.

Source: Zhao and Bilen 2021, arXiv 2102.08259; parameters per image as in the trajectory-matching
papers (Cazenavette et al. 2022, arXiv 2203.11932).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd.data.transforms import warp
from kd.errors import did_you_mean


class Strength(NamedTuple):
    """How far each transformation goes; u is uniform on (0, 1).

    Attributes:
      brightness: x + (u - 1/2) brightness.
      saturation: about the mean over channels of each pixel, times u saturation.
      contrast: about the mean of the image, times u + contrast.
      crop: translation by up to round(crop H) and round(crop W) pixels.
      cutout: rectangle of round(cutout H) x round(cutout W) pixels.
      scale: rows and columns apart, sampled at factors uniform on (1 / scale, scale).
      rotate: by up to this many degrees either way.
    """

    brightness: float = 1.0
    saturation: float = 2.0
    contrast: float = 0.5
    crop: float = 0.125
    cutout: float = 0.5
    scale: float = 1.2
    rotate: float = 15.0


_STANDARD = Strength()


def siamese(
    key: jax.Array,
    images: jax.Array,
    families: Sequence[str] | str = 'color_crop_cutout_flip_scale_rotate',
    *,
    shared: bool = False,
    strength: Strength | Mapping[str, float] = _STANDARD,
    family: jax.Array | int | None = None,
) -> jax.Array:
    """Applies one family, drawn uniformly from `families`, with random parameters.

    Two calls with one key, `families` and `shared=True` do the same to any two sets of images:
    that is how a real and a synthetic batch are augmented alike.

    Args:
      key: typed random key; decides family and parameters.
      images: float [B, H, W, C], standardised or in [-1, 1].
      families: names out of `FAMILIES`, or one string of names joined by '_'.
      shared: one set of parameters for all images instead of one per image.
      strength: see `Strength`; a mapping gives those of its fields that differ.
      family: int32 scalar, the index into `families` instead of a draw. Under vmap over keys a
        drawn family makes XLA compute all of them; one given for all avoids it.

    Returns:
      [B, H, W, C], dtype of `images`.

    Raises:
      ValueError: if `images` is not [B, H, W, C], on an unknown family, or on none.
    """
    warp.check_images(images)
    chosen = tuple(families.split('_')) if isinstance(families, str) else tuple(families)
    for name in chosen:
        if name not in _FAMILIES:
            known = ', '.join(FAMILIES)
            raise ValueError(
                f'Unknown family {name!r} of siamese augmentation; known: {known}.'
                f'{did_you_mean(name, FAMILIES)}'
            )
    if not chosen:
        raise ValueError(f'families is empty; name some of {", ".join(FAMILIES)}.')
    strengths = strength if isinstance(strength, Strength) else Strength(**dict(strength))
    family_key, parameter_key = jax.random.split(key)
    if family is None:
        family = jax.random.randint(family_key, (), 0, len(chosen))
    draws = 1 if shared else images.shape[0]
    branches = [
        lambda key, images, apply=_FAMILIES[name]: apply(key, images, draws, strengths)
        for name in chosen
    ]
    return jax.lax.switch(family, branches, parameter_key, images)


def _color(key: jax.Array, images: jax.Array, draws: int, strength: Strength) -> jax.Array:
    u = jax.random.uniform(key, (3, draws, 1, 1, 1), images.dtype)
    images = images + (u[0] - 0.5) * strength.brightness
    grey = images.mean(3, keepdims=True)
    images = (images - grey) * (u[1] * strength.saturation) + grey
    mean = images.mean((1, 2, 3), keepdims=True)
    return (images - mean) * (u[2] + strength.contrast) + mean


def _crop(key: jax.Array, images: jax.Array, draws: int, strength: Strength) -> jax.Array:
    reach = _round(strength.crop * images.shape[1]), _round(strength.crop * images.shape[2])
    corners = jax.random.randint(key, (draws, 2), 0, 2 * jnp.asarray(reach) + 1)
    return warp.crop(images, reach, corners, 0.0)


def _cutout(key: jax.Array, images: jax.Array, draws: int, strength: Strength) -> jax.Array:
    size = _round(strength.cutout * images.shape[1]), _round(strength.cutout * images.shape[2])
    # With an even side the centre lies between pixels: one place more, symmetric about the middle.
    centres = [side + 1 - length % 2 for side, length in zip(images.shape[1:3], size, strict=True)]
    middle = jax.random.randint(key, (draws, 2), 0, jnp.asarray(centres))
    return warp.erase(images, size, middle - jnp.asarray(size) // 2, 0.0)


def _flip(key: jax.Array, images: jax.Array, draws: int, strength: Strength) -> jax.Array:
    del strength
    return warp.mirror(images, jax.random.bernoulli(key, 0.5, (draws,)))


def _scale(key: jax.Array, images: jax.Array, draws: int, strength: Strength) -> jax.Array:
    factors = jax.random.uniform(key, (draws, 2), images.dtype, 1 / strength.scale, strength.scale)
    return warp.affine(images, factors[:, :, None] * jnp.eye(2, dtype=images.dtype))


def _rotate(key: jax.Array, images: jax.Array, draws: int, strength: Strength) -> jax.Array:
    angle = jnp.deg2rad(strength.rotate) * jax.random.uniform(
        key, (draws,), images.dtype, minval=-1.0
    )
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    matrices = jnp.stack([jnp.stack([cosine, -sine], -1), jnp.stack([sine, cosine], -1)], -2)
    return warp.affine(images, matrices)


def _round(value: float) -> int:
    return int(value + 0.5)


_FAMILIES = {
    'color': _color,
    'crop': _crop,
    'cutout': _cutout,
    'flip': _flip,
    'scale': _scale,
    'rotate': _rotate,
}
FAMILIES = tuple(_FAMILIES)
