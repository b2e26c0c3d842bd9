"""Flow methods: a step against the losses composed by hand, trained flows against closed forms."""

import dataclasses
import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn

from kd import config as kd_config
from kd.claims import seeds
from kd.data import catalogue, sources
from kd.data.context import SourceContext
from kd.data.transforms import mapped, standardised
from kd.errors import UserError
from kd.evaluators import distribution, flow_samples, generation, samples
from kd.losses import flow_map as fm
from kd.losses.flow_map_algorithms import flow_map_errors, get_algorithm
from kd.losses.interpolant import linear
from kd.methods.flow.flow_map import flow_map
from kd.methods.flow.flow_map_distillation import flow_map_distillation
from kd.methods.flow.flow_matching import flow_matching
from kd.methods.flow.reflow import reflow
from kd.models import magnitude_preserving as mp
from kd.models.conditioning import TimeWeight, log_variance, velocity_inputs
from kd.models.magnitude_preserving import MPDense
from kd.models.unet import UNet
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.parallel.mesh import make_mesh
from kd.sampling.flow import draw_noise, euler_sample, time_grid
from kd.sampling.velocity import velocity_function
from kd.training import loop
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SPEC = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}
BATCH = 16


def network(**options):
    module = VelocityMLP(width=8, depth=1, data_scale=0.5, **options)
    return from_linen(module, *velocity_inputs(SPEC))


def context(net, teacher=None, lr=0.1):
    made = seeds.context(network=net, tx=optax.sgd(lr), teacher=teacher, num_classes=3)
    return dataclasses.replace(made, spec=SPEC)


def random_variables(net, seed):
    """Not the initial ones, whose output is zero."""
    shapes = jax.eval_shape(net.init, jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: jnp.asarray(0.4 * rng.standard_normal(x.shape), jnp.float32), shapes
    )


@pytest.fixture(name='batch')
def _batch():
    points = np.random.default_rng(5).standard_normal((BATCH, 2))
    return {'input': jnp.asarray(points, jnp.float32), 'label': jnp.arange(BATCH) % 3}


def started(method, seed, frozen=None):
    """The first state: one program, where leaf after leaf would be one each."""
    return jax.jit(method.init)(jax.random.key(seed), frozen)


def keys_of_step(state):
    """The keys of augmentation, noise, labels, dropout and times."""
    return jax.random.split(state.step_key(), 5)


# A step against the losses.


