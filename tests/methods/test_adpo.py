"""ADPO: steps, anchors and targets against NumPy and closed forms; the bandit's noise."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kd.claims import seeds
from kd.data import sources
from kd.data.builders import bandit
from kd.errors import UserError
from kd.losses import preference
from kd.methods.rl.adpo import adpo
from kd.models.structured import CandidateScorer
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, P, F, LR = 5, 4, 6, 0.5


@pytest.fixture(scope='module')
def network():
    shape = jax.ShapeDtypeStruct((1, P, F), jnp.float32)
    return from_linen(CandidateScorer(widths=()), shape)


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return {
        'input': rng.normal(size=(B, P, F)).astype(np.float32),
        'rewards': rng.normal(size=(B, P)).astype(np.float32),
    }


def prepared(network, **options):
    context = seeds.context(network=network, tx=optax.sgd(LR))
    references = {'anchor': network} if options.get('anchor') == 'fixed' else {}
    method = adpo(dataclasses.replace(context, references=references), **options)
    frozen = {name: jax.jit(network.init)(jax.random.key(9)) for name in references}
    return jax.jit(method.init)(jax.random.key(0), frozen), jax.jit(method.step), frozen


def kernel(params):
    return np.asarray(params['mlp']['head']['kernel'], np.float64)[:, 0]


def objective(w, anchor, batch, tau, beta):
    """Loss and gradient of a linear scorer, in float64; the gradient is (p~ - q) / tau times x."""
    x = batch['input'].astype(np.float64)
    q = scipy.special.softmax(batch['rewards'].astype(np.float64) / beta, -1)
    log_p = scipy.special.log_softmax((x @ w - anchor) / tau, -1)
    slope = np.einsum('bp,bpf->f', (np.exp(log_p) - q) / tau, x) / B
    return -(q * log_p).sum(-1).mean(), slope


@pytest.mark.parametrize(
    ('mode', 'options'),
    [
        ('uniform', {}),
        ('fixed', {}),
        ('self', {}),
        ('ema', {'decay': 0.8}),
        ('on_policy', {'refresh_every': 2}),
    ],
)
def test_three_steps_with_each_anchor_are_numpys(network, batch, mode, options):
    tau, beta = 0.7, 0.6
    state, step, frozen = prepared(
        network, anchor=mode, tau=tau, reward_temperature=beta, **options
    )
    w = kernel(state.params['network'])
    anchor = kernel(frozen['anchor']['params']) if mode == 'fixed' else w.copy()
    anchor = 0 * anchor if mode == 'uniform' else anchor
    for n in range(3):
        if mode == 'on_policy' and n % 2 == 0:
            anchor = w.copy()
        reference = batch['input'].astype(np.float64) @ anchor
        value, slope = objective(w, reference, batch, tau, beta)
        state, metrics = step(state, batch)
        np.testing.assert_allclose(metrics['loss'].total / B, value, rtol=1e-5)
        w = w - LR * slope
        if mode == 'ema':
            anchor = 0.8 * anchor + 0.2 * w
        np.testing.assert_allclose(kernel(state.params['network']), w, rtol=1e-5, atol=1e-6)
    if mode in ('self', 'ema', 'on_policy'):
        np.testing.assert_allclose(kernel(state.extra['anchor']), anchor, rtol=1e-5, atol=1e-6)
    else:
        assert not state.extra


def test_the_first_step_on_policy_pulls_from_uniform_to_the_target(network, batch):
    tau = 0.7
    state, step, _ = prepared(network, anchor='on_policy', tau=tau, reward_temperature=1.0)
    stepped, _ = step(state, batch)
    q = scipy.special.softmax(batch['rewards'].astype(np.float64), -1)
    slope = np.einsum('bp,bpf->f', (1 / P - q) / tau, batch['input'].astype(np.float64)) / B
    np.testing.assert_allclose(
        (kernel(state.params['network']) - kernel(stepped.params['network'])) / LR,
        slope,
        rtol=1e-4,
        atol=1e-6,
    )


def test_equal_rewards_leave_the_student_at_its_anchor(network, batch):
    state, step, _ = prepared(network, anchor='self')
    stepped, _ = step(state, batch | {'rewards': np.full((B, P), 3.0, np.float32)})
    np.testing.assert_allclose(
        kernel(stepped.params['network']), kernel(state.params['network']), atol=1e-6
    )


@pytest.mark.parametrize('soft', [False, True])
def test_all_pairs_are_the_mean_of_dpo_over_them(network, batch, soft):
    tau, beta = 2.0, 0.5
    target = 'soft_pairs' if soft else 'pairs'
    state, step, frozen = prepared(
        network, anchor='fixed', target=target, tau=tau, reward_temperature=beta
    )
    x, r = batch['input'].astype(np.float64), batch['rewards'].astype(np.float64)
    margin = x @ kernel(state.params['network']) - x @ kernel(frozen['anchor']['params'])
    losses = []
    for i in range(P):
        for j in range(i + 1, P):
            difference = (margin[:, i] - margin[:, j]) / tau
            ahead = r[:, i] - r[:, j]
            q = scipy.special.expit(ahead / beta) if soft else (ahead > 0).astype(float)
            losses.append(q * np.logaddexp(0, -difference) + (1 - q) * np.logaddexp(0, difference))
    state = state.replace(frozen=frozen)
    _, metrics = step(state, batch)
    np.testing.assert_allclose(metrics['loss'].total / B, np.mean(losses), rtol=1e-5)


def test_a_random_pair_is_dpo_of_two_distinct_candidates(network, batch):
    state, step, _ = prepared(network, anchor='self', target='pair', tau=1.0)
    many = {name: np.repeat(value[:1], 2000, 0) for name, value in batch.items()}
    # At the anchor every pair of distinct candidates costs log 2; a pair of equals would not move.
    stepped, metrics = step(state, many)
    np.testing.assert_allclose(metrics['loss'].total / 2000, np.log(2), rtol=1e-5)
    x, r = batch['input'][0].astype(np.float64), batch['rewards'][0]
    order = [(i, j) for i in range(P) for j in range(P) if r[i] > r[j]]
    slopes = np.array([-0.5 * (x[i] - x[j]) for i, j in order])
    error = slopes.std(0) / np.sqrt(2000)
    moved = (kernel(state.params['network']) - kernel(stepped.params['network'])) / LR
    assert (np.abs(moved - slopes.mean(0)) < 4.5 * error + 1e-6).all()


def test_many_steps_reach_the_closed_form_policy(network):
    # Candidates as unit vectors make the scores free: one context, one weight per candidate.
    rewards = np.array([[1.0, 0.3, -0.5, 0.0]], np.float32)
    batch = {'input': np.eye(P, F, dtype=np.float32)[None], 'rewards': rewards}
    state, _, _ = prepared(network, anchor='self', tau=0.5, reward_temperature=1.0)
    context = seeds.context(network=network, tx=optax.sgd(LR))
    method = adpo(context, anchor='self', tau=0.5, reward_temperature=1.0)
    run = jax.jit(lambda s: jax.lax.scan(lambda s, _: (method.step(s, batch)[0], 0), s,
                                         length=300)[0])  # fmt: skip
    anchor = network.apply(state.variables(), batch['input']).logits
    logits = network.apply(run(state).variables(), batch['input']).logits
    expected = preference.closed_form_policy(anchor, scipy.special.softmax(rewards, -1), 0.5)
    np.testing.assert_allclose(jax.nn.log_softmax(logits), expected, atol=1e-4)


def test_wrong_options_are_said(network):
    context = seeds.context(network=network, tx=optax.sgd(LR))
    for options, match in (
        ({'anchor': 'sft'}, 'anchor must be one of'),
        ({'target': 'triples'}, 'target must be one of'),
        ({'anchor': 'fixed'}, "references of 'anchor'"),
        ({'refresh_every': 0}, 'at least 1 step'),
    ):
        with pytest.raises(UserError, match=match):
            adpo(context, **options)


# The bandit


def test_utilities_are_bilinear_and_the_label_is_the_best():
    data = bandit.make('test', noise='cauchy', level=2.0)
    x, phi = data['input'][:, 0, :8], data['input'][..., 8:]
    np.testing.assert_array_equal(x, data['input'][:, 3, :8])
    utility = np.einsum('ni,ij,npj->np', x, bandit.utility_matrix(0), phi)
    # The test split is clean.
    np.testing.assert_allclose(data['rewards'], utility, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(data['label'], data['rewards'].argmax(-1))
    assert 0.8 < utility.std() / np.sqrt(8) < 1.2
    small = bandit.make('test', scale=0.25)
    np.testing.assert_allclose(small['rewards'], utility / 4, rtol=1e-4, atol=1e-4)


def test_noises_are_of_their_laws():
    rng = np.random.default_rng(0)
    zeros = np.zeros((100_000, 4))
    gaussian = bandit.corrupt(rng, zeros, 'gaussian', 2.0)
    # Variance level^2 (1 + 0.1 * 25); fourth moments make its standard error about 2 %.
    assert abs(gaussian.var() / (4 * 3.5) - 1) < 0.06
    cauchy = bandit.corrupt(rng, zeros, 'cauchy', 2.0)
    # Quartiles of a Cauchy of scale 1 are +-1.
    np.testing.assert_allclose(np.quantile(cauchy, [0.25, 0.75]), [-1, 1], atol=0.03)
    flipped = bandit.corrupt(rng, zeros + 1, 'flip', 1.0)
    assert set(np.unique(flipped.sum(-1))) == {-4.0, 4.0}
    assert abs((flipped[:, 0] < 0).mean() - 0.15) < 4 * np.sqrt(0.15 * 0.85 / 100_000)
    np.testing.assert_array_equal(bandit.corrupt(rng, zeros, 'none', 1.0), zeros)
    with pytest.raises(sources.DataError, match='noise must be one of'):
        bandit.make('train', noise='pink')
