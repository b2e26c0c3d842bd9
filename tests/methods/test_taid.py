"""TAID: the target, the schedule and the step against their definitions."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import special

from kd.claims import seeds
from kd.errors import UserError
from kd.losses import token
from kd.methods.lm import taid as taid_lib
from kd.methods.lm.distillation import distillation
from kd.methods.lm.taid import advance, first, taid
from kd.models.structured import BottleneckLM
from kd.network import from_linen
from kd.theory import kernel_regression

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, V, N, LR = 6, 48, 10, 0.5


@pytest.fixture(scope='module')
def network():
    return from_linen(BottleneckLM(width=4), jax.ShapeDtypeStruct((1, 2), jnp.int32))


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(0)
    return {
        'input': rng.integers(0, V, (B, 2)).astype(np.int32),
        'label': rng.integers(0, V, B).astype(np.int32),
        'teacher_logits': 2 * rng.normal(size=(B, V)).astype(np.float32),
    }


def context(network):
    return seeds.context(network=network, tx=optax.sgd(LR), num_classes=V, steps=N)


def stepped(method, batch, state=None):
    state = state or jax.jit(method.init)(jax.random.key(0))
    return state, *jax.jit(method.step)(state, batch)


def at(method, t, key=0):
    """A state whose schedule is at t."""
    state = jax.jit(method.init)(jax.random.key(key))
    return state.replace(extra={taid_lib.SCHEDULE: first(t)})


def test_a_step_follows_q_minus_p_t(network, batch):
    """The gradient of the student's logits is (q - p_t) / B, whose p_t is a constant."""
    method, t = taid(context(network)), 0.4
    before, after, metrics = stepped(method, batch, at(method, t))
    params = before.params['network']

    def logits(params):
        return network.apply({'params': params}, batch['input']).logits

    own = np.asarray(logits(params), np.float64)
    q = special.softmax(own, -1)
    p_t = special.softmax((1 - t) * own + t * batch['teacher_logits'], -1)
    (wanted,) = jax.vjp(logits, params)[1](jnp.asarray((q - p_t) / B, jnp.float32))
    moved = jax.tree.map(lambda x, y: (x - y) / LR, params, after.params['network'])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), moved, wanted)
    # J keeps the entropy of p_t.
    total, count = metrics['interpolated']
    assert float(total / count) == pytest.approx(-(p_t * np.log(q)).sum(-1).mean(), rel=1e-5)
    assert float(metrics['t'].total) == pytest.approx(t)


def test_at_1_it_is_forward_kl_and_at_0_nothing_moves(network, batch):
    method = taid(context(network))
    _, ends, _ = stepped(method, batch, at(method, 1.0))
    _, plain, _ = stepped(distillation(context(network)), batch)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), ends.params, plain.params
    )
    before, after, metrics = stepped(method, batch, at(method, 0.0))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), before.params, after.params
    )
    q = special.softmax(network.apply(before.variables(), batch['input']).logits, -1)
    total, count = metrics['interpolated']
    assert float(total / count) == pytest.approx(special.entr(q).sum(-1).mean(), rel=1e-5)


def test_for_small_t_the_gradient_is_t_times_a_covariance():
    rng = np.random.default_rng(1)
    own, teacher = rng.normal(size=(2, V)).astype(np.float32)
    q = special.softmax(own.astype(np.float64))
    gap = own.astype(np.float64) - teacher
    for t in (1e-2, 5e-3):
        p_t = jax.nn.softmax(token.interpolated_logits(own, teacher, t))
        wanted = t * q * (gap - (q * gap).sum())
        assert np.abs(q - p_t - wanted).max() < 2 * t**2
    # Constants on either side are nothing.
    shifted = token.interpolated_logits(own + 3, teacher - 5, 0.3)
    np.testing.assert_allclose(
        jax.nn.softmax(shifted),
        jax.nn.softmax(token.interpolated_logits(own, teacher, 0.3)),
        atol=1e-6,
    )


