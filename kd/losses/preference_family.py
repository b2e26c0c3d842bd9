"""Known preference losses, most of them cells of the anchored cross-entropy of `preference`.

| loss | candidates | anchor | target q | tau |
|---|---|---|---|---|
| dpo | 2 | reference | (1, 0) | 1 / beta |
| simpo, of means | 2 | the margin | (1, 0) | 1 / beta |
| soft_dpo | 2 | reference | softmax of rewards | 1 / beta |
| distillation | P | uniform | softmax(z_T / T) | T |
| supervised | P | uniform | one-hot | 1 |
| max_entropy | P | uniform | softmax(Q / alpha) | 1 |

Shapes, units and stopped gradients are those of `kd.losses.preference`. `kto_pair` and `redi` are
no cells: the first is bounded, the second has no sigmoid at all.

A pair of answers is [..., 2], the preferred one first, as the layout 'pairs' of text sources has it
([B, 2, T]): `log_p` are sums of log-probabilities over the tokens of an answer, its end included,
in float32 (in bfloat16 a thousand tokens lose a tenth), and `counts` how many these are.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
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


def simpo(
    log_p: ArrayLike, counts: ArrayLike, beta: ArrayLike = 2.0, gamma: ArrayLike = 1.0
) -> jax.Array:
    """Preference without a reference: -log sigma(beta (l_0 / n_0 - l_1 / n_1) - gamma).

    DPO on means, its anchor a log-ratio of gamma / beta. As beta goes to 0 its gradient goes to
    beta sigma(gamma) times that of `redi` with alpha = 1.

    Args:
      log_p: [..., 2] sums, see the module.
      counts: [..., 2]; an empty answer counts as one token.
      beta: positive.
      gamma: the margin, in units of the argument of sigma (papers also write gamma / beta).

    Returns:
      [...] nats.

    Source: Meng et al. 2024, arXiv 2405.14734, eq. 6.
    """
    numerics.check_positive('beta', beta)
    mean = _means(log_p, counts)
    margin = jnp.asarray(gamma, mean.dtype) / jnp.asarray(beta, mean.dtype)
    anchor = jnp.stack([margin, jnp.zeros_like(margin)], axis=-1)
    return dpo(mean, jnp.broadcast_to(anchor, mean.shape), beta)


def redi(
    log_p: ArrayLike, counts: ArrayLike, alpha: ArrayLike = 0.8, fade: ArrayLike = 0.0
) -> jax.Array:
    """-l_0 / n_0 + alpha l_1 / n_1: learns the right answer, unlearns the wrong one a little less.

    alpha = 0 is fine-tuning on the right ones, alpha = 1 the limit of `simpo` for beta -> 0. It is
    not bounded below and expected to become negative: the learning rate is its only brake.

    Args:
      log_p: [..., 2] sums, see the module.
      counts: [..., 2]; an empty answer counts as one token.
      alpha: the weight of the wrong answer; below 1, or no law but the wrong one's own is a
        stationary point.
      fade: f >= 0; the weight is alpha exp(f sg[l_1 / n_1]), so that wrong answers are left alone
        once they are unlikely. The paper's option, which it does not use; that the factor is a
        constant to the gradient is ours.

    Returns:
      [...] nats per token.

    Source: REDI, arXiv 2505.24850.
    """
    mean = _means(log_p, counts)
    fade, wrong = jnp.asarray(fade, mean.dtype), lax.stop_gradient(mean[..., 1])
    weight = jnp.asarray(alpha) * jnp.exp(jnp.where(fade > 0, fade * wrong, 0.0))
    return weight * mean[..., 1] - mean[..., 0]


def kto_pair(
    log_p: ArrayLike, anchor_log_p: ArrayLike, baseline: ArrayLike, beta: ArrayLike = 0.1
) -> jax.Array:
    """The mean of sigma(beta (b_1 - a_0)) and sigma(beta (a_1 - b_0)), a = l - r, in [0, 1].

    1/2 where the student is the anchor. Each answer is compared with the batch's mean of the other
    kind, not with its partner.

    Args:
      log_p: [..., 2] sums, see the module.
      anchor_log_p: [..., 2] under the reference, in LLaVA-MoD the teacher; stop-gradiented.
      baseline: [2] of `kto_baseline`, of the whole batch.
      beta: positive.

    Returns:
      [...].

    Source: LLaVA-MoD, arXiv 2408.15881, preference distillation, as its code has it; the loss is of
    Ethayarajh et al. 2024, arXiv 2402.01306, for pairs.
    """
    numerics.check_positive('beta', beta)
    advantage = _advantage(log_p, anchor_log_p)
    baseline = jnp.asarray(baseline, advantage.dtype)
    against = baseline[..., ::-1] - advantage
    sides = jax.nn.sigmoid(jnp.asarray(beta, advantage.dtype) * against * jnp.array([1, -1]))
    return jnp.mean(sides, axis=-1)


def kto_baseline(
    log_p: ArrayLike,
    anchor_log_p: ArrayLike,
    *,
    where: ArrayLike | None = None,
    official: bool = False,
) -> jax.Array:
    """b_i = max(0, mean over the batch of l_i - r_i), the estimated KL of either kind of answer.

    A statistic of the batch: taken in a method's `collect`, it does not depend on micro-batches.

    Args:
      log_p, anchor_log_p: [B, 2], see `kto_pair`.
      where: bool [B], the pairs that count; of none it is 0.
      official: as in the released code of LLaVA-MoD, where the student gets a gradient through the
        baseline too (and the batch is a device's own). Else no gradient.

    Returns:
      [2].
    """
    advantage = _advantage(log_p, anchor_log_p)
    if not official:
        advantage = lax.stop_gradient(advantage)
    counted = jnp.asarray(True) if where is None else jnp.asarray(where, bool)
    counted = jnp.broadcast_to(counted, advantage.shape[:1])[:, None]
    total = jnp.sum(jnp.where(counted, advantage, 0.0), axis=0)
    return jnp.maximum(total / jnp.maximum(jnp.sum(counted), 1), 0.0)


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


def _means(log_p: ArrayLike, counts: ArrayLike) -> jax.Array:
    log_p, counts = _pair('log_p', log_p), _pair('counts', counts)
    dtype = numerics.accumulation_dtype(log_p)
    return log_p.astype(dtype) / jnp.maximum(counts.astype(dtype), 1)


def _advantage(log_p: ArrayLike, anchor_log_p: ArrayLike) -> jax.Array:
    log_p, anchor = _pair('log_p', log_p), lax.stop_gradient(_pair('anchor_log_p', anchor_log_p))
    dtype = numerics.accumulation_dtype(log_p, anchor)
    return log_p.astype(dtype) - anchor.astype(dtype)


def _pair(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if x.shape[-1:] != (2,):
        raise ValueError(f'{name} needs two candidates on the last axis, got shape {x.shape}.')
    return x