@pytest.mark.parametrize('name', ['lsd', 'lmd'])
def test_step_is_the_gradient_of_the_residuals_composed_by_hand(name, batch):
    net, frozen = network(time_weight=4), network(time_weight=4)
    taught = name == 'lmd'
    teacher = random_variables(frozen, 3)
    if taught:
        options = dict(algorithm='lmd', diagonal_fraction=0.75)
        method = flow_map_distillation(context(net, frozen), **options)
    else:
        method = flow_map(context(net), algorithm=name)
    params = random_variables(net, 2)['params']
    state = started(method, 1, {'teacher': teacher} if taught else {})
    state = state.with_params(params)
    _, noise_key, _, _, times_key = keys_of_step(state)
    x0 = 0.5 * jax.random.normal(noise_key, (BATCH, 2))

    def by_hand(params):
        def vfn(s, t, x):
            return net.module.apply({'params': params}, s, t, x)

        on_key, pair_key, _ = jax.random.split(times_key, 3)
        t = jax.random.uniform(on_key, (12,))
        x1 = batch['input']
        x_t = (1 - t)[:, None] * x0[:12] + t[:, None] * x1[:12]
        on = vfn(t, t, x_t) - (x1[:12] - x0[:12])
        pair = jax.random.uniform(pair_key, (2, 4))
        s, e = pair.min(0), pair.max(0)
        x_s = (1 - s)[:, None] * x0[12:] + s[:, None] * x1[12:]
        velocity, slope = jax.jvp(lambda e: vfn(s, e, x_s), (e,), (jnp.ones(4),))
        end = x_s + (e - s)[:, None] * velocity
        if taught:
            field = frozen.module.apply(teacher, e, e, end)
        else:
            field = jax.lax.stop_gradient(vfn(e, e, end))
        off = velocity + (e - s)[:, None] * slope - field
        error = jnp.concatenate([jnp.sum(on**2, 1), jnp.sum(off**2, 1)])
        weight = TimeWeight(4).apply(
            {'params': params['time_weight']}, jnp.concatenate([t, s]), jnp.concatenate([t, e])
        )
        return jnp.mean(jnp.exp(-weight) * error + weight), error

    (loss, error), grads = jax.jit(jax.value_and_grad(by_hand, has_aux=True))(params)
    new, metrics = jax.jit(method.step)(state, batch)
    np.testing.assert_allclose(metrics['loss'].total / BATCH, loss, rtol=1e-5)
    np.testing.assert_allclose(metrics['map_error'].total / 4, error[12:].mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics['diagonal_error'].total / 12, error[:12].mean(), rtol=1e-5)
    # Ordinary layers take the plain gradient step; magnitude-preserving ones are projected.
    for layer in ('hidden0', 'out'):
        np.testing.assert_allclose(
            new.params['network'][layer]['kernel'],
            params[layer]['kernel'] - 0.1 * grads[layer]['kernel'],
            rtol=1e-4, atol=1e-6,
        )  # fmt: skip
    weight = new.params['network']['time_weight']['out']['mp_weight']
    np.testing.assert_allclose(jnp.sqrt(jnp.mean(weight**2, 0)), 1.0, atol=1e-3)


def test_all_on_the_diagonal_every_algorithm_is_flow_matching(batch):
    net = network()
    plain = flow_matching(context(net))
    state = started(plain, 0)
    expected = jax.jit(plain.step)(state, batch)[0].params['network']
    for name in ('esd', 'meanflow'):
        other = flow_map(context(net), algorithm=name, diagonal_fraction=1.0)
        found = jax.jit(other.step)(state, batch)[0].params['network']
        jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_meanflow_target_is_stopped_but_for_the_prediction(batch):
    # The gradient of half the squared error is residual x gradient of the prediction.
    net = network()
    params = random_variables(net, 2)['params']
    x0, x1 = jax.random.normal(jax.random.key(1), (BATCH, 2)), batch['input']
    key = jax.random.key(4)
    s, t = get_algorithm('meanflow').times(jax.random.split(key, 3)[1], BATCH, 1.0)
    x_s, dx = linear().point(s, x0, x1), x1 - x0

    def error(params):
        vfn = velocity_function(net, {'params': params})
        return flow_map_errors(
            key, vfn, x0, x1, interpolant=linear(), algorithm=get_algorithm('meanflow'), diagonal=0
        )[0].sum() / 2  # fmt: skip

    def velocity(params, s, x):
        return net.module.apply({'params': params}, s, t, x)

    @jax.jit
    def by_hand(params):
        tangents = jnp.ones_like(s), dx
        value, along = jax.jvp(lambda s, x: velocity(params, s, x), (s, x_s), tangents)
        residual = value - dx - (t - s)[:, None] * along
        return jax.grad(lambda p: jnp.sum(residual * velocity(p, s, x_s)))(params)

    ours, theirs = jax.jit(jax.grad(error))(params), by_hand(params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), ours, theirs)


class Dropping(nn.Module):
    """A velocity network that is all noise in training."""

    num_classes: int | None = None

    def example_inputs(self, spec):
        return velocity_inputs(spec)

    @nn.compact
    def __call__(self, s, t, x, *, label=None, train=False):
        scale = self.param('scale', nn.initializers.ones, ())
        return scale * nn.Dropout(0.5)(x * (s + 2 * t)[:, None], deterministic=not train)


