"""Divergences between a student's and a teacher's distribution over outcomes.

Throughout, q = softmax(student_logits / temperature) and p is the teacher's distribution. All
functions share one signature and these conventions:

- `student_logits`: [..., V], V on `axis`, any float dtype. Computed in float32 (float64 for float64
  input).
- `teacher`: logits of the same shape (leading axes may broadcast) or a `signal.TeacherSignal`. Of
  the signals, `Dense` has its outcomes on `axis`, the others on their last axis. From `TopK` a
  divergence is that of the k + 1 outcomes 'one of the k, or any other': a lower bound of the full
  one. `Sampled` defines forward_kl only.
- `temperature`: divides both logits; a number, or an array that broadcasts against the logits (with
  `TopK` and `Sampled`: the number they were recorded at). The value is the divergence of the
  tempered distributions and nothing else: gradients shrink like 1/T^2, and who wants Hinton's
  convention writes `temperature**2 * forward_kl(..., temperature=temperature)`.
- `where`: bool, broadcasts against the logits as in `jnp.mean`. An outcome with False is taken out
  of both distributions, exactly as a logit of -inf in both; a position with none left
  (`where=mask[..., None]`) is 0 with zero gradient. `TopK` and `Sampled` cannot be renormalised
  afterwards: record them from equally masked logits (an outcome they list outside `where` makes
  the value +inf). So does an outcome they list that is none of the student's 0 .. V - 1, as a
  teacher with more tokens may: to the student it is impossible.
- Returns [...] nats, one value per position, not reduced. An outcome impossible under both
  contributes exactly 0. Where the divergence is infinite (forward KL: the student excludes an
  outcome the teacher has) the value is +inf.
- Nothing is stop-gradiented: differentiate with respect to the student, or wrap the teacher
  yourself.
- Raises TypeError for a signal that does not define the divergence, ValueError for class counts
  that differ and for parameters outside their range.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics, signal

Teacher = signal.TeacherSignal | ArrayLike
# (log q, log p) -> the contribution of one outcome, elementwise; both may be -inf.
Term = Callable[[jax.Array, jax.Array], jax.Array]


def forward_kl(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KL(p || q) = sum_v p_v (log p_v - log q_v), the mass-covering direction.

    Gradient with respect to the student's logits at temperature 1: q - p. Accepts every signal;
    from `Sampled` it is -H(p) - sum_s weights_s log q(tokens_s), unbiased (and possibly negative).
    Shapes and conventions: see the module.

    Source: Hinton et al. 2015, arXiv 1503.02531.
    """
    teacher = signal.as_signal(teacher)
    if isinstance(teacher, signal.Sampled):
        return _sampled_forward_kl(student_logits, teacher, temperature, axis, where)
    return _sum_of_terms(
        'forward_kl', _forward_term, student_logits, teacher, temperature, axis, where
    )


