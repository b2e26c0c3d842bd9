"""AceReason-Nemotron: GRPO with one update and a mean over tokens, budgets, false verdicts."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from answering import EOS, REWARD, SAMPLING, SPEC, G, P, R, V, context, decoder, prompts, sharp

from kd.claims import seeds
from kd.errors import UserError
from kd.evaluators.verified import verified
from kd.losses import policy
from kd.methods.rl import common
from kd.methods.rl.grpo import grpo
from kd.rewards.noisy import mistaken, noisy
from kd.sampling.autoregressive import sampler

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LR = 0.5
NOISY = dict(name='kd.rewards.noisy.noisy', reward=REWARD)


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def batch():
    return prompts()


class Run:
    """A step that learns from verdicts with mistakes at the rate of a field, compiled once."""

    def __init__(self, network):
        spec = SPEC | {'rate': jax.ShapeDtypeStruct((), jnp.float32)}
        method = grpo(
            context(network, spec=spec), sampling=SAMPLING, chunk=32, aggregation='token_mean',
            reward=dict(NOISY, false_positives='rate', false_negatives='rate'),
        )  # fmt: skip
        self.first = jax.jit(method.init)(jax.random.key(0), {})
        self.step = jax.jit(method.step)

    def __call__(self, batch, variables, rate=0.0):
        state = self.first.replace(params={'network': variables['params']})
        rate = np.broadcast_to(np.float32(rate), 4)
        return state, *self.step(state, {**batch, 'rate': rate})


@pytest.fixture(scope='module')
def run(network):
    return Run(network)


@pytest.fixture(scope='module')
def policy_of(network):
    return sharp(network, 1)


@pytest.fixture(scope='module')
def sampled(network, batch, run, policy_of):
    """What a step of this policy samples, by its own key, and whether it is right, bool [4, G]."""
    draw = common.drawing(context(network), common.Sampling(**SAMPLING))
    key = jax.random.fold_in(run.first.step_key(), zlib.crc32(b'collect'))
    rows = {name: np.repeat(x, G, axis=0) for name, x in batch.items()}
    said = jax.jit(draw)(policy_of, rows['input'], rows['prompt_mask'], key)
    return rows, said, (np.asarray(said.tokens)[:, 0] % 2 == 0).reshape(4, G)


def test_a_step_is_reinforce_over_all_tokens(network, batch, run, policy_of, sampled):
    """sum_i sum_t -A_i log p_it / sum_i |o_i|, by a plain forward pass."""
    before, after, metrics = run(batch, policy_of)
    rows, said, right = sampled
    centred = right - right.mean(1, keepdims=True)
    advantage = (centred / (right.std(1, keepdims=True) + 1e-6)).reshape(-1)

    @jax.jit
    @jax.jacobian
    def slopes(params):
        tokens = jnp.concatenate([rows['input'], said.tokens], 1)
        there = jnp.concatenate([rows['prompt_mask'], said.mask], 1)
        logits = network.apply(
            {'params': params}, tokens, jnp.maximum(there.cumsum(1) - 1, 0), there.astype(int)
        ).logits[:, P - 1 : -1]
        log_q = jax.nn.log_softmax(logits.at[..., :2].set(-jnp.inf))
        log_p = jnp.take_along_axis(log_q, said.tokens[..., None], -1)[..., 0]
        losses = -advantage * jnp.where(said.mask, log_p, 0).sum(1)
        lengths = said.mask.sum(1)
        return jnp.stack([losses.sum() / lengths.sum(), (losses / lengths).mean()])

    found = slopes(before.params['network'])
    by_token, by_sequence = (jax.tree.map(lambda x, i=i: x[i], found) for i in (0, 1))
    moved = jax.tree.map(lambda x, y: (x - y) / LR, before.params, after.params)['network']
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), moved, by_token)
    apart = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), by_token, by_sequence)
    # Lengths differ, and so does the mean over answers of their means.
    assert np.ptp(np.asarray(said.mask).sum(1)) > 0
    assert max(jax.tree.leaves(apart)) > 1e-3
    assert float(metrics['clip_fraction'].total) == 0


def test_with_one_update_no_clip_ever_bites():
    rng = np.random.default_rng(0)
    log_p, advantage = -rng.exponential(size=40), rng.normal(size=40)

    def slope(low, high):
        def loss(x):
            ratio = policy.log_ratio(x, x)
            return policy.clipped_surrogate(ratio, advantage, low=low, high=high).sum()

        return jax.grad(loss)(jnp.asarray(log_p))

    for radii in ((0.2, 0.28), (1e-3, 1e-3)):
        np.testing.assert_allclose(slope(*radii), -advantage, rtol=1e-6)


def test_the_scale_of_rewards_changes_nothing():
    rewards = np.random.default_rng(0).integers(0, 2, 64).astype(np.float32)
    once = policy.group_advantage(rewards, 8)
    np.testing.assert_allclose(policy.group_advantage(7 * rewards, 8), once, atol=1e-5)
    # One success of sixteen: the largest advantage there is.
    one = policy.group_advantage(np.eye(16, dtype=np.float32)[0], 16)
    assert float(one[0]) == pytest.approx(np.sqrt(15), rel=1e-4)


def test_an_expected_update_of_two_arms_goes_by_the_root_of_p_times_1_minus_p():
    """One token, right with p: d logit = mean_i A_i (x_i - p), over all outcomes of a group."""
    size = 1000
    right = np.arange(size + 1)
    rewards = (np.arange(size) < right[:, None]).astype(np.float32)
    advantage = policy.group_advantage(rewards.reshape(-1), size).reshape(rewards.shape)
    for p in (0.1, 0.3, 0.5):
        each = (np.asarray(advantage, float) * (rewards - p)).mean(1)
        update = scipy.stats.binom.pmf(right, size, p) @ each
        assert update == pytest.approx(np.sqrt(p * (1 - p)), abs=1e-3)


def test_entropy_is_of_the_tokens_that_may_be_said_and_of_answers_alone(batch, run, policy_of):
    _, _, metrics = run(batch, jax.tree.map(jnp.zeros_like, policy_of))
    total, count = metrics['entropy']
    assert float(total / count) == pytest.approx(np.log(V - 2), rel=1e-5)
    # A mean over the tokens that were said, not over R.
    assert float(count) == float(metrics['length'].total) < 4 * G * R


def ended(context):
    """1 for an answer that has come to an end."""
    return lambda tokens, mask, batch: 1.0 - batch['truncated']


def test_a_short_budget_cuts_answers_off_and_a_longer_one_leaves_them_as_they_are(
    network, policy_of, run, sampled
):
    rows, whole, _ = sampled
    draw = sampler(network.module, max_new=2, stop=(EOS,), forbidden=(0, 1))
    key = jax.random.fold_in(run.first.step_key(), zlib.crc32(b'collect'))
    said = jax.jit(draw)(policy_of, rows['input'], rows['prompt_mask'], key)
    fits = ~np.asarray(whole.truncated) & (np.asarray(whole.mask).sum(1) <= 2)
    assert 0 < fits.sum() < 4 * G
    reward = np.asarray(ended(None)(said.tokens, said.mask, {'truncated': said.truncated}))
    np.testing.assert_array_equal(reward, fits)
    # What is cut off has all of its tokens counted, and is what the whole answer begins with.
    assert np.asarray(said.mask)[~fits].all()
    shown = [np.where(x.mask, x.tokens, 0)[:, :2] for x in (said, whole)]
    np.testing.assert_array_equal(*shown)


def test_mistakes_are_as_frequent_as_asked_for_and_shrink_differences():
    keys = jax.random.split(jax.random.key(0), 40_000)
    rewards = np.tile(np.array([0.0, 1.0], np.float32), 20_000)
    made = jax.jit(mistaken)
    np.testing.assert_array_equal(made(rewards, keys), rewards)
    found = np.asarray(made(rewards, keys, 0.1, 0.3))
    assert found[::2].mean() == pytest.approx(0.1, abs=0.01)
    assert found[1::2].mean() == pytest.approx(0.7, abs=0.01)
    even = np.asarray(made(rewards, keys, np.full(40_000, 0.2), np.full(40_000, 0.2)))
    assert even[1::2].mean() - even[::2].mean() == pytest.approx(1 - 2 * 0.2, abs=0.015)
    assert np.isnan(np.asarray(made(np.full(3, np.nan, np.float32), keys[:3], 1.0, 1.0))).all()


def test_a_step_learns_from_verdicts_with_mistakes(batch, run, policy_of, sampled):
    *_, right = sampled
    _, _, exact = run(batch, policy_of)
    always = np.array([0, 1, 0, 1], np.float32)
    _, _, wrong = run(batch, policy_of, always)
    assert float(exact['reward'].total) == right.sum()
    flipped = right ^ always.astype(bool)[:, None]
    assert float(wrong['reward'].total) == flipped.sum() != right.sum()
    # Half of them, other ones at another step.
    even, half = batch | {'rate': np.full(4, 0.5, np.float32)}, []
    for step in range(4):
        _, metrics = run.step(run.first.replace(step=jnp.int32(step)), even)
        half.append(float(metrics['reward'].total))
    assert 0 < min(half) < max(half) < 4 * G


def test_mistakes_are_for_learning_alone(network, batch, run):
    made = verified(context(network), reward=NOISY, sampling=SAMPLING)
    asked = {**batch, 'index': np.arange(4), 'mask': np.ones(4, bool)}
    with pytest.raises(UserError, match='a noisy reward is for methods to learn from'):
        jax.eval_shape(made.update, run.first, asked)
    with pytest.raises(UserError, match=r"false_negatives='rate' is no field of the data, which"):
        noisy(seeds.context(spec=SPEC), reward=REWARD, false_negatives='rate')