def test_dropout_acts_on_the_diagonal_only(batch):
    net = from_linen(Dropping(), *velocity_inputs(SPEC))
    x0, data = jax.random.normal(jax.random.key(0), (BATCH, 2)), batch['input']
    # The same times and noise with two dropout keys: only the diagonal errors may differ.
    variables = net.init(jax.random.key(0))

    @jax.jit
    def errors_of(key):
        return flow_map_errors(
            jax.random.key(1),
            velocity_function(net, variables, train=True, key=key),
            x0, data, interpolant=linear(), algorithm=get_algorithm('lsd'), diagonal=12,
            off_diagonal_vfn=velocity_function(net, variables),
        )[0]  # fmt: skip

    errors = [errors_of(jax.random.key(k)) for k in (2, 3)]
    assert (errors[0][:12] != errors[1][:12]).any()
    np.testing.assert_array_equal(errors[0][12:], errors[1][12:])
    # And so does the method: its map error is that of the network without dropout.
    method = flow_map(context(net), noise_scale=1.0)
    state = started(method, 7)
    step_keys = keys_of_step(state)
    noise = jax.random.normal(step_keys[1], (BATCH, 2))
    silent = velocity_function(net, {'params': state.params['network']})
    expected = jax.jit(
        lambda: flow_map_errors(
            step_keys[4], silent, noise, data, interpolant=linear(),
            algorithm=get_algorithm('lsd'), diagonal=12,
        )[0]
    )()  # fmt: skip
    metrics = jax.jit(method.step)(state, batch)[1]
    np.testing.assert_allclose(metrics['map_error'].total, expected[12:].sum(), rtol=1e-5)
    assert abs(metrics['diagonal_error'].total - expected[:12].sum()) > 1e-3


# Classes, guidance, pairs.


def test_guidance_of_one_is_the_conditional_velocity_and_of_zero_the_unconditional():
    net = network(num_classes=3)
    variables = random_variables(net, 2)
    label, x = jnp.array([0, 1, 2, 1]), jax.random.normal(jax.random.key(0), (4, 2))
    s, t = jnp.full(4, 0.2), jnp.full(4, 0.7)
    plain = jax.jit(net.module.apply)(variables, s, t, x, label=label)
    null = jax.jit(net.module.apply)(variables, s, t, x)
    assert float(jnp.abs(plain - null).max()) > 1e-2
    for scale, expected in ((1.0, plain), (0.0, null), (2.5, null + 2.5 * (plain - null))):
        found = jax.jit(velocity_function(net, variables, label, guidance=scale))(s, t, x)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_labels_condition_the_loss_and_are_dropped_at_the_stated_rate(batch):
    net = network(num_classes=3)
    variables = random_variables(net, 2)
    losses = {}
    for rate in (0.0, 1.0):
        method = flow_matching(context(net), label_dropout=rate)
        state = started(method, 1).with_params(variables['params'])
        losses[rate] = jax.jit(method.step)(state, batch)[1]['loss'].total
        step_keys = keys_of_step(state)
        x0 = 0.5 * jax.random.normal(step_keys[1], (BATCH, 2))
        label = batch['label'] if rate == 0.0 else jnp.full(BATCH, 3)
        vfn = velocity_function(net, variables, label)
        expected = jax.jit(
            lambda key, x0, vfn=vfn: flow_map_errors(
                key, vfn, x0, batch['input'],
                interpolant=linear(), algorithm=get_algorithm('lsd'), diagonal=BATCH,
            )[0].sum()
        )(step_keys[4], x0)  # fmt: skip
        np.testing.assert_allclose(losses[rate], expected, rtol=1e-5)
    assert abs(losses[0.0] - losses[1.0]) > 1e-3


