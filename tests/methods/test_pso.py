"""Pairs of samples of few-step generators: log-densities, losses and steps against closed forms."""

import itertools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from kd.claims import seeds
from kd.errors import UserError
from kd.losses import diffusion_preference as pairs
from kd.losses import schedule
from kd.methods.diffusion import pso
from kd.models.denoiser import Denoised
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling.generator import of_network

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PATH, LEVELS, B = schedule.edm(0.02, 5.0), (5.0, 1.0, 0.4), 12
SPEC = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}


@pytest.fixture(scope='module')
def network():
    module = Denoised(VelocityMLP(width=8, depth=1), PATH, precondition='edm')
    return from_linen(module, *module.example_inputs(SPEC))


@pytest.fixture(scope='module')
def variables(network):
    return jax.tree.map(lambda x: x + 0.1, network.init(jax.random.key(7)))


def made(network, **more):
    context = dict(network=network, references={'start': network}, spec=SPEC, steps=4)
    return seeds.context(tx=optax.sgd(0.1), **context | more)


def test_log_densities_are_those_of_scipy_and_a_mean_does_not_grow_with_the_dimensions():
    rng = np.random.default_rng(0)
    x, mean = rng.standard_normal((2, 5, 3, 4)).astype(np.float32)
    wanted = scipy.stats.norm.logpdf(x, mean, 0.7)
    for reduce, value in (('sum', wanted.sum((1, 2))), ('mean', wanted.mean((1, 2)))):
        found = pairs.gaussian_logp(x, mean, jnp.float32(0.7), axes=2, reduce=reduce)
        np.testing.assert_allclose(found, value, rtol=1e-5)
    # The anchor's normaliser cancels: with one x and one deviation squares are left.
    other = mean + 0.3
    ratio = pairs.gaussian_logp(x, mean, 0.7, axes=2, reduce='mean') - pairs.gaussian_logp(
        x, other, 0.7, axes=2, reduce='mean'
    )
    np.testing.assert_allclose(
        ratio, (((x - other) ** 2 - (x - mean) ** 2) / (2 * 0.49)).mean((1, 2)), atol=1e-5
    )
    for size in (2, 2048):
        z = rng.standard_normal((400, size)).astype(np.float32)
        found = pairs.gaussian_logp(z, 0 * z, 1.0, axes=1, reduce='mean')
        assert float(found.mean()) == pytest.approx(-0.5 - 0.5 * np.log(2 * np.pi), abs=0.05)


def test_pairs_online_at_the_reference_swapped_tied_and_outside_of_the_clip():
    rng = np.random.default_rng(1)
    log_p, anchor = jnp.asarray(0.02 * rng.standard_normal((2, 7, 2)), jnp.float32)
    sign = jnp.asarray([1.0, -1, 1, -1, 1, -1, 0])
    same = pairs.clipped_pair(anchor, anchor, sign)
    np.testing.assert_allclose(same, np.log(2), atol=1e-6)
    found = pairs.clipped_pair(log_p, anchor, sign)
    ratio = np.asarray(log_p - anchor)
    by_hand = np.log1p(np.exp(-50 * np.asarray(sign) * (ratio[:, 0] - ratio[:, 1])))
    np.testing.assert_allclose(found, by_hand, rtol=1e-4)
    swapped = pairs.clipped_pair(log_p[:, ::-1], anchor[:, ::-1], -sign)
    np.testing.assert_allclose(swapped, found, atol=1e-6)
    against = pairs.clipped_pair(log_p, anchor, -sign)
    np.testing.assert_allclose(
        against - found, 50 * np.asarray(sign) * (ratio[:, 0] - ratio[:, 1]), atol=1e-4
    )
    # As far apart as the clip lets them be, either way.
    far = jnp.asarray([[2.0, -2.0]])
    for h, wanted in ((1.0, 4.39e-5), (-1.0, 10.0336)):
        value = pairs.clipped_pair(far, 0 * far, jnp.asarray([h]))
        np.testing.assert_allclose(value, [wanted], rtol=1e-3)
    slope = jax.grad(lambda x: pairs.clipped_pair(x, 0 * far, jnp.asarray([-1.0])).sum())(far)
    assert (np.asarray(slope) == 0).all()
    free = jax.grad(lambda x: pairs.clipped_pair(x, 0 * far, jnp.asarray([-1.0]), clip=None).sum())
    assert np.abs(free(far)).min() > 1
    of_anchor = jax.grad(lambda a: pairs.clipped_pair(log_p, a, sign).sum())(anchor)
    assert (np.asarray(of_anchor) == 0).all()


