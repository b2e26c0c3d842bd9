"""Optimal transport between a few points and a few weighted centroids, with an entropic plan.

All arithmetic is in logarithms, so that costs hundreds of times the entropy neither under- nor
overflow. Rows may be padding, so that one program serves sets of every size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics

__all__ = ['distances', 'on_sphere', 'sinkhorn', 'transport_energy']


def sinkhorn(
    cost: jax.Array,
    rows: jax.Array,
    columns: jax.Array,
    *,
    epsilon: float = 0.1,
    iterations: int = 5,
    where: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """(plan [N, K], (f [N], g [K])) that nearly minimises <plan, cost> - epsilon entropy(plan).

        plan_ij = exp((f_i + g_j - C_ij) / epsilon)
        f_i <- epsilon (log a_i - lse_j (g_j - C_ij) / epsilon),   from g = 0,
        g_j <- epsilon (log b_j - lse_i (f_i - C_ij) / epsilon)

    The columns are met exactly, being the last to be scaled; the rows as far as it has converged.
    Rows and columns of no mass are empty, their potentials -inf and their gradients 0.

    Args:
      cost: [N, K].
      rows, columns: a [N] and b [K], from 0, each summing to 1.
      epsilon: of the entropy, in the units of the cost.
      iterations: of both updates.
      where: bool [N], the rows that are there; others have no mass whatever `rows` says.

    Raises:
      ValueError: an epsilon that is not above 0.

    Source: Cuturi 2013, arXiv:1306.0895, in logarithms.
    """
    numerics.check_positive('epsilon', epsilon)
    wide = numerics.accumulation_dtype(cost)
    rows, columns = jnp.asarray(rows, wide), jnp.asarray(columns, wide)
    if where is not None:
        rows = jnp.where(where, rows, 0.0)
        cost = jnp.where(where[:, None], cost, 0.0)
    log_kernel = -cost.astype(wide) / epsilon
    log_a, log_b = _log(rows), _log(columns)

    def scaled(_: int, potentials: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        g = potentials[1]
        f = _less(log_a, numerics.log_sum_exp(log_kernel + g, axis=1))
        return f, _less(log_b, numerics.log_sum_exp(log_kernel + f[:, None], axis=0))

    begun = jnp.zeros_like(log_a), jnp.where(columns > 0, jnp.zeros_like(log_b), -jnp.inf)
    f, g = jax.lax.fori_loop(0, iterations, scaled, begun)
    return jnp.exp(f[:, None] + log_kernel + g), (epsilon * f, epsilon * g)


def transport_energy(
    points: jax.Array,
    centroids: jax.Array,
    mass: jax.Array,
    *,
    epsilon: float = 0.1,
    iterations: int = 5,
    where: jax.Array | None = None,
    sphere: bool = True,
    through_plan: bool = True,
) -> jax.Array:
    """sum_ij plan_ij C_ij, a scalar: how far points of equal mass are from weighted centroids.

        C_ij = || p(x_i) - p(k_j) ||_2,   plan of `sinkhorn` with a_i = 1 / N and b = mass

    Not the squared distance. p is the projection to the unit sphere.

    Args:
      points: [N, ...], flattened.
      centroids: [K, ...].
      mass: [K], from 0, summing to 1.
      epsilon, iterations: see `sinkhorn`.
      where: bool [N], the points that are there; the gradient of others is 0.
      sphere: False for p the identity, of data of few dimensions.
      through_plan: whether the gradient goes through the plan too, as released; False holds it
        constant, which at the optimal plan is the gradient of the entropic problem.

    Source: DMGD, arXiv:2605.03877.
    """
    wide = numerics.accumulation_dtype(points, centroids)
    x = points.reshape(len(points), -1).astype(wide)
    k = centroids.reshape(len(centroids), -1).astype(wide)
    there = jnp.ones(len(x), bool) if where is None else where
    # Of what is not there nothing is read, not even a NaN.
    x = jnp.where(there[:, None], x, 0.0)
    cost = distances(on_sphere(x), on_sphere(k)) if sphere else distances(x, k)
    share = there / jnp.sum(there).astype(wide)
    plan, _ = sinkhorn(
        cost, share, mass, epsilon=epsilon, iterations=iterations, where=where
    )  # fmt: skip
    if not through_plan:
        plan = jax.lax.stop_gradient(plan)
    return jnp.sum(plan * cost)


def distances(a: jax.Array, b: jax.Array) -> jax.Array:
    """|a_i - b_j|, [N, K] of [N, D] and [K, D]; the gradient is 0 where points are the same."""
    square = jnp.sum(jnp.square(a[:, None] - b[None]), axis=-1)
    return jnp.sqrt(jnp.where(square > 0, square, 1.0)) * (square > 0)


def on_sphere(x: jax.Array) -> jax.Array:
    """x / |x| of each row of [N, D]; a row of zeros stays, with no gradient."""
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)


def _log(mass: ArrayLike) -> jax.Array:
    mass = jnp.asarray(mass)
    return jnp.where(mass > 0, jnp.log(jnp.where(mass > 0, mass, 1.0)), -jnp.inf)


def _less(log_mass: jax.Array, log_total: jax.Array) -> jax.Array:
    """log_mass - log_total, -inf where there is no mass, whatever the total."""
    some = log_mass > -jnp.inf
    return jnp.where(some, log_mass - jnp.where(some, log_total, 0.0), -jnp.inf)
