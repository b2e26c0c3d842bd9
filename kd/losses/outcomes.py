"""What divergences are made of: log q and log p over the outcomes that a signal tells apart.

And what they are held to: one value per position.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics, signal

# (log q, log p) -> the contribution of one outcome, elementwise; both may be -inf.
Term = Callable[[jax.Array, jax.Array], jax.Array]


def per_position(
    divergence: Callable[..., jax.Array],
    student_logits: ArrayLike,
    teacher: signal.TeacherSignal | ArrayLike,
    **options,
) -> jax.Array:
    """divergence(student_logits, teacher, **options), held to one value per position [...].

    For divergences that others hand in: a scalar or [..., V] would broadcast into a loss of another
    weight without a word.

    Args:
      divergence: a function of `kd.losses.divergence`, or one of the same signature.
      student_logits: [..., V].
      teacher: any signal, or logits [..., V].
      **options: of the divergence.

    Raises:
      ValueError: a value of another shape.
    """
    value = jnp.asarray(divergence(student_logits, teacher, **options))
    leading = signal.positions(signal.as_signal(teacher))
    wanted = jnp.broadcast_shapes(jnp.shape(student_logits)[:-1], leading)
    if value.shape != wanted:
        name = getattr(divergence, '__name__', repr(divergence))
        raise ValueError(
            f'{name} returned shape {value.shape} for logits {jnp.shape(student_logits)}; a '
            f'divergence returns one value per position, {wanted}.'
        )
    return value


def sum_of_terms(
    name, term: Term, student_logits, teacher, temperature, axis, where, **accepts
) -> jax.Array:
    """sum over outcomes of term(log q_v, log p_v), for every divergence that has this form."""
    log_q, log_p = log_probs(name, student_logits, teacher, temperature, axis, where, **accepts)
    return jnp.sum(term(log_q, log_p), axis=-1)


def log_probs(name, student_logits, teacher, temperature, axis, where, *, top_k=True):
    """log q and log p over the outcomes that the signal tells apart, on the last axis."""
    teacher = signal.as_signal(teacher)
    if isinstance(teacher, signal.Sampled) or (isinstance(teacher, signal.TopK) and not top_k):
        raise TypeError(
            f'{name} is not defined by a teacher signal of the form {type(teacher).__name__}: '
            f'it needs Dense or HiddenHead{" or TopK" if top_k else ""}.'
        )
    if isinstance(teacher, signal.TopK):
        _check_temperature(name, teacher, temperature)
        log_q = _student_log_probs(student_logits, temperature, axis, where)
        return _top_k_outcomes(log_q, teacher, _kept_positions(where, axis, student_logits))
    if isinstance(teacher, signal.HiddenHead):
        teacher_logits = jnp.moveaxis(teacher.logits(), -1, axis)
    else:
        teacher_logits = teacher.logits
    student_logits = jnp.asarray(student_logits)
    if student_logits.shape[axis] != teacher_logits.shape[axis]:
        raise ValueError(
            f'{name} needs a student and a teacher with the same outcomes on axis {axis}, got '
            f'shapes {student_logits.shape} and {teacher_logits.shape}.'
        )
    return tuple(
        jnp.moveaxis(
            numerics.log_softmax(logits, temperature=temperature, axis=axis, where=where), axis, -1
        )
        for logits in (student_logits, teacher_logits)
    )


def _top_k_outcomes(log_q, teacher: signal.TopK, kept):
    """log q and log p of the k listed outcomes and, with the tail, of 'any other'."""
    size = log_q.shape[-1]
    # An empty slot's index is sent out of range, where it neither lists an outcome nor reads one.
    indices = jnp.where(teacher.log_probs > -jnp.inf, teacher.indices, size)
    listed_q = numerics.take_outcomes(log_q, indices, missing=-jnp.inf)
    log_p = teacher.log_probs.astype(log_q.dtype)
    if teacher.rest == 'tail':
        others = jnp.where(signal.outcome_mask(indices, size), -jnp.inf, log_q)
        # Summed over the other outcomes: 1 - sum of the listed loses a small tail to rounding.
        tail_q = numerics.log_sum_exp(others, axis=-1, keepdims=True)
        listed_q = jnp.concatenate([listed_q, tail_q], axis=-1)
        tail = teacher.tail[..., None].astype(log_q.dtype)
        tail_p = jnp.where(tail > 0, jnp.log(jnp.where(tail > 0, tail, 1.0)), -jnp.inf)
        log_p = jnp.concatenate([log_p, tail_p], axis=-1)
    if kept is not None:
        log_p = jnp.where(kept[..., None], log_p, -jnp.inf)
    if teacher.rest == 'renormalised':
        return numerics.log_softmax(listed_q), numerics.log_softmax(log_p)
    return listed_q, log_p


def sampled_forward_kl(student_logits, teacher: signal.Sampled, temperature, axis, where):
    _check_temperature('forward_kl', teacher, temperature)
    log_q = _student_log_probs(student_logits, temperature, axis, where)
    log_q = numerics.take_outcomes(log_q, teacher.tokens, missing=-jnp.inf)
    weights = teacher.weights.astype(log_q.dtype)
    kept = _kept_positions(where, axis, student_logits)
    counted = weights > 0 if kept is None else (weights > 0) & kept[..., None]
    value = -jnp.sum(jnp.where(counted, weights, 0.0) * jnp.where(counted, log_q, 0.0), axis=-1)
    if teacher.entropy is None:
        return value
    entropy = teacher.entropy.astype(log_q.dtype)
    return value - (entropy if kept is None else jnp.where(kept, entropy, 0.0))


def _student_log_probs(student_logits, temperature, axis, where):
    log_q = numerics.log_softmax(student_logits, temperature=temperature, axis=axis, where=where)
    return jnp.moveaxis(log_q, axis, -1)


def _kept_positions(where, axis, student_logits):
    """bool [...]: the positions at which `where` keeps an outcome; None for all."""
    if where is None:
        return None
    shape = jnp.broadcast_shapes(jnp.shape(where), jnp.shape(student_logits))
    return jnp.any(jnp.broadcast_to(where, shape), axis=axis)


def _check_temperature(name, teacher: signal.TopK | signal.Sampled, temperature):
    if not isinstance(temperature, (int, float)) or temperature != teacher.temperature:
        raise ValueError(
            f'{name}: a {type(teacher).__name__} signal recorded at temperature '
            f'{teacher.temperature} cannot be used at temperature {temperature}; record it at '
            'that temperature, or pass the recorded one as a Python number.'
        )
