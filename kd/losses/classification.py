"""Losses with labels: cross-entropy, its mixture with a teacher, decoupled KD, and logits as such.

As in `divergence`: student first, V outcomes on the last axis, values in nats and unreduced,
float32 (float64 for float64 input), `where` takes outcomes out of both softmaxes (`where=mask[...,
None]` takes out positions, which are then 0), and nothing is stop-gradiented.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import divergence as divergences
from kd.losses import numerics, outcomes, signal


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    label_smoothing: float = 0.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """-sum_v y'_v log q_v with y' = (1 - label_smoothing) y + label_smoothing / V.

    The smoothing's uniform part covers the possible outcomes only: V counts neither logits of -inf
    nor outcomes outside `where`.

    Args:
      logits: [..., V].
      labels: int [...], or float [..., V]: probabilities, as mixup makes them.
      label_smoothing: in [0, 1].
      where: bool, broadcasts against `logits`.

    Returns:
      [...] nats; +inf where a label has an impossible outcome, as one outside 0 .. V - 1 does. What
      is to be ignored (-1, -100) is taken out by `where`.

    Raises:
      ValueError: labels of another shape, label_smoothing out of range.

    Source: label smoothing, Szegedy et al. 2015, arXiv 1512.00567, section 7.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    smoothing = numerics.number_in('label_smoothing', label_smoothing, 0, 1)
    log_q = numerics.log_softmax(logits, where=where)
    size = log_q.shape[-1]
    is_index = jnp.issubdtype(labels.dtype, jnp.integer)
    if labels.shape != (logits.shape[:-1] if is_index else logits.shape):
        raise ValueError(
            f'cross_entropy needs int labels {logits.shape[:-1]} or float labels {logits.shape} '
            f'for logits {logits.shape}, got {labels.dtype} {labels.shape}.'
        )
    targets = jax.nn.one_hot(labels, size, dtype=log_q.dtype) if is_index else labels
    possible = log_q > -jnp.inf
    count = jnp.sum(possible, axis=-1, keepdims=True)
    uniform = possible / jnp.maximum(count, 1)
    targets = (1 - smoothing) * targets.astype(log_q.dtype) + smoothing * uniform
    if where is not None:
        # A position that is taken out as a whole has a label but no outcome.
        targets = jnp.where(jnp.any(where, axis=-1, keepdims=True), targets, 0.0)
    loss = -jnp.sum(targets * jnp.where(targets != 0, log_q, 0.0), axis=-1)
    if is_index and smoothing < 1:
        loss = jnp.where(_outside(labels, size, where), jnp.inf, loss)
    return loss


def soft_and_hard(
    student_logits: ArrayLike,
    teacher: divergences.Teacher,
    labels: ArrayLike,
    *,
    temperature: ArrayLike,
    hard_weight: ArrayLike,
    label_smoothing: float = 0.0,
    divergence: Callable[..., jax.Array] = divergences.forward_kl,
    where: ArrayLike | None = None,
) -> jax.Array:
    """(1 - w) T^2 D_T(teacher, student) + w CE(labels, student): Hinton's distillation loss.

    T^2 is applied here, so that the soft part's gradient keeps its size as the temperature changes;
    the hard part is taken at temperature 1.

    Args:
      student_logits: [..., V].
      teacher: any signal that `divergence` accepts, or logits [..., V].
      labels: int [...] or float [..., V].
      temperature: T, a number.
      hard_weight: w in [0, 1], a scalar or [...].
      label_smoothing: of the hard part; see `cross_entropy`.
      divergence: D, a function of `kd.losses.divergence`.
      where: bool, broadcasts against the logits.

    Returns:
      [...] nats.

    Raises:
      ValueError: a divergence that is not one value per position; and as of `cross_entropy`.

    Source: Hinton et al. 2015, arXiv 1503.02531, section 2.
    """
    soft = outcomes.per_position(
        divergence, student_logits, teacher, temperature=temperature, where=where
    )
    hard = cross_entropy(student_logits, labels, label_smoothing=label_smoothing, where=where)
    hard_weight, temperature = jnp.asarray(hard_weight), jnp.asarray(temperature)
    # A part of weight 0 does not count, even where it is infinite.
    soft = jnp.where(hard_weight == 1, 0.0, soft)
    hard = jnp.where(hard_weight == 0, 0.0, hard)
    return (1 - hard_weight) * temperature**2 * soft + hard_weight * hard


