"""OFTSR: slopes from the beginning, one step of each method by hand, what is told, and a run."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd import config as kd_config
from kd.claims import seeds
from kd.errors import UserError
from kd.evaluators import distribution
from kd.evaluators.details import detail_distance, restored, squares
from kd.evaluators.restoration import psnr_together
from kd.losses.flow_map import lsd_residual
from kd.losses.rectified import rk2_slope, start_slope_target
from kd.methods.sr.oftsr import beginning, oftsr, restoring_flow
from kd.models.conditioning import velocity_inputs
from kd.models.edm import SongUNet, preset
from kd.models.one_time import OneTime
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen, parameter_count
from kd.sampling.velocity import velocity_function
from kd.training import loop

pytestmark = pytest.mark.usefixtures('compiled_quickly')

IMAGE, B = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32), 16
SPEC = {'input': IMAGE, 'low': IMAGE}
NET = from_linen(VelocityMLP(width=8, depth=1, beside=('low',)), *velocity_inputs(SPEC))


def context_of(**more):
    given = dict(network=NET, teacher=NET, references={'start': NET}, tx=optax.sgd(1.0), spec=SPEC)
    return seeds.context(**given | more)


def noisy(seed):
    params = jax.jit(NET.init)(jax.random.key(0))['params']
    return jax.tree.map(
        lambda x: x + 0.3 * jax.random.normal(jax.random.key(seed), x.shape), params
    )


def batch_of():
    rng = np.random.default_rng(0)
    return {name: jnp.asarray(rng.uniform(-1, 1, (B, 4, 4, 1)), jnp.float32) for name in SPEC}


# A teacher whose flow is known: x1 ~ N(mu, s1^2) whatever the beginning N(m0, s0^2).
MU, M0, S1, S0 = 0.7, -0.2, 0.5, 0.3


def mean_at(t):
    return (1 - t) * M0 + t * MU


def deviation_at(t):
    return np.sqrt((1 - t) ** 2 * S0**2 + t**2 * S1**2)


def field(s, t, x):
    """d m_t + (S_t' / S_t) (x - m_t)."""
    del t
    s = np.asarray(s)[:, None]
    slope = (-(1 - s) * S0**2 + s * S1**2) / deviation_at(s) ** 2
    return MU - M0 + slope * (x - mean_at(s))


def exact(t, x0):
    """(X_{0,t}(x0) - x0) / t, X = m_t + (S_t / S_0) (x0 - m_0)."""
    t = np.asarray(t)[:, None]
    return (mean_at(t) + deviation_at(t) / S0 * (x0 - M0) - x0) / t


@pytest.mark.parametrize(('ratio', 'order'), [(0.0, 2), (0.5, 4), (2 / 3, 3), (1.0, 3)])
def test_the_residual_of_the_exact_path_falls_with_the_local_error_of_the_slope(ratio, order):
    """Of Gaussian paths, whose S'' S^3 is constant, the midpoint has one order more than 3."""
    with jax.enable_x64(True):
        x0 = np.random.default_rng(0).normal(M0, S0, (64, 1))
        t = np.linspace(0.05, 0.9, 64)
        sizes = []
        for dt in (0.008, 0.004, 0.002):
            said = exact(t, x0)
            slope = rk2_slope(field, x0 + t[:, None] * said, t, dt, ratio)
            target = start_slope_target(said, slope, t, dt)
            residual = exact(t + dt, x0) - target
            # What the target is made of.
            whole = (t + dt)[:, None] * target
            np.testing.assert_allclose(whole, t[:, None] * said + dt * slope, atol=1e-12)
            sizes.append(float(np.sqrt(np.mean(residual**2))))
    ratios = np.array(sizes[:-1]) / np.array(sizes[1:])
    np.testing.assert_allclose(ratios, 2.0**order, rtol=0.08)
    assert sizes[-1] < 1e-3


def test_one_call_is_the_conditional_mean_at_0_and_the_distribution_at_1():
    x0 = np.random.default_rng(0).normal(M0, S0, (200_000, 1))
    zero, one = np.zeros(len(x0)), np.ones(len(x0))
    np.testing.assert_allclose(x0 + field(zero, zero, x0), MU, atol=1e-12)
    end = x0 + exact(one, x0)
    assert (end.mean(), end.std()) == pytest.approx((MU, S1), abs=3e-3)


def test_a_small_step_is_the_lagrangian_residual_from_the_beginning():
    """(t + dt) / dt times the residual, of a student that is far from right."""
    student = lambda s, t, x: jnp.sin(2 * x) * t[:, None] + x * t[:, None] ** 2  # noqa: E731
    teacher = lambda s, t, x: jnp.cos(x + s[:, None])  # noqa: E731
    with jax.enable_x64(True):
        x0 = jnp.asarray(np.random.default_rng(0).normal(size=(32, 1)))
        t, zero = jnp.linspace(0.1, 0.9, 32), jnp.zeros(32)
        limit = lsd_residual(student, zero, t, x0, teacher=teacher)
        away = []
        for dt in (0.02, 0.01, 0.005):
            said = student(zero, t, x0)
            slope = rk2_slope(teacher, x0 + t[:, None] * said, t, dt)
            residual = student(zero, t + dt, x0) - start_slope_target(said, slope, t, dt)
            away.append(float(jnp.abs((t + dt)[:, None] / dt * residual - limit).max()))
    np.testing.assert_allclose(np.array(away[:-1]) / np.array(away[1:]), 2.0, rtol=0.1)


def test_paths_begin_at_low_resolution_with_a_share_of_noise():
    low = jax.random.normal(jax.random.key(1), (B, 4, 4, 1))
    key = jax.random.key(0)
    fresh = jax.random.normal(key, low.shape)
    np.testing.assert_array_equal(beginning(key, low, 0.0), low)
    np.testing.assert_array_equal(beginning(key, low, 1.0), fresh)
    np.testing.assert_allclose(beginning(key, low, 0.6), 0.8 * low + 0.6 * fresh, atol=1e-6)


@pytest.mark.parametrize('distance', ['l1', 'l2'])
def test_a_step_of_the_flow_by_hand(distance):
    method = restoring_flow(context_of(references={}), share=0.6, distance=distance)
    state = jax.jit(method.init)(jax.random.key(0), {})
    state, batch = state.replace(params={'network': noisy(1)}), batch_of()
    after, metrics = jax.jit(method.step)(state, batch)
    noise_key, time_key, _ = jax.random.split(state.step_key(), 3)
    x0 = 0.8 * batch['low'] + 0.6 * jax.random.normal(noise_key, batch['low'].shape)
    t = jax.random.uniform(time_key, (B,), minval=1e-3)[:, None, None, None]
    x_t = (1 - t) * x0 + t * batch['input']

    def loss(params):
        s = t.reshape(B)
        v = velocity_function(NET, {'params': params}, told={'low': batch['low']})(s, s, x_t)
        away = v - (batch['input'] - x0)
        return jnp.mean(jnp.abs(away) if distance == 'l1' else away**2)

    value, slope = jax.jit(jax.value_and_grad(loss))(noisy(1))
    np.testing.assert_allclose(metrics['loss'].total / metrics['loss'].count, value, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: a - b, noisy(1), after.params['network'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, slope)


def test_a_step_of_the_student_by_hand():
    """Traps: the point of the teacher is a constant, and the student never sees it."""
    method = oftsr(context_of(), share=0.6, dt=0.2, align=0.5, boundary=0.25, between=(0.3, 0.95))
    params, teacher, batch = noisy(1), noisy(2), batch_of()
    frozen = {name: {'params': teacher} for name in ('teacher', 'start')}
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    jax.tree.map(np.testing.assert_array_equal, state.params['network'], teacher)
    state = state.replace(params={'network': params})
    after, metrics = jax.jit(method.step)(state, batch)
    noise_key, time_key = jax.random.split(state.step_key())
    x0 = 0.8 * batch['low'] + 0.6 * jax.random.normal(noise_key, batch['low'].shape)
    t = jax.random.uniform(time_key, (B,), minval=0.3, maxval=0.95)
    s, zero, wide = jnp.minimum(t + 0.2, 1.0), jnp.zeros(B), (B, 1, 1, 1)
    dt = (s - t).reshape(wide)

    def said(params, t, x):
        return velocity_function(NET, {'params': params}, told={'low': batch['low']})(t, t, x)

    @jax.jit
    def constants():
        v_t = said(params, t, x0)
        x_t = x0 + t.reshape(wide) * v_t
        first = said(teacher, t, x_t)
        slope = said(teacher, (t + s) / 2, x_t + 0.5 * dt * first)
        return v_t + dt / s.reshape(wide) * (slope - v_t), first, said(teacher, zero, x0)

    target, first, at_0 = constants()

    def loss(params):
        distil = jnp.mean((said(params, s, x0) - target) ** 2)
        align = jnp.mean(((1 - t).reshape(wide) * (said(params, t, x0) - first)) ** 2)
        boundary = jnp.mean((said(params, zero, x0) - at_0) ** 2)
        return distil + 0.5 * align + 0.25 * boundary, (distil, align, boundary)

    (value, parts), slope = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    for name, expected in zip(('loss', 'distil', 'align', 'boundary'), (value, *parts),
                              strict=True):  # fmt: skip
        found = metrics[name].total / metrics[name].count
        np.testing.assert_allclose(found, expected, rtol=1e-4)
    moved = jax.tree.map(lambda a, b: a - b, params, after.params['network'])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), moved, slope)


