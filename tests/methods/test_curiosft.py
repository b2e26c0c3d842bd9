"""CurioSFT: the temperature, the distance to the delayed copy and the step by their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import optimize, special

from kd.claims import seeds
from kd.errors import UserError
from kd.losses import token
from kd.methods.lm.curiosft import COPY, curiosft, entropy_bonus, self_distillation
from kd.methods.lm.distillation import distillation
from kd.models.decoder import Decoder
from kd.models.structured import BottleneckLM
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, V, LR = 6, 48, 0.5


@pytest.fixture(scope='module')
def network():
    return from_linen(BottleneckLM(width=4), jax.ShapeDtypeStruct((1, 2), jnp.int32))


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return {
        'input': rng.integers(0, V, (B, 2)).astype(np.int32),
        'label': rng.integers(0, V, B).astype(np.int32),
    }


@pytest.fixture(scope='module')
def other(network):
    """Parameters whose laws are of all kinds, nearly certain ones among them."""
    params = jax.jit(network.init)(jax.random.key(7))['params']
    return jax.tree.map(lambda x: 7 * x if x.ndim > 1 else x, params)


def context(network, lr=LR):
    return seeds.context(network=network, tx=optax.sgd(lr), num_classes=V, steps=10)


def begun(method, copy=None):
    state = jax.jit(method.init)(jax.random.key(0))
    return state if copy is None else state.replace(ema={COPY: {'network': copy}})


def copy_of(state):
    return state.ema[COPY]['network']


def close(one, two, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **tolerance), one, two)


def follows(network, batch, before, after, cotangent):
    """Whether a step of gradient descent went against `cotangent` [B, V], of the logits."""

    def logits(params):
        return network.apply({'params': params}, batch['input']).logits

    (wanted,) = jax.vjp(logits, before)[1](jnp.asarray(cotangent, jnp.float32))
    close(jax.tree.map(lambda x, y: (x - y) / LR, before, after), wanted, atol=1e-5)


def laws(network, params, batch):
    """Logits in float64, and their log-softmax."""
    logits = np.asarray(network.apply({'params': params}, batch['input']).logits, np.float64)
    return logits, special.log_softmax(logits, -1)


# The step


@pytest.mark.parametrize('distance', ['k2', 'kl'])
def test_a_step_follows_its_equation_with_a_temperature_of_the_copy(
    network, batch, other, distance
):
    method, a = curiosft(context(network), distance=distance, weight=0.7), 0.7
    before = begun(method, other)
    after, metrics = jax.jit(method.step)(before, batch)
    rows = np.arange(B), batch['label']
    said, _ = laws(network, other, batch)
    tau = np.asarray(token.entropy_guided_temperature(said.astype(np.float32)), np.float64)
    assert np.ptp(tau) > 0.1
    params = before.params['network']
    own, log_q = laws(network, params, batch)
    assert np.abs(tau - token.entropy_guided_temperature(own.astype(np.float32))).max() > 0.1
    log_p = special.log_softmax(said / tau[:, None], -1)
    hard = np.exp(log_q)
    hard[rows] -= 1
    if distance == 'k2':
        gap = (log_q - log_p)[rows]
        soft, cotangent = gap**2 / 2, hard * (1 - a * gap)[:, None]
    else:
        soft = (np.exp(log_p) * (log_p - log_q)).sum(-1)
        cotangent = hard + a * (np.exp(log_q) - np.exp(log_p))
    follows(network, batch, params, after.params['network'], cotangent / B)
    found = {name: float(value.total / value.count) for name, value in metrics.items()}
    wanted = -log_q[rows] + a * soft
    assert found['loss'] == pytest.approx(wanted.mean(), rel=1e-5)
    assert found['hard_loss'] == pytest.approx(-log_q[rows].mean(), rel=1e-5)
    assert found['self_distillation'] == pytest.approx(soft.mean(), rel=1e-4)
    assert found['temperature'] == pytest.approx(tau.mean(), rel=1e-5)
    assert found['entropy'] == pytest.approx(special.entr(np.exp(log_q)).sum(-1).mean(), rel=1e-5)


def test_without_weight_or_at_temperature_one_it_is_fine_tuning(network, batch):
    """At 1 the copy, which begins as the student, says what the student says: k2 is 0."""
    plain = distillation(context(network), soft_weight=0.0)
    wanted, _ = jax.jit(plain.step)(begun(plain), batch)
    for options, least, most in (
        (dict(weight=0.0), 1e-4, np.inf),
        (dict(low=1.0, high=1.0), -1e-12, 1e-9),
    ):
        method = curiosft(context(network), **options)
        after, metrics = jax.jit(method.step)(begun(method), batch)
        close(after.params, wanted.params, atol=1e-6)
        assert least < float(metrics['self_distillation'].total) < most


def test_nothing_flows_to_the_copy_or_to_the_temperature():
    rng = np.random.default_rng(1)
    own, said = rng.normal(size=(2, 3, 5)).astype(np.float32)
    labels, tau = np.array([0, 4, 2]), np.array([1.1, 1.3, 1.5], np.float32)

    def both(z, copy, tau):
        return {d: self_distillation(z, copy, labels, tau, distance=d).sum() for d in ('k2', 'kl')}

    for slopes in jax.jit(jax.jacrev(both, (0, 1, 2)))(own, said, tau).values():
        assert np.abs(slopes[0]).min() > 0
        np.testing.assert_array_equal(slopes[1], 0)
        np.testing.assert_array_equal(slopes[2], 0)


def test_a_bonus_for_entropy_follows_its_gradient(network, batch, other):
    method = entropy_bonus(context(network), weight=0.3)
    before = begun(method).with_params(other)
    after, metrics = jax.jit(method.step)(before, batch)
    _, log_q = laws(network, other, batch)
    q, rows = np.exp(log_q), (np.arange(B), batch['label'])
    entropy = special.entr(q).sum(-1)
    cotangent = q + 0.3 * q * (log_q + entropy[:, None])
    cotangent[rows] -= 1
    follows(network, batch, other, after.params['network'], cotangent / B)
    wanted = (-log_q[rows] - 0.3 * entropy).mean()
    assert float(metrics['loss'].total / metrics['loss'].count) == pytest.approx(wanted, rel=1e-5)


# The copy


def test_the_copy_comes_near_the_student_by_its_share_after_every_so_many_steps(
    network, batch, other
):
    """copy_n = theta + (1 - mix)^n (copy_0 - theta) while theta rests."""
    method = curiosft(context(network, lr=0.0), mix=0.7, every=3)
    state, step = begun(method, other), jax.jit(method.step)
    theta = state.params['network']
    for taken in range(1, 8):
        state, _ = step(state, batch)
        left = (1 - 0.7) ** (taken // 3)
        wanted = jax.tree.map(lambda x, y, left=left: x + left * (y - x), theta, other)
        close(copy_of(state), wanted, atol=1e-5)


def test_without_delay_it_is_the_student(network, batch):
    method = curiosft(context(network), mix=1.0, every=1)
    state, step = begun(method), jax.jit(method.step)
    for _ in range(2):
        last, (state, metrics) = state, step(state, batch)
        close(copy_of(state), state.params['network'], rtol=0)
    # The second step has seen the student of the same step: r = log softmax(z / tau)_y.
    rows = np.arange(B), batch['label']
    own, log_q = laws(network, last.params['network'], batch)
    tau = np.asarray(token.entropy_guided_temperature(own.astype(np.float32)))
    gap = log_q[rows] - special.log_softmax(own / tau[:, None], -1)[rows]
    assert float(metrics['self_distillation'].total) == pytest.approx((gap**2).sum() / 2, rel=1e-4)


# Packed text, without logits


def test_packed_text_counts_its_answers_alone_whatever_the_micro_batches():
    fields, rng = ('input', 'positions', 'segments'), np.random.default_rng(2)
    module = Decoder(
        num_classes=20, width=16, depth=1, heads=2, mlp_hidden=12, max_length=8, fields=fields
    )
    decoder = from_linen(module, *[jax.ShapeDtypeStruct((1, 7), jnp.int32)] * 3)
    rows = {
        'input': rng.integers(0, 20, (4, 7)).astype(np.int32),
        'positions': np.tile([0, 1, 2, 3, 0, 1, 2], (4, 1)).astype(np.int32),
        'segments': np.tile([1, 1, 1, 1, 2, 2, 2], (4, 1)).astype(np.int32),
        'response_mask': rng.random((4, 7)) < [[0.9], [0.2], [0.6], [0.6]],
    }
    method = curiosft(context(decoder), micro_batches=4, chunk=5)
    before = begun(method)
    copy = jax.tree.map(lambda x: 12 * x if x.ndim > 1 else x, before.params['network'])
    before = before.replace(ema={COPY: {'network': copy}})
    _, metrics = jax.jit(method.step)(before, rows)
    apply = jax.jit(lambda p: decoder.apply({'params': p}, *decoder.of(rows)).logits[:, :-1])
    own, said = (np.asarray(apply(p), np.float64) for p in (before.params['network'], copy))
    tau = np.asarray(jax.jit(token.entropy_guided_temperature)(said.astype(np.float32)))
    counts = rows['response_mask'][:, 1:] & (rows['segments'][:, 1:] == rows['segments'][:, :-1])
    assert counts.sum(1).min() < counts.sum(1).max()
    log_q, log_p = (
        np.take_along_axis(special.log_softmax(x, -1), rows['input'][:, 1:, None], -1)[..., 0]
        for x in (own, said / tau[..., None])
    )
    losses = (-log_q + (log_q - log_p) ** 2 / 2)[counts]
    for name, wanted in (('loss', losses), ('temperature', tau[counts])):
        assert metrics[name].count == counts.sum()
        assert float(metrics[name].total) == pytest.approx(wanted.sum(), rel=1e-4)


# The temperature


def test_the_entropy_of_a_law_rises_with_the_temperature_and_its_ranking_stays():
    logits = np.random.default_rng(3).normal(size=(5, 12)).astype(np.float32) * 2
    grid = np.linspace(0.2, 8, 60, dtype=np.float32)[:, None, None]
    path = token.entropy(logits[None], temperature=grid)
    assert (np.diff(path, axis=0) > 0).all()
    tempered = logits / np.asarray(token.entropy_guided_temperature(logits))[:, None]
    np.testing.assert_array_equal(tempered.argsort(-1), logits.argsort(-1))


@pytest.mark.parametrize(('now', 'gain'), [(1.2, 0.25), (0.05, 0.0456), (2.2, 0.4404)])
def test_a_law_gains_more_entropy_the_more_it_has(now, gain):
    """0.5 sigma(2 (H - 1.2)): a quarter of a nat at the pivot."""
    assert gain == pytest.approx(0.5 * special.expit(2 * (now - 1.2)), abs=1e-4)
    z = np.random.default_rng(4).normal(size=40)

    def entropy(scale):
        return special.entr(special.softmax(scale * z)).sum()

    scale = optimize.brentq(lambda s: entropy(s) - now, 1e-3, 100)
    logits = (scale * z).astype(np.float32)
    tau = float(token.entropy_guided_temperature(logits, low=1.001, high=20.0))
    assert entropy(scale / tau) - now == pytest.approx(gain, abs=1e-3)


def test_the_entropy_of_the_largest_logits_is_nearly_that_of_all():
    rng = np.random.default_rng(5)
    logits = np.concatenate([4 * rng.normal(size=(8, 60)), rng.normal(size=(8, 300)) - 9], -1)
    top = np.sort(logits, -1)[:, -60:]
    mass = special.softmax(logits, -1)
    assert (np.sort(mass, -1)[:, -60:].sum(-1) > 0.999).all()
    renormalised = token.entropy(top.astype(np.float32))
    full = special.entr(mass).sum(-1)
    np.testing.assert_allclose(renormalised, full, atol=2e-2)


def test_a_range_that_is_none_is_told(network):
    with pytest.raises(UserError, match=r'stage\.method: low=1.6 is above high=1.5'):
        curiosft(context(network), low=1.6)
