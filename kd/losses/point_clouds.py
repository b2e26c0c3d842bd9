"""Distances of point clouds, and pairs of samples that a distance has ranked."""

from __future__ import annotations

import jax
import jax.numpy as jnp

__all__ = ['chamfer', 'rank_pair']


def chamfer(a: jax.Array, b: jax.Array) -> jax.Array:
    """(mean_i min_j |a_i - b_j| + mean_j min_i |a_i - b_j|) / 2, not squared: [...].

    Of two single points it is their distance. Its gradient is 0 where points are the same.

    Args:
      a: [..., N, d].
      b: [..., M, d].

    Source: LiDiff (arXiv:2403.13470), as the metric of scene completion.
    """
    square = jnp.sum(jnp.square(a[..., :, None, :] - b[..., None, :, :]), axis=-1)
    apart = jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0)
    return 0.5 * (apart.min(-1).mean(-1) + apart.min(-2).mean(-1))


def rank_pair(
    first: jax.Array, second: jax.Array, cost: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(winner, loser, whether the first has won), row by row; of equals the first wins.

    Args:
      first, second: [B, ...].
      cost: of both, [B] each; the lower wins.

    Source: arXiv:2504.11447, section 3.
    """
    won = cost[0] <= cost[1]
    where = won.reshape(won.shape + (1,) * (first.ndim - 1))
    return jnp.where(where, first, second), jnp.where(where, second, first), won
