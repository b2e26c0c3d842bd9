"""Preferences over samples of few-step generators, whose steps are Gaussian draws.

A pair is [..., 2], the preferred member first, as in `kd.losses.preference_family`, whose `dpo` is
the logistic loss of all of these.
"""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from kd.losses import preference_family

__all__ = ['best_worst', 'clipped_pair', 'gaussian_logp', 'hinge_pair', 'offline_pair']


def gaussian_logp(
    x: jax.Array, mean: jax.Array, std: jax.Array, *, axes: int, reduce: Literal['mean', 'sum']
) -> jax.Array:
    """log N(x; mean, std^2) over the last `axes` dimensions, in nats, float32 at least.

    Args:
      x, mean: [..., *d]; x is a constant to the caller who stops its gradient.
      std: positive, broadcasts against x.
      axes: how many dimensions one x has.
      reduce: 'sum' is the log-density; 'mean' divides it by the number of dimensions, by which PSO
        has chosen its beta. Of n dimensions a beta for the one is n times that for the other.

    Source: arXiv:2410.03190, the samplers' log-likelihoods as released.
    """
    wide = jnp.promote_types(x.dtype, jnp.float32)
    x, mean, std = (jnp.asarray(y).astype(wide) for y in (x, mean, std))
    each = -0.5 * jnp.square((x - mean) / std) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    over = tuple(range(-axes, 0))
    return jnp.sum(each, over) if reduce == 'sum' else jnp.mean(each, over)


def best_worst(drawn: jax.Array, scores: jax.Array) -> jax.Array:
    """Of several candidates for each example those of the highest and the lowest score, a pair.

    Args:
      drawn: [k, B, ...], k at least 2.
      scores: [k, B]; of equal ones two candidates that differ.

    Returns:
      [B, 2, ...], the best first.
    """
    order, rows = jnp.argsort(scores, axis=0), jnp.arange(scores.shape[1])
    return jnp.stack([drawn[order[-1], rows], drawn[order[0], rows]], axis=1)


def clipped_pair(
    log_p: jax.Array,
    anchor_log_p: jax.Array,
    sign: jax.Array,
    beta: float = 50.0,
    clip: float | None = 0.1,
) -> jax.Array:
    """-log sigma(beta h (log rho_a - log rho_b)), rho = clip(p / p_ref, 1 - eps, 1 + eps): [...].

    Outside of the clip there is no gradient, whichever way the ratio has moved.

    Args:
      log_p: [..., 2] of both members under the generator.
      anchor_log_p: [..., 2] under the reference; stop-gradiented.
      sign: h, 1 where the first is preferred, -1 where the second is, 0 for a tie, which is log 2.
      beta: positive.
      clip: eps; None for no clip.

    Source: PSO, arXiv:2410.03190, online objective as released.
    """
    ratio = log_p - jax.lax.stop_gradient(anchor_log_p)
    if clip is not None:
        ratio = jnp.clip(ratio, math.log(1 - clip), math.log(1 + clip))
    return preference_family.dpo(sign[..., None] * ratio, jnp.zeros_like(ratio), beta)


def offline_pair(
    errors: jax.Array, anchor_errors: jax.Array, beta: float = 5.0, kappa: float = 0.1
) -> jax.Array:
    """-log sigma(beta (D_ref - D)), D = m_w - kappa m_l: [...]; of kappa = 1 Diffusion-DPO.

    Args:
      errors: [..., 2], squared errors m of the generator on a target and on a reference sample.
      anchor_errors: [..., 2] of the frozen generator; stop-gradiented.
      beta: positive.
      kappa: how much of the reference sample is pushed away; with 1 its error has no bound.

    Source: PSO, arXiv:2410.03190, offline objective as released (`loss_type='pso'`).
    """
    share = jnp.asarray([1.0, kappa], errors.dtype)
    return preference_family.dpo(-share * errors, -share * anchor_errors, beta)


def hinge_pair(errors: jax.Array, beta: float = 5.0, kappa: float = 0.1) -> jax.Array:
    """max(0, 1 + beta (m_w - kappa m_l)), [...]: without a reference generator.

    Arguments as of `offline_pair`.

    Source: PSO, arXiv:2410.03190, as released for customisation (`loss_type='pso_db'`).
    """
    return jax.nn.relu(1 + beta * (errors[..., 0] - kappa * errors[..., 1]))
