"""Policy gradients on sampled answers: advantages, clipped surrogates, KL estimates.

    A = policy.group_advantage(rewards, group=8)                       # [B], in `collect`
    ratio = policy.log_ratio(log_p, old_log_p)                         # [B, R]
    losses = policy.clipped_surrogate(ratio, A[:, None], low=0.2, high=0.28)
    rows = aggregate.per_row(losses, weights)                          # then the mean over rows

Log-probabilities are of the realised tokens, [..., R] in nats: `log_p` under the policy that is
trained, `old_log_p` under the one that sampled, both at one temperature and over the same allowed
tokens. Rewards are [B], the G rows of a group (answers to one prompt) following one another.
Computed in float32 (float64 for float64 input). Nothing is reduced; what is padding is left to the
weights. Old policies, teachers, references, rewards and advantages are stop-gradiented: that is
what a policy gradient is. Group statistics are of whole groups, so they belong where the whole
batch is, in `kd.method.with_collect`, and not in a loss, which may see a part of it.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from kd.losses import numerics, token

Advantage = Literal['grpo', 'dr_grpo', 'rloo']
KL = Literal['k1', 'k2', 'k3', 'k3+']

# Log-ratios beyond are cut before they are exponentiated.
_FAR = 20.0


def group_advantage(
    rewards: ArrayLike,
    group: int,
    kind: Advantage = 'grpo',
    *,
    ddof: int = 0,
    epsilon: float = 1e-6,
    where: ArrayLike | None = None,
) -> jax.Array:
    """How much better an answer is than those to the same prompt; no gradient.

    | kind | advantage | source |
    |---|---|---|
    | grpo | (R - mean) / (std + epsilon) | DeepSeekMath, arXiv:2402.03300 |
    | dr_grpo | R - mean | Dr. GRPO, arXiv:2503.20783 |
    | rloo | R - mean of the other G - 1 = G / (G - 1) (R - mean) | arXiv:2402.14740 |

    A group whose rewards are equal is dead: exactly 0, whatever rounding would leave of it. An
    answer that has no reward, for which `where` is False, has 0 and is no part of its group, which
    is that much smaller.

    Args:
      rewards: [B], or [..., B].
      group: G, at least 2; divides B.
      kind: see above.
      ddof: what the variance divides by, G - ddof. Papers have 0; verl, TRL and torch's `std` 1,
        which makes advantages 7 % smaller at G = 8. For 'grpo' alone.
      epsilon: 1e-6 in verl, 1e-4 in TRL.
      where: bool like the rewards, those that there are; None for all.

    Returns:
      [B].

    Raises:
      ValueError: groups that do not fit, or another kind.
    """
    if ddof not in (0, 1):
        raise ValueError(f'ddof is 0 or 1, got {ddof}.')
    grouped, counted = _grouped(rewards, group), _counted(where, rewards, group)
    count = jnp.sum(counted, axis=-1, keepdims=True, dtype=grouped.dtype)
    total = jnp.sum(jnp.where(counted, grouped, 0.0), axis=-1, keepdims=True)
    centred = jnp.where(counted, grouped - total / jnp.maximum(count, 1), 0.0)
    if kind == 'grpo':
        squares = jnp.sum(centred**2, axis=-1, keepdims=True)
        variance = squares / jnp.maximum(count - ddof, 1)
        advantage = centred / (jnp.sqrt(variance) + epsilon)
    elif kind == 'dr_grpo':
        advantage = centred
    elif kind == 'rloo':
        advantage = count / jnp.maximum(count - 1, 1) * centred
    else:
        raise ValueError(f"kind must be 'grpo', 'dr_grpo' or 'rloo', got {kind!r}.")
    alive = ~_equal(grouped, counted)[..., None]
    return jnp.where(alive, advantage, 0.0).reshape(jnp.shape(rewards))


def dead_groups(rewards: ArrayLike, group: int, *, where: ArrayLike | None = None) -> jax.Array:
    """Whether all answers of a group have one reward: it teaches nothing. [B] -> bool [B / G].

    Arguments as of `group_advantage`; so is a group in which fewer than two have any.
    """
    return _equal(_grouped(rewards, group), _counted(where, rewards, group))


def sibling_index(
    rewards: ArrayLike, group: int, threshold: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """For each answer the first right one of its group that is another: whom it could learn from.

    Args:
      rewards: [B].
      group: G, at least 2; divides B.
      threshold: an answer is right from this reward on.

    Returns:
      (index int32 [B], never the row itself; available bool [B], whether the answer there is right:
      an answer that alone is right has no other).

    Source: SDPO, arXiv 2601.20802, whose code takes no answer as its own demonstration.
    """
    grouped = _grouped(rewards, group)
    own = jnp.eye(group, dtype=bool)
    others = (grouped >= threshold)[:, None, :] & ~own
    available = others.any(-1)
    following = (jnp.arange(group) + 1) % group
    first = jnp.where(available, others.argmax(-1), following)
    index = first + group * jnp.arange(grouped.shape[0])[:, None]
    return index.reshape(-1).astype(jnp.int32), available.reshape(-1)


def log_ratio(log_p: ArrayLike, old_log_p: ArrayLike) -> jax.Array:
    """log rho = log_p - sg[old_log_p], cut to +-20 nats, beyond which there is no gradient.

    A token that both hold impossible has 0.

    Args:
      log_p, old_log_p: [...].
    """
    return jnp.clip(_difference(log_p, old_log_p), -_FAR, _FAR)


def anchored_log_ratio(
    log_p: ArrayLike,
    old_log_p: ArrayLike,
    teacher_log_p: ArrayLike,
    alpha: float = 0.5,
    *,
    clamp: float = 1.0,
    clamp_gradient: Literal['literal', 'straight'] = 'literal',
) -> jax.Array:
    """alpha (l - l_old) + (1 - alpha) clip(l - l_T, +-clamp): a ratio to a mixed anchor.

        r = pi / (pi_old^alpha pi_T^(1 - alpha))

    In place of `log_ratio` in `clipped_surrogate`: the trust region lies around a geometric mixture
    (not normalised) of the old policy and the teacher. alpha = 1 is GRPO. The ratio is not 1 on
    fresh samples, and many tokens may be clipped from the first update on.

    Args:
      log_p, old_log_p, teacher_log_p: [...].
      alpha: in [0, 1], the share of the old policy.
      clamp: positive, of the teacher's branch alone.
      clamp_gradient: 'literal' differentiates the clamp as written, so that outside of it the
        teacher scales the ratio and adds no gradient; 'straight' passes the gradient through it.

    Source: RLAD, arXiv 2602.22495, equation 3 and appendix B. (A sentence of its section 4.1 has
    the ends of alpha the other way round.)
    """
    alpha = numerics.number_in('alpha', alpha, 0, 1)
    numerics.check_positive('clamp', clamp)
    if clamp_gradient not in ('literal', 'straight'):
        raise ValueError(f"clamp_gradient is 'literal' or 'straight', got {clamp_gradient!r}.")
    of_teacher = _difference(log_p, teacher_log_p)
    clipped = jnp.clip(of_teacher, -clamp, clamp)
    if clamp_gradient == 'straight':
        clipped = of_teacher + lax.stop_gradient(clipped - of_teacher)
    return alpha * log_ratio(log_p, old_log_p) + (1 - alpha) * clipped


def clipped_surrogate(
    ratio: ArrayLike,
    advantage: ArrayLike,
    *,
    low: float = 0.2,
    high: float = 0.2,
    dual: float | None = None,
) -> jax.Array:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), of tokens.

    No gradient where A > 0 and rho > 1 + high, nor where A < 0 and rho < 1 - low. At rho = 1 it is
    REINFORCE, -A grad log p, with value -A.

    Args:
      ratio: [...] log rho, of `log_ratio` or `anchored_log_ratio`: not rho.
      advantage: broadcasts against the ratio; stop-gradiented. One of 0 gives exactly 0.
      low, high: radii; 0.2 both in PPO (arXiv:1707.06347), 0.2 and 0.28 in DAPO (2503.14476).
      dual: for A < 0 the loss is at most -dual A, so that a ratio above `dual` has no gradient
        (arXiv:1912.09729; 3 in verl); None for no such limit.

    Returns:
      [...].
    """
    log_rho, advantage = jnp.asarray(ratio), lax.stop_gradient(jnp.asarray(advantage))
    rho = jnp.exp(log_rho.astype(numerics.accumulation_dtype(log_rho)))
    advantage = advantage.astype(rho.dtype)
    loss = -jnp.minimum(rho * advantage, jnp.clip(rho, 1 - low, 1 + high) * advantage)
    if dual is not None:
        if dual <= 1:
            raise ValueError(f'dual must be above 1, got {dual}.')
        loss = jnp.where(advantage < 0, jnp.minimum(loss, -dual * advantage), loss)
    return loss


