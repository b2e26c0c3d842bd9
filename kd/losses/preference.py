"""Anchored preference losses: one cross-entropy that holds DPO, distillation and fine-tuning
(`kd.losses.preference_family`).

The student's log-probabilities of P candidates are compared with those of an anchor and the
softmax of the difference is fitted to a target q:

    L = -sum_i q_i log p~_i,    p~ = softmax((l - l_ref) / tau),

so that dL/dl_i = (p~_i - q_i) / tau and, on the simplex over the candidates, the optimum is
pi_ref q^tau / Z. Two effects of tau pull apart: gradients shrink like 1 / tau, while the
distance of the optimum from the anchor grows with tau.

Conventions. Candidates are on the last axis, `[..., P]`; leading axes are contexts. Values are in
nats, float32 (float64 for float64 input), one per context, not reduced. `where` is a bool array
that broadcasts against the candidates; a candidate with False, or with a log-probability of -inf,
takes no part. The anchor and the target are stop-gradiented: the method is defined by it.
Checks of values run on concrete arrays only and are skipped inside jit, grad and vmap.

Source: Wang 2025 (ADPO), arXiv 2510.18913.
"""

from __future__ import annotations

from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import jax.scipy.stats
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from kd.losses import numerics

Tree = TypeVar('Tree')
RewardTarget = Literal['raw', 'standardized']
AnchorMode = Literal['fixed', 'self', 'ema', 'on_policy']