def test_a_guided_teacher_is_distilled_as_the_guided_field(batch):
    net, frozen = network(num_classes=3), network(num_classes=3)
    teacher = random_variables(frozen, 3)
    method = flow_map_distillation(
        context(net, frozen), algorithm='lmd', guidance=2.0, label_dropout=0.0
    )
    state = started(method, 1, {'teacher': teacher})
    state = state.with_params(random_variables(net, 2)['params'])
    step_keys = keys_of_step(state)
    x0 = 0.5 * jax.random.normal(step_keys[1], (BATCH, 2))

    def field(s, t, x):
        plain = frozen.module.apply(teacher, t, t, x, label=batch['label'])
        null = frozen.module.apply(teacher, t, t, x)
        return 2.0 * plain - null

    vfn = velocity_function(net, {'params': state.params['network']}, batch['label'])
    expected = jax.jit(
        lambda: flow_map_errors(
            step_keys[4], vfn, x0, batch['input'], interpolant=linear(),
            algorithm=get_algorithm('lmd', teacher=True), diagonal=0, teacher=field,
        )[0]
    )()  # fmt: skip
    metrics = jax.jit(method.step)(state, batch)[1]
    np.testing.assert_allclose(metrics['loss'].total, expected.sum(), rtol=1e-4)


def test_reflow_regresses_the_straight_line_to_the_teachers_sample(batch):
    net, frozen = network(), network()
    teacher = random_variables(frozen, 3)
    method = reflow(context(net, frozen), sampler='euler', sampler_steps=4)
    state = started(method, 1, {'teacher': teacher})
    # At initialisation the student is zero, so its error is the squared length of the lines.
    metrics = jax.jit(method.step)(state, batch)[1]
    collect_key = jax.random.fold_in(state.step_key(), zlib.crc32(b'collect'))
    x0 = 0.5 * jax.random.normal(collect_key, (BATCH, 2))
    x1 = x0
    for k in range(4):
        t = jnp.full(BATCH, k / 4)
        x1 = x1 + jax.jit(frozen.module.apply)(teacher, t, t, x1) / 4
    np.testing.assert_allclose(metrics['loss'].total, jnp.sum((x1 - x0) ** 2), rtol=1e-5)


# Trained.


class Affine(nn.Module):
    """v(s, t, x) = A(t) x + b(t) on the diagonal, A and b linear interpolations on a grid."""

    knots: int = 9
    num_classes: int | None = None
    data_scale: float = 0.5

    def example_inputs(self, spec):
        return velocity_inputs(spec)

    @nn.compact
    def __call__(self, s, t, x, *, label=None, train=False):
        slope = self.param('slope', nn.initializers.zeros, (self.knots,))
        shift = self.param('shift', nn.initializers.zeros, (self.knots,))
        grid = jnp.linspace(0.0, 1.0, self.knots)
        time = 0.5 * (s + t)
        return jnp.interp(time, grid, slope)[:, None] * x + jnp.interp(time, grid, shift)[:, None]


def test_linear_flow_trained_on_a_gaussian_matches_the_closed_form():
    # b_t(x) = m + (S_t' / S_t)(x - t m) for x0 ~ N(0, 1/4) and x1 ~ N(m, 1/16).
    net = from_linen(Affine(), *velocity_inputs(SPEC))
    mean, deviation = 0.8, 0.25
    data = mean + deviation * np.random.default_rng(0).standard_normal((40_000, 2))
    tx = optax.adam(optax.cosine_decay_schedule(0.1, 600))
    method = flow_matching(seeds.context(network=net, tx=tx))
    state = seeds.train(
        method, {'input': data.astype(np.float32)}, np.array([0]), steps=600, batch_size=2000
    )
    t = np.linspace(0.05, 0.95, 19)
    variance = (1 - t) ** 2 / 4 + t**2 * deviation**2
    slope = (t * deviation**2 - (1 - t) / 4) / variance
    grid = np.linspace(0, 1, 9)
    found_slope = np.interp(t, grid, state.params['network']['slope'][0])
    found_shift = np.interp(t, grid, state.params['network']['shift'][0])
    # The rest is the error of interpolating on 9 knots.
    np.testing.assert_allclose(found_slope, slope, atol=0.12)
    np.testing.assert_allclose(found_shift, mean - slope * t * mean, atol=0.08)
    # And Euler-100 of it carries the noise to the data.
    noise = 0.5 * jax.random.normal(jax.random.key(1), (500, 2))
    params = jax.tree.map(lambda x: x[0], state.params['network'])
    vfn = velocity_function(net, {'params': params})
    end = euler_sample(vfn, noise, time_grid(100))
    exact = mean + deviation / 0.5 * noise
    assert float(jnp.sqrt(jnp.mean((end - exact) ** 2))) < 2e-2