def walk(losses, steps, **options):
    schedule, path = first(options.get('t_start', 0.4)), []
    for n, loss in enumerate(losses, 1):
        schedule = advance(schedule, loss, n, steps, **options)
        path.append(schedule)
    return path


def test_the_schedule_is_as_released():
    losses = [3.0, 2.5, 2.6, 2.0, 1.9, 1.9, 1.2]
    options = dict(t_start=0.2, t_end=0.9, alpha=0.3, beta=0.7)
    found = walk(losses, 20, **options)
    t, before, momentum = 0.2, None, 0.0
    for n, (loss, schedule) in enumerate(zip(losses, found, strict=True), 1):
        if before is not None:
            momentum = 0.7 * momentum + 0.3 * (before - loss) / (before + 1e-15)
            line = 0.2 + 0.7 * n / 20
            t = min(0.9, max(line, t + 0.3 * special.expit(momentum) * (1 - t)))
        before = loss
        np.testing.assert_allclose(schedule, (t, loss, momentum), rtol=1e-5)


def test_t_never_falls_and_ends_at_its_end_and_without_adaptation_is_a_line():
    rng = np.random.default_rng(0)
    losses = rng.exponential(size=50)
    path = [float(s.t) for s in walk(losses, 50, alpha=0.02)]
    assert all(a <= b for a, b in itertools.pairwise(path))
    assert path[0] >= 0.4
    assert path[-1] == 1
    line = [float(s.t) for s in walk(losses, 50, alpha=0.0)]
    np.testing.assert_allclose(line[1:], 0.4 + 0.6 * np.arange(2, 51) / 50, rtol=1e-6)
    # A constant loss has no momentum: t grows by half of alpha (1 - t).
    one, two = walk([2.0, 2.0], 10_000, alpha=0.1)
    assert float(two.t - one.t) == pytest.approx(0.1 * 0.5 * 0.6, rel=1e-5)
    assert float(two.momentum) == 0


def test_the_schedule_of_a_run_goes_by_the_loss_of_the_whole_batch(network, batch):
    whole, parts = (taid(context(network), micro_batches=m, alpha=0.5) for m in (1, 3))
    _, one, _ = stepped(whole, batch, at(whole, 0.5))
    _, three, _ = stepped(parts, batch, at(parts, 0.5))
    np.testing.assert_allclose(
        one.extra[taid_lib.SCHEDULE], three.extra[taid_lib.SCHEDULE], rtol=1e-6
    )
    # The first step remembers its loss alone; from the second on t moves.
    assert float(one.extra[taid_lib.SCHEDULE].t) == 0.5
    _, two, metrics = stepped(whole, batch, one)
    assert float(two.extra[taid_lib.SCHEDULE].t) > 0.6
    assert float(metrics['t'].total) == 0.5


def test_interpolated_targets_do_not_collapse_where_self_distillation_does():
    """Rounds of ridge regression on (1 - t) f + t y against the limit a t / (1 - a (1 - t))."""
    d, lam = np.array([0.3, 1.0, 4.0]), 0.7
    a, filters = d / (d + lam), {}
    for t in (0.0, 0.2, 1.0):
        f = np.ones(3)
        for _ in range(500):
            f = a * ((1 - t) * f + t)
        filters[t] = f
        np.testing.assert_allclose(f, a * t / (1 - a * (1 - t)), atol=1e-6)
    assert filters[0.0].max() < 1e-6 < filters[0.2].min()
    np.testing.assert_allclose(filters[1.0], a)
    np.testing.assert_allclose(
        kernel_regression.spectral_filter_limit(d, lam, 0.2), filters[0.2], rtol=1e-5
    )


def test_a_start_after_the_end_is_told(network):
    with pytest.raises(UserError, match=r't_start=0.9 is above t_end=0.5'):
        taid(context(network), t_start=0.9, t_end=0.5)
