"""PACED 2026: the Beta kernel of the pass rate, its optimality and its robustness."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from kd.losses import divergence
from kd.theory import competence
from kd.theory.statements.rows import Paper, at_least, at_most, counter_example, equal, run

PAPER = Paper('paced', 'PACED: Distillation at the Frontier of Student Competence', '2603.11178')


@PAPER.statement('T1: power-law decay at both ends fixes the exponents')
def boundary_exponents(rng):
    a, b, bound = 1.5, 0.7, 0.8
    p = np.logspace(-12, -3, 500)
    for name, rise, fall in (('p -> 0', a, b), ('p -> 1', b, a)):
        # log SNR with a bounded remainder r(p) = R sin(log p), from the nearer end; log1p keeps it.
        log_snr = rise * np.log(p) + fall * np.log1p(-p) + bound * np.sin(np.log(p))
        gap = np.abs(log_snr / np.log(p) - rise)
        allowed = (bound + fall * np.abs(np.log1p(-p))) / np.abs(np.log(p))
        yield at_most(f'{name}: slope error / stated bound', gap / allowed, 1.0, 1e-12)
        yield at_most(f'{name}: slope error at 10^-12', gap[0], bound / np.log(1e12) + 1e-9)


@PAPER.statement('T2: the best weights are mu / sigma^2')
def best_weights(rng):
    mu, sigma2 = rng.exponential(size=20), rng.exponential(size=20) + 0.1
    best = run(competence.optimal_weights, mu, sigma2)
    snr = run(competence.aggregate_snr, best, mu, sigma2)
    yield equal('SNR at w* against sum_i SNR_i', snr, np.sum(mu**2 / sigma2), 1e-10)
    random = best * np.exp(rng.normal(size=(10_000, 20)))
    others = run(competence.aggregate_snr, random, mu, sigma2)
    yield at_most('SNR at 10^4 random weights - SNR at w*', others - snr, 0, 1e-10)
    slope = run(jax.grad(lambda w: competence.kernel_efficiency(w, mu, sigma2)), best)
    yield equal('gradient of the efficiency at w*', slope, 0, 1e-12)
    # Monte Carlo of the definition: SNR(G) = E[G]^2 / Var[G].
    noise = rng.normal(size=(200_000, 20)) * np.sqrt(sigma2)
    total = (mu + noise) @ best
    score = abs(np.var(total) / np.sum(best**2 * sigma2) - 1) / np.sqrt(2 / len(total))
    yield at_most('variance of sum_i w_i g_i by simulation, |z|', score, 4.0)


@PAPER.statement('T2: which exponents, from what stays constant in p')
def exponents(rng):
    p = np.linspace(0.05, 0.95, 50)
    for a, b in ((2.0, 2.0), (3.0, 1.0)):
        snr = p**a * (1 - p) ** b
        for name, mu, share in (
            ('constant noise: (a, b) / 2', np.sqrt(snr), 0.5),
            ('constant signal: (a, b)', np.ones_like(p), 1.0),
        ):
            kernel = run(competence.beta_kernel, p, share * a, share * b)
            variances = mu**2 / snr
            efficiency = run(competence.kernel_efficiency, kernel, mu, variances)
            yield equal(f'SNR exponents ({a:g}, {b:g}), {name}: efficiency', efficiency, 1.0, 1e-12)
    z, w = rng.normal(size=(2, 100))

    def reverse_kl(z):
        p, q = jax.nn.sigmoid(z), jax.nn.sigmoid(w)
        return jnp.sum(p * jnp.log(p / q) + (1 - p) * jnp.log((1 - p) / (1 - q)))

    p = 1 / (1 + np.exp(-z))
    slope = run(jax.grad(reverse_kl), z)
    yield equal(
        'Bernoulli: dKL(p, q)/dz = p (1-p) (z_p - z_q)', slope, p * (1 - p) * (z - w), 1e-12
    )


@PAPER.statement('T3: a kernel within e^delta of the best loses at most tanh(delta)^2')
def robustness(rng):
    mu, sigma2 = rng.exponential(size=16) + 0.05, rng.exponential(size=16) + 0.05
    best = run(competence.optimal_weights, mu, sigma2)
    for delta in (0.1, 0.5, 1.0):
        signs = rng.choice([-1.0, 1.0], size=(100_000, 16))
        bound = run(competence.efficiency_bound, delta)
        efficiency = run(competence.kernel_efficiency, best * np.exp(delta * signs), mu, sigma2)
        name = f'delta = {delta}: efficiency of 10^5 sign patterns'
        yield at_least(name, efficiency, bound, 1e-12)
        # Two groups at +-delta, the first with the share 1 / (1 + e^(2 delta)) of the energy.
        share = 1 / (1 + np.exp(2 * delta))
        energy = np.array([share, 1 - share])
        weights = np.sqrt(energy) * np.exp([delta, -delta])
        worst = run(competence.kernel_efficiency, weights, np.sqrt(energy), np.ones(2))
        yield equal(f'delta = {delta}: the two-group case', worst, bound, 1e-12)
    for delta, value in ((0.1, 0.99007), (0.5, 0.78645), (1.0, 0.41997)):
        bound = run(competence.efficiency_bound, delta)
        yield equal(f'1 / cosh(delta)^2 at delta = {delta}', bound, value, 5e-6)
    small = 1e-2
    loss = 1 - run(competence.efficiency_bound, small)
    yield equal('loss / delta^2 at delta = .01', loss / small**2, 1.0, small**2)


@PAPER.statement('T3: pointwise loss of a misspecified weight')
def pointwise(rng):
    mu, sigma2, ratio = rng.exponential(size=(3, 10_000)) + 0.05
    best = mu / (mu**2 + sigma2)

    def gain(w):
        return 2 * w * mu - w**2 * (mu**2 + sigma2)

    yield equal(
        'J(w) / J(w*) = 1 - (w/w* - 1)^2',
        gain(ratio * best) / gain(best),
        1 - (ratio - 1) ** 2,
        1e-10,
    )
    delta = 0.01
    losses = 1 - gain(np.exp([[delta], [-delta]]) * best) / gain(best)
    yield equal(
        'worst loss at delta = .01: (e^delta - 1)^2', losses.max(), np.expm1(delta) ** 2, 1e-12
    )
    yield equal('the same / delta^2', losses.max() / delta**2, 1.0, 1.5 * delta)


@PAPER.statement('T3: the centre of the uncertainty is the minimax kernel')
def minimax(rng):
    problems, delta = 8, 0.4
    shifts = np.concatenate([np.zeros((1, problems)), rng.normal(size=(200, problems))])
    worst = []
    for shift in shifts:
        # Against w = w0 e^shift the adversary takes the true weight down where w is highest, up
        # where it is lowest, and puts all the energy on those two problems.
        high, low = int(np.argmax(shift)), int(np.argmin(shift))
        if high == low:
            high, low = 0, 1
        half = (shift[high] - shift[low]) / 2 + delta
        share = 1 / (1 + np.exp(2 * half))
        energy = np.array([share, 1 - share])
        truth = np.exp(np.array([-delta, delta]))
        used = np.exp(shift[[high, low]])
        # mu / sigma^2 = truth with SNR = energy: mu = energy / truth, sigma^2 = energy / truth^2.
        worst.append(float(competence.kernel_efficiency(used, energy / truth, energy / truth**2)))
    bound = float(competence.efficiency_bound(delta))
    yield equal('worst efficiency of the centre', worst[0], bound, 1e-12)
    yield at_most('worst efficiency of 200 other kernels', worst[1:], bound, -1e-6)


@PAPER.statement('T4: the plug-in kernel is unbiased up to a constant at a = b = 1')
def plug_in(rng):
    p = np.linspace(0, 1, 41)
    for rollouts in (2, 4, 8, 16):
        expected = _expected_kernel(rollouts, p, 1.0, 1.0)
        exact = (1 - 1 / rollouts) * p * (1 - p)
        yield equal(f'K = {rollouts}: E[w(p_hat)] = (1 - 1/K) w(p)', expected, exact, 1e-12)
    ratio = _expected_kernel(8, np.array([0.3]), 1.0, 1.0) / 0.21
    yield equal('K = 8: the constant', ratio, 7 / 8, 1e-12)
    correct = np.arange(8) < np.arange(9)[:, None]
    law = stats.binom.pmf(np.arange(9), 8, p[:, None])
    variance = law @ run(competence.reward_variance, correct)
    yield equal('K = 8: E[K p_hat (1 - p_hat) / (K - 1)] = p (1 - p)', variance, p * (1 - p), 1e-12)


@PAPER.statement('T4: for other exponents the plug-in kernel is biased, but for three trivial ones')
def plug_in_bias(rng):
    p = np.linspace(0.05, 0.95, 19)
    for a, b in ((2.0, 1.0), (1.0, 2.0), (2.0, 2.0), (0.5, 0.5), (2.0, 0.0)):
        ratio = _expected_kernel(8, p, a, b) / (p**a * (1 - p) ** b)
        spread = ratio.max() / ratio.min() - 1
        yield counter_example(
            f'a = {a:g}, b = {b:g}: E[w(p_hat)] / w(p), max / min - 1', spread, 1e-2
        )
    for a, b in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0)):
        expected = _expected_kernel(8, p, a, b)
        note = 'Linear in p_hat, hence unbiased.'
        yield equal(
            f'a = {a:g}, b = {b:g}: E[w(p_hat)] = w(p)', expected, p**a * (1 - p) ** b, 1e-12, note
        )


def _expected_kernel(rollouts: int, p: np.ndarray, a: float, b: float) -> np.ndarray:
    """E[w(p_hat)] for p_hat = Bin(K, p) / K by the exact sum, one per p."""
    passed = np.arange(rollouts + 1)
    kernel = run(competence.beta_kernel, passed / rollouts, a, b)
    return stats.binom.pmf(passed, rollouts, p[:, None]) @ kernel


@PAPER.statement('T5: shape of the kernel')
def shape(rng):
    grid = np.linspace(0, 1, 100_001)
    for a, b in ((1.0, 1.0), (2.0, 1.0), (0.5, 3.0)):
        kernel = run(competence.beta_kernel, grid, a, b)
        yield equal(f'a = {a:g}, b = {b:g}: argmax', grid[np.argmax(kernel)], a / (a + b), 1e-5)
        peak = a**a * b**b / (a + b) ** (a + b)
        yield equal(f'a = {a:g}, b = {b:g}: maximum', kernel.max(), peak, 1e-9)
        yield equal(f'a = {a:g}, b = {b:g}: w(0), w(1)', kernel[[0, -1]], 0, 0)
        mirrored = run(competence.beta_kernel, 1 - grid, b, a)
        yield equal(f'a = {a:g}, b = {b:g}: mirrored by swapping', mirrored, kernel, 1e-12)
    yield equal('a = b = 0: uniform, 0^0 = 1', run(competence.beta_kernel, grid, 0.0, 0.0), 1, 0)


@PAPER.statement('T6: staleness of the pass rate acts like misspecification')
def stale(rng):
    p = rng.uniform(0.05, 0.95, 1000)
    for a, b in ((1.0, 1.0), (2.0, 0.5)):
        log_kernel = jax.grad(lambda p: jnp.sum(jnp.log(competence.beta_kernel(p, a, b))))  # noqa: B023
        slope = np.abs(run(log_kernel, p))
        yield equal(
            f'a = {a:g}, b = {b:g}: |d log w / dp|',
            slope,
            run(competence.staleness, p, a, b),
            1e-10,
        )
    drift = 1e-4
    moved = run(competence.beta_kernel, p + drift, 1.0, 1.0)
    delta = np.abs(np.log(moved / run(competence.beta_kernel, p, 1.0, 1.0)))
    first_order = run(competence.staleness, p, 1.0, 1.0) * drift
    yield equal('delta of a drift of 10^-4 - first order', delta - first_order, 0, 4e-6)
    peak = run(competence.staleness, np.array(0.5), 1.0, 1.0)
    yield equal('sensitivity at the peak', peak, 0, 1e-12)


@PAPER.statement('the weighted loss')
def weighted_loss(rng):
    student, teacher = rng.normal(size=(2, 6, 7))
    rates = np.array([0.0, 0.25, 0.5, 0.5, 0.75, 1.0])

    def total(student, teacher, rates, a, b):
        return jnp.sum(competence.paced(divergence.forward_kl, a, b)(rates, student, teacher))

    uniform = run(competence.paced(divergence.forward_kl, 0.0, 0.0), rates, student, teacher)
    plain = run(divergence.forward_kl, student, teacher)
    yield equal('a = b = 0: uniform distillation', uniform, plain, 1e-12)
    ends = run(competence.paced(divergence.forward_kl), rates, student, teacher)[[0, -1]]
    yield equal('value at pass rates 0 and 1', ends, 0, 0)
    gradients = run(jax.grad(total, argnums=(0, 2)), student, teacher, rates, 1.0, 1.0)
    yield equal('gradient at pass rates 0 and 1', gradients[0][[0, -1]], 0, 0)
    yield equal('gradient through the pass rate', gradients[1], 0, 0)
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (teacher, student))
    weights = (rates * (1 - rates))[:, None]
    yield equal('forward KL: gradient w (q - p)', gradients[0], weights * (q - p), 1e-10)
    reverse = run(jax.grad(lambda s: jnp.sum(divergence.reverse_kl(s, teacher))), student)
    log_ratio = np.log(q / p)
    exact = q * (log_ratio - np.sum(q * log_ratio, axis=-1, keepdims=True))
    yield equal('reverse KL: gradient q (log q/p - KL)', reverse, exact, 1e-10)
    for name, loss in (('forward', divergence.forward_kl), ('reverse', divergence.reverse_kl)):
        value, slope = run(jax.value_and_grad(lambda s: jnp.sum(loss(s, teacher))), teacher)  # noqa: B023
        yield equal(f'{name} KL and gradient at S = T', np.append(slope, value), 0, 1e-12)


@PAPER.statement('the cross-problem SNR estimate is unbiased in its numerator')
def snr_estimate(rng):
    mean, scale, n = np.array([0.5, -0.2, 0.1]), np.array([1.0, 0.5, 2.0]), 10
    draws = mean + scale * rng.normal(size=(20_000, n, 3))
    trace = draws.var(axis=1, ddof=1).sum(-1)
    square = np.sum(draws.mean(axis=1) ** 2, axis=-1) - trace / n
    measured = run(jax.vmap(competence.cross_problem_snr), draws)
    yield equal('against the definition, 2 10^4 samples', measured, square / trace, 1e-10)
    score = abs(square.mean() - np.sum(mean**2)) / (square.std(ddof=1) / np.sqrt(len(square)))
    yield at_most('||mean||^2 - tr / n against ||mu||^2, |z|', score, 4.0)
    score = abs(trace.mean() - np.sum(scale**2)) / (trace.std(ddof=1) / np.sqrt(len(trace)))
    yield at_most('tr against the true trace, |z|', score, 4.0)
