"""SlimFlow: noises annealed into pairs, and two steps of a flow as a target of one."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd import config as kd_config
from kd.claims import seeds
from kd.errors import UserError
from kd.losses.rectified import two_step_target, vp_mix
from kd.methods.flow.slimflow import (
    annealed,
    annealing_reflow,
    flipped,
    flow_guided_distillation,
)
from kd.models.conditioning import velocity_inputs
from kd.models.edm import SongUNet
from kd.models.one_time import OneTime
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen, parameter_count
from kd.sampling.velocity import velocity_function

pytestmark = pytest.mark.usefixtures('compiled_quickly')

POINT, B = jax.ShapeDtypeStruct((2,), jnp.float32), 32
SPEC = {'input': POINT, 'noise': POINT, 'sample': POINT}
NET = from_linen(VelocityMLP(width=8, depth=1, data_scale=0.5), *velocity_inputs(SPEC))


def context_of(**more):
    return seeds.context(**dict(network=NET, teacher=NET, tx=optax.sgd(1.0), spec=SPEC) | more)


def noisy(seed):
    params = jax.jit(NET.init)(jax.random.key(0))['params']
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape), params
    )


def test_mixed_noise_is_a_unit_gaussian_for_every_share():
    keys = jax.random.split(jax.random.key(0))
    z, fresh = (jax.random.normal(key, (100_000, 1)) for key in keys)
    for b in (0.0, 0.3, 0.8, 1.0):
        mixed = np.asarray(vp_mix(z, fresh, b))
        assert mixed.var() == pytest.approx(1.0, rel=0.01)
        # How much of the pair is left.
        kept = np.corrcoef(mixed[:, 0], z[:, 0])[0, 1]
        assert kept == pytest.approx(np.sqrt(1 - b * b), abs=0.01)
    np.testing.assert_array_equal(vp_mix(z, fresh, 0.0), z)
    np.testing.assert_array_equal(vp_mix(z, fresh, 1.0), fresh)


def test_the_share_falls_from_one_to_nothing_and_stays_there():
    steps = jnp.arange(0, 15)
    for schedule in ('linear', 'cosine'):
        b = np.asarray(annealed(steps, 10, schedule))
        assert (b[0], b[10], b[14]) == pytest.approx((1.0, 0.0, 0.0), abs=1e-6)
        assert (np.diff(b[:11]) < 0).all()
        assert b[5] == pytest.approx(0.5, abs=1e-6)
    assert annealed(steps, 10, 'none') == 0.0


def test_both_members_of_a_pair_are_turned_or_neither():
    z = jax.random.normal(jax.random.key(0), (200, 2, 3, 1))
    a, b = flipped(jax.random.key(1), z, 2 * z)
    np.testing.assert_array_equal(2 * a, b)
    turned = np.asarray(jnp.all(a == z[:, :, ::-1], axis=(1, 2, 3)))
    assert 70 < turned.sum() < 130
    np.testing.assert_array_equal(a[~turned], z[~turned])


def test_two_steps_of_a_straight_flow_are_one_and_their_limits():
    x0 = jax.random.normal(jax.random.key(0), (B, 2))
    t = jnp.linspace(0.05, 0.95, B)
    c = jnp.array([0.3, -1.0])
    straight = lambda s, t, x: jnp.broadcast_to(c, x.shape)  # noqa: E731
    target = two_step_target(jnp.broadcast_to(c, x0.shape), straight, x0, t)
    np.testing.assert_allclose(target, x0 + c, atol=1e-6)
    teacher = velocity_function(NET, {'params': noisy(1)})
    a = jnp.ones((B, 2))
    one, zero = jnp.ones(B), jnp.zeros(B)
    np.testing.assert_allclose(two_step_target(a, teacher, x0, one), x0 + a, atol=1e-6)
    first = x0 + teacher(zero, zero, x0)
    np.testing.assert_allclose(two_step_target(a, teacher, x0, zero), first, atol=1e-6)
    # Nothing of it has a gradient.
    slope = jax.grad(lambda a: two_step_target(a, teacher, x0, t).sum())(a)
    np.testing.assert_array_equal(slope, 0.0)


def batch_of():
    rng = np.random.default_rng(0)
    z, x = (jnp.asarray(rng.standard_normal((B, 2)), jnp.float32) for _ in range(2))
    return {'input': jnp.zeros((B, 2)), 'noise': z, 'sample': x}


def test_reflow_begins_with_fresh_noise_and_ends_with_the_pairs():
    """Sizes of the loss of a network that says nothing: |x - z_b|^2."""
    batch = batch_of()
    method = annealing_reflow(context_of(), anneal=4)
    step = jax.jit(method.step)
    state = jax.jit(method.init)(jax.random.key(0), {})
    plain = float(jnp.mean(jnp.sum((batch['sample'] - batch['noise']) ** 2, 1)))
    at = {}
    for number in (0, 2, 4, 9):
        _, metrics = step(state.replace(step=jnp.int32(number)), batch)
        at[number] = float(metrics['loss'].total / metrics['loss'].count)
    assert at[4] == pytest.approx(plain, rel=1e-6)
    assert at[9] == pytest.approx(plain, rel=1e-6)
    assert abs(at[0] - plain) > 1e-2
    assert abs(at[2] - plain) > 1e-3
    # Noise has the deviation that the network says its data have.
    fresh = float(jnp.mean(jnp.sum(batch['sample'] ** 2, 1))) + 2 * 0.5**2
    assert at[0] == pytest.approx(fresh, rel=0.4)


def test_a_step_of_distillation_by_hand():
    """Trap: the student's own first step in the target is a constant."""
    context = context_of(references={'start': NET})
    method = flow_guided_distillation(context, two_step=0.5)
    params, teacher = noisy(1), noisy(2)
    frozen = {name: {'params': teacher} for name in ('teacher', 'start')}
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    jax.tree.map(np.testing.assert_array_equal, state.params['network'], teacher)
    state, batch = state.replace(params={'network': params}), batch_of()
    after, metrics = jax.jit(method.step)(state, batch)
    fresh_key, time_key = jax.random.split(state.step_key())
    fresh = 0.5 * jax.random.normal(fresh_key, (B, 2))
    t = jax.random.uniform(time_key, (B,), minval=0.2, maxval=0.8)
    zero = jnp.zeros(B)

    def said(params, x):
        return velocity_function(NET, {'params': params})(zero, zero, x)

    middle = fresh + t[:, None] * said(params, fresh)
    last = velocity_function(NET, {'params': teacher})(t, t, middle)
    target = middle + (1 - t)[:, None] * last

    def loss(params):
        pairs = jnp.mean((batch['noise'] + said(params, batch['noise']) - batch['sample']) ** 2)
        return pairs + 0.5 * jnp.mean((fresh + said(params, fresh) - target) ** 2)

    value, slope = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(metrics['loss'].total / metrics['loss'].count, value, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: a - b, params, after.params['network'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, slope)


def test_data_without_pairs_are_refused():
    with pytest.raises(UserError, match=r'wants pairs of a noise .*kd\.data\.sampled\.pairs'):
        annealing_reflow(context_of(spec={'input': POINT}))
    with pytest.raises(UserError, match='wants pairs of a noise'):
        flow_guided_distillation(context_of(spec={'input': POINT}))


# The networks


@pytest.mark.parametrize(('size', 'count'), [('15.7M', 15_707_235), ('3.4M', 3_437_123)])
def test_students_have_the_papers_number_of_parameters(size, count):
    config = kd_config.load(f'configs/flow/slimflow.py:cifar10,{size}')
    module = kd_config.build(config.one.network.to_dict(), where='network')
    image = {'input': jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)}
    net = from_linen(module, *module.example_inputs(image))
    variables = jax.eval_shape(net.init, jax.random.key(0))
    assert parameter_count(variables) == count


def test_a_network_of_one_time_is_told_it_in_its_own_units():
    inner = SongUNet(channels=8, multipliers=(1,), blocks=1, attention=(), num_classes=3)
    image = {'input': jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)}
    net = from_linen(OneTime(inner, 999.0), *velocity_inputs(image))
    variables = jax.jit(net.init)(jax.random.key(0))
    variables = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), variables
    )
    x, s = jax.random.normal(jax.random.key(2), (2, 4, 4, 1)), jnp.array([0.1, 0.7])
    label = jnp.array([0, 2])
    found = jax.jit(velocity_function(net, variables, label))(s, s + 0.2, x)
    apply = jax.jit(lambda t: inner.apply(variables, t, x, label=label))
    np.testing.assert_allclose(found, apply(999.0 * s), atol=1e-5)
    assert np.abs(found - apply(s)).max() > 1e-3
