"""Losses on the pixels of patches that were hidden from a network.

Source: He et al. 2021 (masked autoencoders), arXiv 2111.06377.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.typing import ArrayLike

from kd.losses import numerics


def patchify(images: ArrayLike, patch: int) -> jax.Array:
    """Images [B, H, W, C] as patches [B, L, patch^2 C], row by row; inside by row, column, channel.

    Raises:
      ValueError: a patch that does not divide the image.
    """
    x = jnp.asarray(images)
    if x.ndim != 4 or x.shape[1] % patch or x.shape[2] % patch:
        raise ValueError(f'patchify: images {list(x.shape)} are no grid of patches of {patch}.')
    return rearrange(x, 'b (h p) (w q) c -> b (h w) (p q c)', p=patch, q=patch)


def unpatchify(patches: ArrayLike, patch: int, rows: int) -> jax.Array:
    """The inverse of `patchify` for images of so many rows of patches."""
    return rearrange(
        jnp.asarray(patches), 'b (h w) (p q c) -> b (h p) (w q) c', h=rows, p=patch, q=patch
    )


def masked_pixel(
    predicted: ArrayLike, patches: ArrayLike, hidden: ArrayLike, *, normalise: bool = False
) -> jax.Array:
    """sum_l hidden_l mean_k (predicted_lk - patches_lk)^2 / sum_l hidden_l; 0 where none is hidden.

    Args:
      predicted: [B, L, K].
      patches: [B, L, K], see `patchify`.
      hidden: [B, L], 1 for patches that count.
      normalise: compare with patches of mean 0 and variance 1 each, (x - mean) / sqrt(var + 1e-6).

    Returns:
      [B].

    Raises:
      ValueError: shapes that differ.

    Source: arXiv 2111.06377, as released: the variance is the unbiased one.
    """
    predicted, patches = jnp.asarray(predicted), jnp.asarray(patches)
    if predicted.shape != patches.shape:
        raise ValueError(
            f'masked_pixel needs patches of one shape, got {predicted.shape} and {patches.shape}.'
        )
    dtype = numerics.accumulation_dtype(predicted, patches)
    predicted, patches = predicted.astype(dtype), patches.astype(dtype)
    if normalise:
        mean = patches.mean(-1, keepdims=True)
        patches = (patches - mean) / jnp.sqrt(patches.var(-1, keepdims=True, ddof=1) + 1e-6)
    weight = jnp.asarray(hidden).astype(dtype)
    error = jnp.mean(jnp.square(predicted - patches), axis=-1)
    count = weight.sum(-1)
    return jnp.sum(weight * error, axis=-1) / jnp.where(count > 0, count, 1.0)
