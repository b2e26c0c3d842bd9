"""Distances of images by the features of a network."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

__all__ = ['feature_distance']

_LEAST = 1e-10


def feature_distance(
    a: Sequence[jax.Array], b: Sequence[jax.Array], weights: Sequence[jax.Array] | None = None
) -> jax.Array:
    """sum over layers of mean over places of sum_c w_c (a_c / |a| - b_c / |b|)^2, [B].

    With the features of VGG16 after each of its levels and learnt weights it is LPIPS; without
    weights, that is with ones, the authors' baseline.

    Args:
      a, b: features of each layer, [B, ..., C].
      weights: [C] of each layer, or none.

    Source: Zhang et al. 2018, arXiv:1801.03924, eq. 1.
    """
    total = jnp.zeros(len(a[0]), jnp.float32)
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        square = jnp.square(_unit(x) - _unit(y))
        apart = square.sum(-1) if weights is None else (square * weights[i]).sum(-1)
        total = total + apart.reshape(len(x), -1).mean(1)
    return total


def _unit(x: jax.Array) -> jax.Array:
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(jnp.square(x), -1, keepdims=True)
    # What is nothing has no direction, and no slope.
    root = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return x * jnp.where(square > 0, 1 / (root + _LEAST), 0.0)
