"""Recursive meta-distillation: generations of students anchored to one base teacher.

Generation t forms a meta-teacher M_t = Op(S_t, T; lam) from the student S_t and the base teacher T,
and the next student realises it, S_{t+1} = Dist(M_t): perfectly, within a family
(`project_exponential_family`) or from samples (`refit_from_samples`). With lam > 0 the
recursion contracts towards T; with lam = 0 errors of Dist add up. Contraction "in KL" depends on
the operator and on the direction:

| operator               | KL(S,T) by 1 - lam | KL(T,S) by 1 - lam | exactly by 1 - lam |
|------------------------|--------------------|--------------------|--------------------|
| linear (power 1)       | yes                | yes                | total variation    |
| geometric (power 0)    | no                 | yes                | Hilbert metric     |
| power in (0, 1)        | no                 | yes                |                    |
| power < 0 or power > 1 | no                 | no                 |                    |

All distributions are log-probabilities `[..., V]`, V outcomes last, any leading axes of contexts;
float64 for float64 input, else float32. A concrete distribution that does not sum to one, and a
weight outside [0, 1], is a ValueError; inside jit, grad, vmap and scan the checks are skipped.
Nothing is stop-gradiented.

Source: Flouro and Chadwick 2026, arXiv 2601.13100 (recursion), 2601.03195 (softening), 2601.09165
(aggregation). The theorems checked by `kd.theory.verify` are proved or enumerated independently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from kd.losses import numerics
from kd.theory import checks, simplex
from kd.theory.axioms import check_axioms as check_axioms
from kd.theory.simplex import chi_square as chi_square
from kd.theory.simplex import hilbert_metric as hilbert_metric

Softening = Literal['power', 'mixing']
Pooling = Literal['linear', 'geometric', 'power']
Operator = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
Realise = Callable[[jax.Array, jax.Array], jax.Array]

# From a student S and the base teacher T; the recursion reports those it is asked for.
MEASURES: dict[str, Callable[[jax.Array, jax.Array], jax.Array]] = {
    'kl_student_base': simplex.kl_divergence,
    'kl_base_student': lambda log_s, log_t: simplex.kl_divergence(log_t, log_s),
    'total_variation': simplex.total_variation,
    'hilbert': simplex.hilbert_metric,
    'chi_square': simplex.chi_square,
    'entropy': lambda log_s, log_t: simplex.entropy(log_s),
    'collision': lambda log_s, log_t: simplex.collision_probability(log_s),
}


class Trajectory(NamedTuple):
    """What `recurse` returns; generation 0 is the initial student.

    Attributes:
      log_s: [G + 1, ..., V] students.
      measures: name in `MEASURES` -> [G + 1, ...].
    """

    log_s: jax.Array
    measures: dict[str, jax.Array]


def soften(log_p: ArrayLike, tau: ArrayLike, family: Softening = 'power') -> jax.Array:
    """A softened teacher p^(tau): identity at tau = 1, uniform as tau grows.

    'power': p^{1/tau} / Z, which is softmax(z / tau), tau > 0. 'mixing': p / tau + (1 - 1/tau) / V,
    tau >= 1. Both keep the ranking and raise the entropy with tau. For V = 2 each is a
    reparametrisation of the other, for V >= 3 they are different families.

    Args:
      log_p: [..., V].
      tau: a number or [...].
      family: 'power' or 'mixing'.

    Returns:
      [..., V] log-probabilities.

    Raises:
      ValueError: tau <= 0, or tau < 1 with 'mixing'; an unknown family; log_p not normalised.

    Source: arXiv 2601.03195.
    """
    log_p = simplex.log_probabilities('log_p', log_p)
    checks.positive('tau', tau)
    tau = jnp.asarray(tau, log_p.dtype)
    tau = tau[..., None] if tau.ndim else tau
    if family == 'power':
        return numerics.log_softmax(log_p, temperature=tau)
    if family != 'mixing':
        raise ValueError(f"family must be 'power' or 'mixing', got {family!r}.")
    checks.in_range('tau', tau, 1, np.inf, 'mixing with the uniform distribution only softens')
    uniform = jnp.log1p(-1 / tau) - jnp.log(jnp.asarray(log_p.shape[-1], log_p.dtype))
    return jnp.logaddexp(log_p - jnp.log(tau), uniform)


def aggregate(
    log_ps: ArrayLike, weights: ArrayLike, family: Pooling = 'linear', *, power: float = 0.5
) -> jax.Array:
    """Pools K teachers: sum_k w_k T_k, prod_k T_k^{w_k} / Z, or (sum_k w_k T_k^r)^{1/r} / Z.

    The geometric pool commutes exactly with power softening, the linear one does not. A mass bound
    on a set of outcomes shared by all teachers survives linear pooling and no other: geometric
    pooling moves mass to where the teachers agree.

    Args:
      log_ps: [K, ..., V].
      weights: [K], or [K, ...] per context; non-negative, summing to one over K.
      family: 'linear' (r = 1), 'geometric' (r = 0) or 'power'.
      power: r, a Python number, for 'power'.

    Returns:
      [..., V] log-probabilities.

    Raises:
      ValueError: weights off the simplex, an unknown family, teachers not normalised, or a
        geometric pool of teachers that share no outcome.

    Source: arXiv 2601.09165.
    """
    families = {'linear': 1.0, 'geometric': 0.0, 'power': float(power)}
    if family not in families:
        raise ValueError(f'family must be one of {tuple(families)}, got {family!r}.')
    log_ps = simplex.log_probabilities('log_ps', log_ps)
    checks.simplex_weights('weights', weights)
    return _pool(log_ps, jnp.asarray(weights, log_ps.dtype), families[family])


def anchor(log_s: ArrayLike, log_t: ArrayLike, lam: ArrayLike, power: float = 1.0) -> jax.Array:
    """The anchored meta-teacher M = ((1 - lam) S^r + lam T^r)^{1/r} / Z with r = power.

    Power 1 is the linear operator (1 - lam) S + lam T, power 0 the geometric S^{1-lam} T^lam / Z.

    Args:
      log_s: [..., V] the student S.
      log_t: [..., V] the base teacher T. Anchoring to an earlier student instead is lam = 0 in
        disguise.
      lam: weight of T in [0, 1]; a number or [...].
      power: a Python number.

    Returns:
      [..., V] log-probabilities.

    Raises:
      ValueError: lam outside [0, 1], or a distribution that does not sum to one.

    Source: arXiv 2601.13100.
    """
    log_s, log_t = (
        simplex.log_probabilities('log_s', log_s),
        simplex.log_probabilities('log_t', log_t),
    )
    checks.in_range('lam', lam, 0, 1, 'it is the weight of the base teacher')
    lam = jnp.asarray(lam, jnp.promote_types(log_s.dtype, log_t.dtype))
    return _pool(jnp.stack(jnp.broadcast_arrays(log_s, log_t)), jnp.stack([1 - lam, lam]), power)


def history_anchor(
    log_history: ArrayLike, log_t: ArrayLike, lam: ArrayLike, weights: ArrayLike
) -> jax.Array:
    """lam T + (1 - lam) sum_j weights_j S_{t-j}: linear anchoring of a window of students.

    Args:
      log_history: [m, ..., V], the newest student first.
      log_t: [..., V].
      lam: weight of T in [0, 1].
      weights: [m] on the simplex.

    Returns:
      [..., V] log-probabilities.

    Source: arXiv 2601.13100.
    """
    return anchor(aggregate(log_history, weights), log_t, lam)


def recurse(
    log_s0: ArrayLike,
    log_t: ArrayLike,
    lams: ArrayLike,
    operator: Operator,
    *,
    realise: Realise | None = None,
    memory: int | None = None,
    measures: Sequence[str] = tuple(MEASURES),
) -> Trajectory:
    """S_{t+1} = realise(operator(S_t, T, lams[t]), t) for G generations, by scan.

    Args:
      log_s0: [..., V] initial student; with `memory`, [memory, ..., V] the last students, newest
        first.
      log_t: [..., V] base teacher.
      lams: [G] anchor weights in [0, 1].
      operator: `(log_s, log_t, lam) -> log_m`, for example `anchor` or
        `functools.partial(anchor, power=0)`; with `memory` its first argument is the window.
      realise: `(log_m, t) -> log_s`; None means perfectly.
      memory: window of a history operator, None for operators on the last student.
      measures: names in `MEASURES` to report. Leave out the KLs, 'hilbert' and 'chi_square' for
        students that lose support, where these are infinite.

    Returns:
      Trajectory(log_s [G + 1, ..., V], measures {name: [G + 1, ...]}).

    Raises:
      ValueError: a distribution does not sum to one, a weight lies outside [0, 1], the base teacher
        has no mass where the student has some (KL(S || T) is infinite), a measure became infinite
        on the way, or an unknown measure.
    """
    unknown = sorted(set(measures) - set(MEASURES))
    if unknown:
        raise ValueError(f'Unknown measures {unknown}; known are {tuple(MEASURES)}.')
    log_s0, log_t = (
        simplex.log_probabilities('log_s0', log_s0),
        simplex.log_probabilities('log_t', log_t),
    )
    checks.in_range('lams', lams, 0, 1, 'they are the weights of the base teacher')
    if 'kl_student_base' in measures:
        simplex.require_support('student', log_s0, 'base teacher', log_t)
    if memory is not None and log_s0.shape[0] != memory:
        raise ValueError(
            f'memory={memory} needs log_s0 of shape [{memory}, ..., V], got {log_s0.shape}.'
        )

    def step(carry, inputs):
        t, lam = inputs
        log_m = operator(carry, log_t, lam)
        log_s = log_m if realise is None else realise(log_m, t)
        carry = log_s if memory is None else jnp.concatenate([log_s[None], carry[:-1]])
        return carry, log_s

    lams = jnp.asarray(lams, log_s0.dtype)
    _, later = lax.scan(step, log_s0, (jnp.arange(lams.size), lams))
    first = log_s0 if memory is None else log_s0[0]
    log_s = jnp.concatenate([jnp.broadcast_to(first, later.shape[1:])[None], later])
    values = jax.vmap(lambda one: {name: MEASURES[name](one, log_t) for name in measures})(log_s)
    _check_finite(values)
    return Trajectory(log_s, values)


def project_exponential_family(
    log_p: ArrayLike, features: ArrayLike, num_steps: int = 60
) -> tuple[jax.Array, jax.Array]:
    """The member q_theta = exp(<theta, F> - A) of an exponential family nearest to p in KL(p || q).

    It matches the mean parameters, E_q F = E_p F, found by Newton's method with step halving.

    Args:
      log_p: [V].
      features: [V, k] F, affinely independent columns.
      num_steps: Newton steps; the iteration converges quadratically.

    Returns:
      (theta [k], log_q [V]).

    Raises:
      ValueError: the features are affinely dependent, or the moments of p lie (numerically) on the
        boundary of what the family reaches, so that theta diverges.
    """
    log_p, features = simplex.log_probabilities('log_p', log_p), jnp.asarray(features)
    features = features.astype(log_p.dtype)
    if features.ndim != 2 or features.shape[0] != log_p.shape[-1]:
        raise ValueError(
            f'features must be [V, k] for V = {log_p.shape[-1]}, got {features.shape}.'
        )
    if checks.concrete(features):
        centred = np.asarray(features) - np.mean(np.asarray(features), axis=0)
        if np.linalg.matrix_rank(centred) < features.shape[1]:
            raise ValueError(
                'The features are affinely dependent: theta is not unique. Drop columns.'
            )
    moments = jnp.exp(log_p) @ features
    halvings = 0.5 ** jnp.arange(12, dtype=log_p.dtype)

    def residual(theta):
        return moments - jax.nn.softmax(features @ theta) @ features

    def direction(theta):
        q = jax.nn.softmax(features @ theta)
        centred = features - q @ features
        return jnp.linalg.solve(centred.T @ (q[:, None] * centred), residual(theta))

    def newton(theta, _):
        candidates = theta + halvings[:, None] * direction(theta)
        # The residual, not the objective, picks the step: near the optimum the objective is flat
        # to rounding and would stop the iteration at half the digits.
        misfits = jnp.sum(jax.vmap(residual)(candidates) ** 2, axis=1)
        best = candidates[jnp.argmin(jnp.where(jnp.isfinite(misfits), misfits, jnp.inf))]
        return jnp.where(jnp.sum(residual(theta) ** 2) <= jnp.min(misfits), theta, best), None

    theta, _ = lax.scan(newton, jnp.zeros(features.shape[1], log_p.dtype), length=num_steps)
    if checks.concrete(theta):
        # On the boundary the moments are met ever better by steps that do not shrink.
        left = float(jnp.max(jnp.abs(direction(theta))) / (1 + jnp.max(jnp.abs(theta))))
        if not left <= float(jnp.finfo(log_p.dtype).eps) ** 0.5:
            raise ValueError(
                f'The projection did not converge in {num_steps} steps: theta still moves by '
                f'{left:.3g} of its size. The moments of p may lie on the boundary of the family.'
            )
    return theta, jax.nn.log_softmax(features @ theta)


def refit_from_samples(
    key: jax.Array, log_p: ArrayLike, num_samples: int, smoothing: float = 0.0
) -> jax.Array:
    """Frequencies of `num_samples` draws from p: log((counts + smoothing) / (N + smoothing V)).

    Args:
      key: typed key.
      log_p: [..., V]; contexts are drawn independently.
      num_samples: N >= 1 per context.
      smoothing: mass added to every outcome. 0 gives -inf to outcomes that were not drawn; more
        than 0 moves the fixed point of the recursion towards uniform.

    Returns:
      [..., V] log-probabilities.
    """
    if num_samples < 1 or smoothing < 0:
        raise ValueError(
            f'need num_samples >= 1 and smoothing >= 0, got {num_samples} and {smoothing}.'
        )
    log_p = simplex.log_probabilities('log_p', log_p)
    cumulative = jnp.cumsum(jnp.exp(log_p), axis=-1)
    # Divided by the last: rounding must not leave draws beyond it.
    cumulative = cumulative / cumulative[..., -1:]
    draws = jax.random.uniform(key, (*log_p.shape[:-1], 1, num_samples), log_p.dtype)
    below = jnp.sum(draws < cumulative[..., None], axis=-1)
    counts = jnp.diff(below, axis=-1, prepend=0).astype(log_p.dtype)
    return jnp.log((counts + smoothing) / (num_samples + smoothing * log_p.shape[-1]))


def _pool(log_ps: jax.Array, weights: jax.Array, power: float) -> jax.Array:
    """log of the normalised weighted power mean over the first axis; weights [K, ...]."""
    weights = weights.reshape(
        weights.shape[0], *[1] * (log_ps.ndim - weights.ndim - 1), *weights.shape[1:]
    )
    weights = jnp.broadcast_to(weights[..., None], log_ps.shape)
    # A teacher without weight has no say, not even by its zeros (0 * -inf is NaN).
    counted = weights > 0
    if power == 0:
        terms = jnp.where(counted, weights, 0.0) * jnp.where(counted, log_ps, 0.0)
        pooled = jnp.sum(terms, axis=0)
        if checks.concrete(pooled) and np.any(np.max(np.asarray(pooled), axis=-1) == -np.inf):
            raise ValueError('The geometric pool is empty: the distributions share no outcome.')
    else:
        log_weights = jnp.log(jnp.where(counted, weights, 1.0))
        terms = log_weights + power * jnp.where(counted, log_ps, 0.0)
        pooled = numerics.log_sum_exp(jnp.where(counted, terms, -jnp.inf), axis=0) / power
    return numerics.log_softmax(pooled)


def _check_finite(values: dict[str, jax.Array]):
    for name, value in values.items():
        if checks.concrete(value) and not np.all(np.isfinite(np.asarray(value))):
            generation = int(np.argwhere(~np.isfinite(np.asarray(value)))[0][0])
            raise ValueError(
                f'{name} is not finite at generation {generation}: a student or the base teacher '
                'has no mass where the other has some. Smooth the base teacher or the refit, or '
                f'leave {name} out of `measures`.'
            )
