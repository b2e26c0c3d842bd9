"""Augmentations of image batches: pure functions of a key, on device, per image, under jit.

A config names them in order; the function it gets back is part of the training step:

    transform = compose((('crop', 4), 'flip', ('mixup', 0.2)), num_classes=10)
    batch = transform(key, batch)

An entry is a name or `(name, *arguments)`; the last argument may be a mapping of options, as in
`('crop', 4, {'fill': 0.0})`. Images are [B, H, W, C], float in [-1, 1] (-1 is black).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd import errors
from kd.data.transforms import mixing, warp
from kd.data.transforms.rand_augment import rand_augment
from kd.data.transforms.siamese import siamese

Batch = dict[str, jax.Array]
Transform = Callable[[jax.Array, Batch], Batch]


def random_flip(
    key: jax.Array, images: jax.Array, probability: float = 0.5, *, shared: bool = False
) -> jax.Array:
    """Mirrors each image left to right with the given probability.

    Args:
      key: typed random key.
      images: [B, H, W, C], any dtype.
      probability: of a flip, in [0, 1].
      shared: flip all images or none.

    Returns:
      [B, H, W, C], dtype of `images`.

    Raises:
      ValueError: if `images` is not [B, H, W, C] or the probability lies outside [0, 1].
    """
    warp.check_images(images)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f'The probability of a flip lies in [0, 1], got {probability}.')
    flipped = jax.random.bernoulli(key, probability, (1,) if shared else images.shape[:1])
    return warp.mirror(images, flipped)


def random_crop(
    key: jax.Array, images: jax.Array, padding: int, *, fill: float | None = -1.0
) -> jax.Array:
    """Pads each image on all sides and cuts a window of the old size from a random place.

    Args:
      key: typed random key.
      images: [B, H, W, C], any dtype.
      padding: pixels added on each side; the window's corner is uniform on {0..2 padding}^2.
      fill: value of the added pixels (-1 is black), or None to mirror the image at its border
        without repeating the border pixel.

    Returns:
      [B, H, W, C], dtype of `images`.

    Raises:
      ValueError: if `images` is not [B, H, W, C], the padding is negative, or a mirrored padding
        is not smaller than the image.
    """
    warp.check_images(images)
    count, height, width, _ = images.shape
    if padding < 0 or (fill is None and padding >= min(height, width)):
        limit = f'0..{min(height, width) - 1}' if fill is None else '0 or more'
        raise ValueError(
            f'crop: padding of {height}x{width} images must be {limit} pixels, got {padding}.'
        )
    corners = jax.random.randint(key, (count, 2), 0, 2 * padding + 1)
    return warp.crop(images, (padding, padding), corners, fill)


def random_resized_crop(
    key: jax.Array,
    images: jax.Array,
    area: tuple[float, float] = (0.08, 1.0),
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    *,
    shared: bool = False,
    method: str = 'bilinear',
) -> jax.Array:
    """Cuts a rectangle of random area and aspect from each image and resizes it to the image.

    Of ten draws, area uniform and aspect log-uniform, the first whose rectangle lies inside is
    taken, at a uniform place; where none does, the largest rectangle at the centre whose aspect
    is within the bounds.

    Args:
      key: typed random key.
      images: float [B, H, W, C].
      area: bounds of the share of the image's area, in (0, 1].
      aspect: bounds of width over height, above 0.
      shared: the same rectangle for all images.
      method: of `kd.data.transforms.warp.resize`, 'bilinear' or 'bicubic'.

    Returns:
      [B, H, W, C]; linear in `images`, where the cubic may leave [-1, 1].

    Raises:
      ValueError: if `images` is not [B, H, W, C], or on bounds that are none.

    Source: Szegedy et al. 2014, arXiv 1409.4842, in the form of torchvision.
    """
    warp.check_images(images)
    count, height, width, _ = images.shape
    corners, sizes = rectangles(key, 1 if shared else count, (height, width), area, aspect)
    return warp.resize(images, corners, sizes, method=method)


def cutout(key: jax.Array, images: jax.Array, size: int, *, fill: float = 0.0) -> jax.Array:
    """Overwrites a square of each image; its centre is uniform over the image, so it may stick out.

    Args:
      key: typed random key.
      images: [B, H, W, C].
      size: side of the square in pixels, at least 1. The square covers rows
        `centre - size // 2 .. centre - size // 2 + size - 1`, and columns likewise.
      fill: value written; 0 is the middle of [-1, 1].

    Returns:
      [B, H, W, C], dtype of `images`.

    Raises:
      ValueError: if `images` is not [B, H, W, C] or `size` is below 1.

    Source: DeVries and Taylor 2017, arXiv 1708.04552.
    """
    warp.check_images(images)
    if size < 1:
        raise ValueError(f'cutout: the square has a side of 1 pixel or more, got {size}.')
    count, height, width, _ = images.shape
    centres = jax.random.randint(key, (count, 2), 0, jnp.asarray([height, width]))
    return warp.erase(images, (size, size), centres - size // 2, fill)


def random_erasing(
    key: jax.Array,
    images: jax.Array,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    *,
    deviation: float = 0.5,
) -> jax.Array:
    """Overwrites a rectangle of an image with noise, for a share of the images.

    Args:
      key: typed random key.
      images: float [B, H, W, C].
      probability: of an image to lose a rectangle, in [0, 1].
      area, aspect: bounds as of `random_resized_crop`.
      deviation: of the normal noise around 0, anew for every pixel; natural images in [-1, 1] have
        about 1/2.

    Raises:
      ValueError: as `random_resized_crop`, or a probability that is none.

    Source: Zhong et al. 2017, arXiv 1708.04896.
    """
    warp.check_images(images)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f'The probability of an erasure lies in [0, 1], got {probability}.')
    coin_key, place_key, noise_key = jax.random.split(key, 3)
    count, height, width, _ = images.shape
    corners, sizes = rectangles(place_key, count, (height, width), area, aspect)
    noise = deviation * jax.random.normal(noise_key, images.shape, images.dtype)
    erased = jax.random.bernoulli(coin_key, probability, (count, 1, 1, 1))
    return jnp.where(erased, warp.erase(images, sizes, corners, noise), images)


def compose(transforms: Sequence[Any], num_classes: int | None = None) -> Transform:
    """Builds `transform(key, batch) -> batch` from the names of a config.

    Each entry draws from `fold_in(key, its place)`, so that changing one leaves the randomness of
    those before it alone.

    Args:
      transforms: entries `name` or `(name, *arguments)` or `(name, *arguments, {option: value})`;
        see `names()`. An empty sequence is the identity.
      num_classes: for entries that make labels soft.

    Raises:
      UserError: on an unknown name, or arguments that the function does not take. `transform`
        raises it for a batch with fields that hold for the inputs as they are alone: what a teacher
        has said of them, or the noise that they are paired with.
    """
    bound = [_bind(entry, num_classes) for entry in transforms]

    def transform(key: jax.Array, batch: Batch) -> Batch:
        if bound:
            mixing.check_alone(batch)
        for index, function in enumerate(bound):
            batch = function(jax.random.fold_in(key, index), batch)
        return batch

    return transform


def augment(
    key: jax.Array, batch: Batch, transforms: Sequence[Any], num_classes: int | None = None
) -> Batch:
    """`compose(transforms, num_classes)(key, batch)`."""
    return compose(transforms, num_classes)(key, batch)


def names() -> tuple[str, ...]:
    """Names that a config may use."""
    return tuple(sorted([*_OF_IMAGES, *_OF_BATCHES]))


def _bind(entry: Any, num_classes: int | None) -> Transform:
    name, *arguments = (entry,) if isinstance(entry, str) else tuple(entry)
    options: dict[str, Any] = {}
    if arguments and hasattr(arguments[-1], 'items'):
        options = dict(arguments.pop().items())
    function = _OF_IMAGES.get(name) or _OF_BATCHES.get(name)
    if function is None:
        hint = errors.did_you_mean(str(name), names())
        raise errors.UserError(f'Unknown augmentation {name!r}; known: {", ".join(names())}.{hint}')
    try:
        inspect.signature(function).bind(None, None, *arguments, **options)
    except TypeError as error:
        raise errors.UserError(f'Augmentation {name!r}: {error}, in {entry!r}.') from error
    if name in _OF_BATCHES:
        return functools.partial(_on_batch, function, arguments, options, num_classes)
    return functools.partial(_on_images, function, arguments, options)


def _on_images(function, arguments, options, key: jax.Array, batch: Batch) -> Batch:
    return {**batch, 'input': function(key, batch['input'], *arguments, **options)}


def _on_batch(function, arguments, options, num_classes, key: jax.Array, batch: Batch) -> Batch:
    return function(key, batch, *arguments, num_classes=num_classes, **options)


def rectangles(
    key: jax.Array,
    count: int,
    space: tuple[int, int],
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
    """Corners and sizes, int [count, 2] each, of rectangles that lie in a space.

    See `random_resized_crop`.
    """
    for name, (low, high), top in (('area', area, 1.0), ('aspect', aspect, math.inf)):
        if not 0 < low <= high <= top:
            raise ValueError(
                f'the bounds of {name} are 0 < low <= high'
                f'{" <= 1" if name == "area" else ""}, got {(low, high)}.'
            )
    area_key, aspect_key, corner_key = jax.random.split(key, 3)
    height, width = space
    areas = (
        height * width * jax.random.uniform(area_key, (count, 10), minval=area[0], maxval=area[1])
    )
    logs = jax.random.uniform(
        aspect_key, (count, 10), minval=math.log(aspect[0]), maxval=math.log(aspect[1])
    )
    drawn = jnp.stack([jnp.sqrt(areas / jnp.exp(logs)), jnp.sqrt(areas * jnp.exp(logs))], -1)
    drawn = jnp.round(drawn).astype(jnp.int32)
    fits = ((drawn > 0) & (drawn <= jnp.asarray(space))).all(-1)
    first = jnp.take_along_axis(drawn, fits.argmax(1)[:, None, None], 1)[:, 0]
    central = jnp.asarray(
        [min(height, round(width / aspect[0])), min(width, round(height * aspect[1]))]
    )
    found = fits.any(1)[:, None]
    sizes = jnp.where(found, first, central)
    room = jnp.asarray(space) - sizes
    corners = jax.random.randint(corner_key, (count, 2), 0, room + 1)
    return jnp.where(found, corners, room // 2), sizes


_OF_IMAGES: dict[str, Callable[..., Any]] = {
    'flip': random_flip,
    'crop': random_crop,
    'resized_crop': random_resized_crop,
    'cutout': cutout,
    'random_erasing': random_erasing,
    'rand_augment': rand_augment,
    'siamese': siamese,
}
_OF_BATCHES: dict[str, Callable[..., Any]] = {
    'mixup': mixing.mixup,
    'cutmix': mixing.cutmix,
    'mixup_or_cutmix': mixing.mixup_or_cutmix,
}