def test_pairs_offline_are_diffusion_dpo_with_kappa_one_and_a_hinge_without_a_reference():
    errors, anchor = jnp.asarray([[0.7, 0.4], [1.2, 2.0]]), jnp.asarray([[0.9, 0.5], [1.0, 1.0]])
    beta = 3.0

    def gap(kappa):
        both = np.asarray(errors), np.asarray(anchor)
        ours, theirs = (m[:, 0] - kappa * m[:, 1] for m in both)
        return ours, theirs

    for kappa in (0.1, 1.0):
        ours, theirs = gap(kappa)
        found = pairs.offline_pair(errors, anchor, beta, kappa)
        np.testing.assert_allclose(found, np.log1p(np.exp(beta * (ours - theirs))), rtol=1e-5)
        np.testing.assert_allclose(
            pairs.hinge_pair(errors, beta, kappa), np.maximum(0, 1 + beta * ours), rtol=1e-5
        )
    slope = jax.grad(lambda m: pairs.offline_pair(m, anchor, beta, 1.0).sum())(errors)
    ours, theirs = gap(1.0)
    wanted = beta / (1 + np.exp(-beta * (ours - theirs)))
    np.testing.assert_allclose(slope, np.stack([wanted, -wanted], 1), rtol=1e-5)
    np.testing.assert_allclose(pairs.offline_pair(anchor, anchor), np.log(2), rtol=1e-6)
    at = jax.grad(lambda m: pairs.offline_pair(m, anchor, beta, 1.0).sum())(anchor)
    np.testing.assert_allclose(at[:, 0], beta / 2, rtol=1e-6)


def test_a_preference_for_larger_samples_moves_a_mean_up():
    """One dimension, one step: the expected slope of 10^5 pairs is beta / 2 E[|gap|] / s^2 > 0."""
    s, beta = 0.8, 1.0
    z = s * jax.random.normal(jax.random.key(0), (100_000, 2))
    sign = jnp.sign(z[:, 0] - z[:, 1])

    def loss(mean):
        log_p = pairs.gaussian_logp(z[..., None], mean, s, axes=1, reduce='mean')
        anchor = pairs.gaussian_logp(z[..., None], 0.0, s, axes=1, reduce='mean')
        return pairs.clipped_pair(log_p, anchor, sign, beta, clip=None).mean()

    slope = float(jax.grad(loss)(0.0))
    assert slope == pytest.approx(-beta / 2 / s**2 * 2 * s / np.sqrt(np.pi), rel=0.02)


