"""Distances on the probability simplex, from log-probabilities.

Every function takes log-probabilities `[..., V]` of normalised distributions (-inf for an outcome
without mass) and returns `[...]` in nats where it is an entropy; float64 for float64 input, else
float32. On concrete arrays a distribution that does not sum to one, and a distance that is
infinite because one distribution lacks the other's support, is a ValueError; inside jit, grad, vmap
and scan the checks are skipped and the value is inf.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd.losses import divergence, numerics
from kd.theory import checks

Distance = Callable[[ArrayLike, ArrayLike], jax.Array]


def log_probabilities(name: str, log_p: ArrayLike) -> jax.Array:
    """`log_p` in the dtype of computation, after checking that it is normalised.

    Raises:
      ValueError: a concrete distribution does not sum to one within sqrt(eps) of its type.
    """
    log_p = jnp.asarray(log_p)
    given = log_p.dtype
    log_p = log_p.astype(numerics.accumulation_dtype(log_p))
    if checks.concrete(log_p):
        totals = np.sum(np.exp(np.asarray(log_p)), axis=-1)
        # Of the type it came in: bfloat16 logarithms are off by a percent.
        tolerance = float(jnp.finfo(given).eps) ** 0.5 if given.kind in 'fV' else 0.0
        # Not >: NaN must fail as well.
        if not np.all(np.abs(totals - 1) <= tolerance):
            worst = totals.flat[np.argmax(np.nan_to_num(np.abs(totals - 1), nan=np.inf))]
            raise ValueError(
                f'{name} must hold log-probabilities that sum to one over the last axis; the worst '
                f'sum is {worst:.6g}. Pass log_softmax of logits, or the logarithm of normalised '
                'probabilities.'
            )
    return log_p


def require_support(name_p: str, log_p: jax.Array, name_q: str, log_q: jax.Array):
    """Raises ValueError where p has mass and q has none: KL(p || q) is infinite."""
    if not checks.concrete(log_p, log_q):
        return
    p, q = np.broadcast_arrays(np.asarray(log_p), np.asarray(log_q))
    missing = (p > -np.inf) & (q == -np.inf)
    if np.any(missing):
        place = tuple(int(i) for i in np.argwhere(missing)[0])
        raise ValueError(
            f'KL({name_p} || {name_q}) is infinite: {name_q} has no mass at index {place}, where '
            f'{name_p} has {np.exp(p[place]):.3g} ({int(missing.sum())} such entries). Smooth '
            f'{name_q} (for example add epsilon and renormalise) before the comparison.'
        )


def kl_divergence(log_p: ArrayLike, log_q: ArrayLike) -> jax.Array:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), [...] nats; terms with p_v = 0 are 0."""
    log_p, log_q = log_probabilities('log_p', log_p), log_probabilities('log_q', log_q)
    require_support('p', log_p, 'q', log_q)
    return divergence.forward_kl(log_q, log_p)


def total_variation(log_p: ArrayLike, log_q: ArrayLike) -> jax.Array:
    """(1/2) sum_v |p_v - q_v|, [...] in [0, 1]."""
    log_p, log_q = log_probabilities('log_p', log_p), log_probabilities('log_q', log_q)
    return 0.5 * jnp.sum(jnp.abs(jnp.exp(log_p) - jnp.exp(log_q)), axis=-1)


def hilbert_metric(log_p: ArrayLike, log_q: ArrayLike) -> jax.Array:
    """max_v log(p_v / q_v) - min_v log(p_v / q_v), [...].

    Outcomes without mass in both are left out. Finite iff the supports agree.
    """
    log_p, log_q = log_probabilities('log_p', log_p), log_probabilities('log_q', log_q)
    require_support('p', log_p, 'q', log_q)
    require_support('q', log_q, 'p', log_p)
    shared = jnp.maximum(log_p, log_q) > -jnp.inf
    log_ratio = jnp.where(shared, log_p, 0.0) - jnp.where(shared, log_q, 0.0)
    highest = jnp.max(jnp.where(shared, log_ratio, -jnp.inf), axis=-1)
    return highest - jnp.min(jnp.where(shared, log_ratio, jnp.inf), axis=-1)


def chi_square(log_p: ArrayLike, log_q: ArrayLike) -> jax.Array:
    """chi^2(p || q) = sum_v (p_v - q_v)^2 / q_v, [...]; outcomes without mass in both count 0."""
    log_p, log_q = log_probabilities('log_p', log_p), log_probabilities('log_q', log_q)
    require_support('p', log_p, 'q', log_q)
    # (p/q - 1)^2 q keeps the relative precision of small q, and is exactly 0 at p = q.
    shared = jnp.maximum(log_p, log_q) > -jnp.inf
    log_ratio = jnp.where(shared, log_p, 0.0) - jnp.where(shared, log_q, 0.0)
    return jnp.sum(jnp.exp(log_q) * jnp.expm1(log_ratio) ** 2, axis=-1)


def entropy(log_p: ArrayLike) -> jax.Array:
    """-sum_v p_v log p_v, [...] nats."""
    log_p = log_probabilities('log_p', log_p)
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)


def collision_probability(log_p: ArrayLike) -> jax.Array:
    """sum_v p_v^2, [...] in [1/V, 1]: 1 means that all mass sits on one outcome."""
    return jnp.sum(jnp.exp(2 * log_probabilities('log_p', log_p)), axis=-1)
