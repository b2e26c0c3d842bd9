"""Divergences between a student's and a teacher's distribution over outcomes.

Throughout, q = softmax(student_logits / temperature) and p is the teacher's distribution. All
functions share one signature and these conventions:

- `student_logits`: [..., V], V on `axis`, any float dtype. Computed in float32 (float64 for float64
  input).
- `teacher`: logits of the same shape (leading axes may broadcast) or a `signal.TeacherSignal`. Of
  the signals, `Dense` has its outcomes on `axis`, the others on their last axis. From `TopK` a
  divergence is that of the k + 1 outcomes 'one of the k, or any other': a lower bound of the full
  one (`rest` has other readings). `Sampled` defines forward_kl only.
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
  that differ (`signal.cut` cuts padded vocabularies) and for parameters outside their range.

What other libraries and papers call the parameters:

| there | here |
|---|---|
| GKD and TRL: beta; TSD-KD: GJSD .9; PACED: JSD beta | `generalized_jsd(beta=beta)` |
| SDPO (verl) and SRPO: alpha; KEPO's JSD parameter | `generalized_jsd(beta=alpha)` |
| DistiLLM: js_distance(lam), .9 by default | `generalized_jsd(beta=1 - lam)` |
| DistiLLM: skewed_forward_kl(lam), its paper's alpha | `skew_kl(alpha=lam)` |
| DistiLLM: skewed_reverse_kl(lam) | `skew_reverse_kl(alpha=lam)` |
| DistiLLM: symmetric_kl(lam) | `mixed_kl(weight=1 - lam)` |
| SD-Zero: mixed with weight w | `mixed_kl(weight=w)` |
| MiniLLM (its alpha is the teacher's share of what is sampled) | `reverse_kl` |
| AKL: mu | `adaptive_kl(mass=mu)` |
| ABKD: alpha, beta | `alpha_beta(alpha=alpha, beta=beta)` |
| TAID: t | `forward_kl` from `token.interpolated_logits(..., t)` |

In the Jensen-Shannon family all of the first two rows have the teacher's weight in the mixture, 0
for exactly the forward and 1 for exactly the reverse KL. MiniLLM, DistiLLM and TAID often drop the
teacher's entropy: their 'forward KL' is a cross-entropy, of the same gradient and another value.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from kd.losses import numerics, outcomes, signal

Teacher = signal.TeacherSignal | ArrayLike


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
        return outcomes.sampled_forward_kl(student_logits, teacher, temperature, axis, where)
    return outcomes.sum_of_terms(
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
    return outcomes.sum_of_terms(
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
    tends to the forward KL, divided by 1 - beta to the reverse KL), so beta = 0 returns exactly
    `forward_kl` and beta = 1 exactly `reverse_kl`, and the scale jumps there. In between it is at
    most the entropy of (beta, 1 - beta): log 2 at 1/2.

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

    return outcomes.sum_of_terms(
        'generalized_jsd', term, student_logits, teacher, temperature, axis, where
    )


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

    return outcomes.sum_of_terms('skew_kl', term, student_logits, teacher, temperature, axis, where)


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

    return outcomes.sum_of_terms(
        'skew_reverse_kl', term, student_logits, teacher, temperature, axis, where
    )


def mixed_kl(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    weight: float = 0.5,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """weight KL(p || q) + (1 - weight) KL(q || p), the symmetric KL at 1/2.

    Args:
      weight: of the forward KL; Python number in [0, 1]. The ends are exactly `forward_kl` and
        `reverse_kl`. Others: see the module.
    """
    weight = numerics.number_in('weight', weight, 0, 1)
    if weight == 1:
        return forward_kl(student_logits, teacher, temperature=temperature, axis=axis, where=where)
    if weight == 0:
        return reverse_kl(student_logits, teacher, temperature=temperature, axis=axis, where=where)

    def term(log_q, log_p):
        return weight * _forward_term(log_q, log_p) + (1 - weight) * _reverse_term(log_q, log_p)

    return outcomes.sum_of_terms(
        'mixed_kl', term, student_logits, teacher, temperature, axis, where
    )


def adaptive_kl(
    student_logits: ArrayLike,
    teacher: Teacher,
    *,
    mass: float = 0.5,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """(g_h KL(p || q) + g_t KL(q || p)) / (g_h + g_t): each KL as far as its part is yet to learn.

    The head is the smallest set of the teacher's most probable outcomes with `mass` between them,
    up to a millionth of rounding; g_h is sum |p - q| over the head, g_t over the others. The
    weights are stop-gradiented. Sorts the outcomes of every position.

    `TopK` does not define it: no bound is left where the weights come from coarser outcomes.

    Args:
      mass: Python number in [0, 1]; 0 makes the most probable outcome the head, 1 all of them,
        which is the forward KL. Others: see the module.

    Source: Wu et al. 2024 (AKL), arXiv 2404.02657.
    """
    mass = numerics.number_in('mass', mass, 0, 1)
    log_q, log_p = outcomes.log_probs(
        'adaptive_kl', student_logits, teacher, temperature, axis, where, top_k=False
    )
    forward = jnp.sum(_forward_term(log_q, log_p), axis=-1)
    if mass == 1:
        return forward
    reverse = jnp.sum(_reverse_term(log_q, log_p), axis=-1)
    p, q = jnp.exp(lax.stop_gradient(log_p)), jnp.exp(lax.stop_gradient(log_q))
    p, gap = lax.sort((-p, jnp.abs(p - q)), dimension=-1, num_keys=1)
    so_far = jnp.cumsum(-p, axis=-1)
    # The sum up to, and without, each outcome; the first is always in the head.
    before = jnp.roll(so_far, 1, axis=-1).at[..., 0].set(-1.0)
    in_head = jnp.sum(jnp.where(before < mass * (1 - 1e-6), gap, 0.0), axis=-1)
    total = jnp.sum(gap, axis=-1)
    share = jnp.where(total > 0, in_head / jnp.where(total > 0, total, 1.0), 0.5)
    # A part of weight 0 does not count, even where it is infinite.
    forward = jnp.where(share > 0, share * jnp.where(share > 0, forward, 0.0), 0.0)
    return forward + jnp.where(share < 1, (1 - share) * jnp.where(share < 1, reverse, 0.0), 0.0)


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

    return outcomes.sum_of_terms(
        'total_variation', term, student_logits, teacher, temperature, axis, where
    )


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
    return outcomes.sum_of_terms(
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
    log_q, log_p = outcomes.log_probs('renyi', student_logits, teacher, temperature, axis, where)
    # p = 0 contributes 0 whatever q; q = 0 contributes 0 below 1 and, if p > 0, infinity above.
    shared = log_p > -jnp.inf
    if alpha < 1:
        shared &= log_q > -jnp.inf
    exponent = alpha * jnp.where(shared, log_p, 0.0) + (1 - alpha) * jnp.where(shared, log_q, 0.0)
    log_total = numerics.log_sum_exp(jnp.where(shared, exponent, -jnp.inf), axis=-1)
    # A position that `where` left without outcomes; disjoint distributions stay at infinity.
    empty = jnp.all(jnp.maximum(log_q, log_p) == -jnp.inf, axis=-1)
    return jnp.where(empty, 0.0, log_total / (alpha - 1))


def _forward_term(log_q, log_p):
    return numerics.relative_entropy_term(log_p, log_q)


def _reverse_term(log_q, log_p):
    return numerics.relative_entropy_term(log_q, log_p)


def _alpha_edge(alpha: float) -> outcomes.Term:
    """The limit beta -> 0 of the alpha-beta divergence."""

    def term(log_q, log_p):
        log_p, log_q = alpha * log_p, alpha * log_q
        relative = numerics.relative_entropy_term(log_p, log_q)
        return (relative - jnp.exp(log_p) + jnp.exp(log_q)) / alpha**2

    return term


def _alpha_beta_interior(alpha: float, beta: float) -> outcomes.Term:
    total = alpha + beta

    def term(log_q, log_p):
        own = (alpha * jnp.exp(total * log_p) + beta * jnp.exp(total * log_q)) / total
        return (own - jnp.exp(alpha * log_p + beta * log_q)) / (alpha * beta)

    return term