def test_a_straight_teacher_is_learnt_already_and_both_ends_are_one_loss_at_0():
    batch = batch_of()
    straight = jax.tree.map(jnp.zeros_like, noisy(1))
    straight['out']['bias'] = jnp.linspace(-1.0, 1.0, 16)
    method = oftsr(context_of(), align=1.0, boundary=1.0, between=(0.0, 0.0))
    step = jax.jit(method.step)

    def parts(student, teacher):
        frozen = {name: {'params': teacher} for name in ('teacher', 'start')}
        state = method.init(jax.random.key(0), frozen).replace(params={'network': student})
        metrics = step(state, batch)[1]
        return {name: float(x.total / x.count) for name, x in metrics.items()}

    found = parts(straight, straight)
    assert max(found[name] for name in ('distil', 'align', 'boundary')) < 1e-12
    # At t = 0 the path has not begun.
    found = parts(noisy(1), noisy(2))
    assert found['align'] == pytest.approx(found['boundary'], rel=1e-5)
    assert found['align'] > 1e-3


# What a network is told


def test_what_is_beside_an_image_is_further_channels_and_is_asked_for():
    inner = SongUNet(channels=8, multipliers=(1,), blocks=1, attention=(), beside=('low',))
    net = from_linen(OneTime(inner, 999.0), *velocity_inputs(SPEC))
    variables = jax.jit(net.init)(jax.random.key(0))
    assert variables['params']['enc_4x4_conv']['kernel'].shape == (3, 3, 2, 8)
    assert net.module.conditions == ('low',)
    variables = jax.tree.map(
        lambda x: x + 0.1 * jax.random.normal(jax.random.key(1), x.shape), variables
    )
    x, low = (jax.random.normal(jax.random.key(i), (2, 4, 4, 1)) for i in (2, 3))
    s = jnp.array([0.1, 0.7])
    wide = SongUNet(channels=8, multipliers=(1,), blocks=1, attention=())

    @jax.jit
    def both(variables, x, low):
        """The same layers on channels that are given as one image; the first of its outputs."""
        found = velocity_function(net, variables, told={'low': low})(s, s, x)
        params = dict(variables['params'])
        out = params['dec_4x4_aux_conv']
        params['dec_4x4_aux_conv'] = jax.tree.map(lambda w: jnp.concatenate([w, w], -1), out)
        other = wide.apply({'params': params}, 999.0 * s, jnp.concatenate([x, low], -1))
        return found, other[..., :1]

    found, expected = both(variables, x, low)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    with pytest.raises(ValueError, match=r"SongUNet is told 'low', which was not given"):
        velocity_function(net, variables)(s, s, x)
    with pytest.raises(ValueError, match=r"SongUNet is told \['low'\], not 'high'"):
        velocity_function(net, variables, told={'low': low, 'high': low})(s, s, x)
    with pytest.raises(
        UserError, match='a network that is told nothing: give it num_classes, or data'
    ):
        velocity_function(net, variables, told={'low': low}, guidance=2.0)
    # With what means none beside it, that is what guidance compares with.
    told, none = {'low': low, 'null_low': 0 * low}, {'low': 0 * low}
    guided = velocity_function(net, variables, told=told, guidance=2.0)(s, s, x)
    plain = (velocity_function(net, variables, told=one)(s, s, x) for one in (told, none))
    (given, without) = plain
    np.testing.assert_allclose(guided, 2 * given - without, atol=1e-5)


