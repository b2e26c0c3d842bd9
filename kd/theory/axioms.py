"""Axioms of distillation operators as predicates, with a counter-example where one fails.

Three kinds of operators are checked on random draws:

- 'anchor', `operator(log_s, log_t, lam) -> log_m`: validity, anchoring, consistency, continuity,
  non-expansion, boundary, rank_coherence;
- 'softening', `operator(log_p, tau) -> log_p`: ranking, continuity, entropy, identity, boundary;
- 'aggregation', `operator(log_ps [K, ...], weights [K, ...]) -> log_p`: convexity, positivity,
  monotonicity, continuity.

The names are those of the papers; the formal statements below are a reconstruction and no
quotation. An axiom that holds on the draws is not thereby proved; one that fails is disproved.

Source of the names: Flouro and Chadwick 2026, arXiv 2601.13100 (anchored meta-teachers), 2601.03195
(softening), 2601.09165 (aggregation).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import numpy as np

Kind = Literal['anchor', 'softening', 'aggregation']
Draws = dict[str, np.ndarray]
# (operator, draws) -> [draws], how far the axiom is violated; <= 0 where it holds.
Axiom = Callable[[Callable, Draws], np.ndarray]

_SLACK = 1e-9  # of a float64 computation


class AxiomResult(NamedTuple):
    """What the draws say about one axiom.

    Attributes:
      holds: whether no draw violates it by more than the tolerance.
      worst: the largest violation.
      tolerance: what counts as rounding.
      counter_example: the worst draw, name -> array, if the axiom fails; else None.
    """

    holds: bool
    worst: float
    tolerance: float
    counter_example: dict[str, np.ndarray] | None


def check_axioms(
    operator: Callable,
    kind: Kind = 'anchor',
    *,
    draws: int = 1000,
    num_outcomes: int = 5,
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, AxiomResult]:
    """Which axioms an operator obeys on random draws, in float64 (enabled for the call only).

    Args:
      operator: see the module for the three signatures. It must be traceable by JAX and work on
        batches: `[draws, V]` with `lam` or `tau` of shape `[draws]`, or `log_ps [K, draws, V]`
        and `weights [K, draws]`.
      kind: 'anchor', 'softening' or 'aggregation'.
      draws: number of random draws.
      num_outcomes: V.
      seed: of the draws.
      names: the axioms to check; None for all of that kind.

    Returns:
      {name of the axiom: AxiomResult}.
    """
    if kind not in _AXIOMS:
        raise ValueError(f'kind must be one of {tuple(_AXIOMS)}, got {kind!r}.')
    unknown = sorted(set(names or ()) - set(_AXIOMS[kind]))
    if unknown:
        raise ValueError(f'Unknown axioms {unknown} of {kind!r}; known: {tuple(_AXIOMS[kind])}.')
    with jax.enable_x64(True):
        sample = _draw(np.random.default_rng(seed), draws, num_outcomes)
        results = {}
        # All predicates call the operator with the same shapes and are NumPy around it: one
        # compilation for the lot.
        jitted = jax.jit(operator)

        def compiled(*arrays):
            return np.asarray(jitted(*arrays))

        for name in _AXIOMS[kind] if names is None else names:
            results[name] = _result(_AXIOMS[kind][name](compiled, sample), sample)
        return results


def random_log_probabilities(
    rng: np.random.Generator, shape: tuple[int, ...], num_outcomes: int
) -> np.ndarray:
    """Dirichlet draws, from peaked to flat: [*shape, V] float64 log-probabilities, all finite."""
    concentration = rng.choice([0.3, 1.0, 3.0], size=(*shape, 1))
    gamma = rng.gamma(np.broadcast_to(concentration, (*shape, num_outcomes)))
    p = np.maximum(gamma, 1e-30)
    return np.log(p / p.sum(-1, keepdims=True))


def _draw(rng: np.random.Generator, draws: int, num_outcomes: int) -> Draws:
    def distribution(*shape):
        return random_log_probabilities(rng, (*shape, draws), num_outcomes)

    return {
        'log_s': distribution(),
        'log_t': distribution(),
        'log_other': distribution(),
        'log_ps': distribution(3),
        'weights': rng.dirichlet(np.ones(3), size=draws).T,
        'lam': rng.uniform(0.01, 0.99, draws),
        'tau': 1 + rng.exponential(2.0, draws),
    }


def _result(violation: np.ndarray, sample: Draws) -> AxiomResult:
    # NaN is a violation.
    violation = np.where(np.isnan(violation), np.inf, violation)
    worst = int(np.argmax(violation))
    holds = bool(violation[worst] <= _SLACK)
    example = None
    if not holds:
        example = {
            name: np.asarray(value[:, worst] if name in ('log_ps', 'weights') else value[worst])
            for name, value in sample.items()
        }
    return AxiomResult(holds, float(violation[worst]), _SLACK, example)


def _invalid(log_p: np.ndarray) -> np.ndarray:
    """How far [draws, V] is from a positive, normalised distribution."""
    off = np.abs(np.sum(np.exp(log_p), axis=-1) - 1)
    return np.where(np.all(np.isfinite(log_p), axis=-1), off, np.inf)


def _difference(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return np.max(np.abs(np.exp(log_p) - np.exp(log_q)), axis=-1)


def _rank_violation(inputs: list[np.ndarray], output: np.ndarray) -> np.ndarray:
    """Largest gap by which the output inverts a pair that all inputs order alike."""

    def pairs(log_p):
        return log_p[..., :, None] - log_p[..., None, :]

    agreed = np.all(np.stack([pairs(x) for x in inputs]) > 1e-6, axis=0)
    return np.max(np.where(agreed, -pairs(output), -np.inf), axis=(-2, -1))


def _jump(path: Callable[[np.ndarray], np.ndarray], draws: int) -> np.ndarray:
    """The jump left along u -> path(u), u in [0, 1], after bisecting to the worse half 45 times.

    A continuous operator leaves 2^-45 of its slope; one that steps leaves the step. Random pairs
    would not see a step, as they never straddle it closely.
    """

    low, high = np.zeros(draws), np.ones(draws)
    for _ in range(45):
        middle = (low + high) / 2
        at_middle = path(middle)
        left = _difference(path(low), at_middle) >= _difference(at_middle, path(high))
        low, high = np.where(left, low, middle), np.where(left, middle, high)
    return _difference(path(low), path(high))


def _between(log_p: np.ndarray, log_q: np.ndarray, u: np.ndarray) -> np.ndarray:
    mixed = (1 - u)[..., None] * log_p + u[..., None] * log_q
    return mixed - np.logaddexp.reduce(mixed, axis=-1, keepdims=True)


# --- anchored meta-teachers -------------------------------------------------------------------


def _anchor_validity(operator, x):
    return _invalid(operator(x['log_s'], x['log_t'], x['lam']))


def _anchor_anchoring(operator, x):
    """The base teacher is heard: another one gives another meta-teacher, even for small lam."""
    lam = np.full_like(x['lam'], 0.01)
    one = operator(x['log_s'], x['log_t'], lam)
    other = operator(x['log_s'], x['log_other'], lam)
    heard = np.max(np.abs(one - other), axis=-1)
    return 1e-4 * lam * np.max(np.abs(x['log_t'] - x['log_other']), axis=-1) - heard


def _anchor_consistency(operator, x):
    return _difference(operator(x['log_t'], x['log_t'], x['lam']), x['log_t'])


def _anchor_continuity(operator, x):
    def path(u):
        log_s = _between(x['log_s'], x['log_other'], u)
        log_t = _between(x['log_t'], x['log_s'], u)
        return operator(log_s, log_t, (1 - u) * x['lam'] + u * 0.5)

    return _jump(path, x['lam'].size)


def _anchor_non_expansion(operator, x):
    log_m = operator(x['log_s'], x['log_t'], x['lam'])
    after, before = (_kl(log, x['log_t']) for log in (log_m, x['log_s']))
    return after - before


def _anchor_boundary(operator, x):
    # A limit without a rate: power means approach the student only like lam^(1/r).
    one, small = np.ones_like(x['lam']), np.full_like(x['lam'], 1e-250)
    at_teacher = _difference(operator(x['log_s'], x['log_t'], one), x['log_t'])
    at_student = _difference(operator(x['log_s'], x['log_t'], small), x['log_s'])
    return np.maximum(at_teacher, at_student)


def _anchor_rank_coherence(operator, x):
    log_m = operator(x['log_s'], x['log_t'], x['lam'])
    return _rank_violation([x['log_s'], x['log_t']], log_m)


# --- softening --------------------------------------------------------------------------------


def _soften_ranking(operator, x):
    return _rank_violation([x['log_s']], operator(x['log_s'], x['tau']))


def _soften_continuity(operator, x):
    def path(u):
        return operator(_between(x['log_s'], x['log_t'], u), 1 + u * (x['tau'] - 1))

    return _jump(path, x['tau'].size)


def _soften_entropy(operator, x):
    cooler, warmer = operator(x['log_s'], x['tau']), operator(x['log_s'], 1.3 * x['tau'])
    return _entropy(cooler) - _entropy(warmer)


def _soften_identity(operator, x):
    return _difference(operator(x['log_s'], np.ones_like(x['tau'])), x['log_s'])


def _soften_boundary(operator, x):
    uniform = np.full_like(x['log_s'], -np.log(x['log_s'].shape[-1]))
    return _difference(operator(x['log_s'], np.full_like(x['tau'], 1e13)), uniform)


# --- aggregation ------------------------------------------------------------------------------


def _pool_convexity(operator, x):
    """KL(p || pool) <= sum_k w_k KL(p || T_k) for every p."""
    own = _kl(x['log_s'], operator(x['log_ps'], x['weights']))
    return own - np.sum(x['weights'] * _kl(x['log_s'][None], x['log_ps']), axis=0)


def _pool_positivity(operator, x):
    return _invalid(operator(x['log_ps'], x['weights']))


def _pool_monotonicity(operator, x):
    """More weight on a teacher, taken evenly from the rest, brings the pool nearer to it."""
    first = np.eye(len(x['weights']))[:, :1]
    heavier = 0.8 * x['weights'] + 0.2 * first
    before, after = (_kl(x['log_ps'][0], operator(x['log_ps'], w)) for w in (x['weights'], heavier))
    return after - before


def _pool_continuity(operator, x):
    def path(u):
        log_ps = _between(x['log_ps'], np.roll(x['log_ps'], 1, axis=0), u)
        return operator(log_ps, (1 - u) * x['weights'] + u / 3)

    return _jump(path, x['tau'].size)


def _kl(log_p, log_q):
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def _entropy(log_p):
    return -np.sum(np.exp(log_p) * log_p, axis=-1)


_AXIOMS: dict[str, dict[str, Axiom]] = {
    'anchor': {
        'validity': _anchor_validity,
        'anchoring': _anchor_anchoring,
        'consistency': _anchor_consistency,
        'continuity': _anchor_continuity,
        'non_expansion': _anchor_non_expansion,
        'boundary': _anchor_boundary,
        'rank_coherence': _anchor_rank_coherence,
    },
    'softening': {
        'ranking': _soften_ranking,
        'continuity': _soften_continuity,
        'entropy': _soften_entropy,
        'identity': _soften_identity,
        'boundary': _soften_boundary,
    },
    'aggregation': {
        'convexity': _pool_convexity,
        'positivity': _pool_positivity,
        'monotonicity': _pool_monotonicity,
        'continuity': _pool_continuity,
    },
}