def target_kl(
    student_logits: ArrayLike,
    teacher: divergences.Teacher,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """TCKD: the KL of the two outcomes 'the label' and 'any other', p_t log(p_t / q_t) + ...

    Args:
      student_logits: [..., V].
      teacher: logits [..., V], Dense or HiddenHead.
      labels: int [...].
      temperature: divides both logits.
      where: bool, broadcasts against the logits.

    Returns:
      [...] nats, in the teacher's direction KL(b_p || b_q); NaN where a label is outside 0..V-1.

    Raises:
      TypeError: TopK or Sampled, float labels.

    Source: Zhao et al. 2022 (DKD), arXiv 2203.08679, eq. 5.
    """
    teacher_logits = signal.all_logits('target_kl', teacher)
    is_label = _is_label(teacher_logits, labels)
    numerics.check_positive('temperature', temperature)

    def binary(logits):
        """Log-probabilities of both, of one sweep over the others."""
        logits = numerics.wide(logits)
        possible = logits != -jnp.inf
        if where is not None:
            possible = possible & where
        scaled = jnp.where(possible, logits, 0.0) / jnp.asarray(temperature, logits.dtype)
        # Beside the largest of all, so that logits of 1e4 keep their digits.
        peak = jnp.max(jnp.where(possible, scaled, -jnp.inf), axis=-1, keepdims=True)
        scaled = scaled - jax.lax.stop_gradient(jnp.where(jnp.isfinite(peak), peak, 0.0))
        own = is_label & possible
        label = jnp.where(own.any(-1), jnp.sum(jnp.where(own, scaled, 0.0), axis=-1), -jnp.inf)
        other = jnp.where(possible & ~is_label, scaled, -jnp.inf)
        other = numerics.log_sum_exp(other, axis=-1)
        return numerics.log_softmax(jnp.stack([label, other], axis=-1))

    term = numerics.relative_entropy_term(binary(teacher_logits), binary(student_logits))
    outside = _outside(labels, teacher_logits.shape[-1], where)
    return jnp.where(outside, jnp.nan, jnp.sum(term, axis=-1))


def non_target_kl(
    student_logits: ArrayLike,
    teacher: divergences.Teacher,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """NCKD: forward KL among the outcomes other than the label, each side renormalised over them.

    Together they are the whole: KL(p || q) = target_kl + (1 - p_t) non_target_kl. Arguments, errors
    and NaN as of `target_kl`.

    Source: Zhao et al. 2022 (DKD), arXiv 2203.08679, eqs. 5-7.
    """
    teacher_logits = signal.all_logits('non_target_kl', teacher)
    others = ~_is_label(teacher_logits, labels)
    if where is not None:
        others = others & where
    value = divergences.forward_kl(
        student_logits, teacher_logits, temperature=temperature, where=others
    )
    return jnp.where(_outside(labels, teacher_logits.shape[-1], where), jnp.nan, value)


def decoupled_kd(
    student_logits: ArrayLike,
    teacher: divergences.Teacher,
    labels: ArrayLike,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """alpha TCKD + beta NCKD: the weight of the non-target part no longer falls with p_t.

    T^2 is not applied. Arguments, errors and NaN as of `target_kl`; `alpha`, `beta` are weights.

    Source: Zhao et al. 2022 (DKD), arXiv 2203.08679, eq. 8.
    """
    target = target_kl(student_logits, teacher, labels, temperature=temperature, where=where)
    rest = non_target_kl(student_logits, teacher, labels, temperature=temperature, where=where)
    return alpha * target + beta * rest


def logit_mse(
    student_logits: ArrayLike,
    teacher: divergences.Teacher,
    *,
    center: bool = False,
    where: ArrayLike | None = None,
) -> jax.Array:
    """(1/V) sum_v (z^s_v - z^t_v)^2, on logits as they are.

    With `center` each side's mean logit is taken off first, as a softmax does not see it; half of
    that is the limit of T^2 forward_kl as T grows.

    Args:
      student_logits: [..., V].
      teacher: logits [..., V], Dense or HiddenHead.
      center: whether to compare logits up to a constant.
      where: bool, broadcasts against the logits. Outcomes outside it, or with a logit of -inf in
        both, are left out of sums and V.

    Returns:
      [...] squared logits; +inf where one side alone has a logit of -inf.

    Raises:
      TypeError: TopK or Sampled.

    Source: Kim et al. 2021, arXiv 2105.08919, eq. 4; Hinton et al. 2015, arXiv 1503.02531, eq. 4.
    """
    student, target = jnp.asarray(student_logits), signal.all_logits('logit_mse', teacher)
    dtype = numerics.accumulation_dtype(student, target)
    counted = (student != -jnp.inf) | (target != -jnp.inf)
    if where is not None:
        counted = counted & where
    student = jnp.where(counted, student.astype(dtype), 0.0)
    target = jnp.where(counted, target.astype(dtype), 0.0)
    difference = student - target
    count = jnp.maximum(jnp.sum(counted, axis=-1, keepdims=True), 1)
    if center:
        mean = jnp.sum(difference, axis=-1, keepdims=True) / count
        difference = jnp.where(counted, difference - mean, 0.0)
    return jnp.sum(difference**2, axis=-1) / count[..., 0]


def standardise(
    logits: ArrayLike, *, where: ArrayLike | None = None, eps: float = 1e-7
) -> jax.Array:
    """LSKD: (z - mean z) / (std z + eps) over the outcomes, std with V - 1 as in the released code.

    Any divergence of both sides so treated compares their logits up to a positive scale and a
    shift; the paper's is `standardised_kl`.

    Args:
      logits: [..., V]; those of -inf or outside `where` are left out of mean and std, and are -inf
        in the result.

    Returns:
      [..., V]; 0 for constant logits, with gradient 0.

    Source: Sun et al. 2024 (LSKD), arXiv 2403.01427.
    """
    logits = jnp.asarray(logits)
    logits = logits.astype(numerics.accumulation_dtype(logits))
    counted = logits != -jnp.inf
    if where is not None:
        counted = counted & where
    z = jnp.where(counted, logits, 0.0)
    count = jnp.sum(counted, axis=-1, keepdims=True)
    mean = jnp.sum(z, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    centred = jnp.where(counted, z - mean, 0.0)
    length = numerics.norm(centred, axis=-1, keepdims=True)
    std = length / jnp.sqrt(jnp.maximum(count - 1, 1).astype(z.dtype))
    return jnp.where(counted, centred / (std + eps), -jnp.inf)


def standardised_kl(
    student_logits: ArrayLike,
    teacher: divergences.Teacher,
    *,
    temperature: ArrayLike = 2.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """LSKD: the forward KL of `standardise`d logits; T^2 is not applied.

    Args:
      student_logits: [..., V].
      teacher: logits [..., V], Dense or HiddenHead.
      temperature: of both sides, after they are standardised.
      where: bool, broadcasts against the logits.

    Returns:
      [...] nats.

    Source: Sun et al. 2024 (LSKD), arXiv 2403.01427.
    """
    teacher_logits = signal.all_logits('standardised_kl', teacher)
    sides = (standardise(x, where=where) for x in (student_logits, teacher_logits))
    return divergences.forward_kl(*sides, temperature=temperature)


def weighted_soft_label(
    student_logits: ArrayLike,
    teacher: divergences.Teacher,
    labels: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
) -> jax.Array:
    """WSLD: (1 - exp(-CE(y, s) / CE(y, t))) KL_T(t || s); the weight is stop-gradiented.

    An example that the student knows better than the teacher counts less. T^2 is not applied.

    Args:
      student_logits: [..., V].
      teacher: logits [..., V], Dense or HiddenHead.
      labels: int [...].
      temperature: of the KL alone; the weight is taken at 1.
      where: bool, broadcasts against the logits.

    Returns:
      [...] nats.

    Raises:
      TypeError: TopK or Sampled.

    Source: Zhou et al. 2021 (WSLD), arXiv 2102.00650.
    """
    teacher_logits = signal.all_logits('weighted_soft_label', teacher)
    ours, theirs = (
        jax.lax.stop_gradient(cross_entropy(logits, labels, where=where))
        for logits in (student_logits, teacher_logits)
    )
    weight = -jnp.expm1(-ours / (theirs + 1e-7))
    value = divergences.forward_kl(
        student_logits, teacher_logits, temperature=temperature, where=where
    )
    return weight * value


def _outside(labels, size, where):
    """bool [...]: labels that are none of 0 .. size - 1, at positions that `where` keeps."""
    outside = ~numerics.is_outcome(labels, size)
    return outside if where is None else outside & jnp.any(where, axis=-1)


def _is_label(teacher_logits, labels):
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f'decoupled KD needs int labels [...], got {labels.dtype} {labels.shape}.')
    return jnp.arange(teacher_logits.shape[-1]) == labels[..., None]