# Refusals.


class OneTime(nn.Module):
    """A flow that looks at one time."""

    def example_inputs(self, spec):
        return velocity_inputs(spec)

    @nn.compact
    def __call__(self, s, t, x, *, train=False):
        # The other time goes through a call that drops it.
        unused = jax.jit(lambda s, t: t)(s, t)
        return nn.Dense(2)(jnp.concatenate([x, unused[:, None]], 1))


def test_mistakes_are_refused_when_the_method_is_built():
    one = from_linen(OneTime(), *velocity_inputs(SPEC))
    with pytest.raises(UserError, match='ignores its time s, the start'):
        flow_map(context(one))
    flow_matching(context(one))
    wide = from_linen(nn.Dense(3), jax.ShapeDtypeStruct((1, 2), jnp.float32))
    with pytest.raises(UserError, match='no velocity network'):
        flow_map(context(wide))
    with pytest.raises(UserError, match="'lmd' distils a frozen flow: use the method"):
        flow_map(context(network()), algorithm='lmd')
    with pytest.raises(ValueError, match='unknown algorithm'):
        flow_map(context(network()), algorithm='lsdd')
    with pytest.raises(UserError, match='teacher'):
        flow_map_distillation(context(network()))
    with pytest.raises(UserError, match='conditioned on 3 classes and its teacher on None'):
        flow_map_distillation(context(network(num_classes=3), network()))
    with pytest.raises(UserError, match='guidance needs a teacher with num_classes'):
        flow_map_distillation(context(network(), network()), guidance=2.0)
    with pytest.raises(UserError, match='diagonal_fraction must lie'):
        flow_map(context(network()), diagonal_fraction=75)


def lmd_recipe(**changes):
    """The stage `map` and its teacher `flow`, changed by block."""
    config = kd_config.load('configs/flow/checkerboard.py:cpu,lmd')
    config.report = {}
    with config.unlocked(), config.ignore_type():
        for name in ('flow', 'map'):
            config[name].evaluators = {}
            config[name].network.update(width=8, depth=1)
        for path, values in changes.items():
            stage, _, block = path.partition('_')
            config[stage][block].update(values)
    return config


@pytest.mark.parametrize('another_run', [False, True], ids=['this_run', 'another_run'])
@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({}, None),
        (
            dict(map_method=dict(interpolant='trigonometric')),
            "the teacher was trained on interpolant 'linear', the student uses 'trigonometric'",
        ),
        (
            dict(flow_method=dict(interpolant='variance_preserving')),
            "map: the teacher was trained on interpolant 'variance_preserving', the student uses",
        ),
        (dict(flow_method=dict(noise_scale=2.0)), r'deviation 0\.577\d*, that of the teacher 2;'),
        (
            dict(map_network=dict(data_scale=0.5)),
            r'noise has standard deviation 0\.5, that',
        ),
        (
            dict(map_data=dict(name='rings')),
            r'^map\.teacher was trained on checkerboard, and the stage takes rings; give both',
        ),
        (dict(map_method=dict(guidance=2.0)), 'map: guidance needs a teacher with num_classes'),
        (
            dict(
                map_method=dict(guidance=2.0),
                map_network=dict(num_classes=8),
                flow_network=dict(num_classes=8),
                flow_method=dict(label_dropout=0.0),
            ),
            'map: guidance=2 takes the velocity without a class, which the teacher was not trained',
        ),
    ],
)
def test_a_teacher_of_another_path_is_refused(tmp_path, changes, message, another_run):
    config = lmd_recipe(**changes)
    if another_run:
        written = kd_config.parse(config).plain()
        (tmp_path / 'config.json').write_text(json.dumps(written))
        config.map.teacher = str(tmp_path / 'flow')
        with config.unlocked():
            config.stages = ('map',)
            del config['flow']
    build = functools.partial(prepare, kd_config.parse(config), 'map', make_mesh({'data': 1}))
    if message is None:
        assert build().context.trained_by['teacher']['name'].endswith('flow_matching')
        return
    with pytest.raises(UserError, match=message):
        build()


