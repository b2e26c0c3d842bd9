"""Augmentations that mix the examples of a batch, and their labels with them."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd import errors
from kd.data.transforms import warp
from kd.io.cache import PREFIX
from kd.losses import numerics

Batch = dict[str, jax.Array]


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
    lambda: images, soft labels, and logits that are labels (which are mixed as logits, not as
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
      ValueError: if alpha is not above 0, labels are int and `num_classes` is missing, or the
        batch has what cannot be mixed: integer inputs, or fields that belong to one input.

    Source: Zhang et al. 2017, arXiv 1710.09412.
    """
    if not alpha > 0:
        raise ValueError(f'mixup: alpha must be above 0, got {alpha}; leave mixup out for none.')
    check_alone(batch)
    if not jnp.issubdtype(batch['input'].dtype, jnp.floating):
        raise ValueError(f'mixup: inputs of type {batch["input"].dtype} cannot be mixed.')
    weight_key, partner_key = jax.random.split(key)
    batch = _softened(batch, num_classes)
    count = batch['input'].shape[0]
    weights = jax.random.beta(weight_key, alpha, alpha, (1,) if shared else (count,))
    partners = jax.random.permutation(partner_key, count)
    return {name: _mix(values, weights, partners) for name, values in batch.items()}


def cutmix(
    key: jax.Array,
    batch: Batch,
    alpha: float = 1.0,
    *,
    num_classes: int | None = None,
) -> Batch:
    """Pastes a rectangle of another example of the batch into every image.

    Its sides are sqrt(1 - lambda) of the image's, lambda ~ Beta(alpha, alpha), its centre is
    uniform over the image, and what sticks out is cut off. Labels and other floating entries are
    mixed by the share of the image that stays.

    Args:
      key, batch, alpha, num_classes: as of `mixup`; `input` is [B, H, W, C].

    Returns, raises: as `mixup`; `ValueError` too for inputs that are no images.

    Source: Yun et al. 2019, arXiv 1905.04899.
    """
    if not alpha > 0:
        raise ValueError(f'cutmix: alpha must be above 0, got {alpha}; leave cutmix out for none.')
    check_alone(batch)
    warp.check_images(batch['input'])
    weight_key, place_key, partner_key = jax.random.split(key, 3)
    batch = _softened(batch, num_classes)
    images = batch.pop('input')
    count, space = len(images), jnp.asarray(images.shape[1:3])
    weights = jax.random.beta(weight_key, alpha, alpha, (count, 1))
    sizes = (space * jnp.sqrt(1 - weights)).astype(jnp.int32)
    corners = jax.random.randint(place_key, (count, 2), 0, space) - sizes // 2
    partners = jax.random.permutation(partner_key, count)
    pasted = warp.rectangle(images.shape[1:3], sizes, corners)
    kept = 1.0 - pasted.mean((1, 2, 3), dtype=jnp.float32)
    mixed = {name: _mix(values, kept, partners) for name, values in batch.items()}
    return {**mixed, 'input': jnp.where(pasted, images[partners], images)}


def mixup_or_cutmix(
    key: jax.Array,
    batch: Batch,
    mixup_alpha: float = 0.8,
    cutmix_alpha: float = 1.0,
    *,
    num_classes: int | None = None,
) -> Batch:
    """One of the two for every example, by an even coin; arguments as of them.

    timm's code tosses one coin for the whole batch, and pairs it with its reverse.
    """
    coin_key, *keys = jax.random.split(key, 3)
    mixed = mixup(keys[0], batch, mixup_alpha, num_classes=num_classes)
    pasted = cutmix(keys[1], batch, cutmix_alpha, num_classes=num_classes)
    coins = jax.random.bernoulli(coin_key, 0.5, (len(batch['input']),))

    def chosen(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(coins.reshape(-1, *[1] * (a.ndim - 1)), a, b)

    return {name: chosen(mixed[name], pasted[name]) for name in mixed}


def soft_labels(labels: jax.Array, num_classes: int | None) -> jax.Array:
    """Returns float32 [B, C] labels: int [B] labels one-hot, floating [B, C] labels as they are.

    A label that is none of 0 .. C - 1 becomes NaN.

    Raises:
      ValueError: if the labels are int and `num_classes` is None.
    """
    if jnp.issubdtype(labels.dtype, jnp.floating):
        return labels
    if num_classes is None:
        raise ValueError('Integer labels need num_classes to become soft labels.')
    return numerics.one_hot(labels, num_classes)


def check_alone(batch: Batch) -> None:
    """Raises `UserError` for fields that hold for the inputs as they are alone."""
    bound = sorted(name for name in batch if name.startswith(PREFIX) or name == 'noise')
    if bound:
        raise errors.UserError(
            f'inputs of a batch that brings {", ".join(bound)} cannot be augmented, for these '
            "belong to the inputs as they are: leave out the method's augmentation, or the source "
            'of the data that brings them.'
        )


def _softened(batch: Batch, num_classes: int | None) -> Batch:
    """A copy, whose labels are probabilities."""
    if 'label' not in batch:
        return dict(batch)
    return {**batch, 'label': soft_labels(batch['label'], num_classes)}


def _mix(values: jax.Array, weights: jax.Array, partners: jax.Array) -> jax.Array:
    if not jnp.issubdtype(values.dtype, jnp.floating):
        return values
    weights = weights.astype(values.dtype).reshape(-1, *[1] * (values.ndim - 1))
    return weights * values + (1 - weights) * values[partners]