@pytest.mark.parametrize(
    ('variant', 'released', 'width'),
    [('imagenet256', 552_814_086, 256), ('ffhq256', 93_563_910, 128)],
)
def test_networks_have_the_papers_number_of_parameters(variant, released, width):
    """The released ones have three channels and six outputs, these six channels and three."""
    config = kd_config.load(f'configs/sr/oftsr.py:{variant}')
    module = kd_config.build(config.student.network.to_dict(), where='network')
    image = {'input': jax.ShapeDtypeStruct((256, 256, 3), jnp.float32)}
    net = from_linen(module, *module.example_inputs(image))
    variables = jax.eval_shape(net.init, jax.random.key(0))
    weights, outputs = 27 * width, 3
    assert parameter_count(variables) == released + weights - (weights + outputs)
    heads = variables['params']['enc_16x16_block0']['qkv']['kernel'].shape[-1] // 3
    assert heads // module.inner.head_channels == (4 if width == 128 else 16)
    assert preset('adm256').blocks == 2


def test_what_does_not_fit_is_told():
    blind = from_linen(VelocityMLP(width=8, depth=1), *velocity_inputs(SPEC))
    with pytest.raises(UserError, match=r"stage\.network is not told 'low', and restores nothing"):
        restoring_flow(context_of(network=blind))
    with pytest.raises(UserError, match=r"wants images and what is left of them, 'input' and"):
        restoring_flow(context_of(spec={'input': IMAGE}))
    with pytest.raises(UserError, match=r"stage\.teacher is not told 'low', and restores nothing"):
        oftsr(context_of(teacher=blind))
    with pytest.raises(UserError, match=r'between=\(0\.9, 0\.1\) must be the least time and the'):
        oftsr(context_of(), between=(0.9, 0.1))
    context = dataclasses.replace(context_of(), trained_by={'teacher': {'name': 'x'}})
    with pytest.raises(UserError, match=r'share=0\.3 is not that of the teacher, 0\.2'):
        oftsr(context, share=0.3)
    with pytest.raises(UserError, match=r"stage\.ema has no 'slow'"):
        restored(context_of(), weights='slow')
    data = dict(lowered=lambda x: x)
    small = dataclasses.replace(context_of(), source=lambda split: types.SimpleNamespace(**data))
    with pytest.raises(UserError, match='compares squares of 8 pixels, and images have 4 x 4'):
        restored(small)


