"""Losses on how outputs relate to each other, across outcomes and across examples."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics


def inter_class_correlation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    eps: float = 1e-8,
) -> jax.Array:
    """DIST, within an example: 1 - corr_v(q_bv, p_bv), Pearson over the outcomes.

    A student may match the teacher's probabilities up to a positive scale and a shift. T^2, with
    which the paper's code multiplies, is not applied.

    Args:
      student_logits, teacher_logits: [B, V]; -inf marks an outcome impossible (probability 0).
      temperature: divides both logits.
      where: bool, broadcasts against the logits; outcomes outside it are in neither softmax, and
        neither in the correlation.
      eps: added to the product of the two standard deviations, as in the paper's code. Where one of
        them is 0 the correlation is 0.

    Returns:
      [B] in [0, 2], 0 for a row without outcomes. Nothing is stop-gradiented.

    Source: Huang et al. 2022 (DIST), arXiv 2205.10536, eqs. 8-9.
    """
    q, p, kept = _probabilities(student_logits, teacher_logits, temperature, where)
    return _correlation_distance(q, p, kept, axis=-1, eps=eps)


def intra_class_correlation(
    student_logits: ArrayLike,
    teacher_logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    where: ArrayLike | None = None,
    eps: float = 1e-8,
) -> jax.Array:
    """DIST, within a class: 1 - corr_b(q_bv, p_bv), Pearson over the examples of the batch.

    A statistic of the batch it is given: under pmap or shard_map, of the device's share. Arguments
    as of `inter_class_correlation`; `where=mask[:, None]` leaves examples out.

    Returns:
      [V] in [0, 2], 0 for a class without examples. Nothing is stop-gradiented.

    Source: Huang et al. 2022 (DIST), arXiv 2205.10536, eq. 10.
    """
    q, p, kept = _probabilities(student_logits, teacher_logits, temperature, where)
    return _correlation_distance(q, p, kept, axis=0, eps=eps)


def _probabilities(student_logits, teacher_logits, temperature, where):
    student_logits, teacher_logits = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    if student_logits.ndim != 2 or student_logits.shape != teacher_logits.shape:
        raise ValueError(
            'DIST needs student and teacher logits of one shape [B, V], got '
            f'{student_logits.shape} and {teacher_logits.shape}.'
        )
    q, p = (
        jnp.exp(numerics.log_softmax(logits, temperature=temperature, where=where))
        for logits in (student_logits, teacher_logits)
    )
    kept = jnp.ones(q.shape, bool) if where is None else jnp.broadcast_to(where, q.shape)
    return q, p, kept


def _correlation_distance(a, b, kept, *, axis, eps):
    count = jnp.sum(kept, axis=axis, keepdims=True)

    def centred(x):
        x = jnp.where(kept, x, 0.0)
        mean = jnp.sum(x, axis=axis, keepdims=True) / jnp.maximum(count, 1)
        return jnp.where(kept, x - mean, 0.0)

    a, b = centred(a), centred(b)
    norms = numerics.norm(a, axis=axis) * numerics.norm(b, axis=axis) + eps
    distance = 1 - jnp.sum(a * b, axis=axis) / jnp.where(norms > 0, norms, 1.0)
    return jnp.where(jnp.squeeze(count, axis) > 0, distance, 0.0)