# Probes, sources, and a recipe from beginning to end.


@pytest.fixture(name='stage')
def _stage():
    """A context whose stage keeps an average, and a state in which the two differ."""
    net = network()
    recipe = kd_config.parse(kd_config.load('configs/flow/checkerboard.py:cpu,lsd'))
    made = dataclasses.replace(
        context(net), stage='map', config=recipe.stages['map'], recipe=recipe
    )
    state = started(flow_map(made), 0)
    average = random_variables(net, 9)['params']
    return made, state.replace(ema={'slow': {'network': average}}), net


def test_samples_are_drawn_with_the_average_and_measured_by_steps(stage, batch):
    made, state, net = stage
    train = catalogue.load('checkerboard', 'train')
    made = dataclasses.replace(made, source=lambda split: train)
    batches = [{**batch, 'mask': jnp.arange(BATCH) < 10}]
    options = dict(steps=(1, 3), samples=40, batch=16)
    drawn = {}
    for weights, sampler in (('slow', 'flow_map'), ('final', 'flow_map'), ('slow', 'euler')):
        probe = flow_samples.flow_samples(made, weights=weights, sampler=sampler, **options)
        drawn[weights, sampler] = probe.run(state, batches)
    noise = draw_noise(jax.random.key(0), 40, (2,), scale=0.5)
    vfn = velocity_function(net, {'params': state.ema['slow']['network']})
    one = np.asarray(fm.flow_map(vfn, 0.0, 1.0, noise))
    real = np.asarray(batch['input'][:10])
    expected = distribution.sliced_wasserstein(real, one)
    found = drawn['slow', 'flow_map']
    assert found['sliced_wasserstein_1'] == pytest.approx(expected, rel=1e-5)
    assert found['samples'].axes
    # As many points of the data itself are a perfect sampler.
    fresh = train.fetch(np.arange(len(train) - 40, len(train)))['input']
    assert found['kl_floor'] == distribution.histogram_kl(real, fresh) > 0.1
    # The final parameters are the initial ones: zero velocity, the noise itself.
    still = distribution.sliced_wasserstein(real, np.asarray(noise))
    assert drawn['final', 'flow_map']['sliced_wasserstein_3'] == pytest.approx(still, rel=1e-5)
    euler = euler_sample(vfn, noise, time_grid(3))
    expected = distribution.sliced_wasserstein(real, np.asarray(euler))
    assert drawn['slow', 'euler']['sliced_wasserstein_3'] == pytest.approx(expected, rel=1e-5)
    with pytest.raises(UserError, match=r"map\.ema has no 'fast'"):
        flow_samples.flow_samples(made, weights='fast')


