"""Matching of the distributions of synthetic and real examples by their mean embeddings.

Not to be confused with distribution matching distillation of diffusion models, which compares
scores.

Source: Zhao and Bilen 2021, arXiv 2110.04181 (DM).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def mean_embedding_distance(
    synthetic: jax.Array,
    real: jax.Array,
    *,
    where: jax.Array | None = None,
    real_where: jax.Array | None = None,
) -> jax.Array:
    """Squared distance of the mean embeddings, the maximum mean discrepancy of a linear kernel.

        || mean_i psi(s_i) - mean_j psi(x_j) ||^2

    Args:
      synthetic: [..., n, D] embeddings of synthetic examples by a random network; as a rule the
        leading axis numbers classes.
      real: [..., m, D] embeddings of real ones. Not stop-gradiented.
      where, real_where: bool [..., n] and [..., m], examples that count; at least one each.

    Returns:
      [...], float32 (float64 for float64 input).

    Source: arXiv 2110.04181, section 3.
    """
    difference = _mean(synthetic, where) - _mean(real, real_where)
    return jnp.sum(jnp.square(difference), -1)


def _mean(embeddings: jax.Array, where: jax.Array | None) -> jax.Array:
    dtype = jnp.promote_types(embeddings.dtype, jnp.float32)
    if where is None:
        return jnp.mean(embeddings, -2, dtype=dtype)
    where = where[..., None]
    total = jnp.sum(jnp.where(where, embeddings, 0.0), -2, dtype=dtype)
    return total / jnp.sum(where, -2, dtype=dtype)