def reverse_kl(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KL(q || p) = sum_v q_v (log q_v - log p_v), the mode-seeking direction.

    Gradient with respect to the student's logits at temperature 1: q (log q - log p - KL(q || p)).
    Infinite where the teacher excludes an outcome the student has: pass `where`. Shapes and
    conventions: see the module.

    Source: Gu et al. 2023 (MiniLLM), arXiv 2306.08543.
    """
    return _sum_of_terms(
        'reverse_kl', _reverse_term, student_logits, teacher, temperature, axis, where
    )


def generalized_jsd(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    beta: float = 0.5,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q.

    The ends are a convention: as it stands the divergence vanishes at both (divided by beta it
      tends to the forward KL,
    divided by 1 - beta to the reverse KL), so beta = 0 returns exactly `forward_kl` and beta = 1
    exactly `reverse_kl`, and the scale jumps there. In between it is at most the entropy of (beta,
    1 - beta): log 2 at 1/2.

    Args:
      beta: Python number in [0, 1]; the weight of the teacher. Others: see the module.

    Source: Agarwal et al. 2023 (GKD), arXiv 2306.13649, eq. 1.
    """
    beta = numerics.number_in('beta', beta, 0, 1)
    if beta == 0:
        return forward_kl(student_logits, teacher, temperature=temperature, axis=axis, where=where)
    if beta == 1:
        return reverse_kl(student_logits, teacher, temperature=temperature, axis=axis, where=where)

    def term(log_q, log_p):
        log_m = numerics.log_mixture(log_p, log_q, beta)
        to_teacher = numerics.relative_entropy_term(log_p, log_m)
        return beta * to_teacher + (1 - beta) * numerics.relative_entropy_term(log_q, log_m)

    return _sum_of_terms('generalized_jsd', term, student_logits, teacher, temperature, axis, where)


def skew_kl(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    alpha: float = 0.1,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KL(p || alpha p + (1 - alpha) q): the forward KL that stays below -log alpha.

    Args:
      alpha: Python number in [0, 1]; 0 is the forward KL, 1 is 0. Others: see the module.

    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    """
    alpha = numerics.number_in('alpha', alpha, 0, 1)

    def term(log_q, log_p):
        mixture = numerics.log_mixture(log_p, log_q, alpha)
        return numerics.relative_entropy_term(log_p, mixture)

    return _sum_of_terms('skew_kl', term, student_logits, teacher, temperature, axis, where)


def skew_reverse_kl(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    alpha: float = 0.1,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """KL(q || alpha q + (1 - alpha) p): the reverse KL that stays below -log alpha.

    Args:
      alpha: Python number in [0, 1]; 0 is the reverse KL, 1 is 0. Others: see the module.

    Source: Ko et al. 2024 (DistiLLM), arXiv 2402.03898.
    """
    alpha = numerics.number_in('alpha', alpha, 0, 1)

    def term(log_q, log_p):
        mixture = numerics.log_mixture(log_q, log_p, alpha)
        return numerics.relative_entropy_term(log_q, mixture)

    return _sum_of_terms('skew_reverse_kl', term, student_logits, teacher, temperature, axis, where)


def total_variation(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """(1/2) sum_v |p_v - q_v|, in [0, 1]. The gradient is 0 where p_v = q_v.

    Shapes and conventions: see the module.

    Source: as a distillation loss, Wen et al. 2023, arXiv 2307.15190.
    """

    def term(log_q, log_p):
        return 0.5 * jnp.abs(jnp.exp(log_p) - jnp.exp(log_q))

    return _sum_of_terms('total_variation', term, student_logits, teacher, temperature, axis, where)


def alpha_beta(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    alpha: float,
    beta: float,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """The alpha-beta divergence of p from q, its limits at the edges included.

    -(1 / (a b)) sum_v [p^a q^b - a/(a+b) p^(a+b) - b/(a+b) q^(a+b)], with a = alpha, b = beta. (1,
    0) is the forward KL, (0, 1) the reverse KL, (1/2, 1/2) is 4 (1 - sum sqrt(p q)), (1, 1) is half
    the squared distance of p and q; a + b = 1 is Amari's alpha-divergence. `TopK` defines only the
    last: for other sums coarser outcomes do not bound the divergence.

    Args:
      alpha, beta: Python numbers >= 0, not both 0. (With a negative one the divergence is infinite
        as soon as a probability vanishes.) Others: see the module.

    Source: Wang et al. 2025 (ABKD), arXiv 2505.04560; limits: Cichocki et al. 2011, Entropy 13(1),
    eq. 22.
    """
    alpha = numerics.number_in('alpha', alpha, 0, float('inf'))
    beta = numerics.number_in('beta', beta, 0, float('inf'))
    if alpha + beta == 0:
        raise ValueError('alpha_beta needs alpha + beta > 0, got alpha=0 and beta=0.')
    if beta == 0:
        term = _alpha_edge(alpha)
    elif alpha == 0:
        edge = _alpha_edge(beta)

        def term(log_q, log_p):
            return edge(log_p, log_q)
    else:
        term = _alpha_beta_interior(alpha, beta)
    name = f'alpha_beta(alpha={alpha}, beta={beta})'
    return _sum_of_terms(
        name, term, student_logits, teacher, temperature, axis, where, top_k=alpha + beta == 1
    )


def renyi(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    alpha: float,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """Renyi's divergence 1/(alpha - 1) log sum_v p_v^alpha q_v^(1 - alpha) of p from q.

    Rises with alpha; alpha = 1 is exactly the forward KL. Below 1 it is finite unless p and q share
    no outcome; from 1 on it is infinite where the student excludes an outcome the teacher has.

    Args:
      alpha: positive Python number. Others: see the module.

    Source: van Erven and Harremoes 2014, arXiv 1206.2459, eq. 1.
    """
    alpha = numerics.number_in('alpha', alpha, 0, float('inf'))
    if alpha == 0:
        raise ValueError('renyi needs alpha > 0, got 0.')
    if alpha == 1:
        return forward_kl(student_logits, teacher, temperature=temperature, axis=axis, where=where)
    log_q, log_p = _outcomes('renyi', student_logits, teacher, temperature, axis, where)
    # p = 0 contributes 0 whatever q; q = 0 contributes 0 below 1 and, if p > 0, infinity above.
    shared = log_p > -jnp.inf
    if alpha < 1:
        shared &= log_q > -jnp.inf
    exponent = alpha * jnp.where(shared, log_p, 0.0) + (1 - alpha) * jnp.where(shared, log_q, 0.0)
    log_total = numerics.log_sum_exp(jnp.where(shared, exponent, -jnp.inf), axis=-1)
    # A position that `where` left without outcomes; disjoint distributions stay at infinity.
    empty = jnp.all(jnp.maximum(log_q, log_p) == -jnp.inf, axis=-1)
    return jnp.where(empty, 0.0, log_total / (alpha - 1))


def per_position(
    divergence: Callable[..., jax.Array],
    student_logits: ArrayLike,
    teacher: Teacher,
    **options,
) -> jax.Array:
    """divergence(student_logits, teacher, **options), held to one value per position [...].

    For divergences that others hand in: a scalar or [..., V] would broadcast into a loss of another
    weight without a word.

    Args:
      divergence: a function of this module, or one of the same signature.
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


def _forward_term(log_q, log_p):
    return numerics.relative_entropy_term(log_p, log_q)


def _reverse_term(log_q, log_p):
    return numerics.relative_entropy_term(log_q, log_p)


def _alpha_edge(alpha: float) -> Term:
    """The limit beta -> 0 of the alpha-beta divergence."""

    def term(log_q, log_p):
        log_p, log_q = alpha * log_p, alpha * log_q
        relative = numerics.relative_entropy_term(log_p, log_q)
        return (relative - jnp.exp(log_p) + jnp.exp(log_q)) / alpha**2

    return term


def _alpha_beta_interior(alpha: float, beta: float) -> Term:
    total = alpha + beta

    def term(log_q, log_p):
        own = (alpha * jnp.exp(total * log_p) + beta * jnp.exp(total * log_q)) / total
        return (own - jnp.exp(alpha * log_p + beta * log_q)) / (alpha * beta)

    return term


def _sum_of_terms(name, term: Term, student_logits, teacher, temperature, axis, where, **accepts):
    """sum over outcomes of term(log q_v, log p_v), for every divergence that has this form."""
    log_q, log_p = _outcomes(name, student_logits, teacher, temperature, axis, where, **accepts)
    return jnp.sum(term(log_q, log_p), axis=-1)


def _outcomes(name, student_logits, teacher, temperature, axis, where, *, top_k=True):
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
    """log q and log p of the k listed outcomes and of 'any other': [..., k + 1] each."""
    size = log_q.shape[-1]
    # An empty slot's index is sent out of range, where it neither lists an outcome nor reads one.
    indices = jnp.where(teacher.log_probs > -jnp.inf, teacher.indices, size)
    others = jnp.where(signal.outcome_mask(indices, size), -jnp.inf, log_q)
    # Summed over the other outcomes: 1 - sum of the listed loses a small tail to rounding.
    tail_q = numerics.log_sum_exp(others, axis=-1, keepdims=True)
    listed_q = numerics.take_outcomes(log_q, indices, missing=-jnp.inf)
    log_q = jnp.concatenate([listed_q, tail_q], axis=-1)
    tail = teacher.tail[..., None].astype(log_q.dtype)
    tail_p = jnp.where(tail > 0, jnp.log(jnp.where(tail > 0, tail, 1.0)), -jnp.inf)
    log_p = jnp.concatenate([teacher.log_probs.astype(log_q.dtype), tail_p], axis=-1)
    return log_q, log_p if kept is None else jnp.where(kept[..., None], log_p, -jnp.inf)


def _sampled_forward_kl(student_logits, teacher: signal.Sampled, temperature, axis, where):
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
