"""Inter-class feature compensators: one additive perturbation shared by an image of every class.

A group holds one real image of each class. Each of M networks gives each group one compensator, so
k groups of C images and their k M compensators, (C + M) k images in store, unfold to (M + 1) k C
images to train on.

Source: Zhang et al. 2024, arXiv 2408.06927 (INFER).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from kd.data.distilled import coreset
from kd.data.transforms import warp


def group_count(images_per_class: int, networks: int, num_classes: int) -> int:
    """Groups that fit the storage of `images_per_class`: floor(IPC C / (C + M)).

    Raises:
      ValueError: if not even one fits.

    Source: arXiv 2408.06927, as released: floor(IPC / (M / C + 1)).
    """
    count = images_per_class * num_classes // (num_classes + networks)
    if count < 1:
        raise ValueError(
            f'{images_per_class} images per class of {num_classes} classes do not hold a group and '
            f'its {networks} compensators; raise images_per_class or use fewer networks.'
        )
    return count


def group_indices(
    rng: np.random.Generator, labels: np.ndarray, groups: int, num_classes: int | None = None
) -> np.ndarray:
    """Draws groups of one example per class, without replacement: int64 [groups, C] indices.

    Classes are 0 .. num_classes - 1, by default up to the largest label.

    Raises:
      ValueError: if a class has fewer examples than there are groups.
    """
    chosen = coreset.random_subset(rng, labels, groups, num_classes=num_classes)
    return chosen.reshape(-1, groups).T


def cyclic_shift(key: jax.Array, images: jax.Array, reach: int) -> jax.Array:
    """Rolls all images [B, H, W, C] alike by 0..reach rows and columns.

    Source: arXiv 2408.06927, as released.
    """
    warp.check_images(images)
    rows, columns = jax.random.randint(key, (2,), 0, reach + 1)
    return jnp.roll(images, (rows, columns), (1, 2))


def unfold(
    groups: jax.Array,
    compensators: jax.Array,
    low: jax.Array | float = -1.0,
    high: jax.Array | float = 1.0,
) -> jax.Array:
    """The images to train on: the groups themselves, then each with each of its compensators.

    Args:
      groups: [k, C, H, W, ch].
      compensators: [M, k, 1, H, W, ch].
      low, high: range of pixels, scalars or [ch]; compensated images are clipped to it,
        compensators are not.

    Returns:
      [(M + 1) k C, H, W, ch], block 0 the real images; labels repeat 0..C-1 throughout.

    Raises:
      ValueError: if the shapes do not fit.
    """
    if compensators.shape[1:] != (groups.shape[0], 1, *groups.shape[2:]):
        raise ValueError(
            f'Compensators of groups {list(groups.shape)} have the shape '
            f'[M, {groups.shape[0]}, 1, {", ".join(map(str, groups.shape[2:]))}], '
            f'got {list(compensators.shape)}.'
        )
    compensated = jnp.clip(groups + compensators, low, high)
    return jnp.concatenate([groups[None], compensated]).reshape(-1, *groups.shape[2:])