def is_clipped(
    ratio: ArrayLike, advantage: ArrayLike, *, low: float = 0.2, high: float = 0.2
) -> jax.Array:
    """The tokens to which `clipped_surrogate` gives no gradient though they have an advantage."""
    rho, advantage = jnp.exp(jnp.asarray(ratio)), jnp.asarray(advantage)
    return ((advantage > 0) & (rho > 1 + high)) | ((advantage < 0) & (rho < 1 - low))


def kl_estimate(
    log_p: ArrayLike,
    reference_log_p: ArrayLike,
    kind: KL = 'k3',
    *,
    old_log_p: ArrayLike | None = None,
) -> jax.Array:
    """Estimates of KL(pi || ref) from tokens that pi, or an older policy, has sampled.

    With d = l - l_ref, and l alone differentiated (Schulman 2020, "Approximating KL divergence"):

    | kind | value | mean over pi | mean gradient over pi |
    |---|---|---|---|
    | k1 | d | KL(pi, ref) | 0: a reward, no loss |
    | k2 | d^2 / 2 | biased | that of KL(pi, ref) |
    | k3 | e^-d - 1 + d, >= 0 | KL(pi, ref) | that of KL(ref, pi), the forward one! |
    | k3+ | that of k3 | KL(pi, ref) | that of KL(pi, ref), as of k2 (verl) |
    | rho k1, rho k3 | with `old_log_p`, over the old policy | KL(pi, ref) | that of KL(pi, ref) |

    GRPO adds beta k3, KDRL (arXiv:2506.02208) beta k2 of the teacher, Skill-SD (arXiv:2604.10674)
    lambda rho k3 of a teacher with skills.

    Args:
      log_p, reference_log_p: [...]. Tokens that both hold impossible have 0.
      kind: see above. In k3, d is cut to +-20.
      old_log_p: [...] of the policy that sampled; weighs k1 and k3 by rho = exp(l - sg[l_old]),
        which is 1 for fresh samples in value but not in gradient.

    Returns:
      [...] nats.

    Raises:
      ValueError: another kind, or one that `old_log_p` does not correct.
    """
    d = _difference(log_p, reference_log_p)
    near = jnp.clip(d, -_FAR, _FAR)
    # Not exp(-d) - 1, which loses the digits of small d.
    third = jnp.expm1(-near) + near
    if kind in ('k2', 'k3+') and old_log_p is not None:
        raise ValueError(f'old_log_p weighs k1 and k3, not {kind}.')
    if kind == 'k1':
        value = d
    elif kind == 'k2':
        value = token.k2(log_p, reference_log_p)
    elif kind == 'k3':
        value = third
    elif kind == 'k3+':
        second = token.k2(log_p, reference_log_p)
        value = second + lax.stop_gradient(third - second)
    else:
        raise ValueError(f"kind must be 'k1', 'k2', 'k3' or 'k3+', got {kind!r}.")
    return value if old_log_p is None else jnp.exp(log_ratio(log_p, old_log_p)) * value


