"""Flouro and Chadwick 2026, 'Recursive Meta-Distillation': contraction of the anchored operators.

Imperfect refits are in `meta_refits`, softening, pooling and the axioms in `meta_operators`.
"""

from __future__ import annotations

import functools

import jax
import numpy as np

from kd.theory import axioms, simplex
from kd.theory import meta_distillation as md
from kd.theory.statements.rows import Paper, at_least, at_most, counter_example, equal, run

PAPER = Paper(
    'recursive_meta_distillation',
    'Recursive Meta-Distillation: An Axiomatic Framework for Iterative Knowledge Refinement',
    '2601.13100',
)

DRAWS, OUTCOMES = 10_000, 5

# Compiled once per operator and shape and shared by the statements, which is most of their time.
_anchor = jax.jit(md.anchor, static_argnames='power')
_recurse = jax.jit(md.recurse, static_argnames=('operator', 'realise', 'memory', 'measures'))


def distributions(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Random log-probabilities [*shape, 5], from peaked to flat."""
    return axioms.random_log_probabilities(rng, shape, OUTCOMES)


def anchored(log_s, log_t, lam, power: float = 1.0) -> np.ndarray:
    return np.asarray(_anchor(log_s, log_t, lam, power=power))


def kl(log_p, log_q) -> np.ndarray:
    """KL(p || q) in plain NumPy: independent of the code under test, and nothing to compile."""
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def trajectory(log_s0, log_t, lams, measures, operator=md.anchor, **options) -> md.Trajectory:
    """`recurse` as NumPy; `measures` are those that the statement needs."""
    lams = np.asarray(lams, float)
    path = _recurse(log_s0, log_t, lams, operator=operator, measures=measures, **options)
    return jax.tree.map(np.asarray, path)


@PAPER.statement('T1: the linear operator contracts both KL divergences by 1 - lam')
def linear_contraction(rng):
    log_s, log_t, log_q = distributions(rng, 3, DRAWS)
    lam = rng.uniform(size=DRAWS)
    log_m = anchored(log_s, log_t, lam)
    excess = kl(log_m, log_t) - (1 - lam) * kl(log_s, log_t)
    yield at_most('KL(M, T) - (1 - lam) KL(S, T), 10^4 draws', excess, 0, 1e-10)
    excess = kl(log_t, log_m) - (1 - lam) * kl(log_t, log_s)
    yield at_most('KL(T, M) - (1 - lam) KL(T, S), 10^4 draws', excess, 0, 1e-10)
    excess = kl(log_m, anchored(log_q, log_t, lam)) - (1 - lam) * kl(log_s, log_q)
    yield at_most('KL(M(P), M(Q)) - (1 - lam) KL(P, Q), 10^4 draws', excess, 0, 1e-10)
    start, base = log_s[:100], log_t[:100]
    path = trajectory(start, base, np.full(60, 0.2), ('kl_student_base',))
    value = path.measures['kl_student_base']
    bound = 0.8 ** np.arange(61)[:, None] * value[0]
    yield at_most('KL(S_t, T) - (1 - lam)^t KL(S_0, T), 60 generations', value - bound, 0, 1e-10)
    base = np.tile(log_t[0], (100, 1))
    last = trajectory(start, base, np.full(60, 0.5), ('kl_student_base',)).log_s[-1]
    yield equal('S_60 from 100 starts, lam = 1/2: one fixed point, T', last, base, 1e-10)


@PAPER.statement('T2: exact rates of the linear operator')
def linear_rates(rng):
    # Half uniform: the rate of KL shows once S - T is small against the least mass of T.
    log_s, log_t = np.log((np.exp(distributions(rng, 2, 100)) + 1 / OUTCOMES) / 2)
    lam = 0.3
    measures = ('kl_student_base', 'total_variation', 'chi_square')
    path = trajectory(log_s, log_t, np.full(25, lam), measures).measures
    ratio = {name: value[1:] / value[:-1] for name, value in path.items()}
    tv, chi = ratio['total_variation'][:8], ratio['chi_square'][:8]
    yield equal('total variation: ratio of generations', tv, 1 - lam, 1e-12)
    yield equal('chi-square: ratio of generations', chi, (1 - lam) ** 2, 1e-12)
    late = ratio['kl_student_base'][-1]
    yield equal('KL(S, T): ratio at generation 25', late, (1 - lam) ** 2, 1e-2)
    name = 'KL(S, T): largest ratio, against the bound 1 - lam (not tight)'
    yield at_most(name, ratio['kl_student_base'], 1 - lam)


@PAPER.statement('T3: the geometric operator contracts the Hilbert metric exactly')
def geometric_contraction(rng):
    log_s, log_t, log_q = distributions(rng, 3, DRAWS)
    lam = rng.uniform(size=DRAWS)
    log_m = anchored(log_s, log_t, lam, 0.0)
    hilbert = functools.partial(run, simplex.hilbert_metric)
    factor = hilbert(log_m, log_t) / hilbert(log_s, log_t)
    yield equal('d_H(M, T) / d_H(S, T), 10^4 draws', factor, 1 - lam, 1e-10)
    factor = hilbert(log_m, anchored(log_q, log_t, lam, 0.0)) / hilbert(log_s, log_q)
    yield equal('d_H(M(P), M(Q)) / d_H(P, Q), 10^4 draws', factor, 1 - lam, 1e-10)
    excess = kl(log_t, log_m) - (1 - lam) * kl(log_t, log_s)
    yield at_most('KL(T, M) - (1 - lam) KL(T, S)', excess, 0, 1e-10)
    yield at_most('KL(M, T) - KL(S, T)', kl(log_m, log_t) - kl(log_s, log_t), 0, 1e-10)


@PAPER.statement('T3: KL(M, T) <= (1 - lam) KL(S, T) is false for the geometric operator')
def geometric_counter_example(rng):
    log_s, log_t = distributions(rng, 2, DRAWS)
    lam = rng.uniform(size=DRAWS)
    after, bound = kl(anchored(log_s, log_t, lam, 0.0), log_t), (1 - lam) * kl(log_s, log_t)
    violated = after - bound > 1e-10
    worst = int(np.argmax(after / bound))
    s, t = (np.round(np.exp(x[worst]), 4).tolist() for x in (log_s, log_t))
    note = (
        f'{violated.mean():.1%} of the draws; the worst {after[worst] / bound[worst]:.1f}-fold at '
        f'lam = {lam[worst]:.2f}, S = {s}, T = {t}.'
    )
    yield counter_example('largest KL(M, T) - (1 - lam) KL(S, T)', after - bound, 1e-2, note)
    yield at_least('share of draws that violate it', violated.mean(), 0.05)
    # With numbers anyone can check by hand.
    start, base = np.log([0.98, 0.01, 0.01]), np.log([0.01, 0.495, 0.495])
    excess = kl(run(md.anchor, start, base, 0.3, power=0), base) - 0.7 * kl(start, base)
    yield counter_example('S = (.98, .01, .01), T = (.01, .495, .495), lam = .3', excess, 1e-2)


@PAPER.statement('T4: KL(T, M) contracts by 1 - lam for powers r in [0, 1] and no other')
def power_contraction(rng):
    log_s, log_t = distributions(rng, 2, DRAWS)
    lam = rng.uniform(size=DRAWS)
    bound = (1 - lam) * kl(log_t, log_s)
    for power in (0.0, 0.5, 1.0):
        excess = kl(log_t, anchored(log_s, log_t, lam, power)) - bound
        yield at_most(f'r = {power}: KL(T, M) - (1 - lam) KL(T, S)', excess, 0, 1e-10)
    for power in (-1.0, -0.2, 1.2, 2.0):
        excess = kl(log_t, anchored(log_s, log_t, lam, power)) - bound
        note = f'{np.mean(excess > 1e-10):.1%} of the draws violate it.'
        yield counter_example(f'r = {power}: KL(T, M) - (1 - lam) KL(T, S)', excess, 1e-4, note)


@PAPER.statement('T4: KL(M, T) contracts by 1 - lam for r = 1 and no other power')
def power_counter_examples(rng):
    # S sits where T has mass e^-300, and has mass e^-600 elsewhere. Then KL(M, T) / KL(S, T) is
    # close to M's mass there: 1 for r < 0; for r > 0, (1-lam)^(1/r) / ((1-lam)^(1/r) + lam^(1/r)),
    # which exceeds 1 - lam on one side of lam = 1/2 unless r = 1.
    others = np.full(OUTCOMES - 1, -np.log(OUTCOMES - 1))
    log_t, log_s = np.array([-300.0, *others]), np.array([0.0, *(others - 600.0)])
    lam = np.linspace(0.01, 0.99, DRAWS)
    start, base = np.tile(log_s, (DRAWS, 1)), np.tile(log_t, (DRAWS, 1))
    for power in (-1.0, 0.0, 0.5, 1.2, 2.0):
        excess = kl(anchored(start, base, lam, power), log_t) / kl(log_s, log_t) - (1 - lam)
        note = f'Largest at lam = {lam[np.argmax(excess)]:.2f}.'
        yield counter_example(f'r = {power}: KL(M, T) / KL(S, T) - (1 - lam)', excess, 1e-2, note)
    excess = kl(anchored(start, base, lam), log_t) / kl(log_s, log_t) - (1 - lam)
    yield at_most('r = 1: KL(M, T) / KL(S, T) - (1 - lam)', excess, 0, 1e-10)


@PAPER.statement('T5: schedules of the anchor weight')
def schedules(rng):
    log_s, log_t = distributions(rng, 2)
    steps = np.arange(2, 1002)
    lams = 1 / steps**2
    path = trajectory(log_s, log_t, lams, ('total_variation',))
    kept = np.concatenate([[1.0], np.cumprod(1 - lams)])[:, None]
    mixture = kept * np.exp(log_s) + (1 - kept) * np.exp(log_t)
    yield equal('S_t = pi_t S_0 + (1 - pi_t) T', np.exp(path.log_s), mixture, 1e-12)

    def final_ratio(lams):
        tv = trajectory(log_s, log_t, lams, ('total_variation',)).measures['total_variation']
        return tv[-1] / tv[0]

    yield equal('lam_t = 1/(t+2)^2, summable: TV_1000 / TV_0', final_ratio(lams), 0.5, 1e-3)
    yield equal('the same, exactly 1002/2002', final_ratio(lams), 1002 / 2002, 1e-12)
    slow = final_ratio(1 / steps)
    yield equal('lam_t = 1/(t+2), not summable: TV_1000 / TV_0', slow, 1 / 1001, 1e-12)
    once = final_ratio(np.where(steps == 3, 1.0, 0.0))
    note = 'Summable and yet convergent: "iff sum lam_t = inf" needs lam_t < 1.'
    yield equal('one lam_t = 1, the others 0: TV_1000 / TV_0', once, 0.0, 1e-12, note)


@PAPER.statement('T6: operators on a window of past students')
def history(rng):
    window, lam, generations = 3, 0.1, 300
    log_s, log_t = distributions(rng, window), distributions(rng)
    # Every student has weight: with all of it on the oldest the errors would go in circles.
    shares = (rng.dirichlet(np.ones(window)) + 1 / window) / 2
    operator = functools.partial(md.history_anchor, weights=shares)
    lams = np.full(generations, lam)
    path = trajectory(log_s, log_t, lams, ('total_variation',), operator, memory=window)
    older = np.abs(np.exp(log_s[:0:-1]) - np.exp(log_t)).sum(axis=-1) / 2
    errors = np.concatenate([older, path.measures['total_variation']])
    weights = (1 - lam) * shares
    bound = sum(w * errors[window - 1 - j : -1 - j] for j, w in enumerate(weights))
    excess = errors[window:] - bound
    yield at_most('e_(t+1) - sum_j b_j e_(t-j), 300 generations', excess, 0, 1e-12)
    roots = np.roots([1, *-weights])
    root = float(np.max(roots[np.abs(roots.imag) < 1e-12].real))
    yield at_most('the positive root z of z^m = sum_j b_j z^(m-1-j)', root, 1.0, -1e-6)
    yield equal('ratio of errors at generation 300', errors[-1] / errors[-2], root, 1e-6)
    unanchored = np.max(np.abs(np.roots([1, *-shares])))
    yield equal('lam = 0: the root', unanchored, 1.0, 1e-9)
