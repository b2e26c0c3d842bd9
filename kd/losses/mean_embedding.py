"""Matching of the distributions of synthetic and real examples by their mean embeddings.

Not to be confused with distribution matching distillation of diffusion models, which compares
scores.

Sources: Zhao and Bilen 2021, arXiv 2110.04181 (DM); Gretton et al. 2012.
"""

from __future__ import annotations

from typing import Literal

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


def mmd2(
    x: jax.Array,
    y: jax.Array,
    *,
    kernel: Literal['linear', 'gaussian'] = 'linear',
    unbiased: bool = False,
    bandwidth: jax.Array | float | None = None,
) -> jax.Array:
    """Squared maximum mean discrepancy of two samples of embeddings, with leading axes in common.

        mean_{i i'} k(x_i, x_i') + mean_{j j'} k(y_j, y_j') - 2 mean_{i j} k(x_i, y_j)

    The biased (V) statistic has i = i' among its pairs and a mean of tr(Cov x) / n + tr(Cov y) / m
    for one law and the linear kernel, which rewards a narrow x; the unbiased (U) one leaves these
    pairs out, has mean 0 there, and may be negative.

    Args:
      x, y: [..., n, D] and [..., m, D], at least two each if unbiased. Not stop-gradiented.
      kernel: 'linear', the product; or 'gaussian', the mean of exp(-|a - b|^2 / (2 h^2)) over h of
        1/2, 1, 2 and 4 bandwidths.
      unbiased: see above.
      bandwidth: of the Gaussian; None for the median distance of x and y, a constant.

    Returns:
      [...], float32 (float64 for float64 input).
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    x, y = x.astype(dtype), y.astype(dtype)
    if kernel == 'linear' and not unbiased:
        return mean_embedding_distance(x, y)
    if kernel == 'linear':

        def of_pairs(a: jax.Array, b: jax.Array) -> jax.Array:
            return jnp.einsum('...id,...jd->...ij', a, b)

    elif kernel == 'gaussian':
        width = bandwidth
        if width is None:
            width = jnp.median(jnp.sqrt(_squares(x, y)), axis=(-2, -1), keepdims=True)
        scale = jax.lax.stop_gradient(jnp.asarray(width, dtype))

        def of_pairs(a: jax.Array, b: jax.Array) -> jax.Array:
            squares = _squares(a, b)
            terms = [jnp.exp(-0.5 * squares / (h * scale) ** 2) for h in (0.5, 1.0, 2.0, 4.0)]
            return jnp.mean(jnp.stack(terms), axis=0)

    else:
        raise ValueError(f"mmd2: kernel is 'linear' or 'gaussian', got {kernel!r}.")

    def within(a: jax.Array) -> jax.Array:
        n, pairs = a.shape[-2], of_pairs(a, a)
        if not unbiased:
            return pairs.mean((-2, -1))
        own = jnp.diagonal(pairs, axis1=-2, axis2=-1).sum(-1)
        return (pairs.sum((-2, -1)) - own) / (n * (n - 1))

    return within(x) + within(y) - 2 * of_pairs(x, y).mean((-2, -1))


def _squares(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distances, [..., n, m]."""
    return jnp.sum(jnp.square(a[..., :, None, :] - b[..., None, :, :]), -1)


def _mean(embeddings: jax.Array, where: jax.Array | None) -> jax.Array:
    dtype = jnp.promote_types(embeddings.dtype, jnp.float32)
    if where is None:
        return jnp.mean(embeddings, -2, dtype=dtype)
    where = where[..., None]
    total = jnp.sum(jnp.where(where, embeddings, 0.0), -2, dtype=dtype)
    return total / jnp.sum(where, -2, dtype=dtype)
