"""Recursive meta-distillation: several teachers, softening, and the axioms of operators."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kd.theory import axioms
from kd.theory import meta_distillation as md
from kd.theory.statements.recursive_meta_distillation import DRAWS, PAPER, distributions, kl
from kd.theory.statements.rows import Row, at_least, at_most, counter_example, equal, run

_soften = jax.jit(md.soften, static_argnames='family')
_aggregate = jax.jit(md.aggregate, static_argnames=('family', 'power'))


@PAPER.statement('T10: bounds for several teachers')
def several_teachers(rng):
    log_ps, log_p = distributions(rng, 3, DRAWS), distributions(rng, DRAWS)
    weights = rng.dirichlet(np.ones(3), DRAWS).T
    mixture = np.sum(weights * kl(log_p[None], log_ps), axis=0)
    pools = {
        name: np.asarray(_aggregate(log_ps, weights, name)) for name in ('linear', 'geometric')
    }
    for family, pooled in pools.items():
        excess = kl(log_p, pooled) - mixture
        yield at_most(f'{family}: KL(p, pool) - sum_k w_k KL(p, T_k)', excess, 0, 1e-10)
    excess = np.sum(weights[..., None] * log_ps, axis=0) - pools['linear']
    yield at_most('linear: -log pool(y) + sum_k w_k log T_k(y)', excess, 0, 1e-10)
    mass, pool_mass = (np.exp(x)[..., :2].sum(-1) for x in (log_ps, pools['linear']))
    exact = np.sum(weights * mass, axis=0)
    yield equal('linear: mass on a set is the weighted mean', pool_mass, exact, 1e-12)
    excess = pool_mass - mass.max(axis=0)
    yield at_most('linear: mass on a set - max_k', excess, 0, 1e-12)


@PAPER.statement('T10: variance of a linear pool of unbiased teachers')
def pool_variance(rng):
    teachers, draws, sigma, correlation = 4, 200_000, 1.3, 0.4
    common, own = rng.normal(size=(draws, 1)), rng.normal(size=(draws, teachers))
    weights = rng.dirichlet(np.ones(teachers))
    # A sample variance of n normal draws has the relative standard error sqrt(2 / n).
    independent = np.var(sigma * own @ weights) / (sigma**2 * np.sum(weights**2))
    score = abs(independent - 1) / np.sqrt(2 / draws)
    yield at_most('independent: sigma^2 sum_k w_k^2, |z|', score, 4.0)
    noise = sigma * (np.sqrt(correlation) * common + np.sqrt(1 - correlation) * own)
    exact = sigma**2 * (correlation + (1 - correlation) / teachers)
    score = abs(np.var(noise.mean(axis=1)) / exact - 1) / np.sqrt(2 / draws)
    yield at_most('correlated: sigma^2 (rho + (1 - rho) / K), |z|', score, 4.0)


@PAPER.statement('T10: a bound on forbidden mass is false for geometric and power pools')
def forbidden_mass(rng):
    # Both teachers put 5% on the first outcome and disagree on the others.
    log_ps = np.log([[0.05, 0.949, 0.001], [0.05, 0.001, 0.949]])
    for name, family, power in (('geometric', 'geometric', 0.5), ('power 1/2', 'power', 0.5)):
        pooled = _aggregate(log_ps, np.array([0.5, 0.5]), family, power=power)
        mass = float(np.exp(pooled[0]))
        note = f'T_k = (.05, .949, .001), (.05, .001, .949): pooled mass {mass:.3f} on the first.'
        yield counter_example(f'{name}: pooled mass - max_k T_k', mass - 0.05, 1e-2, note)


@PAPER.statement('softening keeps ranks and raises the entropy')
def softening(rng):
    log_p, tau = distributions(rng, DRAWS), 1 + rng.exponential(size=DRAWS)
    for family in ('power', 'mixing'):
        cool, warm = (np.asarray(_soften(log_p, t, family)) for t in (tau, 2 * tau))
        same = np.mean(np.argsort(cool, axis=-1) == np.argsort(log_p, axis=-1))
        yield equal(f'{family}: share of ranks unchanged, 10^4 draws', same, 1.0, 0.0)
        growth = np.sum(np.exp(cool) * cool - np.exp(warm) * warm, axis=-1)
        yield at_least(f'{family}: entropy at 2 tau - entropy at tau', growth, 0.0, 1e-12)
        seed = int(rng.integers(2**31))
        operator = functools.partial(_soften, family=family)
        yield _failures(family, axioms.check_axioms(operator, 'softening', seed=seed))
    cold = np.asarray(_soften(log_p, np.full(DRAWS, 1e-12), 'power'))
    yield equal('power: tau -> 0 is the argmax', np.exp(cold.max(axis=-1)), 1.0, 1e-6)


@PAPER.statement('power and mixing softening agree for V = 2 and differ for V >= 3')
def softening_families(rng):
    p, tau = rng.uniform(0.51, 0.99, 200), 1 + rng.exponential(size=200)
    log_p = np.log(np.stack([p, 1 - p], -1))
    mixed = np.asarray(_soften(log_p, tau, 'mixing'))
    # The power that gives the same odds.
    matching = (log_p[:, 0] - log_p[:, 1]) / (mixed[:, 0] - mixed[:, 1])
    powered = np.asarray(_soften(log_p, matching, 'power'))
    yield equal('V = 2: mixing by a matching power', powered, mixed, 1e-12)
    p = np.array([0.7, 0.2, 0.1])
    powered = p ** (1 / np.linspace(1, 21, 20_001)[:, None])
    powered /= powered.sum(-1, keepdims=True)
    mixed = np.exp(_soften(np.log(p), 2.0, 'mixing'))
    gap = np.min(np.max(np.abs(powered - mixed), axis=-1))
    note = 'p = (.7, .2, .1), mixing at tau = 2, against every power in [1, 21].'
    yield counter_example('V = 3: distance to the nearest power', gap, 1e-3, note)


@PAPER.statement('the geometric pool commutes with power softening, the linear pool does not')
def commutation(rng):
    log_ps, weights = distributions(rng, 3, 1000), rng.dirichlet(np.ones(3))

    def gap(family):
        pool = functools.partial(md.aggregate, weights=weights, family=family)
        return jnp.exp(md.soften(pool(log_ps), 2.5)) - jnp.exp(pool(md.soften(log_ps, 2.5)))

    geometric, linear = run(lambda: (gap('geometric'), gap('linear')))
    yield equal('geometric: pool then soften - soften then pool', geometric, 0, 1e-12)
    yield counter_example('linear: largest difference', np.abs(linear), 1e-3)


@PAPER.statement('axioms of the operators')
def operator_axioms(rng):
    seed = int(rng.integers(2**31))
    for power in (1.0, 0.5, 0.0):
        operator = jax.jit(functools.partial(md.anchor, power=power))
        yield _failures(f'anchor, r = {power}', axioms.check_axioms(operator, seed=seed))
    for family in ('linear', 'geometric'):
        pool = functools.partial(_aggregate, family=family)
        result = axioms.check_axioms(pool, 'aggregation', seed=seed)
        yield _failures(f'{family} pool', result)


@PAPER.statement('the axioms exclude operators that break them')
def broken_operators(rng):
    seed = int(rng.integers(2**31))
    for name, (operator, axiom) in BROKEN.items():
        verdict = axioms.check_axioms(operator, seed=seed, names=(axiom,))[axiom]
        yield counter_example(f'{name}: violation of {axiom}', verdict.worst, 1e-6)


def _failures(name: str, result: dict[str, axioms.AxiomResult]) -> Row:
    failed = [axiom for axiom, verdict in result.items() if not verdict.holds]
    return equal(
        f'{name}: axioms that fail (of {len(result)})', len(failed), 0, 0, ' '.join(failed)
    )


def _smoothed_after(log_s, log_t, lam):
    return md.soften(md.anchor(log_s, log_t, lam), 1.05, 'mixing')


def _more_confident(log_s, log_t, lam):
    return jnp.where(log_s.max(-1, keepdims=True) > log_t.max(-1, keepdims=True), log_s, log_t)


def _past_the_student(log_s, log_t, lam):
    return jax.nn.log_softmax(log_s + lam[..., None] * (log_s - log_t))


def _reversed_teacher(log_s, log_t, lam):
    return md.anchor(log_s, log_t[..., ::-1], lam)


BROKEN = {
    'not normalised': (lambda log_s, log_t, lam: log_s + log_t, 'validity'),
    'anchored to the student itself': (lambda log_s, log_t, lam: log_s, 'anchoring'),
    'smoothed after mixing': (_smoothed_after, 'consistency'),
    'the more confident of the two': (_more_confident, 'continuity'),
    'extrapolated past the student': (_past_the_student, 'non_expansion'),
    'always the teacher': (lambda log_s, log_t, lam: log_t, 'boundary'),
    'mixed with the reversed teacher': (_reversed_teacher, 'rank_coherence'),
}