def anchored_log_policy(
    log_p: ArrayLike,
    anchor_log_p: ArrayLike,
    tau: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """log p~ = log softmax((log_p - sg[anchor_log_p]) / tau) over the candidates.

    Adding a constant per context to either argument changes nothing.

    Args:
      log_p: [..., P] the student's log-probabilities (sequence sums, or logits).
      anchor_log_p: [..., P] the anchor's, stop-gradiented.
      tau: positive; a number, or [...] one per context.
      where: bool, see the module.

    Returns:
      [..., P] nats, -inf for a candidate that takes no part.

    Raises:
      ValueError: the shapes differ, or a concrete tau is not positive.
    """
    log_p, anchor_log_p = jnp.asarray(log_p), lax.stop_gradient(jnp.asarray(anchor_log_p))
    if log_p.shape[-1:] != anchor_log_p.shape[-1:]:
        raise ValueError(
            'log_p and anchor_log_p need the same candidates on the last axis, got shapes '
            f'{log_p.shape} and {anchor_log_p.shape}.'
        )
    numerics.check_positive('tau', tau)
    dtype = numerics.accumulation_dtype(log_p, anchor_log_p)
    possible = (log_p > -jnp.inf) & (anchor_log_p > -jnp.inf)
    if where is not None:
        possible &= jnp.asarray(where)
    # -inf - -inf is NaN: absent candidates are zeroed before the subtraction.
    log_ratio = jnp.where(possible, log_p, 0.0).astype(dtype)
    log_ratio -= jnp.where(possible, anchor_log_p, 0.0).astype(dtype)
    return numerics.log_softmax(log_ratio, temperature=_per_context(tau, dtype), where=possible)


def anchored_cross_entropy(
    log_p: ArrayLike,
    anchor_log_p: ArrayLike,
    target: ArrayLike,
    tau: ArrayLike = 1.0,
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """-sum_i q_i log p~_i = KL(q || p~) + H(q), with p~ = softmax((l - l_ref) / tau).

    Gradient: dL/dl_i = (p~_i - q_i) / tau, which sums to 0 over the candidates. A context in which
    no candidate takes part is 0 with zero gradient.

    Args:
      log_p: [B, P] log-probabilities of the candidates under the student.
      anchor_log_p: [B, P] under the anchor; stop-gradiented.
      target: [B, P] q, a distribution over the candidates that take part; stop-gradiented.
      tau: positive anchoring temperature; a number or [B].
      where: bool, broadcasts against [B, P].

    Returns:
      [B] nats, not reduced.

    Raises:
      ValueError: the shapes differ, tau is not positive, or (concrete arrays) the target is not a
        distribution or has mass on a candidate that takes no part, where the loss is infinite.

    Source: arXiv 2510.18913, the anchored objective.
    """
    log_policy = anchored_log_policy(log_p, anchor_log_p, tau, where=where)
    target = lax.stop_gradient(jnp.asarray(target).astype(log_policy.dtype))
    if where is not None:
        target = jnp.where(where, target, 0.0)
    _check_target(target, log_policy)
    # Not `> 0`, which is false for NaN: a broken target would be one that asks for nothing.
    counted = target != 0
    return -jnp.sum(jnp.where(counted, target, 0.0) * jnp.where(counted, log_policy, 0.0), axis=-1)


def closed_form_policy(anchor_log_p: ArrayLike, target: ArrayLike, tau: ArrayLike) -> jax.Array:
    """log pi*, pi* = pi_ref q^tau / Z: the minimiser of `anchored_cross_entropy` over policies.

    Args:
      anchor_log_p: [..., P] log-probabilities of the anchor.
      target: [..., P] q.
      tau: positive; a number or [...].

    Returns:
      [..., P] nats; -inf where q is 0.

    Source: arXiv 2510.18913, the closed-form optimum on the candidates.
    """
    numerics.check_positive('tau', tau)
    anchor_log_p, target = jnp.asarray(anchor_log_p), jnp.asarray(target)
    dtype = numerics.accumulation_dtype(anchor_log_p, target)
    log_q = jnp.log(jnp.where(target > 0, target, 1.0).astype(dtype))
    tilted = anchor_log_p.astype(dtype) + _per_context(tau, dtype) * log_q
    return numerics.log_softmax(tilted, where=target > 0)


def target_from_rewards(
    rewards: ArrayLike,
    temperature: ArrayLike = 0.5,
    kind: RewardTarget = 'raw',
    *,
    where: ArrayLike | None = None,
) -> jax.Array:
    """q = softmax(R / beta_r) ('raw') or softmax(A / beta_r) ('standardized').

    A = (R - mean) / (std + 1e-8) within the context, with the population standard deviation. Equal
    rewards give the uniform q: unlike a policy gradient, the loss then pulls back to the anchor.

    Args:
      rewards: [..., P].
      temperature: beta_r > 0; a number or [...].
      kind: 'raw' or 'standardized'.
      where: bool, see the module; an absent candidate gets q = 0.

    Returns:
      [..., P] probabilities, stop-gradiented.
    """
    numerics.check_positive('temperature', temperature)
    rewards = lax.stop_gradient(jnp.asarray(rewards))
    dtype = numerics.accumulation_dtype(rewards)
    rewards = rewards.astype(dtype)
    if kind == 'standardized':
        mean = jnp.mean(rewards, axis=-1, keepdims=True, where=where)
        std = jnp.std(rewards, axis=-1, keepdims=True, where=where)
        rewards = (rewards - mean) / (std + 1e-8)
    elif kind != 'raw':
        raise ValueError(f"kind must be 'raw' or 'standardized', got {kind!r}.")
    return jnp.exp(
        numerics.log_softmax(rewards, temperature=_per_context(temperature, dtype), where=where)
    )


def kernel_density_scores(
    rewards: ArrayLike, buffer: ArrayLike, bandwidth: ArrayLike, epsilon: float = 1e-3
) -> jax.Array:
    """logit F(R), F the Gaussian-kernel estimate of the rewards' distribution function.

    F(R) = mean_j Phi((R - b_j) / h), clipped to [epsilon, 1 - epsilon]: a smooth rank, so a heavy
    tail cannot dominate the target made of it by `target_from_rewards`. A reconstruction: the
    paper names the transform and gives no formula.

    Args:
      rewards: [..., P].
      buffer: [N] past rewards.
      bandwidth: h > 0.
      epsilon: in (0, 1/2); scores lie within +-log((1 - epsilon) / epsilon).

    Returns:
      [..., P] scores, stop-gradiented.
    """
    numerics.check_positive('bandwidth', bandwidth)
    if not 0 < epsilon < 0.5:
        raise ValueError(f'epsilon must be in (0, 1/2), got {epsilon}.')
    rewards, buffer = lax.stop_gradient((jnp.asarray(rewards), jnp.asarray(buffer)))
    dtype = numerics.accumulation_dtype(rewards, buffer)
    distances = (rewards[..., None].astype(dtype) - buffer.astype(dtype)) / bandwidth
    ranks = jnp.mean(jax.scipy.stats.norm.cdf(distances), axis=-1)
    ranks = jnp.clip(ranks, epsilon, 1 - epsilon)
    return jnp.log(ranks) - jnp.log1p(-ranks)


def adaptive_temperature(
    mean_neg_log_p: ArrayLike,
    rewards: ArrayLike,
    vocab_size: int,
    *,
    base: float = 0.8,
    uncertainty: float = 1.0,
    failure: float = 0.5,
    low: float = 0.1,
    high: float = 5.0,
) -> jax.Array:
    """tau(x) = base (1 + a H + b (1 - H)(1 - R)), clipped to [low, high]; no gradient.

    a = uncertainty, b = failure. H is the mean of -log p of the sampled tokens divided by
    log(vocab_size) and clipped to [0, 1]. R is the context's mean reward, min-max normalised over
    the batch (1/2 where all are equal). H = 0, R = 1 gives `base`; it rises with H iff
    a >= b (1 - R).

    Args:
      mean_neg_log_p: [B, P] mean over the tokens of each candidate of -log p, nats.
      rewards: [B, P].
      vocab_size: |V| >= 2.
      base, uncertainty, failure, low, high: numbers.

    Returns:
      [B], stop-gradiented.

    Raises:
      ValueError: vocab_size < 2 or not 0 < low <= high.

    Source: arXiv 2510.18913, adaptive temperature.
    """
    if vocab_size < 2:
        raise ValueError(f'vocab_size must be at least 2, got {vocab_size}.')
    if not 0 < low <= high:
        raise ValueError(f'need 0 < low <= high, got low={low}, high={high}.')
    neg_log_p, rewards = lax.stop_gradient((jnp.asarray(mean_neg_log_p), jnp.asarray(rewards)))
    dtype = numerics.accumulation_dtype(neg_log_p, rewards)
    entropy = jnp.mean(neg_log_p.astype(dtype), axis=-1) / jnp.log(jnp.asarray(vocab_size, dtype))
    entropy = jnp.clip(entropy, 0.0, 1.0)
    reward = jnp.mean(rewards.astype(dtype), axis=-1)
    spread = jnp.max(reward) - jnp.min(reward)
    normalised = (reward - jnp.min(reward)) / jnp.where(spread > 0, spread, 1.0)
    normalised = jnp.where(spread > 0, normalised, 0.5)
    tau = base * (1 + uncertainty * entropy + failure * (1 - entropy) * (1 - normalised))
    return jnp.clip(tau, low, high)


def anchor_init(mode: AnchorMode, params: Tree, reference: Tree | None = None) -> Tree:
    """The anchor before the first step: the reference if 'fixed', else the student itself.

    Raises:
      ValueError: an unknown mode, or 'fixed' without a reference.
    """
    _check_mode(mode)
    if mode != 'fixed':
        return params
    if reference is None:
        raise ValueError("anchor mode 'fixed' needs a reference (an SFT model, or the teacher).")
    return reference


def anchor_update(anchor: Tree, params: Tree, mode: AnchorMode, decay: ArrayLike = 0.99) -> Tree:
    """The anchor after a step, for pytrees of parameters or of log-probabilities.

    'fixed' and 'self' keep the anchor (they differ in `anchor_init`); 'ema' returns
    decay anchor + (1 - decay) params; 'on_policy' returns params, to be called when candidates are
    sampled: the anchor is then the old policy, and inner steps leave it alone.

    Raises:
      ValueError: an unknown mode, or a concrete decay outside [0, 1].
    """
    _check_mode(mode)
    if mode in ('fixed', 'self'):
        return anchor
    if mode == 'on_policy':
        return params
    if not isinstance(decay, jax.core.Tracer) and np.any(np.abs(np.asarray(decay) - 0.5) > 0.5):
        raise ValueError(f'decay must be in [0, 1], got {decay}.')
    return jax.tree.map(lambda a, p: decay * a + (1 - decay) * p, anchor, params)


def _per_context(value: ArrayLike, dtype: Any) -> jax.Array:
    """A number stays one; [...] becomes [..., 1] to meet the candidates' axis."""
    value = jnp.asarray(value, dtype)
    return value[..., None] if value.ndim else value


def _check_mode(mode: str):
    modes = ('fixed', 'self', 'ema', 'on_policy')
    if mode not in modes:
        raise ValueError(f'anchor mode must be one of {modes}, got {mode!r}.')


def _check_target(target: jax.Array, log_policy: jax.Array):
    if isinstance(target, jax.core.Tracer) or isinstance(log_policy, jax.core.Tracer):
        return
    q, log_p = np.asarray(target), np.asarray(log_policy)
    total = np.sum(q, axis=-1)
    empty = np.all(log_p == -np.inf, axis=-1)
    tolerance = float(np.finfo(q.dtype).eps) ** 0.5
    if np.any(q < 0) or not np.all(empty | (np.abs(total - 1) <= tolerance)):
        raise ValueError(
            'target must be a distribution over the candidates that take part; its sums are in '
            f'[{float(np.min(total))}, {float(np.max(total))}], its least entry is '
            f'{float(np.min(q))}.'
        )
    if np.any((q > 0) & (log_p == -np.inf)):
        raise ValueError(
            'target has mass on a candidate whose log-probability is -inf under the student or the '
            'anchor: the loss is infinite. Mask the candidate with where= and renormalise q.'
        )
