"""Recursive meta-distillation with imperfect students: errors, limited capacity, sampling noise."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from kd.theory import axioms, simplex
from kd.theory import meta_distillation as md
from kd.theory.statements.recursive_meta_distillation import (
    OUTCOMES,
    PAPER,
    anchored,
    distributions,
    kl,
    trajectory,
)
from kd.theory.statements.rows import Row, at_least, at_most, equal, run


@PAPER.statement('T7: with imperfect refits the error stays below eps / lam')
def imperfect_refits(rng):
    lam, generations = 0.1, 200
    log_s, log_t = distributions(rng, 2, 200)
    toward = distributions(rng, 200)

    def realise(log_m, t):
        return jnp.logaddexp(jnp.log(0.98) + log_m, jnp.log(0.02) + toward)

    lams = np.full(generations, lam)
    path = trajectory(log_s, log_t, lams, ('total_variation',), realise=realise)
    error = path.measures['total_variation']
    log_m = np.log((1 - lam) * np.exp(path.log_s[:-1]) + lam * np.exp(log_t))
    miss = np.abs(np.exp(log_m) - np.exp(path.log_s[1:])).sum(axis=-1).max(axis=0) / 2
    excess = error[1:] - (1 - lam) * error[:-1] - miss
    yield at_most('e_(t+1) - (1 - lam) e_t - eps, 200 starts', excess, 0, 1e-12)
    yield at_most('e_200 - eps / lam', error[-1] - miss / lam, 0, 1e-6)
    pinsker = np.sqrt(kl(log_m, path.log_s[1:]).max(axis=0) / 2)
    yield at_most('eps - sqrt(eps_KL / 2)', miss - pinsker, 0, 1e-12)
    yield at_most('e_200 - sqrt(eps_KL / 2) / lam', error[-1] - pinsker / lam, 0, 1e-6)
    yield from _constant_error(lam)


def _constant_error(lam: float) -> Iterator[Row]:
    """A refit that always errs by eps in one direction attains eps / lam, or t eps unanchored."""
    log_t, shift = np.log([0.2, 0.3, 0.5]), np.array([1e-3, 0.0, -1e-3])

    def realise(log_m, t):
        return jnp.log(jnp.exp(log_m) + shift)

    times = np.arange(201)
    for weight, name, exact in (
        (lam, '(1 - (1-lam)^t) eps / lam', 1e-3 * (1 - (1 - lam) ** times) / lam),
        (0.0, 't eps', 1e-3 * times),
    ):
        lams = np.full(200, weight)
        path = trajectory(log_t, log_t, lams, ('total_variation',), realise=realise)
        error = path.measures['total_variation']
        yield equal(f'a constant error eps = .001, lam = {weight}: {name}', error, exact, 1e-12)


@PAPER.statement('T8: students of limited capacity (exponential family, M-projection)')
def capacity(rng):
    lam = 0.3
    features = rng.normal(size=(8, 3))
    log_t, log_s = axioms.random_log_probabilities(rng, (2,), 8)

    @jax.jit
    def project(log_p):
        return md.project_exponential_family(log_p, features)[1]

    log_base = project(log_t)
    students = [project(log_s)]
    for _ in range(6):
        students.append(project(np.logaddexp(np.log(1 - lam) + students[-1], np.log(lam) + log_t)))
    log_students = np.asarray(students)
    gap = (np.exp(log_students) - np.exp(log_t)) @ features
    excess = gap[1:] - (1 - lam) * gap[:-1]
    yield equal('mean parameters: gap_(t+1) - (1 - lam) gap_t', excess, 0, 1e-10)
    to_base = kl(log_students, log_base)
    excess = to_base[1:] - (1 - lam) * to_base[:-1]
    yield at_most('KL(S_(t+1), P T) - (1 - lam) KL(S_t, P T)', excess, 0, 1e-10)
    excess = kl(log_t, log_students) - kl(log_t, log_base) - kl(log_base, log_students)
    yield equal('Pythagoras: KL(T, S_t) - KL(T, P T) - KL(P T, S_t)', excess, 0, 1e-12)
    again = project(np.logaddexp(np.log(1 - lam) + log_base, np.log(lam) + log_t))
    yield equal('P T is a fixed point', np.exp(again), np.exp(log_base), 1e-12)
    yield at_least('KL(T, P T), the bias that no anchor removes', kl(log_t, log_base), 1e-3)


@PAPER.statement('T9: refits from N samples collapse without an anchor and settle with one')
def sampling_noise(rng):
    samples, chains, generations = 50, 10_000, 40
    # Not peaked: a rare outcome would be drawn so seldom that its mean is far from normal.
    log_t = np.log((np.exp(distributions(rng)) + 1 / OUTCOMES) / 2)
    collision = float(np.sum(np.exp(2 * log_t)))
    key = jax.random.key(int(rng.integers(2**31)))

    def realise(log_m, t):
        return md.refit_from_samples(jax.random.fold_in(key, t), log_m, samples)

    start = np.tile(log_t, (chains, 1))
    for lam in (0.0, 0.1):
        lams = np.full(generations, lam)
        path = trajectory(start, log_t, lams, ('collision',), realise=realise)
        measured = path.measures['collision'][[1, 10, 40]]
        exact = expected_collision(collision, lam, samples, generations)[[1, 10, 40]]
        score = _z_score(np.transpose(measured), exact)
        yield at_most(f'lam = {lam}: q_1, q_10, q_40, worst |z|', score, 4.0)
        score = _z_score(np.exp(path.log_s[-1]), np.exp(log_t))
        yield at_most(f'lam = {lam}: E[S_40] = T, worst |z|', score, 4.0)
    free = expected_collision(collision, 0.0, samples, 1000)
    decay = (1 - 1 / samples) ** np.arange(1001) * (1 - collision)
    yield equal('lam = 0: 1 - q_t = (1 - 1/N)^t (1 - c)', 1 - free, decay, 1e-12)
    held = expected_collision(collision, 0.1, samples, 1000)[-1]
    limit = stationary_collision(collision, 0.1, samples)
    yield equal('lam = .1: q_1000 against the stationary value', held, limit, 1e-12)


def _z_score(samples: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """|sample mean - mean| in standard errors, over the first axis."""
    error = samples.std(axis=0, ddof=1) / np.sqrt(len(samples))
    return np.abs(samples.mean(axis=0) - mean) / error


def expected_collision(collision: float, lam: float, samples: int, generations: int) -> np.ndarray:
    """q_t = E sum_i S_t[i]^2 from S_0 = T by its recursion, [G + 1]."""
    q = [collision]
    for _ in range(generations):
        mixed = (1 - lam) ** 2 * q[-1] + (2 * lam * (1 - lam) + lam**2) * collision
        q.append(1 / samples + (1 - 1 / samples) * mixed)
    return np.array(q)


def stationary_collision(collision: float, lam: float, samples: int) -> float:
    """The limit of `expected_collision`; 1, all mass on one outcome, for lam = 0."""
    kept = 1 - 1 / samples
    return (1 / samples + kept * (2 * lam - lam**2) * collision) / (1 - kept * (1 - lam) ** 2)


@PAPER.statement('the two-teacher loss is the anchored recursion')
def training_form(rng):
    log_s, log_t = distributions(rng, 2)
    logits, lam = rng.normal(size=OUTCOMES), 0.3
    log_m = anchored(log_s, log_t, lam)

    def cross_entropy(logits, log_m):
        return -jnp.sum(jax.lax.stop_gradient(jnp.exp(log_m)) * jax.nn.log_softmax(logits))

    def two_teachers(logits):
        to_student, to_base = (
            simplex.kl_divergence(log_p, jax.nn.log_softmax(logits)) for log_p in (log_s, log_t)
        )
        return (1 - lam) * to_student + lam * to_base

    gradient, to_target = run(jax.grad(cross_entropy, argnums=(0, 1)), logits, log_m)
    exact = run(jax.grad(two_teachers), logits)
    yield equal('gradient of CE(M, S) against that of the two KLs', gradient, exact, 1e-10)
    yield equal('gradient with respect to M', to_target, 0, 0)