def test_fid_is_the_distance_in_the_features_of_shown_pixels(stage, batch, monkeypatch):
    made, state, net = stage
    source = catalogue.load('checkerboard', 'test')
    monkeypatch.setattr(source, 'to_pixels', lambda x: x + 1.0)
    monkeypatch.setattr(samples, 'inception_features', lambda file: np.square)
    made = dataclasses.replace(made, source=lambda split: source)
    probe = flow_samples.flow_samples(
        made, weights='slow', steps=(1,), samples=40, batch=20, inception='weights.safetensors'
    )
    # Two batches, the last one padded; moments are of all examples, not of the first 40.
    padded = {**batch, 'mask': jnp.arange(BATCH) < 5}
    found = probe.run(state, [{**batch, 'mask': jnp.ones(BATCH, bool)}] * 3 + [padded])
    noise = draw_noise(jax.random.key(0), 40, (2,), scale=0.5)
    vfn = velocity_function(net, {'params': state.ema['slow']['network']})
    one = np.asarray(fm.flow_map(vfn, 0.0, 1.0, noise))
    inputs = np.asarray(batch['input'])
    inputs = np.concatenate([inputs, inputs, inputs, inputs[:5]])
    real, fake = (distribution.moments((x + 1.0) ** 2) for x in (inputs, one))
    expected = distribution.frechet_distance(real, fake)
    assert found['fid_1'] == pytest.approx(expected, rel=1e-5)
    # Moments of the split are kept.
    again = probe.run(state, [{**batch, 'mask': jnp.ones(BATCH, bool)}])
    assert again['fid_1'] == found['fid_1']


def test_geometry_agrees_with_the_metrics_of_the_whole_path(stage):
    made, state, net = stage
    probe = flow_samples.flow_geometry(made, weights='slow', samples=32, steps=8)
    found = probe.run(state, [])
    noise_key = jax.random.split(jax.random.key(0), 3)[0]
    noise = draw_noise(noise_key, 32, (2,), scale=0.5)
    vfn = velocity_function(net, {'params': state.ema['slow']['network']})
    straight = generation.straightness(vfn, noise, steps=8).mean()
    assert found['straightness'] == pytest.approx(float(straight), rel=1e-4)
    gap = fm.flow_map(vfn, 0.0, 1.0, noise) - euler_sample(vfn, noise, time_grid(8))
    assert found['map_to_flow'] == pytest.approx(float(jnp.sum(gap**2) / 32), rel=1e-4)
    assert found['semigroup'] > 0
    # A field that does not depend on time or place is straight and its own flow map.
    constant = jax.tree.map(jnp.zeros_like, state.params['network'])
    constant['out']['bias'] = jnp.array([0.3, -0.2])
    still = probe.run(state.replace(ema={'slow': {'network': constant}}), [])
    assert max(still.values()) < 1e-10


def test_area_resizing_averages_whole_blocks_and_shares():
    weights = mapped.area_weights(140, 64)
    np.testing.assert_allclose(weights.sum(1), 1.0, atol=1e-6)
    np.testing.assert_allclose(weights.sum(0), 64 / 140, atol=1e-6)
    np.testing.assert_array_equal(mapped.area_weights(6, 3), np.repeat(np.eye(3), 2, 1) / 2)
    # 3 to 2: half of the middle pixel goes to each side.
    expected = [[2 / 3, 1 / 3, 0], [0, 1 / 3, 2 / 3]]
    np.testing.assert_allclose(mapped.area_weights(3, 2), expected, atol=1e-7)


def test_whitened_and_resized_sources(monkeypatch):
    rng = np.random.default_rng(0)
    images = (rng.standard_normal((300, 16)) @ rng.standard_normal((16, 64))).astype(np.float32)
    images = images.reshape(300, 8, 8, 1)
    spec = sources.example_spec((8, 8, 1), labelled=False)
    reader = sources.in_memory({'input': images})
    data = sources.DataSet('images', {'train': 300}, lambda split: reader, spec, None)
    load = lambda name, split, data_dir: sources.Source(data, split)  # noqa: E731
    monkeypatch.setattr(catalogue, 'load', load)

    context, rows = SourceContext('train'), np.arange(300)
    white = standardised.standardised(context, of='images', kind='zca', eps=0.0)
    found = white.fetch(rows)['input']
    np.testing.assert_allclose(white.to_pixels(found), images, atol=1e-3)
    # Pairs, say, of whitened images are shown as these are.
    np.testing.assert_array_equal(
        sources.Derived(white, {}).to_pixels(found), white.to_pixels(found)
    )
    # Sixteen directions have unit variance, the others none.
    variances = np.linalg.eigvalsh(np.cov(found.reshape(300, 64).T))
    np.testing.assert_allclose(variances, [0.0] * 48 + [1.0] * 16, atol=1e-3)
    small = mapped.resized(SourceContext('train[:5]'), of='images', crop=6, size=3)
    blocks = images[:5, 1:7, 1:7].reshape(5, 3, 2, 3, 2, 1).mean((2, 4))
    np.testing.assert_allclose(small.fetch(np.arange(5))['input'], blocks, atol=1e-5)
    assert small.spec['input'].shape == (3, 3, 1)
    with pytest.raises(ValueError, match='must satisfy size <= crop <= 8'):
        mapped.resized(context, of='images', crop=9, size=3)