def importance_cap(log_p: ArrayLike, sampler_log_p: ArrayLike, cap: float = 2.0) -> jax.Array:
    """min(exp(l - l_sampler), cap), no gradient: a weight for samples of another policy.

    Truncated importance sampling: of what a sampler in lower precision drew (l the old policy's
    own), or for distillation on samples that are no longer the student's (SDPO, arXiv:2601.20802).
    """
    numerics.check_positive('cap', cap)
    return lax.stop_gradient(jnp.minimum(jnp.exp(log_ratio(log_p, sampler_log_p)), cap))


def overlong_penalty(lengths: ArrayLike, longest: int, buffer: int) -> jax.Array:
    """DAPO's soft penalty, to be added to rewards: 0, falling to -1 over the last `buffer` tokens.

        0 for n <= L - C;  ((L - C) - n) / C for L - C < n <= L;  -1 beyond

    Args:
      lengths: int [B], n.
      longest: L.
      buffer: C, positive.

    Returns:
      float32 [B].

    Source: DAPO, arXiv 2503.14476, equation 13; there L = 20,480 and C = 4,096.
    """
    if not 0 < buffer <= longest:
        raise ValueError(f'need 0 < buffer <= longest, got {buffer} and {longest}.')
    excess = jnp.asarray(lengths, jnp.float32) - (longest - buffer)
    return -jnp.clip(excess / buffer, 0.0, 1.0)


