"""Known losses as cells of the anchored cross-entropy of `kd.losses.preference`.

| loss | candidates | anchor | target q | tau |
|---|---|---|---|---|
| dpo | 2 | reference | (1, 0) | 1 / beta |
| soft_dpo | 2 | reference | softmax of rewards | 1 / beta |
| distillation | P | uniform | softmax(z_T / T) | T |
| supervised | P | uniform | one-hot | 1 |
| max_entropy | P | uniform | softmax(Q / alpha) | 1 |

Shapes, units and stopped gradients are those of `kd.losses.preference`.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics, preference


def dpo(log_p: ArrayLike, anchor_log_p: ArrayLike, beta: ArrayLike = 0.1) -> jax.Array:
    """Direct preference optimisation: -log sigma(beta [(l_0 - l_1) - (r_0 - r_1)]).

    The anchored cross-entropy with P = 2, q = (1, 0) and tau = 1 / beta.

    Args:
      log_p: [..., 2] sequence log-probabilities, the preferred answer first.
      anchor_log_p: [..., 2] under the reference; stop-gradiented.
      beta: positive.

    Returns:
      [...] nats.

    Source: Rafailov et al. 2023, arXiv 2305.18290, eq. 7.
    """
    numerics.check_positive('beta', beta)
    log_p = _pair('log_p', log_p)
    target = jnp.zeros(log_p.shape, numerics.accumulation_dtype(log_p)).at[..., 0].set(1.0)
    return preference.anchored_cross_entropy(log_p, anchor_log_p, target, 1 / jnp.asarray(beta))


def soft_dpo(
    log_p: ArrayLike,
    anchor_log_p: ArrayLike,
    rewards: ArrayLike,
    beta: ArrayLike = 0.1,
    reward_temperature: ArrayLike = 1.0,
) -> jax.Array:
    """DPO with soft labels: q = (sigma((R_0 - R_1) / beta_r), 1 - that), tau = 1 / beta.

    Args:
      log_p, anchor_log_p, rewards: [..., 2], in the same (arbitrary) order.
      beta, reward_temperature: positive.

    Returns:
      [...] nats.

    Source: arXiv 2510.18913, pairwise soft targets.
    """
    numerics.check_positive('beta', beta)
    target = preference.target_from_rewards(_pair('rewards', rewards), reward_temperature)
    return preference.anchored_cross_entropy(
        _pair('log_p', log_p), anchor_log_p, target, 1 / jnp.asarray(beta)
    )


def distillation(
    logits: ArrayLike, teacher_logits: ArrayLike, temperature: ArrayLike = 1.0
) -> jax.Array:
    """Hinton's soft-label cross-entropy: uniform anchor, q = softmax(z_T / T), tau = T.

    CE(softmax(z_T / T), softmax(z / T)), without the factor T^2.

    Args:
      logits, teacher_logits: [..., P]; the teacher's are stop-gradiented.
      temperature: positive; a number or [...].

    Returns:
      [...] nats.

    Source: Hinton et al. 2015, arXiv 1503.02531.
    """
    target = preference.target_from_rewards(teacher_logits, temperature)
    return preference.anchored_cross_entropy(logits, jnp.zeros_like(logits), target, temperature)


def supervised(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """Cross-entropy with labels: uniform anchor, q one-hot, tau = 1.

    Args:
      logits: [..., P].
      labels: int [...].

    Returns:
      [...] nats; +inf where a label is none of 0 .. P - 1.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    known = numerics.is_outcome(labels, logits.shape[-1])
    dtype = numerics.accumulation_dtype(logits)
    # A distribution in any case, which the loss asks for.
    target = jax.nn.one_hot(jnp.where(known, labels, 0), logits.shape[-1], dtype=dtype)
    loss = preference.anchored_cross_entropy(logits, jnp.zeros_like(logits), target)
    return jnp.where(known, loss, jnp.inf)


def max_entropy(logits: ArrayLike, values: ArrayLike, temperature: ArrayLike = 1.0) -> jax.Array:
    """Fits the maximum-entropy policy: uniform anchor, q = softmax(Q / alpha), tau = 1.

    q is also the maximiser of E_pi[Q] + alpha H(pi), whose negative is alpha KL(pi || q) up to a
    constant. This loss is KL(q || pi) + H(q): the same optimum by the other KL, so gradients away
    from the optimum differ from those of maximum-entropy reinforcement learning.

    Args:
      logits: [..., P] of the policy.
      values: [..., P] Q, stop-gradiented.
      temperature: alpha > 0; a number or [...].

    Returns:
      [...] nats.

    Source: arXiv 2510.18913, special cases; Haarnoja et al. 2018, arXiv 1801.01290.
    """
    target = preference.target_from_rewards(values, temperature)
    return preference.anchored_cross_entropy(logits, jnp.zeros_like(logits), target)


def _pair(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape[-1:] != (2,):
        raise ValueError(f'{name} needs two candidates on the last axis, got shape {x.shape}.')
    return x