# Metrics of restored images


def test_details_are_compared_in_squares_and_by_the_closed_form():
    rng = np.random.default_rng(0)
    images = rng.normal(size=(3, 5, 9, 2))
    cut = squares(images, 4)
    assert cut.shape == (6, 32)
    np.testing.assert_array_equal(cut[1], images[0, :4, 4:8].ravel())
    np.testing.assert_array_equal(cut[2], images[1, :4, :4].ravel())
    # Independent pixels of deviations 3 > 2 > ...: the first two directions are the first two.
    scale = np.array([3.0, 2.0, *np.full(14, 0.1)])
    real = (rng.normal(size=(50_000, 16)) * scale).reshape(-1, 4, 4, 1)
    made = (rng.normal(size=(50_000, 16)) * 0.5 * scale + 1.0).reshape(-1, 4, 4, 1)
    expected = 2 * 1.0 + (0.5 * 3) ** 2 + (0.5 * 2) ** 2
    assert detail_distance(real, made, 2, side=4) == pytest.approx(expected, rel=0.03)
    whole = distribution.frechet_distance(
        *(distribution.moments(x.reshape(-1, 16)) for x in (real, made))
    )
    assert detail_distance(real, made, 99, side=4) == pytest.approx(whole, rel=1e-6)
    a = rng.uniform(-1, 1, (4, 4, 4, 1))
    assert psnr_together(a, a + 0.02) == pytest.approx(40.0)
    assert psnr_together(a, a) == float('inf')


def test_a_run_of_the_small_recipe_reports_by_steps_and_by_times(tmp_path):
    config = kd_config.load('configs/sr/oftsr.py:cpu')
    config.data.source.of.count = 40
    for stage in (config.flow, config.student):
        stage.steps = stage.log_every = stage.checkpoint_every = 2
        stage.batch_size = 8
        stage.network.width, stage.network.depth = 8, 1
        stage.evaluators.restored.samples, stage.evaluators.restored.batch = 20, 10
        stage.evaluators.restored.components = 4
    config.flow.evaluators.restored.steps = (1, 2)
    report = loop.run(config, tmp_path / 'run').read_text()
    assert report.startswith('# china_flower: flow, OFTSR')
    for words in ('psnr_at_0.99', 'frechet_at_0.01', 'low_psnr', '| sampling steps | 1 | 2 |'):
        assert words in report
    assert len(list((tmp_path / 'run' / 'student' / 'figures').glob('*.png'))) == 2
