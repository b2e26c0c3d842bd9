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
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from kd import errors
from kd.data import warp
from kd.data.siamese import siamese

Batch = dict[str, jax.Array]
Transform = Callable[[jax.Array, Batch], Batch]


def random_flip(key: jax.Array, images: jax.Array, probability: float = 0.5) -> jax.Array:
    """Mirrors each image left to right with the given probability.

    Args:
      key: typed random key.
      images: [B, H, W, C], any dtype.
      probability: of a flip, in [0, 1].

    Returns:
      [B, H, W, C], dtype of `images`.

    Raises:
      ValueError: if `images` is not [B, H, W, C] or the probability lies outside [0, 1].
    """
    warp.check_images(images)
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f'The probability of a flip lies in [0, 1], got {probability}.')
    flipped = jax.random.bernoulli(key, probability, images.shape[:1])
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


def mixup(
    key: jax.Array,
    batch: Batch,
    alpha: float,
    *,
    num_classes: int | None = None,
    shared: bool = False,
) -> Batch:
    """Mixes every example with another one of the batch, and their labels with them.

        x'_i = lambda_i x_i + (1 - lambda_i) x_p(i),   lambda ~ Beta(alpha, alpha)

    with `p` a random permutation. All floating entries of the batch are mixed with the same
    lambda: images, soft labels, and stored teacher logits (which are mixed as logits, not as
    probabilities). An int `label` is made one-hot first. Other integer and boolean entries stay
    those of example i.

    Args:
      key: typed random key.
      batch: arrays with leading axis B; `label` is int [B] or float [B, num_classes].
      alpha: both parameters of the Beta distribution, above 0; small values mix little.
      num_classes: needed for int labels.
      shared: one lambda for the whole batch (as in the paper's code) instead of one per example.

    Returns:
      A new batch with `label` float32 [B, num_classes].

    Raises:
      ValueError: if alpha is not above 0, or labels are int and `num_classes` is missing.

    Source: Zhang et al. 2017, arXiv 1710.09412.
    """
    if not alpha > 0:
        raise ValueError(f'mixup: alpha must be above 0, got {alpha}; leave mixup out for none.')
    weight_key, partner_key = jax.random.split(key)
    batch = dict(batch)
    if 'label' in batch:
        batch['label'] = soft_labels(batch['label'], num_classes)
    count = batch['input'].shape[0]
    weights = jax.random.beta(weight_key, alpha, alpha, (1,) if shared else (count,))
    partners = jax.random.permutation(partner_key, count)
    return {name: _mix(values, weights, partners) for name, values in batch.items()}


def soft_labels(labels: jax.Array, num_classes: int | None) -> jax.Array:
    """Returns float32 [B, C] labels: int [B] labels one-hot, floating [B, C] labels as they are.

    Raises:
      ValueError: if the labels are int and `num_classes` is None.
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return labels
    if num_classes is None:
        raise ValueError('Integer labels need num_classes to become soft labels.')
    return jax.nn.one_hot(labels, num_classes, dtype=jnp.float32)


def compose(transforms: Sequence[Any], num_classes: int | None = None) -> Transform:
    """Builds `transform(key, batch) -> batch` from the names of a config.

    Each entry draws from `fold_in(key, its place)`, so that changing one leaves the randomness of
    those before it alone.

    Args:
      transforms: entries `name` or `(name, *arguments)` or `(name, *arguments, {option: value})`;
        see `names()`. An empty sequence is the identity.
      num_classes: for entries that make labels soft.

    Raises:
      UserError: on an unknown name, or arguments that the function does not take.
    """
    bound = [_bind(entry, num_classes) for entry in transforms]

    def transform(key: jax.Array, batch: Batch) -> Batch:
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


def _mix(values: jax.Array, weights: jax.Array, partners: jax.Array) -> jax.Array:
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return values
    weights = weights.astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    return weights * values + (1 - weights) * values[partners]


_OF_IMAGES: dict[str, Callable[..., Any]] = {
    'flip': random_flip,
    'crop': random_crop,
    'cutout': cutout,
    'siamese': siamese,
}
_OF_BATCHES: dict[str, Callable[..., Any]] = {'mixup': mixup}