def pass_at_k(correct: ArrayLike, samples: int, k: int) -> jax.Array:
    """1 - C(n - c, k) / C(n, k): whether one of k answers is right, unbiased from n of them.

    Args:
      correct: int [...], c of the n answers are right.
      samples: n.
      k: 1 .. n.

    Returns:
      [...] in [0, 1]. k = 1 is c / n.

    Source: Chen et al. 2021, arXiv 2107.03374, equation 1.
    """
    if not 1 <= k <= samples:
        raise ValueError(f'k must be in 1 .. {samples} (samples), got {k}.')
    drawn = np.arange(k)
    wrong = samples - jnp.asarray(correct)[..., None] - drawn
    return 1 - jnp.prod(jnp.maximum(wrong, 0) / (samples - drawn), axis=-1)


def _difference(log_p: ArrayLike, reference_log_p: ArrayLike) -> jax.Array:
    """l - sg[l_ref], 0 where both are -inf."""
    log_p, reference = jnp.asarray(log_p), lax.stop_gradient(jnp.asarray(reference_log_p))
    dtype = numerics.accumulation_dtype(log_p, reference)
    neither = (log_p == -jnp.inf) & (reference == -jnp.inf)
    own = jnp.where(neither, 0.0, log_p).astype(dtype)
    return own - jnp.where(neither, 0.0, reference).astype(dtype)


def _grouped(rewards: ArrayLike, group: int) -> jax.Array:
    """[..., B] -> [..., B / G, G], without gradient."""
    rewards = lax.stop_gradient(jnp.asarray(rewards))
    rewards = rewards.astype(numerics.accumulation_dtype(rewards))
    if group < 2 or not rewards.ndim or rewards.shape[-1] % group:
        raise ValueError(
            f'rewards {rewards.shape} do not divide into groups of {group}, of at least 2.'
        )
    return rewards.reshape(*rewards.shape[:-1], -1, group)


def _counted(where: ArrayLike | None, rewards: ArrayLike, group: int) -> jax.Array:
    """`where` as `_grouped` has the rewards."""
    found = jnp.ones(jnp.shape(rewards), bool) if where is None else jnp.asarray(where)
    return found.reshape(*found.shape[:-1], -1, group)


def _equal(grouped: jax.Array, counted: jax.Array) -> jax.Array:
    """Whether what counts is all the same, [..., B / G]."""
    least = jnp.where(counted, grouped, jnp.inf).min(-1)
    return least >= jnp.where(counted, grouped, -jnp.inf).max(-1)
