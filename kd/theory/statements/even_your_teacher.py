"""Borup and Andersen 2021, 'Even your Teacher Needs Guidance': kernel self-distillation."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.theory import kernel_regression as kr
from kd.theory.statements.rows import Paper, at_least, at_most, counter_example, equal, run

PAPER = Paper(
    'even_your_teacher',
    'Even your Teacher Needs Guidance: Ground-Truth Targets Dampen Regularization Imposed by '
    'Self-Distillation',
    '2102.13088',
)

# The toy of the authors' notebook: noisy sin(2 pi x) at x = 0, .1, ..., 1.
TOY_TARGETS = np.array(
    [
        *(0.38476636465198066, 1.2333967683416893, 1.33232242218057, 0.6920159488889518),
        *(-0.29756145531871736, -0.24189291901377769, -0.7964485769175675, -0.9616480167034174),
        *(-0.49672509509916934, -0.3469066003991437, 0.5589512650600734),
    ]
)[:, None]
# Mean squared error against sin(2 pi x) after steps 1 ... 6 and in the limit, by weight.
TOY_LOSSES = {
    0.0: (0.16477, 0.15076, 0.14915, 0.15561, 0.16735, 0.18251, 0.49505),
    0.35: (0.16477, 0.15424, 0.15089, 0.14983, 0.14954, 0.14948, 0.14959),
    0.25: (0.16477, 0.15309, 0.14958, 0.14903, 0.14946, 0.15011, 0.15250),
}
STEPS = ('1', '2', '3', '4', '5', '6', 'inf')


class Problem(NamedTuple):
    """A regression problem with its Gram matrices and their spectrum, all NumPy."""

    gram: np.ndarray
    gram_val: np.ndarray
    lam: float
    s: np.ndarray
    d: np.ndarray
    V: np.ndarray
    y: np.ndarray
    y_val: np.ndarray


def random_problem(rng: np.random.Generator, lam: float = 0.3) -> Problem:
    """Forty noisy training and thirty validation points of a smooth map from R^2 to R^2."""
    x, x_val = rng.normal(size=(40, 2)), rng.normal(size=(30, 2))
    truth = rng.normal(size=(2, 2))
    y = np.sin(x @ truth) + 0.5 * rng.normal(size=(40, 2))
    y_val = np.sin(x_val @ truth) + 0.5 * rng.normal(size=(30, 2))
    gram, gram_val = run(kr.rbf_kernel, x, x, 1.0), run(kr.rbf_kernel, x_val, x, 1.0)
    s, d, V = map(np.asarray, kr.ridge_smoother(gram, lam))
    return Problem(gram, gram_val, lam, s, d, V, y, y_val)


def predict(p: Problem, filter: np.ndarray) -> np.ndarray:
    return run(kr.predict, p.gram_val, p.V, p.d, filter, p.y)


@PAPER.statement('objective: mixing targets is mixing losses')
def objective(rng):
    f, y, previous = rng.normal(size=(3, 20, 3))
    alpha = rng.uniform()
    mixed = run(kr.mixed_targets, y, previous, alpha)
    two = alpha / 2 * np.sum((f - y) ** 2) + (1 - alpha) / 2 * np.sum((f - previous) ** 2)
    one = np.sum((f - mixed) ** 2) / 2 + alpha * (1 - alpha) / 2 * np.sum((y - previous) ** 2)
    yield equal('one square plus a constant, against two squares', one, two, 1e-11)


@PAPER.statement('T1: every step is diagonal in the eigenbasis')
def recursion(rng):
    p = random_problem(rng)
    alphas = rng.uniform(size=7)
    filters = run(kr.spectral_filter_path, p.s, alphas)

    # Independently: eight linear systems, one after the other.
    def solve(targets):
        return np.linalg.solve(p.gram + p.lam * np.eye(len(p.gram)), targets)

    dual = solve(p.y)
    for alpha in alphas:
        dual = solve(alpha * p.y + (1 - alpha) * p.gram @ dual)
    fitted = run(kr.fitted_values, p.V, filters[-1], p.y)
    yield equal('Y_8 against 8 linear solves', fitted, p.gram @ dual, 1e-11)
    yield equal('f_8(x) against 8 linear solves', predict(p, filters[-1]), p.gram_val @ dual, 1e-11)


@PAPER.statement('T2: closed form for varying weights')
def closed_form(rng):
    s = rng.uniform(size=40)
    alphas = rng.uniform(-0.5, 1.5, size=7)
    path = run(kr.spectral_filter_path, s, alphas)
    closed = run(kr.spectral_filter_closed_form, s, alphas)
    yield equal('B_1 ... B_8, closed form against recursion', closed, path, 1e-12)
    # As a function of the first fit A Y, every power of A is one lower: B_t = s (...).
    polynomial = np.array([np.prod(1 - alphas), *_coefficients(alphas)])
    on_first_fit = np.polyval(polynomial, s)
    yield equal('B_8 as a polynomial of degree 7 applied to the first fit',
                closed[-1], s * on_first_fit, 1e-12)  # fmt: skip


def _coefficients(alphas: np.ndarray) -> list[float]:
    """alpha_i prod_{j > i} (1 - alpha_j), from the highest power of A to the constant."""
    return [alpha * np.prod(1 - alphas[i + 1 :]) for i, alpha in enumerate(alphas)]


@PAPER.statement("T2': closed form for a constant weight")
def constant_weight(rng):
    s = rng.uniform(size=20)
    for alpha in (0.0, 0.1, 0.5, 1.0):
        path = run(kr.spectral_filter_path, s, np.full(7, alpha))
        closed = run(kr.spectral_filter_constant, s, alpha, np.arange(1.0, 9)[:, None])
        yield equal(f'B_1 ... B_8 at alpha = {alpha}', closed, path, 1e-12)


@PAPER.statement('T3: the limit is one ridge fit with lam / alpha')
def limit(rng):
    p = random_problem(rng)
    alpha = 0.25
    path = run(kr.spectral_filter_path, p.s, np.full(199, alpha))
    yield equal('B_200 against d / (d + lam / alpha)', path[-1], p.d / (p.d + p.lam / alpha), 1e-10)
    filter = run(kr.spectral_filter_limit, p.d, p.lam, alpha)
    ridge = np.linalg.solve(p.gram + p.lam / alpha * np.eye(len(p.gram)), p.y)
    yield equal('f_inf(x) against a ridge fit', predict(p, filter), p.gram_val @ ridge, 1e-10)
    zero = run(kr.spectral_filter_path, p.s, np.zeros(199))
    yield equal('alpha = 0: B_8 = s^8', zero[7], p.s**8, 1e-12)
    vanished = run(kr.spectral_filter_limit, p.d, p.lam, 0.0)
    yield equal('alpha = 0: the limit is the zero function', vanished, 0.0, 0.0)
    one = run(kr.spectral_filter_path, p.s, np.ones(199))
    yield equal('alpha = 1: B_t = s for all t', one, p.s, 1e-12)


@PAPER.statement('T4: the approach to the limit is exactly linear')
def rate(rng):
    d, lam = np.array([0.02, 0.3, 1.0, 5.0, 40.0]), 0.2
    s = d / (d + lam)
    for alpha in (0.1, 0.5):
        path = run(kr.spectral_filter_path, s, np.full(5, alpha))
        gap = path - run(kr.spectral_filter_limit, d, lam, alpha)
        # Compared as products: late gaps are too small to divide.
        exact = gap[:-1] * (1 - alpha) * s
        yield equal(f'gap_t = (1 - alpha) s gap_(t-1), alpha = {alpha}', gap[1:], exact, 1e-15)
        ratio = gap[1] / gap[0]
        yield equal(
            f'gap_2 / gap_1 = (1 - alpha) s, alpha = {alpha}', ratio, (1 - alpha) * s, 1e-10
        )
        slowest = (1 - alpha) * d[-1] / (d[-1] + lam)
        yield equal(f'slowest direction, alpha = {alpha}', np.max(ratio), slowest, 1e-10)


@PAPER.statement('T5: the limit minimises the amplified problem')
def amplified(rng):
    features, y = rng.normal(size=(40, 8)), rng.normal(size=(40, 2))
    lam, alpha = 0.4, 0.3
    _, d, V = kr.ridge_smoother(features @ features.T, lam)
    # beta = Phi^T (dual coefficients), the dual being V diag(B / d) V^T Y.
    filter = run(kr.spectral_filter_limit, d, lam, alpha)
    beta = features.T @ run(kr.predict, np.eye(40), V, d, filter, y)

    def amplified_objective(beta):
        return jnp.sum((features @ beta - y) ** 2) / 2 + lam / (2 * alpha) * jnp.sum(beta**2)

    yield equal('gradient at beta_inf', run(jax.grad(amplified_objective), beta), 0.0, 1e-9)


@PAPER.statement('T6: sparsification of the basis')
def sparsification(rng):
    d = np.array([0.3, 3.0])
    s = d / (d + 0.2)
    ratios = [
        path[:, 1] / path[:, 0]
        for path in (run(kr.spectral_filter_path, s, np.full(11, alpha)) for alpha in (0.0, 1.0))
    ]
    powers = np.arange(1, 13) * np.log(s[1] / s[0])
    yield at_least('alpha = 0: least growth of rho', np.diff(ratios[0]), 1e-3)
    yield equal('alpha = 0: log rho_t = t log(s_k / s_j)', np.log(ratios[0]), powers, 1e-12)
    yield equal('alpha = 1: rho is constant', ratios[1], s[1] / s[0], 1e-12)
    reset = run(kr.spectral_filter_path, s, np.where(np.arange(11) == 5, 1.0, 0.3))[6]
    yield equal('a weight of 1 in between resets rho', reset[1] / reset[0], s[1] / s[0], 1e-12)
    yield equal('growth and its criterion disagree (of 10^4 draws)', _criterion_errors(rng), 0, 0)
    small = rng.exponential(size=10_000) + 1e-3
    d = np.stack([small, small + rng.exponential(size=10_000)])
    weight, lam = rng.uniform(0.01, 0.99, 10_000), rng.exponential(size=10_000) + 1e-3
    first, last = run(kr.shrinkage, d, lam), run(kr.spectral_filter_limit, d, lam, weight)
    yield at_least(
        'rho_inf - rho_1, 10^4 draws', last[1] / last[0] - first[1] / first[0], 0.0, 1e-12
    )


def _criterion_errors(rng) -> int:
    """Draws on which rho_{t+1} >= rho_t and its criterion differ (beyond rounding)."""
    s = np.sort(rng.uniform(size=(2, 10_000)), axis=0)
    filter = s * rng.uniform(size=(2, 10_000))
    alpha = rng.uniform(size=10_000)
    after = run(kr.spectral_filter_step, filter, s, alpha)
    growth = np.log(after[1] / after[0]) - np.log(filter[1] / filter[0])
    criterion = np.diff(s * (alpha / filter + 1 - alpha), axis=0)[0]
    return int(np.sum((np.sign(growth) != np.sign(criterion)) & (np.abs(growth) > 1e-12)))


@PAPER.statement('T6: monotone sparsification is false for 0 < alpha < 1')
def overshoot(rng):
    d, lam, alpha = np.array([0.3, 3.0]), 0.2, 0.1
    path = run(kr.spectral_filter_path, d / (d + lam), np.full(11, alpha))
    ratios = path[:, 1] / path[:, 0]
    last = run(kr.spectral_filter_limit, d, lam, alpha)
    note = 'd = (3, .3), lam = .2, alpha = .1: the ratio overshoots its limit and comes back.'
    yield counter_example('max_t rho_t - rho_inf', ratios - last[1] / last[0], 0.1, note)
    yield equal('rho_1', ratios[0], 1.56, 5e-3)
    yield equal('rho_8', ratios[7], 5.14, 5e-3)
    yield equal('the peak is at t =', 1 + np.argmax(ratios), 8, 0)
    yield equal('rho_inf', last[1] / last[0], 4.60, 5e-3)


@PAPER.statement('T7: the optimal weight is closed form')
def optimal_weight(rng):
    p = random_problem(rng)
    first, distilled = predict(p, p.s), predict(p, p.s * p.s)
    alpha = float(run(kr.optimal_alpha, first, distilled, p.y_val))
    # Errors by refitting step 2 with each weight, not by mixing two predictions.
    grid = np.linspace(-3, 5, 8001)
    filters = run(kr.spectral_filter_step, p.s, p.s, grid[:, None])
    best = grid[np.argmin(_validation_errors(p, filters))]
    yield equal('grid of 8001 refits, step 10^-3', best, np.clip(alpha, -3, 5), 1e-3)
    gap = first - distilled
    other = 1 - np.sum((first - p.y_val) * gap) / np.sum(gap**2)
    yield equal('the two forms of alpha*', alpha, other, 1e-12)


@PAPER.statement('T7: the optimal student beats its teacher and the pure student, at every step')
def optimal_path(rng):
    for lam, name in ((3.0, 'over-regularised'), (1e-3, 'under-regularised')):
        p = random_problem(rng, lam=lam)
        smoother = kr.Smoother(*map(jnp.asarray, (p.s, p.d, p.V)))
        alphas, filters = run(
            kr.optimal_alpha_path, p.gram_val, smoother, p.y, p.y_val, num_steps=8
        )
        errors = _validation_errors(p, filters)
        pure = _validation_errors(p, p.s * filters[:-1])
        yield at_most(f'{name}: error - error of f_1', errors - errors[0], 0.0, 1e-12)
        yield at_most(f'{name}: error - error of the pure student', errors[1:] - pure, 0.0, 1e-12)
        outside = np.maximum(-alphas, alphas - 1)
        yield counter_example(f'{name}: alpha* leaves [0, 1] by', outside, 1e-3)


def _validation_errors(p: Problem, filters: np.ndarray) -> np.ndarray:
    predictions = np.einsum(
        'mk,tk,kc->tmc', p.gram_val @ p.V / p.d, filters, p.V.T @ p.y, optimize=True
    )
    return np.mean((predictions - p.y_val) ** 2, axis=(1, 2))


@PAPER.statement('the teacher of the network loss is frozen')
def frozen_teacher(rng):
    logits, teacher = rng.normal(size=(2, 6, 4))
    labels = np.eye(4)[rng.integers(4, size=6)]

    def loss(logits, teacher):
        return jnp.mean(kr.self_distillation_loss(logits, labels, teacher, 0.4))

    to_student, to_teacher = run(jax.grad(loss, argnums=(0, 1)), logits, teacher)
    yield equal('gradient with respect to the teacher', to_teacher, 0.0, 0.0)
    yield at_least('norm of the gradient of the student', np.linalg.norm(to_student), 1e-3)


@PAPER.statement('golden numbers: the toy of the official notebook')
def golden(rng):
    x, grid = np.linspace(0, 1, 11)[:, None], np.linspace(0, 1, 101)[:, None]
    s, d, V = kr.ridge_smoother(run(kr.rbf_kernel, x, x, 80.0), 0.2)
    gram_grid = run(kr.rbf_kernel, grid, x, 80.0)

    def losses(alpha):
        path = kr.spectral_filter_closed_form(s, jnp.full(5, alpha))
        filters = jnp.concatenate([path, kr.spectral_filter_limit(d, 0.2, alpha)[None]])
        fits = jax.vmap(lambda filter: kr.predict(gram_grid, V, d, filter, TOY_TARGETS))(filters)
        return jnp.mean((fits - np.sin(2 * np.pi * grid)) ** 2, axis=(1, 2))

    for alpha, golden_losses in TOY_LOSSES.items():
        measured = run(losses, alpha)
        for step, value, exact in zip(STEPS, measured, golden_losses, strict=True):
            yield equal(f'loss at alpha = {alpha}, step {step}', value, exact, 5e-6)
