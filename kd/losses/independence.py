"""Independence of a latent from a group, in closed form for Gaussian posteriors, and energies.

A latent of example i is N(m_i, diag v_i). The product integral of two of them is

    k_ij = int N(z; m_i, v_i) N(z; m_j, v_j) dz = N(m_i - m_j; 0, v_i + v_j)

All pairs are gone through in chunks of rows, again in the backward pass, so that no array of all
pairs is kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from kd.losses import numerics
from kd.losses.numerics import wide

__all__ = ['distance_covariance', 'energy_distance', 'gauss_overlap', 'gaussian_kl']

_CHUNK = 128


def gaussian_kl(mean: jax.Array, variance: jax.Array) -> jax.Array:
    """KL(N(mean, diag variance) || N(0, I)) in nats, [..., D] to [...].

    1/2 sum_d (m^2 + v - 1 - log v)
    """
    mean, variance = wide(mean), wide(variance)
    return 0.5 * jnp.sum(mean**2 + variance - 1.0 - jnp.log(variance), -1)


def gauss_overlap(
    mean1: jax.Array,
    variance1: jax.Array,
    mean2: jax.Array,
    variance2: jax.Array,
    *,
    where1: jax.Array | None = None,
    where2: jax.Array | None = None,
    diagonal: bool = True,
    log_scale: float = 0.0,
    chunk: int = _CHUNK,
) -> jax.Array:
    """int p_1 p_2 dz of two mixtures of equal weights: the mean of k_ij over all pairs.

        exp(log_scale) mean_ij exp(-1/2 sum_d [(m_i - m_j)_d^2 / (v_i + v_j)_d
                                               + log(2 pi (v_i + v_j)_d)])

    Args:
      mean1, variance1: [N, D].
      mean2, variance2: [M, D].
      where1, where2: bool [N] and [M], what counts; all by default.
      diagonal: False leaves out pairs i = j, of a batch with itself, which bias it upwards.
      log_scale: densities of many dimensions leave float32 otherwise: give 0.9 D, say.
      chunk: rows at a time.

    Returns:
      [], float32 (float64 for float64 input); 0 where no pair counts.

    Source: arXiv 2408.10755, as of FairDisCo.
    """
    weight1 = _weights(where1, mean1)[:, None]
    weight2 = _weights(where2, mean2)[:, None]
    side1 = (*_counted(mean1, variance1, where1), weight1)
    side2 = (*_counted(mean2, variance2, where2), weight2)
    sums = _grouped(side1, side2, diagonal, log_scale, chunk)
    pairs = weight1.sum() * weight2.sum()
    if not diagonal:
        pairs = pairs - (weight1 * weight2).sum()
    return _ratio(sums[0, 0], pairs)


def distance_covariance(
    mean: jax.Array,
    variance: jax.Array,
    group: jax.Array,
    groups: int,
    *,
    where: jax.Array | None = None,
    diagonal: bool = True,
    log_scale: float = 0.0,
    chunk: int = _CHUNK,
) -> jax.Array:
    """V^2(z, s): the integrated squared difference of p(z, s) and p(z) p(s).

        sum_s (n_s / B)^2 int (p(z | s) - p(z))^2 dz
            = sum_s (n_s / B)^2 [k(all, all) + k(s, s) - 2 k(s, all)]

    with k the overlaps of `gauss_overlap`. 0 where every group has the same Gaussians. A group that
    is absent, or is the whole batch, counts for nothing. Of a batch, and of its parts another
    number.

    Args:
      mean, variance: [B, D].
      group: int [B], 0 .. groups - 1.
      groups: S.
      where: bool [B], what counts.
      diagonal: False leaves pairs i = j out of every mean; the result may then be below 0.
      log_scale, chunk: as of `gauss_overlap`; the result is exp(log_scale) V^2.

    Returns:
      [], float32 (float64 for float64 input). Not stop-gradiented.

    Source: arXiv 2408.10755, as of FairDisCo.
    """
    member = jax.nn.one_hot(group, groups, dtype=wide(mean).dtype)
    member = member * _weights(where, mean)[:, None]
    side = (*_counted(mean, variance, where), member)
    sums = _grouped(side, side, diagonal, log_scale, chunk)
    count = member.sum(0)
    total = count.sum()
    own = 0.0 if diagonal else 1.0
    everything = _ratio(sums.sum(), total * (total - own))
    inside = _ratio(jnp.diagonal(sums), count * (count - own))
    between = _ratio(sums.sum(1), count * (total - own))
    counts = (count > own) & (count < total)
    return jnp.sum(jnp.where(counts, _ratio(count, total) ** 2, 0.0) * (
        everything + inside - 2.0 * between
    ))  # fmt: skip


def energy_distance(a: jax.Array, b: jax.Array, *, chunk: int = _CHUNK) -> jax.Array:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two samples, their own pairs included; 0 if equal.

    Args:
      a: [N, D].
      b: [M, D]. Neither is stop-gradiented.
      chunk: rows at a time.

    Source: Szekely and Rizzo 2013; used by arXiv 2408.10755 as we read it.
    """
    a, b = wide(a), wide(b)

    def distances(x: jax.Array, y: jax.Array) -> jax.Array:
        def of_rows(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
            part, weight = rows
            apart = numerics.norm(part[:, None] - y, axis=-1)
            return jnp.sum(apart * weight[:, None])

        total = _over_chunks(of_rows, (x, jnp.ones(len(x), x.dtype)), chunk)
        return total / (len(x) * len(y))

    return 2.0 * distances(a, b) - distances(a, a) - distances(b, b)


def _grouped(side1, side2, diagonal: bool, log_scale: float, chunk: int) -> jax.Array:
    """[S1, S2], sums over pairs of k_ij w_is w_jt; a side is (mean, variance, w [N, S])."""
    mean2, variance2, weight2 = (wide(x) for x in side2)
    constant = log_scale - 0.5 * mean2.shape[-1] * math.log(2.0 * math.pi)

    def of_rows(rows: tuple[jax.Array, ...]) -> jax.Array:
        mean1, variance1, weight1, number = rows
        variance = variance1[:, None] + variance2
        exponent = (mean1[:, None] - mean2) ** 2 / variance + jnp.log(variance)
        k = jnp.exp(constant - 0.5 * exponent.sum(-1))
        if not diagonal:
            k = jnp.where(number[:, None] == jnp.arange(len(mean2)), 0.0, k)
        return jnp.einsum('ij,is,jt->st', k, weight1, weight2, precision='highest')

    side = tuple(wide(x) for x in side1)
    # Rows that only fill the last chunk: their variance must not be 0.
    numbers = jnp.arange(len(side[0]))
    return _over_chunks(of_rows, (side[0], side[1], side[2], numbers), chunk, fill=(0, 1, 0, -1))


def _over_chunks(
    function: Callable[..., jax.Array],
    arrays: tuple[jax.Array, ...],
    chunk: int,
    fill: tuple[int, ...] = (),
) -> jax.Array:
    """The sum of `function` over chunks of rows, computed again for the gradient."""
    count = len(arrays[0])
    chunk = min(chunk, count)
    missing = -count % chunk
    padded = [
        jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1), constant_values=value)
        for x, value in zip(arrays, fill or (0,) * len(arrays), strict=True)
    ]
    parts = tuple(x.reshape(-1, chunk, *x.shape[1:]) for x in padded)
    first = jax.eval_shape(function, tuple(x[0] for x in parts))
    step = jax.checkpoint(lambda total, part: (total + function(part), None))
    return jax.lax.scan(step, jnp.zeros(first.shape, first.dtype), parts)[0]


def _weights(where: jax.Array | None, like: jax.Array) -> jax.Array:
    x = wide(like)
    return jnp.ones(len(x), x.dtype) if where is None else where.astype(x.dtype)


def _counted(
    mean: jax.Array, variance: jax.Array, where: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """A unit Gaussian in the place of what does not count, so that not even a NaN is read."""
    if where is None:
        return mean, variance
    there = jnp.asarray(where)[:, None]
    return jnp.where(there, mean, 0.0), jnp.where(there, variance, 1.0)


def _ratio(a: jax.Array, b: jax.Array) -> jax.Array:
    """a / b, 0 where b is."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
