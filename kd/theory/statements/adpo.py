"""Wang 2025, 'ADPO: Anchored Direct Preference Optimization'."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd.losses import preference, preference_family
from kd.theory.statements.rows import Paper, at_least, at_most, counter_example, equal, run

PAPER = Paper('adpo', 'ADPO: Anchored Direct Preference Optimization', '2510.18913')


def log_softmax(x: np.ndarray) -> np.ndarray:
    return x - np.logaddexp.reduce(x, axis=-1, keepdims=True)


def problem(rng: np.random.Generator, contexts: int = 16, candidates: int = 5):
    """Student and anchor log-probabilities, a target and temperatures [B]."""
    student, anchor = log_softmax(2 * rng.normal(size=(2, contexts, candidates)))
    # At least a tenth of uniform: gradient descent is slow where the target is close to 0.
    target = 0.9 * rng.dirichlet(np.ones(candidates), size=contexts) + 0.1 / candidates
    return student, anchor, target, rng.uniform(0.3, 3.0, contexts)


@PAPER.statement('the gradient is (p~ - q) / tau')
def gradient(rng):
    student, anchor, target, tau = problem(rng)

    def total(student, anchor, target):
        return jnp.sum(preference.anchored_cross_entropy(student, anchor, target, tau))

    slopes = run(jax.grad(total, argnums=(0, 1, 2)), student, anchor, target)
    policy = np.exp(log_softmax((student - anchor) / tau[:, None]))
    yield equal('autodiff against the formula', slopes[0], (policy - target) / tau[:, None], 1e-12)
    yield equal('sum over the candidates', slopes[0].sum(-1), 0, 1e-12)
    yield equal('with respect to the anchor', slopes[1], 0, 0)
    yield equal('with respect to the target', slopes[2], 0, 0)
    shift = rng.normal(size=(16, 1))
    plain = run(preference.anchored_cross_entropy, student, anchor, target, tau)
    for name, moved in (
        ('student', (student + shift, anchor)),
        ('anchor', (student, anchor + shift)),
    ):
        value = run(preference.anchored_cross_entropy, *moved, target, tau)
        yield equal(f'a constant per context added to the {name}', value, plain, 1e-10)
    uniform = run(
        preference.anchored_cross_entropy, student, np.full_like(anchor, -3.0), target, tau
    )
    exact = -np.sum(target * log_softmax(student / tau[:, None]), axis=-1)
    yield equal('constant anchor: CE(q, softmax(l / tau))', uniform, exact, 1e-12)
    first = run(jax.grad(total), anchor, anchor, target)
    exact = (1 / 5 - target) / tau[:, None]
    yield equal('on-policy first step: gradient (1/P - q) / tau', first, exact, 1e-12)


@PAPER.statement('the optimum is pi_ref q^tau / Z')
def optimum(rng):
    _, anchor, target, tau = problem(rng)
    best = run(preference.closed_form_policy, anchor, target, tau)
    exact = log_softmax(anchor + tau[:, None] * np.log(target))
    yield equal('closed form', best, exact, 1e-12)
    policy = run(preference.anchored_log_policy, best, anchor, tau)
    yield equal('p~ = q at the optimum', np.exp(policy), target, 1e-12)

    def total(student):
        return jnp.sum(preference.anchored_cross_entropy(student, anchor, target, tau))

    yield equal('gradient at the optimum', run(jax.grad(total), best), 0, 1e-12)
    uniform = run(preference.closed_form_policy, anchor, np.full_like(target, 1 / 5), tau)
    yield equal('uniform q: the optimum is the anchor', uniform, anchor, 1e-12)
    # Free logits, from the anchor; the step size suits the curvature 1 / (4 tau^2) or less.
    step = jax.jit(lambda x: x - 2 * (tau**2)[:, None] * jax.grad(total)(x))
    fitted = jax.jit(lambda x: jax.lax.fori_loop(0, 4000, lambda _, x: step(x), x))(anchor)
    gap = np.exp(log_softmax(np.asarray(fitted))) - np.exp(exact)
    yield equal('gradient descent on free logits, 4000 steps', gap, 0, 1e-4)


@PAPER.statement('curvature at the optimum')
def curvature(rng):
    _, anchor, target, _ = problem(rng, contexts=1)
    tau = np.array([2.5])
    best = run(preference.closed_form_policy, anchor, target, tau)
    direction = rng.normal(size=5)
    fisher = np.diag(target[0]) - np.outer(target[0], target[0])
    form = float(direction @ fisher @ direction)

    def excess(student):
        loss = run(preference.anchored_cross_entropy, student, anchor, target, tau)
        return float((loss - floor)[0])

    floor = run(preference.anchored_cross_entropy, best, anchor, target, tau)
    size = 1e-3
    # Symmetric differences drop the cubic term: what is left is of fourth order.
    measured = (excess(best + size * direction) + excess(best - size * direction)) / 2
    logit_form = size**2 * form / (2 * tau[0] ** 2)
    yield equal('(L - L*) / [d^T F d / (2 tau^2)], d = l - l*', measured / logit_form, 1.0, 1e-4)
    hessian = run(
        jax.hessian(lambda x: jnp.sum(preference.anchored_cross_entropy(x, anchor, target, tau))),
        best,
    )[0, :, 0, :]
    yield equal('Hessian = F / tau^2', hessian, fisher / tau[0] ** 2, 1e-10)
    # The same displacement in u = (l - l_ref) / tau: there the factor is 1/2, without tau.
    u_form = (size / tau[0]) ** 2 * form
    yield equal('(L - L*) / [d^T F d / 2], d = u - u*', measured / (u_form / 2), 1.0, 1e-4)
    note = f'tau = {tau[0]}: a factor 1/tau^2 on top of u-coordinates counts tau twice.'
    twice = abs(measured / (u_form / (2 * tau[0] ** 2)) - 1)
    yield counter_example('|ratio - 1| with d = u - u* and 1 / (2 tau^2)', twice, 1e-2, note)


@PAPER.statement('tau: smaller gradients, and an optimum farther from the anchor')
def two_effects(rng):
    student, anchor, target, _ = problem(rng, contexts=1)
    taus = np.geomspace(0.1, 10, 60)
    tiled = [np.tile(x, (60, 1)) for x in (student, anchor, target)]
    best = run(preference.closed_form_policy, tiled[1], tiled[2], taus)
    distance = np.sum(np.exp(best) * (best - anchor), axis=-1)
    yield at_least('growth of KL(pi*, pi_ref) over tau in [.1, 10]', np.diff(distance), 0)
    # d^2/dtau^2 of that KL at tau = 0 is the variance of log q under the anchor.
    mean = np.sum(np.exp(anchor) * np.log(target))
    variance = np.sum(np.exp(anchor) * (np.log(target) - mean) ** 2)
    near = log_softmax(anchor + 1e-3 * np.log(target))
    ratio = np.sum(np.exp(near) * (near - anchor)) / (1e-6 * variance / 2)
    yield equal('KL(pi*, pi_ref) / [tau^2 Var_ref(log q) / 2] at tau = .001', ratio, 1.0, 2e-2)

    def total(anchor):
        # From the anchor itself: p~ is uniform at every tau, which isolates the factor 1 / tau.
        return jnp.sum(preference.anchored_cross_entropy(anchor, tiled[1], tiled[2], taus))

    norm = np.linalg.norm(run(jax.grad(total), tiled[1]), axis=-1)
    yield equal(
        'gradient norm at l = l_ref, times tau', norm * taus / norm[0] / taus[0], 1.0, 1e-10
    )


@PAPER.statement('DPO and soft DPO are special cases')
def preference_pairs(rng):
    student, anchor = -20 * rng.exponential(size=(2, 64, 2))
    for beta in (0.1, 1.0):
        margin = beta * ((student[:, 0] - student[:, 1]) - (anchor[:, 0] - anchor[:, 1]))
        hard = run(preference_family.dpo, student, anchor, beta)
        yield equal(f'DPO, beta = {beta}: -log sigma', hard, np.logaddexp(0, -margin), 1e-12)
        rewards = rng.normal(size=(64, 2))
        soft = run(preference_family.soft_dpo, student, anchor, rewards, beta, 0.7)
        p = 1 / (1 + np.exp(-(rewards[:, 0] - rewards[:, 1]) / 0.7))
        exact = p * np.logaddexp(0, -margin) + (1 - p) * np.logaddexp(0, margin)
        yield equal(f'soft DPO, beta = {beta}', soft, exact, 1e-12)


@PAPER.statement('distillation and supervised learning are special cases')
def supervised_cases(rng):
    logits, teacher = rng.normal(size=(2, 64, 5))
    for temperature in (1.0, 4.0):
        value = run(preference_family.distillation, logits, teacher, temperature)
        p = np.exp(log_softmax(teacher / temperature))
        exact = -np.sum(p * log_softmax(logits / temperature), axis=-1)
        yield equal(f"Hinton's loss without T^2, T = {temperature:g}", value, exact, 1e-12)
    labels = rng.integers(5, size=64)
    value = run(preference_family.supervised, logits, labels)
    exact = run(optax.softmax_cross_entropy_with_integer_labels, logits, labels)
    yield equal('cross-entropy with labels, against optax', value, exact, 1e-12)


@PAPER.statement('maximum-entropy RL is a special case in its optimum, not in its gradient')
def max_entropy(rng):
    values, alpha = rng.normal(size=(1, 5)), 0.6
    best = log_softmax(values / alpha)

    def rl_objective(logits):
        log_pi = jax.nn.log_softmax(logits)
        return -jnp.sum(jnp.exp(log_pi) * (values - alpha * log_pi))

    def loss(logits):
        return jnp.sum(preference_family.max_entropy(logits, values, alpha))

    yield equal('gradient of this loss at softmax(Q / alpha)', run(jax.grad(loss), best), 0, 1e-12)
    slope = run(jax.grad(rl_objective), best)
    yield equal('gradient of -(E[Q] + alpha H) there', slope, 0, 1e-12)
    logits = rng.normal(size=(1, 5))
    log_pi = log_softmax(logits)
    divergence = alpha * np.sum(np.exp(log_pi) * (log_pi - best))
    at_best = float(run(rl_objective, best))
    gap = float(run(rl_objective, logits)) - at_best
    yield equal('-(E[Q] + alpha H) = alpha KL(pi, q) + const', gap, divergence, 1e-12)
    ours, theirs = (np.ravel(run(jax.grad(f), logits)) for f in (loss, rl_objective))
    cosine = ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)
    note = 'KL(q, pi) here, KL(pi, q) there: parallel gradients would give 0.'
    yield counter_example('elsewhere: 1 - cosine of the two gradients', 1 - cosine, 1e-4, note)


@PAPER.statement('targets from rewards')
def targets(rng):
    rewards = rng.normal(size=(16, 8))
    raw = run(preference.target_from_rewards, rewards, 0.5)
    yield equal('raw: softmax(R / beta_r)', raw, np.exp(log_softmax(rewards / 0.5)), 1e-12)
    scores = (rewards - rewards.mean(-1, keepdims=True)) / (rewards.std(-1, keepdims=True) + 1e-8)
    standard = run(preference.target_from_rewards, rewards, 0.5, kind='standardized')
    yield equal(
        'standardised: softmax(A / beta_r)', standard, np.exp(log_softmax(scores / 0.5)), 1e-12
    )
    affine = run(preference.target_from_rewards, 3 * rewards - 7, 0.5, kind='standardized')
    yield equal('standardised: invariant to a R + b', affine, standard, 1e-6)
    ties = run(preference.target_from_rewards, np.ones((16, 8)), 0.5, kind='standardized')
    yield equal('equal rewards: uniform', ties, 1 / 8, 1e-15)


@PAPER.statement('the adaptive temperature')
def adaptive_temperature(rng):
    base, a, b, vocab = 0.8, 1.0, 0.5, 100

    def tau(entropy, mean_reward):
        # A second and a third context pin the batch range of rewards to [0, 1].
        rewards = jnp.stack([jnp.full(4, mean_reward), jnp.zeros(4), jnp.ones(4)])
        neg_log_p = jnp.full((3, 4), entropy * np.log(vocab))
        return preference.adaptive_temperature(
            neg_log_p, rewards, vocab, base=base, uncertainty=a, failure=b, low=1e-3, high=1e3
        )[0]

    grid = np.linspace(0, 1, 21)
    values = run(jax.vmap(jax.vmap(tau, (0, None)), (None, 0)), grid, grid)
    yield equal('H = 0, R = 1: tau_base', values[-1, 0], base, 1e-12)
    yield equal('H = 0, R = 0: tau_base (1 + b)', values[0, 0], base * (1 + b), 1e-12)
    exact = base * (1 + a * grid + b * (1 - grid) * (1 - grid[:, None]))
    yield equal('on a grid of (H, R)', values, exact, 1e-12)
    yield at_least('a >= b (1 - R): growth with H', np.diff(values, axis=1), 0)
    clipped = preference.adaptive_temperature(
        rng.exponential(size=(64, 4)) * 5, rng.normal(size=(64, 4)), vocab, low=0.9, high=1.3
    )
    yield at_most('clipped to [.9, 1.3]', np.abs(clipped - 1.1), 0.2, 1e-12)