def test_recipe_distils_the_average_of_its_first_stage_and_reports_by_steps(tmp_path):
    config = kd_config.load('configs/flow/checkerboard.py:cpu,lmd')
    for name in config.stages:
        stage = config[name]
        stage.steps, stage.batch_size, stage.checkpoint_every, stage.log_every = 4, 64, 4, 4
        stage.network.width, stage.network.depth = 8, 1
        stage.evaluators.samples.steps = (1, 2)
        stage.evaluators.samples.samples = 500
        stage.evaluators.samples.batch = 500
        stage.evaluators.geometry.samples = 16
        stage.evaluators.geometry.steps = 4
    config.mesh.data = 1
    report = loop.run(config, tmp_path / 'run')
    text = report.read_text()
    results = json.loads(report.with_suffix('.json').read_text())
    for title in ('flow, Euler', 'flow map, lmd'):
        values = [results[title][f'samples/kl_{n}'] for n in (1, 2)]
        assert f'| {title} | {values[0]:.4f} | {values[1]:.4f} |' in text
        # 500 points of almost pure noise are nowhere near the board.
        assert min(values) > 0.5
    floor = results['flow, Euler']['samples/kl_floor']
    # With 500 points even a perfect sampler is far off.
    assert 0.5 < floor < min(values)
    assert f'| a perfect sampler | {floor:.4f} | {floor:.4f} |' in text
    assert (tmp_path / 'run/map/figures/samples_samples_4.png').stat().st_size > 5_000
    assert 'map/figures/samples_samples_4.png' in text


@pytest.mark.parametrize('algorithm', ['lsd', 'psd_midpoint'])
def test_a_step_normalises_every_weight_once(monkeypatch, algorithm):
    """Otherwise every evaluation of the network reduces a gradient of its own over the devices."""
    shape = jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)
    module = UNet(channels=8, multipliers=(1,), blocks=1, attention=(), time_weight=0)
    net = from_linen(module, *velocity_inputs({'input': shape}))
    made = dataclasses.replace(context(net), spec={'input': shape})
    method = flow_map(made, algorithm=algorithm)
    state = jax.eval_shape(method.init, jax.random.key(0), None)
    weights = [x for x in jax.tree.leaves(state.params['network']) if x.ndim > 1]
    normalised, plain = [], mp._effective
    monkeypatch.setattr(mp, '_effective', lambda w, dtype: normalised.append(w) or plain(w, dtype))
    jax.eval_shape(method.step, state, {'input': jnp.zeros((8, *shape.shape))})
    assert len(normalised) == len(weights)


def test_log_variance_reads_the_weight_beside_the_network():
    net = network(time_weight=4)
    params = random_variables(net, 1)['params']
    s, t = jnp.array([0.1, 0.5]), jnp.array([0.4, 0.9])
    expected = TimeWeight(4).apply({'params': params['time_weight']}, s, t)
    np.testing.assert_array_equal(log_variance(params, s, t), expected)
    assert MPDense(4).init(jax.random.key(0), jnp.ones((1, 4)))['params'].keys() == {'mp_weight'}
