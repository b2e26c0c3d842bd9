"""Hyper-SD: consistency within phases of time, and the averages that it aims at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.stats

from kd.claims import flow_world, seeds
from kd.errors import UserError
from kd.losses.flow_map import flow_map
from kd.losses.flow_map_family import consistency_trajectory_residual
from kd.method import with_ema
from kd.methods.flow.hyper_sd import tscd
from kd.models import denoiser as denoiser_lib
from kd.network import from_linen
from kd.sampling import times
from kd.sampling.velocity import velocity_function

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.mark.parametrize('phases', [1, 2, 4, 8])
def test_times_lie_in_one_phase_in_order_and_ends_are_uniform(phases):
    start, middle, end = (
        np.asarray(x) for x in times.phase_times(jax.random.key(0), 40_000, phases=phases, grid=16)
    )
    length = 16 // phases
    assert (middle == start + 1).all()
    assert (start < middle).all()
    assert (middle <= end).all()
    assert (start // length == (end - 1) // length).all()
    counts = np.bincount(start, minlength=16)
    assert scipy.stats.chisquare(counts).pvalue > 1e-3
    # A start at an edge is of the phase behind it.
    at_edge = end[start == 0]
    assert set(at_edge) == set(range(1, length + 1))
    assert length == 1 or scipy.stats.chisquare(np.bincount(at_edge)[1:]).pvalue > 1e-3


def test_phases_that_do_not_divide_the_grid_are_refused():
    with pytest.raises(ValueError, match='3 phases do not divide a grid of 16 steps'):
        times.phase_times(jax.random.key(0), 4, phases=3, grid=16)


@pytest.fixture(name='world', scope='module')
def _world():
    return flow_world.World(np.arange(1), **flow_world.SMALL)


def context_of(world, **more):
    return seeds.context(
        network=world.network(), teacher=world.teacher, tx=optax.sgd(1.0), spec=flow_world.SPEC,
        **more,
    )  # fmt: skip


def noisy(world, seed):
    params = jax.jit(world.network().init)(jax.random.key(0))['params']
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape), params
    )


def test_a_step_aims_at_the_average_before_it(world):
    """Traps: neither parameters nor the average after the step; exactly no gradient into it."""
    context = context_of(world, ema={'slow': 0.5})
    method = with_ema(tscd(context, phases=2, grid=8, target='slow'), {'slow': 0.5})
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': {}})
    params, average = noisy(world, 1), noisy(world, 2)
    state = state.replace(params={'network': params}, ema={'slow': {'network': average}})
    batch = {'input': jnp.asarray(world.data['input'][:64])}
    after, metrics = jax.jit(method.step)(state, batch)

    times_key, noise_key = jax.random.split(state.step_key())
    first, middle, end = times.phase_times(times_key, 64, phases=2, grid=8)
    s, u, e = (np.asarray(i) / 8 for i in (first, middle, end))
    noise = 0.5 * jax.random.normal(noise_key, (64, 2))
    x_s = (1 - s)[:, None] * noise + s[:, None] * batch['input']
    teacher = velocity_function(world.teacher, {})
    x_u = x_s + (u - s)[:, None] * teacher(s, s, x_s)
    own = velocity_function(world.network(), {'params': average})
    target = x_u + (e - u)[:, None] * own(jnp.asarray(u), jnp.asarray(u), x_u)
    # An end at the next time is regression of the teacher's step.
    np.testing.assert_array_equal(target[e == u], x_u[e == u])
    assert (e == u).sum() > 3

    def loss(params):
        v = velocity_function(world.network(), {'params': params})
        at = jnp.asarray(s)
        return jnp.mean((x_s + (e - s)[:, None] * v(at, at, x_s) - target) ** 2)

    value, slope = jax.jit(jax.value_and_grad(loss))(params)
    np.testing.assert_allclose(metrics['loss'].total / metrics['loss'].count, value, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: a - b, params, after.params['network'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, slope)
    # The average is taken after the step.
    kept = jax.tree.map(lambda a, b: 0.5 * (a + b), average, after.params['network'])
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.ema['slow']['network'], kept
    )


def test_the_exact_mean_velocity_errs_by_the_square_of_the_teachers_step():
    """With the end fixed; half the step is a quarter of the error."""
    with jax.enable_x64(True):
        d, scale = 0.4, 0.5
        s = jnp.linspace(0.0, 0.5, 32)
        x = jnp.asarray(np.random.default_rng(0).standard_normal((32, 1)))

        def spread(s):
            return jnp.sqrt((s * d) ** 2 + ((1 - s) * scale) ** 2)[:, None]

        def mean(s, t, x):
            return (d / spread(s) - 1) * x / (1 - s)[:, None]

        def field(s, t, x):
            s = s[:, None]
            return (s * d**2 - (1 - s) * scale**2) / ((s * d) ** 2 + ((1 - s) * scale) ** 2) * x

        def error(h):
            x_u = flow_map(lambda s, t, x: field(s, s, x), s, s + h, x)
            one = jnp.ones_like(s)
            return jnp.abs(consistency_trajectory_residual(mean, s, s + h, one, x, x_u)).max()

        assert error(1 / 64) / error(1 / 128) == pytest.approx(4.0, rel=0.1)


def test_a_stage_begins_with_the_network_of_the_one_before(world):
    made = tscd(context_of(world, references={'start': world.network()}), phases=4, grid=8)
    before = {'params': noisy(world, 3)}
    state = jax.jit(made.init)(jax.random.key(0), {'teacher': {}, 'start': before})
    jax.tree.map(np.testing.assert_array_equal, state.params['network'], before['params'])


def test_with_the_last_end_it_is_consistency_distillation_to_the_end_of_the_phase(world):
    method = tscd(context_of(world), phases=2, grid=8, ends='last')
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': {}})
    # The network says nothing yet, so that the error is that of the teacher's own step.
    batch = {'input': jnp.asarray(world.data['input'][:64])}
    _, metrics = jax.jit(method.step)(state, batch)
    times_key, noise_key = jax.random.split(state.step_key())
    s = np.asarray(times.phase_times(times_key, 64, phases=2, grid=8)[0]) / 8
    noise = 0.5 * jax.random.normal(noise_key, (64, 2))
    x_s = (1 - s)[:, None] * noise + s[:, None] * batch['input']
    step = velocity_function(world.teacher, {})(s, s, x_s) / 8
    np.testing.assert_allclose(
        metrics['loss'].total / metrics['loss'].count, jnp.mean(step**2), rtol=1e-4
    )


def denoising(of, *, kind='scaled_linear', **settings):
    """Perceptrons that say eps, at the times of Stable Diffusion."""
    block = dict(
        network=dict(name='kd.models.velocity_mlp.VelocityMLP', width=8, depth=1, beside=('text',)),
        schedule=dict(name='kd.losses.schedule.discrete', kind=kind, **settings),
        kind='eps',
    )
    module = denoiser_lib.denoiser(**block)
    spec = dict.fromkeys(('input', 'text'), jax.ShapeDtypeStruct((2,), jnp.float32))
    network = from_linen(module, *module.example_inputs(spec))
    variables = jax.jit(network.init)(jax.random.key(of))
    draw = lambda x: 0.3 * jax.random.normal(jax.random.key(of + 1), x.shape)  # noqa: E731
    return network, jax.tree.map(draw, variables)


def test_of_denoisers_a_step_is_ddims_from_any_time_to_any():
    """By NumPy: x' = alpha' x0 + sigma' eps, of a guided teacher, then of both students."""
    network, params = denoising(0)
    _, average = denoising(2)
    _, teacher = denoising(4)
    context = seeds.context(
        network=network, teacher=network, tx=optax.sgd(1.0), ema={'slow': 0.5},
        spec={'input': jax.ShapeDtypeStruct((2,), jnp.float32)},
    )  # fmt: skip
    made = tscd(context, phases=4, grid=16, target='slow', guidance=3.0)
    method = with_ema(made, {'slow': 0.5})
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': teacher})
    state = state.replace(
        params={'network': params['params']}, ema={'slow': {'network': average['params']}}
    )
    rng = np.random.default_rng(0)
    fields = ('input', 'text', 'null_text')
    batch = {name: rng.normal(size=(64, 2)).astype('f4') for name in fields}
    _, metrics = jax.jit(method.step)(state, batch)

    times_key, noise_key = jax.random.split(state.step_key())
    indices = times.phase_times(times_key, 64, phases=4, grid=16)
    first, middle, end = (np.round(999 * (1 - np.asarray(i) / 16)).astype(int) for i in indices)
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    alpha, sigma = np.sqrt(np.cumprod(1 - betas)), np.sqrt(1 - np.cumprod(1 - betas))

    def eps(variables, x, t, text):
        inner = network.module.inner
        told = {'text': text}
        return np.asarray(inner.apply(variables, jnp.float32(t), jnp.float32(t), x, **told))

    def jump(x, said, t, to):
        a, s, a2, s2 = (table[i][:, None] for i in (t, to) for table in (alpha, sigma))
        return a2 * (x - s * said) / a + s2 * said

    noise = np.asarray(jax.random.normal(noise_key, (64, 2)))
    x = (alpha[first][:, None] * batch['input'] + sigma[first][:, None] * noise).astype('f4')
    told, none = (eps(teacher, x, first, batch[name]) for name in ('text', 'null_text'))
    ahead = jump(x, none + 3.0 * (told - none), first, middle).astype('f4')
    said = jump(x, eps(params, x, first, batch['text']), first, end)
    wanted = jump(ahead, eps(average, ahead, middle, batch['text']), middle, end)
    loss = np.mean((said - wanted) ** 2)
    np.testing.assert_allclose(metrics['loss'].total / metrics['loss'].count, loss, rtol=1e-3)


def test_denoisers_of_other_schedules_are_refused():
    def context(of, by):
        return seeds.context(network=of, teacher=by, tx=optax.sgd(1.0))

    network = denoising(0)[0]
    with pytest.raises(UserError, match="of another schedule than the network's 'scaled_linear'"):
        tscd(context(network, denoising(0, kind='linear')[0]))
    with pytest.raises(UserError, match='noise_scale is of flows'):
        tscd(context(network, network), noise_scale=2.0)
    dark = denoising(0, zero_terminal=True)[0]
    with pytest.raises(UserError, match="'scaled_linear' leaves nothing of the data at its last"):
        tscd(context(dark, dark))


def test_mistakes_are_refused_when_the_method_is_built(world):
    context = dataclasses.replace(context_of(world), stage='four')
    with pytest.raises(UserError, match=r'four\.method: 5 phases do not divide a grid of 64'):
        tscd(context, phases=5)
    with pytest.raises(UserError, match="target='slow' is no average of the stage"):
        tscd(context, target='slow')
