"""What language models distil by tokens: targets, gates, masks and rankings.

Logits are [..., V], of positions that PREDICT a token; entropies and masks are [..., T] over the
positions of one sequence. Computed in float32 (float64 for float64 input). A logit of -inf is an
impossible outcome: it contributes exactly 0, to values and to gradients. Nothing is reduced.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from kd.losses import numerics

# Sums of entropies in float32 miss their exact value by this share: constant entropies would
# otherwise reach a tenth of their total one token too late or not, by chance.
_TOLERANCE = 1e-6


def entropy(logits: ArrayLike, *, temperature: ArrayLike = 1.0) -> jax.Array:
    """H(softmax(logits / temperature)) in nats; logits [..., V] -> [...].

    Gradient: -q (log q + H) / temperature. A position whose outcomes are all impossible has 0.

    Args:
      logits: [..., V].
      temperature: positive; a number, or an array that broadcasts against the logits.
    """
    log_p = numerics.log_softmax(logits, temperature=temperature)
    return -jnp.sum(numerics.relative_entropy_term(log_p, jnp.zeros_like(log_p)), axis=-1)


def interpolated_logits(
    student_logits: ArrayLike, teacher_logits: ArrayLike, t: ArrayLike
) -> jax.Array:
    """(1 - t) z_s + t z_t, no gradient: TAID's teacher between the student (0) and the teacher (1).

    The loss is `divergence.forward_kl(student_logits, this)`, with gradient q - softmax(this).
    TAID's schedule reads the cross-entropy, which is that KL + `entropy(this)`.

    Args:
      student_logits, teacher_logits: [..., V]. What either holds impossible stays so for every t,
        1 included: mask both alike.
      t: in [0, 1]; a number, or an array that broadcasts against the logits.

    Returns:
      [..., V], float32 or float64: bfloat16 could not tell one step's t from the next.

    Raises:
      ValueError: the shapes differ.

    Source: Shing et al. 2025 (TAID), arXiv 2501.16937.
    """
    student, teacher = lax.stop_gradient(_pair_of_logits(student_logits, teacher_logits))
    t = lax.stop_gradient(jnp.asarray(t, student.dtype))
    possible = (student > -jnp.inf) & (teacher > -jnp.inf)
    mixed = (1 - t) * jnp.where(possible, student, 0.0) + t * jnp.where(possible, teacher, 0.0)
    return jnp.where(possible, mixed, -jnp.inf)


def confidence_gate(
    student_entropy: ArrayLike, teacher_entropy: ArrayLike, temperature: ArrayLike = 1.0
) -> jax.Array:
    """sigma((H_s - H_t) / temperature), no gradient: how much less certain the student is.

    In (0, 1), 1/2 where both are equally certain. It multiplies a token's divergence; the mean is
    over the tokens, not over the sum of the gates.

    Args:
      student_entropy, teacher_entropy: [...] nats, of `entropy`.
      temperature: positive.

    Source: TSD-KD, arXiv 2603.13260, direct distillation.
    """
    numerics.check_positive('temperature', temperature)
    student, teacher = jnp.asarray(student_entropy), jnp.asarray(teacher_entropy)
    dtype = numerics.accumulation_dtype(student, teacher)
    difference = student.astype(dtype) - teacher.astype(dtype)
    return lax.stop_gradient(jax.nn.sigmoid(difference / jnp.asarray(temperature, dtype)))


def opener_mask(entropies: ArrayLike, where: ArrayLike, fraction: float = 0.1) -> jax.Array:
    """The opener of each sequence: its shortest start that holds `fraction` of its entropy.

    i <= min {t: sum_{j<=t} H_j >= fraction sum_j H_j}, over counted tokens; the token that crosses
    is in it. The comparison allows for a millionth, which sums in float32 cannot tell.

    Args:
      entropies: [..., T] the student's, >= 0.
      where: bool [..., T], the tokens that count. A sequence with none has no opener; one without
        entropy has its first token.
      fraction: Python number in [0, 1]; 1 takes all up to the last token with entropy.

    Returns:
      bool [..., T].

    Source: TSD-KD, arXiv 2603.13260, indirect distillation. (The released code leaves the crossing
    token out, and takes one cut for all sequences of a batch.)
    """
    fraction = numerics.number_in('fraction', fraction, 0, 1)
    entropies, where = jnp.asarray(entropies), jnp.asarray(where, bool)
    dtype = numerics.accumulation_dtype(entropies)
    so_far = jnp.cumsum(jnp.where(where, entropies, 0.0), axis=-1, dtype=dtype)
    reached = where & (so_far >= fraction * (1 - _TOLERANCE) * so_far[..., -1:])
    before = jnp.cumsum(reached, axis=-1) - reached
    return where & (before == 0)


def top_fraction_mask(
    values: ArrayLike,
    where: ArrayLike,
    fraction: float = 0.1,
    *,
    scope: Literal['batch', 'sequence'] = 'batch',
) -> jax.Array:
    """The `fraction` of the counted tokens that have the largest values.

    ceil(fraction n) of n tokens, and those that tie with the last of them.

    Args:
      values: [..., T], such as entropies; no gradient.
      where: bool [..., T], the tokens that count.
      fraction: Python number in [0, 1].
      scope: 'batch' ranks all tokens together: a statistic of the batch, which belongs into a
        method's `collect` and not into a loss that sees micro-batches. 'sequence' ranks [..., T]
        along T.

    Returns:
      bool [..., T].

    Raises:
      ValueError: a fraction out of range, another scope.

    Source: TSD-KD, arXiv 2603.13260, entropy minimisation. (The released code keeps the top 90 %.)
    """
    fraction = numerics.number_in('fraction', fraction, 0, 1)
    if scope not in ('batch', 'sequence'):
        raise ValueError(f"scope must be 'batch' or 'sequence', got {scope!r}.")
    values, where = lax.stop_gradient(jnp.asarray(values)), jnp.asarray(where, bool)
    shape = values.shape
    if scope == 'batch':
        values, where = values.reshape(-1), where.reshape(-1)
    count = jnp.sum(where, axis=-1, keepdims=True)
    taken = jnp.ceil(fraction * (1 - _TOLERANCE) * count).astype(jnp.int32)
    ranked = jnp.sort(jnp.where(where, values, -jnp.inf), axis=-1, descending=True)
    least = jnp.take_along_axis(ranked, jnp.maximum(taken - 1, 0), axis=-1)
    return (where & (values >= least) & (taken > 0)).reshape(shape)


def entropy_weights(
    entropies: ArrayLike, where: ArrayLike, sharpness: ArrayLike = 1.0
) -> jax.Array:
    """exp(-b H), divided by its mean over the counted tokens; no gradient.

    Tokens of which a teacher is certain weigh more; the mean weight is 1. A statistic of the batch:
    it belongs into a method's `collect`, and not into a loss that sees micro-batches.

    Args:
      entropies: H, [...] nats, of the teacher.
      where: bool [...], the tokens that count; others have weight 0, and may hold anything.
      sharpness: b >= 0; 0 weighs all alike.

    Returns:
      [...] of `entropies`; all 0 where no token counts.

    Source: SRPO, arXiv 2604.02288, dynamic weights.
    """
    where, entropies = jnp.asarray(where), lax.stop_gradient(jnp.asarray(entropies))
    exponent = jnp.where(where, -jnp.asarray(sharpness, entropies.dtype) * entropies, -jnp.inf)
    # The largest is 1: nothing is lost of weights that are all small.
    largest = jnp.max(exponent, initial=-jnp.inf, where=where)
    raw = jnp.where(where, jnp.exp(exponent - jnp.where(largest > -jnp.inf, largest, 0.0)), 0.0)
    total = jnp.sum(raw)
    return raw * jnp.sum(where) / jnp.where(total > 0, total, 1.0)


def list_mle(student_logits: ArrayLike, teacher_logits: ArrayLike, k: int = 10) -> jax.Array:
    """-sum_j [s_j - log sum_{i>=j} exp(s_i)]: the student's top k, ranked as the teacher would.

    s are the student's k largest logits in the order of the teacher's; the loss is -log of the
    Plackett-Luce probability of that order. k = 2 is softplus(s_2 - s_1), equal logits give log k!.
    The teacher enters by its order alone (of equal ones the student's favourite is first), and
    nothing flows through the choice of the k.

    Args:
      student_logits, teacher_logits: [..., V]. What is impossible for the student is not ranked.
      k: 1 .. V.

    Returns:
      [...] nats.

    Raises:
      ValueError: k out of range, shapes that differ.

    Source: TSD-KD, arXiv 2603.13260, indirect distillation. (The released code sums over i <= j,
    which is the likelihood of the reversed order.)
    """
    student, teacher = _pair_of_logits(student_logits, teacher_logits)
    if not 1 <= k <= student.shape[-1]:
        raise ValueError(f'k must be in 1 .. {student.shape[-1]} (the outcomes), got {k}.')
    _, chosen = lax.top_k(lax.stop_gradient(student), k)
    preferred = jnp.take_along_axis(lax.stop_gradient(teacher), chosen, axis=-1)
    order = jnp.argsort(preferred, axis=-1, descending=True)
    scores = jnp.take_along_axis(student, jnp.take_along_axis(chosen, order, axis=-1), axis=-1)
    # Each suffix is normalised by itself, not by sums: those lose the digits of large logits.
    not_before = jnp.triu(jnp.ones((k, k), bool))  # [j, i]: i >= j
    log_p = numerics.log_softmax(scores[..., None, :], where=not_before)
    log_drawn = jnp.diagonal(log_p, axis1=-2, axis2=-1)
    return -jnp.sum(jnp.where(scores > -jnp.inf, log_drawn, 0.0), axis=-1)


def entropy_guided_temperature(
    logits: ArrayLike,
    *,
    low: float = 1.1,
    high: float = 1.5,
    pivot: float = 1.2,
    slope: float = 2.0,
    amplitude: float = 0.5,
    certain: float = 0.03,
    top_k: int = 512,
    iterations: int = 20,
) -> jax.Array:
    """tau with H(z / tau) = H(z) + amplitude sigma(slope (H(z) - pivot)), in [low, high].

    By bisection, as the entropy rises with tau; an end where no tau between reaches the target;
    `low` where H(z) <= certain. No gradient. The temperature of CurioSFT's self-teacher: much more
    entropy for tokens that have some, almost none for facts.

    Args:
      logits: [..., V] of the teacher (the student's delayed copy).
      low, high: 0 < low <= high.
      pivot, slope, amplitude, certain: numbers, in nats but for the slope (1 / nats).
      top_k: the entropies, that of `certain` aside, are of this many largest logits, renormalised.
      iterations: halvings of [low, high].

    Returns:
      [...] temperatures.

    Raises:
      ValueError: not 0 < low <= high.

    Source: CurioSFT, arXiv 2602.02244, entropy-guided temperature; the defaults are its code's.
    """
    if not 0 < low <= high:
        raise ValueError(f'need 0 < low <= high, got low={low}, high={high}.')
    logits = lax.stop_gradient(jnp.asarray(logits))
    logits = logits.astype(numerics.accumulation_dtype(logits))
    full = entropy(logits)
    top, now = logits, full
    if top_k < logits.shape[-1]:
        top = lax.top_k(logits, top_k)[0]
        now = entropy(top)
    target = now + amplitude * jax.nn.sigmoid(slope * (now - pivot))

    def halved(_, bounds):
        below, above = bounds
        middle = (below + above) / 2
        short = entropy(top, temperature=middle[..., None]) < target
        return jnp.where(short, middle, below), jnp.where(short, above, middle)

    bounds = jnp.full_like(now, low), jnp.full_like(now, high)
    tau = sum(lax.fori_loop(0, iterations, halved, bounds)) / 2
    tau = jnp.where(target >= entropy(top, temperature=high), high, tau)
    tau = jnp.where(target <= entropy(top, temperature=low), low, tau)
    return jnp.where(full <= certain, low, tau)


def k2(log_p: ArrayLike, reference_log_p: ArrayLike) -> jax.Array:
    """(l - r)^2 / 2, half the squared log-ratio; gradient (l - r) with respect to l, none to r.

    Args:
      log_p: [...] log-probabilities of given tokens under the student.
      reference_log_p: [...] under the reference. Equal ones give 0, both -inf included.

    Source: as CurioSFT's self-distillation on demonstrated tokens, arXiv 2602.02244 (where it is no
    estimate of a KL: they are not the student's samples); the name is of Schulman 2020,
    "Approximating KL divergence".
    """
    log_p, reference = jnp.asarray(log_p), lax.stop_gradient(jnp.asarray(reference_log_p))
    dtype = numerics.accumulation_dtype(log_p, reference)
    differs = log_p != reference
    ratio = jnp.where(differs, log_p, 0.0).astype(dtype)
    ratio -= jnp.where(differs, reference, 0.0).astype(dtype)
    return ratio**2 / 2


def _pair_of_logits(student_logits, teacher_logits) -> tuple[jax.Array, jax.Array]:
    student, teacher = jnp.asarray(student_logits), jnp.asarray(teacher_logits)
    if student.shape != teacher.shape:
        raise ValueError(
            f'student and teacher logits need one shape, got {student.shape} and {teacher.shape}.'
        )
    dtype = numerics.accumulation_dtype(student, teacher)
    return student.astype(dtype), teacher.astype(dtype)