@pytest.mark.parametrize('step', ['restart', 'ancestral'])
def test_steps_are_draws_from_their_kernels_and_the_last_has_none(network, variables, step):
    student = of_network(network, LEVELS, step, where='here')
    states = jax.jit(lambda key: pso.trajectory(student, variables, {}, key, (4_000, 2)))(
        jax.random.key(1)
    )
    assert states.shape == (4, 4_000, 2)
    both = jnp.moveaxis(states[:-1], 0, 1)[:, None].repeat(2, 1)
    log_p = jax.jit(lambda s: pso.transitions(student, variables, s, {}, 'mean'))(both)
    assert log_p.shape == (4_000, 2, 2)
    for i, (t, to) in enumerate(itertools.pairwise(LEVELS)):
        said = network.apply(variables, jnp.full(4_000, t), states[i]).logits
        if step == 'restart':
            mean, std = said, to
        else:
            up = np.sqrt(to**2 * (t**2 - to**2) / t**2)
            down = np.sqrt(to**2 - up**2)
            mean, std = states[i] + (states[i] - said) / t * (down - t), up
        away = np.asarray(states[i + 1] - mean)
        # Noise of each row's own.
        np.testing.assert_allclose(away.std(0), std, rtol=0.05)
        wanted = scipy.stats.norm.logpdf(away, 0, std).mean(1)
        np.testing.assert_allclose(log_p[:, 0, i], wanted, rtol=2e-3, atol=2e-3)
    np.testing.assert_allclose(
        states[-1], network.apply(variables, jnp.full(4_000, LEVELS[-1]), states[-2]).logits,
        atol=1e-5,
    )  # fmt: skip


def larger(x, condition, frozen):
    return x[:, 0]


def test_the_first_step_online_is_log_two_and_leans_to_what_is_rewarded(network, variables):
    context = made(network)
    student = of_network(network, LEVELS, where='here')
    method = pso.online(context, student, larger, beta=5.0)
    state = jax.jit(method.init)(jax.random.key(0), {'start': variables})
    batch = {'input': jnp.zeros((256, 2))}
    step = jax.jit(method.step)
    state, metrics = step(state, batch)
    assert float(metrics['loss'].total / metrics['loss'].count) == pytest.approx(
        np.log(2), abs=1e-5
    )
    before = float(metrics['reward'].total / metrics['reward'].count)
    for _ in range(20):
        state, metrics = step(state, batch)
    assert float(metrics['reward'].total / metrics['reward'].count) > before + 0.02
    jax.tree.map(np.testing.assert_array_equal, state.frozen['start'], variables)
    for times, name in (((5.0,), 'restart'), (LEVELS, 'ddim')):
        with pytest.raises(UserError, match='learns from steps that draw noise'):
            pso.online(context, of_network(network, times, name, where='here'), larger)
    with pytest.raises(UserError, match=r'to be tuned is stage\.references\.start'):
        pso.online(made(network, references={}), student, larger)


def test_the_first_step_offline_against_the_same_by_hand(network, variables):
    """Its gradient is beta / 2 that of the error on targets less kappa that on samples."""
    student = of_network(network, LEVELS, where='here')
    method = pso.offline(made(network), student, beta=2.0, kappa=0.3, prior=0.1)
    state = jax.jit(method.init)(jax.random.key(0), {'start': variables})
    batch = {'input': jax.random.normal(jax.random.key(2), (B, 2))}

    found, metrics = jax.jit(method.step)(state, batch)
    assert float(metrics['loss'].total) / B == pytest.approx(
        np.log(2) + 0.1 * float(metrics['reference'].total) / B, rel=1e-4
    )

    keys = jax.random.split(jax.random.fold_in(state.step_key(), zlib.crc32(b'offline_pso')), 3)
    own = student.sample(variables, {}, keys[0], (B, 2))
    t = jax.random.choice(keys[1], jnp.asarray(LEVELS), (B,))
    assert np.isin(np.asarray(t), np.float32(LEVELS)).all()
    noise = jax.random.normal(keys[2], (B, 2))

    def loss(params):
        def error(x):
            mu = network.apply({'params': params}, t, x + t[:, None] * noise).logits
            return jnp.mean(jnp.mean((mu - x) ** 2, 1) / t**2)

        target, sample = error(batch['input']), error(own)
        return 1.0 * (target - 0.3 * sample) + 0.1 * sample

    gradient = jax.grad(loss)(variables['params'])
    wanted = jax.tree.map(lambda p, g: p - 0.1 * g, variables['params'], gradient)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=1e-4),
        found.params['network'], wanted,
    )  # fmt: skip
