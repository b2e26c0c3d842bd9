"""How far the feature statistics of a batch are from those that batch normalisation has seen.

Sources: Yin et al. 2019, arXiv 1912.08795 (DeepInversion); Yin et al. 2023, arXiv 2306.13092
(SRe2L); Zhang et al. 2024, arXiv 2408.06927 (unsquared norms, weight of the first layer).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp


class LayerStatistics(NamedTuple):
    """What enters one normalisation layer, and what it has seen in training; all [C]."""

    mean: jax.Array
    variance: jax.Array
    running_mean: jax.Array
    running_variance: jax.Array


def statistics_of(features: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance of [..., C] over all axes but the last, each [C] float32."""
    features = features.astype(jnp.promote_types(features.dtype, jnp.float32))
    axes = tuple(range(features.ndim - 1))
    return jnp.mean(features, axes), jnp.var(features, axes)


def statistics_distance(
    layers: Sequence[LayerStatistics], *, first_weight: float = 10.0
) -> jax.Array:
    """Sum over layers of how far batch statistics are from running ones.

        sum_l w_l ( || var_l - running_var_l ||_2 + || mean_l - running_mean_l ||_2 )

    Args:
      layers: from input to output.
      first_weight: w of the first layer; all others weigh 1.

    Returns:
      Scalar, at least 0. The norms are not squared; at exactly equal statistics the gradient is 0.

    Source: arXiv 2408.06927, as released.
    """
    total = jnp.float32(0.0)
    for index, layer in enumerate(layers):
        distance = _norm(layer.variance - layer.running_variance) + _norm(
            layer.mean - layer.running_mean
        )
        total += (first_weight if index == 0 else 1.0) * distance
    return total


def _norm(x: jax.Array) -> jax.Array:
    squared = jnp.sum(jnp.square(x))
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)
