"""pi-Distill and OPSD against plain forward passes, enumeration and closed forms."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from playing import ACTIONS, REWARD, SAMPLING, G, H, context, decoder, levels, sharp

from kd.data.builders import symbols
from kd.errors import UserError
from kd.losses import policy
from kd.methods.rl import common
from kd.methods.rl.grpo import grpo
from kd.methods.rl.pi_distill import both, opsd, pi_distill, told
from kd.rewards.push import push

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LR = 0.5
HOW = dict(reward=REWARD, sampling=SAMPLING, chunk=32)


def value(metrics, name):
    total, count = metrics[name]
    return float(total / count)


def close(first, second, atol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), first, second)


def largest(tree):
    return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))


@pytest.fixture(scope='module')
def network():
    return decoder()


class Run:
    """A method, compiled once; what a step takes off the parameters, and its metrics."""

    def __init__(self, network, made):
        first = jax.jit(made.init)(jax.random.key(0), {})
        self.start = first.replace(params={'network': sharp(network, 1)['params']})
        self.step = jax.jit(made.step)

    def __call__(self, batch=None, **frozen):
        before = self.start.replace(frozen=frozen)
        after, metrics = self.step(before, levels() if batch is None else batch)
        taken = jax.tree.map(lambda x, y: (x - y) / LR, before.params, after.params)
        return taken['network'], metrics


@pytest.fixture(scope='module')
def distilled(network):
    made = pi_distill(
        context(network), **HOW, alpha=lambda state: state.frozen['alpha'],
        beta=lambda state: state.frozen['beta'],
    )  # fmt: skip
    return Run(network, made)


@pytest.fixture(scope='module')
def acted(network, distilled):
    """What the told policy has done in the step, by its own key, with advantages."""
    of = context(network)
    draw = common.drawing(of, common.Sampling(**SAMPLING))
    rows = {name: np.repeat(x, G, axis=0) for name, x in levels().items()}
    asked = told(rows)
    key = jax.random.fold_in(distilled.start.step_key(), zlib.crc32(b'collect'))
    said = jax.jit(draw.of)(distilled.start.variables(), asked, key)
    reward = push(of, of='completion')(said.tokens, said.mask, rows)
    advantage = policy.group_advantage(reward, G)
    return {**rows, 'asked': asked['input'], 'tokens': said.tokens, 'mask': said.mask,
            'advantage': advantage}  # fmt: skip


def log_probs(network, params, prompts, rows):
    """[B, 4 H] by a plain forward pass; prompts have no padding."""
    text = jnp.concatenate([prompts, rows['tokens']], 1)
    logits = network.apply({'params': params}, text).logits[:, -4 * H - 1 : -1, ACTIONS]
    chosen = jnp.clip(rows['tokens'] - ACTIONS[0], 0, 3)[..., None]
    log_p = jnp.take_along_axis(jax.nn.log_softmax(logits), chosen, -1)[..., 0]
    return jnp.where(rows['mask'], log_p, 0.0)


@pytest.fixture(scope='module')
def slopes(network, distilled, acted):
    """Gradients of the four terms, written as they stand in the paper, at one alpha and beta."""
    params = distilled.start.params['network']
    behaviour = log_probs(network, params, acted['asked'], acted)
    untold = log_probs(network, params, acted['input'], acted)

    def mean(x):
        mask = acted['mask']
        return (jnp.where(mask, x, 0).sum(1) / mask.sum(1)).mean()

    def rewarded(log_p):
        rho, advantage = jnp.exp(log_p - behaviour), acted['advantage'][:, None]
        return mean(-jnp.minimum(rho * advantage, jnp.clip(rho, 0.8, 1.2) * advantage))

    def terms(params):
        of_teacher = log_probs(network, params, acted['asked'], acted)
        of_student = log_probs(network, params, acted['input'], acted)
        return jnp.stack([
            rewarded(of_teacher), mean((of_teacher - untold) ** 2 / 2),
            rewarded(of_student), mean(-of_student),
        ])  # fmt: skip

    return jax.jit(jax.jacobian(terms))(params), terms(params)


@pytest.mark.parametrize(('alpha', 'beta'), [(1.0, 0.25), (0.0, 0.25), (0.5, 0.5), (0.0, 0.0)])
def test_a_step_is_the_gradient_of_both_terms(distilled, slopes, alpha, beta):
    """alpha 1 has nothing of the student's pass, alpha 0 nothing of the teacher's."""
    weights = np.array([alpha, alpha * beta, 1 - alpha, (1 - alpha) * beta], np.float32)
    wanted = jax.tree.map(lambda x: np.tensordot(weights, x, 1), slopes[0])
    taken, metrics = distilled(alpha=alpha, beta=beta)
    close(taken, wanted)
    assert largest(wanted) > 1e-2
    assert value(metrics, 'loss') == pytest.approx(float(weights @ slopes[1]), abs=1e-5)
    assert abs(value(metrics, 'kl_to_untold')) > 1e-3


def test_without_rewards_that_differ_the_student_learns_what_the_teacher_does(network):
    """A = 0, alpha = 0: maximum likelihood of all that the teacher has done."""
    short = {**SAMPLING, 'environment': {**SAMPLING['environment'], 'horizon': 1}}
    how = {**HOW, 'sampling': short, 'reward': dict(name='kd.rewards.push.push')}
    run = Run(network, pi_distill(context(network), **how, alpha=0.0, beta=0.25))
    taken, metrics = run()
    assert value(metrics, 'dead_groups') == 1
    assert largest(taken) > 1e-2
    assert value(metrics, 'loss') > 0


def test_an_expert_that_says_nothing_leaves_grpo(network, distilled):
    silent = {**levels(), 'told_mask': np.zeros((4, 7), bool)}
    wanted, _ = Run(network, grpo(context(network), **HOW))(silent)
    for alpha in (0.0, 0.5, 1.0):
        taken, metrics = distilled(silent, alpha=alpha, beta=0.0)
        close(taken, wanted, atol=1e-5)
        assert value(metrics, 'kl_to_untold') == pytest.approx(0, abs=1e-6)
    taken, _ = distilled(silent, alpha=1.0, beta=0.5)
    close(taken, wanted, atol=1e-5)
    for estimate in ('k2', 'all'):
        run = Run(network, opsd(context(network), **HOW, beta=0.5, estimate=estimate))
        taken, metrics = run(silent)
        close(taken, wanted, atol=1e-5)
        # Told, the two forms agree in what they draw to, not to the digit.
        taken, metrics = run()
        assert value(metrics, 'kl_to_told') != pytest.approx(0, abs=1e-4)
        assert largest(jax.tree.map(jnp.subtract, taken, wanted)) > 1e-3


def test_the_penalty_may_be_a_part_of_the_reward(network, acted):
    run = Run(network, pi_distill(context(network), **HOW, alpha=0.5, beta=0.25, penalty='reward'))
    _, metrics = run()
    params = run.start.params['network']
    gap = log_probs(network, params, acted['asked'], acted)
    gap -= log_probs(network, params, acted['input'], acted)
    made = push(context(network), of='completion')(acted['tokens'], acted['mask'], acted)
    lengths = acted['mask'].sum(1)
    advantage = policy.group_advantage(made - 0.25 * gap.sum(1) / lengths, G)
    # -A of the teacher's half, -rho A clipped of the student's.
    rho = jnp.exp(-gap)
    student = -jnp.minimum(rho * advantage[:, None], jnp.clip(rho, 0.8, 1.2) * advantage[:, None])
    student = (jnp.where(acted['mask'], student, 0).sum(1) / lengths).mean()
    wanted = -0.5 * advantage.mean() + 0.5 * student
    assert value(metrics, 'loss') == pytest.approx(float(wanted), abs=1e-5)
    assert value(metrics, 'reward') == pytest.approx(float(made.mean()), abs=1e-6)


def test_no_student_is_told(acted, network):
    rows = {**acted, 'weight': np.ones((16, 4 * H), np.float32)}
    zeros = jnp.zeros((16, 4 * H))
    teacher = {**rows, 'input': acted['asked'], 'prompt_mask': np.ones((16, 10), bool)}
    made = jax.tree.map(np.asarray, both(teacher, rows, zeros, zeros + 1, 0.25))
    of_student = made['input'][16:][made['prompt_mask'][16:]]
    assert set(of_student) <= {symbols.BOS, symbols.PUSH, *range(40, 65)}
    assert len(of_student) == 16 * 3
    assert (made['input'][:16, 3] == symbols.HINT).all()
    np.testing.assert_array_equal(made['tokens'][:16], made['tokens'][16:])
    assert made['weight'][:16].mean() == 0.5
    assert made['weight'][16:].mean() == 1.5
    np.testing.assert_array_equal(made['teaches'], np.arange(32) < 16)
    # Of a teacher's row the other is the student, and the other way round.
    assert made['other'][:16].max() == 1
    assert made['other'][16:].max() == 0


# Theory, by enumeration over five outcomes


@pytest.fixture(scope='module')
def five():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.normal(size=5), jnp.float32) for name in ('z', 'other', 'R')}


def expected(loss, z, by):
    """Gradient in the logits z of a loss of log pi(v), v drawn from softmax(by)."""
    law = jax.nn.softmax(by)
    return jax.grad(lambda z: (law * loss(jax.nn.log_softmax(z))).sum())(z)


def test_the_terms_have_the_gradients_of_their_divergences(five):
    def kl(p, q):
        p, q = jax.nn.log_softmax(p), jax.nn.log_softmax(q)
        return (jnp.exp(p) * (p - q)).sum()

    z, other = five['z'], five['other']
    log_other = jax.nn.log_softmax(other)
    # -l_S over tokens of the teacher: KL(sg pi_T, pi_S), right or wrong.
    found = expected(lambda log_p: -log_p, z, other)
    np.testing.assert_allclose(found, jax.grad(lambda z: kl(other, z))(z), atol=1e-6)
    # k2(l_T - sg l_S) over tokens of the teacher: KL(pi_T, sg pi_S).
    found = expected(lambda log_p: policy.kl_estimate(log_p, log_other, 'k2'), z, z)
    np.testing.assert_allclose(found, jax.grad(lambda z: kl(z, other))(z), atol=1e-6)
    # What the student would earn, from what the teacher has done.
    ratio = jnp.exp(jax.nn.log_softmax(z) - log_other)
    of_teacher = (jax.nn.softmax(other) * ratio * five['R']).sum()
    assert float(of_teacher) == pytest.approx(float(jax.nn.softmax(z) @ five['R']), abs=1e-6)


def test_the_best_policy_is_the_others_tilted_by_rewards(five):
    """J_OPSD: pi_T exp(R / beta); J_teacher: the same of pi_S. By ascent on the losses here."""
    beta, other, rewards = 0.5, five['other'], five['R']
    log_other = jax.nn.log_softmax(other)

    def loss(log_p):
        ratio = policy.log_ratio(log_p, jax.lax.stop_gradient(log_p))
        surrogate = policy.clipped_surrogate(ratio, rewards)
        return surrogate + beta * policy.kl_estimate(log_p, log_other, 'k2')

    def step(_, z):
        return z - 0.5 * expected(loss, z, jax.lax.stop_gradient(z))

    found = jax.nn.softmax(jax.lax.fori_loop(0, 2_000, step, five['z']))
    np.testing.assert_allclose(found, jax.nn.softmax(other + rewards / beta), atol=1e-3)


def test_data_without_an_expert_is_told(network):
    spec = {name: x for name, x in context(network).spec.items() if not name.startswith('told')}
    for method in (pi_distill, opsd):
        with pytest.raises(UserError, match="what an expert says is the field 'told'"):
            method(context(network, spec=spec), **HOW)
