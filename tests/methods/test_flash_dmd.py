"""Flash-DMD: matching and a discriminator by level, steps by hand, preferences of next states."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from kd.claims import seeds
from kd.errors import UserError
from kd.losses import preference_family
from kd.losses.diffusion_preference import best_worst, gaussian_logp
from kd.losses.schedule import Schedule, edm
from kd.methods.diffusion import common
from kd.methods.diffusion.dmd import dmd
from kd.methods.diffusion.flash_dmd import alternately, flash, flash_dmd
from kd.methods.diffusion.preferred_steps import brightness, preferred_steps, preferring
from kd.models.denoiser import Denoised
from kd.models.discriminator import FourierHead
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import times

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PATH, CLOCK = edm(0.02, 5.0), times.karras(0.02, 5.0)
SPEC = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}
B, LR, D_LR, LEVELS = 6, 0.2, 0.3, (5.0, 0.5)
HEADS = {'points': dict(name='kd.models.discriminator.FourierHead', width=5, frequencies=3)}
REWARD = dict(name='kd.methods.diffusion.preferred_steps.brightness')
KEY, BETA = jax.random.key(0), 0.3


@pytest.fixture(scope='module')
def network():
    module = Denoised(VelocityMLP(width=6, depth=2), PATH, precondition='edm')
    return from_linen(module, *module.example_inputs(SPEC))


@pytest.fixture(scope='module')
def frozen(network):
    teacher = jax.tree.map(lambda x: x + 0.1, jax.jit(network.init)(jax.random.key(1)))
    return {'teacher': teacher, 'start': jax.tree.map(lambda x: 0.8 * x, teacher)}


@pytest.fixture(scope='module')
def batch():
    return {'input': jax.random.normal(jax.random.key(3), (B, 2))}


def context(network):
    return seeds.context(
        network=network, teacher=network, references={'start': network}, spec=SPEC, steps=10,
        tx=optax.sgd(LR),
    )  # fmt: skip


def method(network, **options):
    given = dict(times=LEVELS, high=1, optimizer=dict(name='sgd', lr=D_LR), heads=HEADS)
    return flash_dmd(context(network), **given | options)


def close(one, other):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4), one, other)


def test_with_all_times_high_and_no_coupling_it_is_dmd(network, frozen, batch):
    options = dict(times=(5.0,), updates=2, optimizer=dict(name='sgd', lr=D_LR))
    own = method(network, high=1, heads=None, coupling=1.0, **options)
    other = dmd(context(network), **options)
    one, two = (
        jax.jit(made.step)(
            jax.jit(made.init)(KEY, frozen).replace(step=jnp.int32(3)), batch
        )[0].params
        for made in (own, other)
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, one, two)


def test_a_step_against_one_by_hand(network, frozen, batch):
    """Rows 0, 2, 4 follow the direction at 5, rows 1, 3, 5 the discriminator at .5."""
    made = method(network, gan=0.7, coupling=0.9)
    state = jax.jit(made.init)(KEY, frozen)
    fake = jax.tree.map(lambda x: 1.2 * x, frozen['teacher']['params'])
    state = state.replace(params={**state.params, 'fake': fake})
    moved, metrics = jax.jit(made.step)(state, batch)

    def mu(params, x, t):
        return network.apply({'params': params}, jnp.full(len(x), 1.0) * t, x).logits

    head, heads = FourierHead(width=5, frequencies=3), state.params['discriminator']['points']
    keys = jax.random.split(jax.random.fold_in(state.step_key(), 0), 4)
    noise_key, _, key, _ = jax.random.split(keys[0], 4)
    z = 5.0 * jax.random.normal(noise_key, (B, 2))
    fresh = jax.random.normal(jax.random.fold_in(key, 0), (B, 2))
    old = state.params['generator']
    # No gradient through the first step of the later rows.
    later = (jax.jit(mu)(old, z, 5.0) + 0.5 * fresh)[1::2]
    time_key, noise_key = jax.random.split(keys[1])
    t = CLOCK.at(jax.random.uniform(time_key, (3,), minval=0.02, maxval=0.98))
    eps = jax.random.normal(noise_key, (3, 2))

    def loss(params):
        x, late = mu(params, z[::2], 5.0), mu(params, later, 0.5)
        x_t = jax.lax.stop_gradient(x) + t[:, None] * eps
        real, said = mu(frozen['teacher']['params'], x_t, t), mu(fake, x_t, t)
        g = (said - real) / jnp.abs(x - real).mean(1, keepdims=True)
        matched = jnp.mean(jnp.sum(jax.lax.stop_gradient(g) * x, 1)) / 2
        logits = head.apply({'params': heads}, late)
        return matched + 0.7 * jnp.mean(jnp.log1p(jnp.exp(-logits))), late

    grads, late = jax.jit(jax.grad(loss, has_aux=True))(old)
    generator = jax.tree.map(lambda p, g: p - LR * g, old, grads)
    close(moved.params['generator'], generator)

    def telling(params):
        real, said = (head.apply({'params': params}, x) for x in (batch['input'][1::2], late))
        return jnp.mean(jnp.log1p(jnp.exp(-real)) + jnp.log1p(jnp.exp(said)))

    told = jax.jit(jax.grad(telling))(heads)
    close(
        moved.params['discriminator']['points'],
        jax.tree.map(lambda p, g: p - D_LR * g, heads, told),
    )
    # The critic has gone a tenth of the way before its own move.
    apart = jax.tree.map(lambda x, y: np.sum(np.square(np.asarray(x - y))), fake, generator)
    found = float(metrics['coupling/loss'].total)
    np.testing.assert_allclose(found, 0.5 * sum(jax.tree.leaves(apart)), rtol=1e-4)


@pytest.mark.parametrize(('high', 'count'), [(3, 4), (0, 2), (1, 2)])
def test_every_other_example_is_of_matching(high, count):
    exits = np.asarray(alternately(high, count)(KEY, 400))
    early, late = exits[::2], exits[1::2]
    assert set(late) == set(range(high, count))
    assert set(early) == set(range(high) if high else range(count))


def test_pairs_of_candidates():
    drawn = jax.random.normal(KEY, (4, 5, 3))
    scores = np.asarray(drawn.sum(-1))
    pair = np.asarray(best_worst(drawn, scores))
    for row in range(5):
        np.testing.assert_array_equal(pair[row, 0], drawn[scores[:, row].argmax(), row])
        np.testing.assert_array_equal(pair[row, 1], drawn[scores[:, row].argmin(), row])
    two = np.asarray(best_worst(drawn[:2], scores[:2]))
    np.testing.assert_array_equal(np.sort(two, 1), np.sort(np.moveaxis(drawn[:2], 0, 1), 1))
    # Of no preference: two that differ, whose difference is none in the mean.
    many = np.asarray(best_worst(jax.random.normal(KEY, (4, 4_000, 3)), jnp.ones((4, 4_000))))
    apart = many[:, 0] - many[:, 1]
    assert (np.abs(apart).sum(-1) > 0).all()
    assert (np.abs(apart.mean(0)) < 3 * apart.std(0) / np.sqrt(4_000)).all()


def test_the_preference_at_the_reference_and_its_gradient():
    """log 2; -(beta / 2) (z^w - z^l) / s^2; ratios as those of SciPy; swapped, the log-odds."""
    rng = np.random.default_rng(0)
    pair, m, other = (
        rng.normal(size=shape).astype(np.float32) for shape in ((7, 2, 3), (7, 3), (7, 3))
    )
    s = rng.uniform(0.5, 2.0, size=(7, 1)).astype(np.float32)

    wanted = (
        scipy.stats.norm.logpdf(pair, m[:, None], s[:, None])
        - scipy.stats.norm.logpdf(pair, other[:, None], s[:, None])
    ).sum(-1)

    @jax.jit
    def found(m):
        def log_p(mean, pair=pair):
            wide = jnp.broadcast_to(jnp.asarray(s), (7, 3))[:, None]
            return gaussian_logp(pair, mean[:, None], wide, axes=1, reduce='sum')

        def loss(m, other, pair=pair):
            return preference_family.dpo(log_p(m, pair), log_p(other, pair), BETA)

        at_reference = jax.value_and_grad(lambda x: loss(x, m).sum())(m)
        swapped = loss(m, other, pair[:, ::-1]) - loss(m, other)
        return log_p(m) - log_p(other), at_reference, swapped

    ratio, (value, grad), swapped = found(m)
    np.testing.assert_allclose(ratio, wanted, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(value / 7, math.log(2), rtol=1e-6)
    np.testing.assert_allclose(
        grad, -0.5 * BETA * (pair[:, 0] - pair[:, 1]) / s**2, rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(swapped, BETA * (wanted[:, 0] - wanted[:, 1]), rtol=1e-4)


def test_a_move_by_preferences_against_one_by_hand(network, frozen, batch):
    made = preferred_steps(
        context(network), times=LEVELS, reward=REWARD, reward_updates=2, candidates=3, beta=0.4
    )
    state = jax.jit(made.init)(KEY, {'start': frozen['start']})
    jax.tree.map(
        np.testing.assert_array_equal, state.params['generator'], frozen['start']['params']
    )
    moved, metrics = jax.jit(made.step)(state, batch)
    player = jax.random.fold_in(state.step_key(), 0)
    theta = before = state.params['generator']

    def mu(params, z):
        return network.apply({'params': params}, jnp.full(B, 5.0), z).logits

    totals, scored = [], []
    for move in range(2):
        _, key, noise_key = jax.random.split(jax.random.fold_in(player, move), 3)
        z = 5.0 * jax.random.normal(jax.random.split(key, 4)[0], (B, 2))
        drawn = mu(theta, z) + 0.5 * jax.random.normal(noise_key, (3, B, 2))
        scores = np.asarray(drawn.mean(-1))
        scored.append(scores.mean())
        best, worst = (drawn[index, np.arange(B)] for index in (scores.argmax(0), scores.argmin(0)))

        def loss(params, best=best, worst=worst, z=z):
            own, ref = mu(params, z), mu(before, z)

            def log_ratio(x):
                return -((x - own) ** 2 - (x - ref) ** 2).sum(1) / (2 * 0.25)

            return jnp.mean(jnp.log1p(jnp.exp(-0.4 * (log_ratio(best) - log_ratio(worst)))))

        value, grads = jax.jit(jax.value_and_grad(loss))(theta)
        totals.append(float(value))
        theta = jax.tree.map(lambda p, g: p - LR * g, theta, grads)
    close(moved.params['generator'], theta)
    assert totals[0] == pytest.approx(math.log(2), rel=1e-6)
    for name, values in (('loss', totals), ('reward', scored)):
        found = metrics[f'generator/{name}']
        np.testing.assert_allclose(found.total / found.count, np.mean(values), rtol=1e-4)


class Mean(nn.Module):
    """A generator that says its one parameter, whatever it is asked."""

    schedule: Schedule = PATH

    @nn.compact
    def __call__(self, t, x, train=False):
        return x * 0 + self.param('mean', nn.initializers.zeros_init(), ())


def test_a_reward_alone_drifts_and_beside_a_pull_it_stays():
    """A linear reward; the pull is that of KL(N(m, 1) || N(0, 1)), which is m."""
    line = {'input': jax.ShapeDtypeStruct((1,), jnp.float32)}
    module = Mean()
    own = from_linen(module, *(jax.ShapeDtypeStruct(x, jnp.float32) for x in ((1,), (1, 1))))
    given = seeds.context(
        network=own, teacher=own, references={'start': own}, spec=line, steps=300,
        optimizer=dict(name='sgd', lr=0.05),
    )  # fmt: skip
    student = common.student(given, LEVELS)
    data, begun = {'input': jnp.zeros((64, 1))}, own.init(KEY)

    def along(pull):
        """The mean after 100, 200 and 300 steps."""
        state = init(KEY, {'start': begun, 'teacher': begun, 'pull': jnp.float32(pull)})
        found = []
        for number in range(300):
            state, _ = step(state, data)
            if number % 100 == 99:
                found.append(float(state.params['generator']['mean']))
        return found

    player = preferring(given, student, brightness(given), updates=5, beta=0.1, others=1)
    critic = common.critic(
        given, dict(name='sgd', lr=0.01), times.uniform(CLOCK), updates=1, weight='eps'
    )
    made = flash(
        given, student, 2, common.teacher(given), critic,
        lambda views, key: (views.state.frozen['pull'] * views.x, {}), rewarded=player,
    )  # fmt: skip
    init, step = jax.jit(made.init), jax.jit(made.step)
    drift, stays = along(0.0), along(1.0)
    assert drift[1] > drift[0] + 0.5
    assert drift[2] > drift[1] + 0.5
    assert abs(stays[2] - stays[1]) < 0.3
    assert 0.02 < stays[2] < 0.5 * drift[0]


def test_what_cannot_be(network):
    with pytest.raises(UserError, match=r'method: 3 of 2 times are of matching'):
        method(network, high=3)
    with pytest.raises(UserError, match=r'1 of 2 times .* of a discriminator, which has heads'):
        method(network, heads=None)
    with pytest.raises(UserError, match=r'steps from the first 2 of 2 times must draw noise'):
        method(network, reward=REWARD, reward_times=2)
    bare = seeds.context(network=network, spec=SPEC, steps=1, tx=optax.sgd(LR))
    with pytest.raises(UserError, match=r'rewards are for \w+\.references\.start'):
        preferred_steps(bare, times=LEVELS, reward=REWARD)
