"""RandAugment: a few random operations of one strength on every image.

Images are float [B, H, W, C] in [-1, 1]. Those of colour are computed on 256 levels as Pillow does,
for the whole batch at once, and each image takes the one it has drawn; the geometric ones are one
affine map.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kd.data.transforms import warp

GEOMETRIC = ('rotate', 'shear_x', 'shear_y', 'translate_x', 'translate_y')
COLOURS = (
    *('autocontrast', 'equalize', 'invert', 'posterize', 'solarize', 'solarize_add'),
    *('colour', 'contrast', 'brightness', 'sharpness'),
)
OPERATIONS = (*GEOMETRIC, *COLOURS)
# The strength is a number in [0, 10].
_MOST = 10.0
_GREY = (0.299, 0.587, 0.114)


def rand_augment(
    key: jax.Array,
    images: jax.Array,
    count: int = 2,
    magnitude: float = 9.0,
    *,
    deviation: float = 0.5,
    probability: float = 0.5,
) -> jax.Array:
    """Applies `count` operations in turn, each drawn for every image and left out by a coin.

    The strength m of each is normal around `magnitude`, within [0, 10]. With either sign: rotations
    by 3 m degrees, shears by .03 m, shifts by .045 m of the side (bilinear, grey outside), colour,
    contrast, brightness and sharpness by a factor 1 +- .09 m of at least .1. Levels are cut to
    4 - floor(.4 m) bits, those from 256 - floor(25.6 m) on inverted, those below 128 raised by
    floor(11 m). Automatic contrast, equalisation and inversion have no strength.

    Args:
      key: typed random key.
      images: float [B, H, W, C] in [-1, 1].
      count: operations in turn.
      magnitude: mean strength, in [0, 10].
      deviation: of the strength.
      probability: of an operation that was drawn to be made.

    Returns:
      [B, H, W, C] in [-1, 1].

    Raises:
      ValueError: images of another shape, a magnitude or a probability out of range.

    Source: Cubuk et al. 2019, arXiv 1909.13719, with the operations that grow with the strength as
    ViTs are fine-tuned (`rand-m9-mstd0.5-inc1` of timm).
    """
    warp.check_images(images)
    if not 0 <= magnitude <= _MOST or not 0 <= probability <= 1 or count < 0 or deviation < 0:
        raise ValueError(
            'rand_augment takes a count from 0, a magnitude in [0, 10] and a probability in '
            f'[0, 1], got {(count, magnitude, probability)}.'
        )
    for layer in range(count):
        keys = jax.random.split(jax.random.fold_in(key, layer), 4)
        size = (len(images),)
        which = jax.random.randint(keys[0], size, 0, len(OPERATIONS))
        made = jax.random.bernoulli(keys[1], probability, size)
        strength = magnitude + deviation * jax.random.normal(keys[2], size)
        sign = jax.random.rademacher(keys[3], size)
        changed = apply(images, which, jnp.clip(strength, 0.0, _MOST), sign)
        images = jnp.where(made[:, None, None, None], changed, images)
    return images


def apply(images: jax.Array, which: jax.Array, strength: jax.Array, sign: jax.Array) -> jax.Array:
    """Operation `OPERATIONS[which]` of each image.

    Args:
      images: as of `rand_augment`.
      which: int [B].
      strength: [B] in [0, 10].
      sign: [B], 1 or -1, for those that have two directions.
    """
    moved = _moved(images, which, strength, sign)
    levels = jnp.round((images + 1) * 127.5)
    share = strength / _MOST
    factor = jnp.maximum(0.1, 1.0 + sign * 0.9 * share)
    made = {
        'autocontrast': _autocontrast(levels),
        'equalize': _equalized(levels),
        'invert': 255.0 - levels,
        'posterize': _posterized(levels, 4 - jnp.floor(4 * share)),
        'solarize': jnp.where(
            levels >= _over(256 - jnp.floor(256 * share)), 255.0 - levels, levels
        ),
        'solarize_add': jnp.where(
            levels < 128, jnp.minimum(levels + _over(jnp.floor(110 * share)), 255.0), levels
        ),
        'colour': _blend(_grey(levels), levels, factor),
        'contrast': _blend(
            jnp.floor(_grey(levels).mean((1, 2, 3), keepdims=True) + 0.5), levels, factor
        ),
        'brightness': _blend(jnp.zeros_like(levels), levels, factor),
        'sharpness': _blend(_smooth(levels), levels, factor),
    }
    result = moved
    for number, name in enumerate(COLOURS, start=len(GEOMETRIC)):
        result = jnp.where(_over(which == number), made[name] / 127.5 - 1.0, result)
    return result


def _moved(images, which, strength, sign):
    """Rotated, sheared or shifted; as they are where another operation is asked for."""
    amount = sign * strength / _MOST
    angle = jnp.where(which == 0, amount * np.pi / 6, 0.0)
    shear_x, shear_y = (jnp.where(which == i, 0.3 * amount, 0.0) for i in (1, 2))
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Of (row, column): a place of the result to one of the image.
    matrices = jnp.stack(
        [jnp.stack([cos, sin + shear_y], -1), jnp.stack([shear_x - sin, cos], -1)], 1
    )
    height, width = images.shape[1:3]
    shifts = jnp.stack(
        [
            jnp.where(which == 4, 0.45 * amount * height, 0.0),
            jnp.where(which == 3, 0.45 * amount * width, 0.0),
        ],
        -1,
    )
    return warp.affine(images, matrices, shifts)


def _autocontrast(levels):
    low, high = levels.min((1, 2), keepdims=True), levels.max((1, 2), keepdims=True)
    spread = high - low
    stretched = jnp.floor((levels - low) * 255.0 / jnp.where(spread > 0, spread, 1.0))
    return jnp.where(spread > 0, jnp.clip(stretched, 0, 255), levels)


def _equalized(levels):
    """Pillow's, channel by channel: levels by their rank among the pixels."""
    count, height, width, channels = levels.shape
    rows = jnp.moveaxis(levels, -1, 1).reshape(count * channels, -1).astype(jnp.int32)

    def one(row):
        histogram = jnp.zeros(256, jnp.int32).at[row].add(1)
        last = histogram[row.max()]
        step = (height * width - last) // 255
        before = jnp.cumsum(histogram) - histogram
        table = jnp.clip((step // 2 + before) // jnp.maximum(step, 1), 0, 255)
        return jnp.where(step > 0, table[row], row)

    made = jax.vmap(one)(rows).reshape(count, channels, height, width)
    return jnp.moveaxis(made, 1, -1).astype(levels.dtype)


def _posterized(levels, bits):
    size = _over(2.0 ** (8 - bits))
    return jnp.floor(levels / size) * size


def _smooth(levels):
    """Pillow's SMOOTH: pixels at the border stay."""
    height, width = levels.shape[1:3]
    inner = 5.0 * levels[:, 1:-1, 1:-1]
    for i in range(3):
        for j in range(3):
            if (i, j) != (1, 1):
                inner = inner + levels[:, i : height - 2 + i, j : width - 2 + j]
    return levels.at[:, 1:-1, 1:-1].set(jnp.floor(inner / 13.0 + 0.5))


def _grey(levels):
    """[B, H, W, 1]; of other than three channels their mean."""
    weights = _GREY if levels.shape[-1] == 3 else (1 / levels.shape[-1],) * levels.shape[-1]
    grey = jnp.sum(levels * jnp.asarray(weights), -1, keepdims=True)
    return jnp.floor(grey + 0.5)


def _blend(degenerate, levels, factor):
    return jnp.clip(degenerate + _over(factor) * (levels - degenerate), 0.0, 255.0)


def _over(values):
    """[B] beside images."""
    return values[:, None, None, None]
