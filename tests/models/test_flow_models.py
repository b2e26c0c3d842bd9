"""The two-time networks: derivatives against finite differences, and what they promise."""

import dataclasses
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from kd.losses.flow_map import flow_map, squared_error
from kd.losses.flow_map_checks import check_velocity_function
from kd.models import magnitude_preserving as mp
from kd.models.conditioning import TimeWeight, class_features, positional_embedding
from kd.models.dit import DiT
from kd.models.unet import Block, UNet
from kd.models.velocity_mlp import VelocityMLP

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, CLASSES = 2, 3


def init(network, s, t, x, **options):
    # The 'rbg' generator compiles several times faster than the default one.
    return jax.jit(network.init)(jax.random.key(1, impl='rbg'), s, t, x, **options)


NETWORKS = {
    'mlp': (VelocityMLP(width=16, depth=2, num_classes=CLASSES, dtype=jnp.float64), (2,)),
    'mlp_fourier': (
        VelocityMLP(
            width=16, depth=2, data_scale=0.6, frequencies=(1, 2), num_classes=CLASSES,
            dtype=jnp.float64,
        ),
        (2,),
    ),
    'unet': (
        UNet(
            channels=8, multipliers=(1, 2), blocks=0, attention=(4,), dropout=0.5,
            num_classes=CLASSES, channels_per_head=8, dtype=jnp.float64,
        ),
        (4, 4, 1),
    ),
    'dit': (
        DiT(
            patch=2, width=16, depth=1, heads=2, dropout=0.5, num_classes=CLASSES,
            dtype=jnp.float64,
        ),
        (4, 4, 1),
    ),
}  # fmt: skip


@pytest.fixture(autouse=True, scope='module')
def _x64():
    with jax.enable_x64(True):
        yield


@dataclasses.dataclass
class Case:
    name: str
    network: nn.Module
    initial: dict
    params: dict  # perturbed, so that zero gains do not hide the rest
    jvp: Callable  # jitted (params, label, (s, t, x), tangents) -> (velocity, its derivative)
    s: jax.Array
    t: jax.Array
    x: jax.Array
    label: jax.Array

    def bind(self, params=None, label=None):
        params, label = params or self.params, self.label if label is None else label

        def velocity(s, t, x):
            # The same program as the derivative: each further one costs seconds to compile.
            point = (s, t, x)
            return self.jvp(params, label, point, jax.tree.map(np.zeros_like, point))[0]

        return velocity


@pytest.fixture(name='case', scope='module', params=NETWORKS)
def _case(request, _x64):
    network, shape = NETWORKS[request.param]
    keys = jax.random.split(jax.random.key(0), 4)
    s, t = jnp.array([0.1, 0.3]), jnp.array([0.6, 0.9])
    x = 0.5 * jax.random.normal(keys[0], (B, *shape), jnp.float64)
    label = jnp.array([0, 2])
    # float64 throughout: parameters are float32 as trained, wide here for finite differences.
    shapes = jax.eval_shape(network.init, keys[1], s, t, x, label=label)
    rng = np.random.default_rng(0)
    # NumPy arrays, here and below: each operation on each shape would be a program to compile.
    params = jax.tree.map(lambda p: np.asarray(0.5 * rng.standard_normal(p.shape)), shapes)
    if request.param == 'unet':
        # Drawing all its weights takes long to compile; the gains alone are enough.
        gains = jax.jit(
            lambda key: jax.tree.map(
                lambda p: p if p.ndim == 0 else None, network.init(key, s, t, x, label=label)
            )
        )(keys[1])
        initial = jax.tree.map(
            lambda gain, p: p if gain is None else gain, gains, params, is_leaf=lambda p: p is None
        )
    else:
        initial = init(network, s, t, x, label=label)
    initial = jax.tree.map(lambda p: np.asarray(p, np.float64), initial)

    @jax.jit
    def jvp(params, label, point, tangents):
        return jax.jvp(lambda *a: network.apply(params, *a, label=label), point, tangents)

    return Case(request.param, network, initial, params, jvp, s, t, x, label)


def test_map_is_the_identity_at_initialisation(case):
    v = case.bind(case.initial)
    np.testing.assert_array_equal(flow_map(v, case.s, case.t, case.x), case.x)
    assert float(jnp.max(jnp.abs(case.bind()(case.s, case.t, case.x)))) > 1e-2


def test_forward_derivative_passes_through_every_layer(case):
    v, h = case.bind(), 1e-5
    dx = jax.random.normal(jax.random.key(5), case.x.shape, case.x.dtype)
    direction = (jnp.array([1.0, -0.5]), jnp.array([0.7, 1.0]), dx)
    primal = (case.s, case.t, case.x)
    value, derivative = case.jvp(case.params, case.label, primal, direction)
    ends = [
        v(*(p + sign * h * d for p, d in zip(primal, direction, strict=True))) for sign in (1, -1)
    ]
    np.testing.assert_allclose(value, v(*primal), atol=1e-12)
    scale = float(jnp.max(jnp.abs(derivative)))
    np.testing.assert_allclose(derivative, (ends[0] - ends[1]) / (2 * h), atol=1e-7 * scale)


def test_gradient_of_a_time_derivative_reaches_every_parameter(case):
    direction = jax.tree.map(np.cos, case.params)

    @jax.jit
    @jax.value_and_grad
    def loss(params):
        def v(s, t, x):
            return case.network.apply(params, s, t, x, label=case.label)

        if case.name == 'unet':
            # Every kind of block has both derivatives (below); the whole takes long to compile.
            return jnp.sum(squared_error(v(case.s, case.t, case.x)))
        value, slope = jax.jvp(lambda t: v(case.s, t, case.x), (case.t,), (jnp.ones(B),))
        return jnp.sum(squared_error(value + 0.5 * slope))

    gradient = jax.device_get(loss(case.params)[1])
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), gradient, direction)))
    h = 1e-6
    ends = [
        loss(jax.tree.map(lambda p, d, sign=sign: p + sign * h * d, case.params, direction))[0]
        for sign in (1, -1)
    ]
    np.testing.assert_allclose(slope, (ends[0] - ends[1]) / (2 * h), rtol=1e-5)
    dead = [
        jax.tree_util.keystr(path)
        for path, g in jax.tree_util.tree_leaves_with_path(gradient)
        if not np.any(g != 0)
    ]
    assert dead == []


def test_both_times_reach_the_output_even_with_zero_gain(case):
    check_velocity_function(case.bind(case.initial), case.x)
    check_velocity_function(case.bind(), case.x)


def test_label_matters_and_no_label_is_the_null_class(case):
    null = case.bind(label=jnp.full(B, CLASSES))(case.s, case.t, case.x)
    if case.name != 'unet':  # another program, slow to compile; the parts are shared
        without = jax.jit(case.network.apply)(case.params, case.s, case.t, case.x)
        np.testing.assert_allclose(null, without, atol=1e-12)
    values = [case.bind(label=jnp.full(B, k))(case.s, case.t, case.x) for k in range(CLASSES + 1)]
    for i in range(CLASSES):
        for j in range(i):
            assert float(jnp.max(jnp.abs(values[i] - values[j]))) > 1e-4


def test_examples_of_a_batch_do_not_mix(case):
    v, flip = case.bind(), slice(None, None, -1)
    swapped = case.bind(label=case.label[flip])(case.s[flip], case.t[flip], case.x[flip])
    np.testing.assert_allclose(swapped[flip], v(case.s, case.t, case.x), atol=1e-12)


@pytest.mark.parametrize('case', ['unet', 'dit'], indirect=True, scope='module')
def test_dropout_acts_in_training_only(case):
    args = (case.s, case.t, case.x)

    @jax.jit
    def noisy(params, key):
        rngs = {'dropout': key}
        return case.network.apply(params, *args, label=case.label, train=True, rngs=rngs)

    keys = [jax.random.key(seed, impl='rbg') for seed in (1, 1, 2)]
    a, b, c = (noisy(case.params, key) for key in keys)
    np.testing.assert_array_equal(a, b)
    assert float(jnp.max(jnp.abs(a - c))) > 1e-4
    assert float(jnp.max(jnp.abs(a - case.bind()(*args)))) > 1e-4


@pytest.mark.parametrize('name', ['mlp', 'dit'])
def test_low_precision_network_keeps_float32_outside(name):
    network, shape = NETWORKS[name]
    low, full = network.copy(dtype=jnp.bfloat16), network.copy(dtype=jnp.float32)
    rng = np.random.default_rng(0)
    s, t = np.array([0.1, 0.3], np.float32), np.array([0.6, 0.9], np.float32)
    x = 0.5 * rng.standard_normal((B, *shape)).astype(np.float32)
    shapes = jax.eval_shape(low.init, jax.random.key(1), s, t, x)
    assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(shapes))
    params = jax.tree.map(lambda p: 0.3 * rng.standard_normal(p.shape).astype(p.dtype), shapes)
    coarse, fine = (np.asarray(jax.jit(net.apply)(params, s, t, x)) for net in (low, full))
    assert coarse.dtype == fine.dtype == np.float32
    assert 0 < np.abs(coarse - fine).max() < 0.05 * np.abs(fine).max()


# Parts.


def test_positional_embedding_is_the_stated_wave_at_unit_power():
    t = np.array([0.0, 0.3, 1.0])
    frequency = np.exp(-np.log(1e4) * np.arange(4) / 4)
    wanted = np.sqrt(2) * np.concatenate(
        [np.cos(t[:, None] * frequency), np.sin(t[:, None] * frequency)], axis=1
    )
    embedding = positional_embedding(jnp.asarray(t), 8)
    np.testing.assert_allclose(embedding, wanted, atol=1e-12)
    np.testing.assert_allclose(jnp.mean(embedding**2, axis=1), 1.0, atol=1e-12)
    with pytest.raises(ValueError, match='size=7, expected an even number'):
        positional_embedding(jnp.asarray(t), 7)


def test_class_features_have_unit_power_and_a_null_column():
    features = class_features(jnp.array([1]), 3, 2, jnp.float32)
    np.testing.assert_array_equal(features, [[0, 2, 0, 0], [0, 2, 0, 0]])
    np.testing.assert_array_equal(class_features(None, 3, 1, jnp.float32), [[0, 0, 0, 2]])
    assert class_features(None, None, 1, jnp.float32) is None
    outside = class_features(jnp.array([-1, 3, 4]), 3, 3, jnp.float32)
    np.testing.assert_array_equal(np.isnan(outside).all(1), [True, False, True])
    with pytest.raises(ValueError, match='unconditional network; set num_classes'):
        class_features(jnp.array([1]), None, 1, jnp.float32)


def test_sums_concatenations_and_activations_preserve_magnitude():
    a, b = jax.random.normal(jax.random.key(0), (2, 40_000))
    for balance in (0.3, 0.5):
        np.testing.assert_allclose(jnp.mean(mp.mp_sum(a, b, balance) ** 2), 1.0, atol=0.03)
    np.testing.assert_allclose(jnp.mean(mp.mp_silu(a) ** 2), 1.0, atol=0.03)
    joined = mp.mp_concat(a.reshape(-1, 10), b[:12_000].reshape(4000, 3))
    np.testing.assert_allclose(jnp.mean(joined**2), 1.0, atol=0.03)
    # Equal balance: both parts contribute the same energy whatever their widths.
    energy = jnp.sum(joined**2, axis=0)
    np.testing.assert_allclose(jnp.sum(energy[:10]) / jnp.sum(energy[10:]), 1.0, atol=0.05)


def test_unit_norm_has_unit_rms_and_a_finite_gradient_at_zero():
    x = 7 * jax.random.normal(jax.random.key(0), (4, 32))
    rms = jnp.sqrt(jnp.mean(mp.unit_norm(x, -1) ** 2, axis=-1))
    np.testing.assert_allclose(rms, 1.0, atol=1e-4)
    gradient = jax.grad(lambda x: jnp.sum(mp.unit_norm(x, -1)))(jnp.zeros((2, 3)))
    assert jnp.all(jnp.isfinite(gradient))


def test_convolution_uses_unit_kernels_and_equals_scipy():
    conv = mp.MPConv(2, 3, jnp.float64)
    x = jax.random.normal(jax.random.key(0), (1, 5, 6, 3), jnp.float64)
    params = conv.init(jax.random.key(1), x)
    kernel = np.array(params['params']['mp_weight'], np.float64)
    kernel /= np.sqrt(np.sum(kernel**2, axis=(0, 1, 2), keepdims=True))
    wanted = np.zeros((5, 6, 2))
    for i in range(3):
        for o in range(2):
            wanted[..., o] += scipy.signal.correlate2d(
                np.asarray(x)[0, :, :, i], kernel[:, :, i, o], mode='same'
            )
    np.testing.assert_allclose(conv.apply(params, x)[0], wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize('case', ['unet'], indirect=True, scope='module')
def test_weight_projection_changes_lengths_only(case):
    # Lengths drift apart in training; the network must not notice.
    grown = jax.tree.map(lambda p: 3.0 * p if p.ndim > 1 else p, case.params)
    project = jax.jit(mp.normalize_weights)
    projected = jax.device_get(project(grown))
    for path, leaf in jax.tree_util.tree_leaves_with_path(projected):
        if leaf.ndim > 1:
            rms = np.sqrt(np.mean(np.square(leaf), axis=tuple(range(leaf.ndim - 1))))
            np.testing.assert_allclose(rms, 1.0, atol=1e-3, err_msg=jax.tree_util.keystr(path))
    gain = case.params['params']['out_gain']
    assert projected['params']['out_gain'] == gain
    args = (case.s, case.t, case.x)
    out = case.bind(grown)(*args)
    np.testing.assert_allclose(case.bind(projected)(*args), out, atol=2e-3 * np.abs(out).max())
    again = jax.device_get(project(projected))
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(projected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3)


def test_gradient_is_orthogonal_to_a_normalised_weight():
    layer = mp.MPDense(4, jnp.float64)
    x = jax.random.normal(jax.random.key(0), (8, 5), jnp.float64)
    weight = layer.init(jax.random.key(1), x)['params']['mp_weight'].astype(jnp.float64)
    gradient = jax.grad(lambda w: jnp.sum(jnp.sin(layer.apply({'params': {'mp_weight': w}}, x))))(
        weight
    )
    along = jnp.sum(gradient * weight, axis=0)
    length = jnp.linalg.norm(gradient, axis=0) * jnp.linalg.norm(weight, axis=0)
    assert jnp.max(jnp.abs(along) / length) < 1e-3


def test_widening_encoder_block_has_both_derivatives():
    # The one kind of block that the small UNet above does not contain.
    block = Block(features=6, encoder=True, attention=True, dtype=jnp.float64)
    rng = np.random.default_rng(1)
    x, dx = rng.standard_normal((2, 1, 4, 4, 3))
    embedding, step = rng.standard_normal((2, 1, 5))
    shapes = jax.eval_shape(lambda: block.init(jax.random.key(0), x, embedding, False))
    params = jax.tree.map(lambda p: np.asarray(rng.standard_normal(p.shape)), shapes)
    names = [path[1].key for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert {'skip', 'qkv'} <= set(names)

    @jax.jit
    def tangent(params, h):
        at = (x + h * dx, embedding + h * step)
        return jax.jvp(lambda *a: block.apply(params, *a, False), at, (dx, step))

    h = 1e-6
    ends = [tangent(params, sign * h)[0] for sign in (1, -1)]
    derivative = tangent(params, 0.0)[1]
    np.testing.assert_allclose(derivative, (ends[0] - ends[1]) / (2 * h), atol=1e-7)
    loss = jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.square(tangent(p, 0.0)[1]))))
    gradient = jax.device_get(loss(params)[1])
    moved = [
        loss(jax.tree.map(lambda p, sign=sign: p + sign * h * np.cos(p), params))[0]
        for sign in (1, -1)
    ]
    slope = sum(
        np.sum(g * np.cos(p))
        for g, p in zip(jax.tree.leaves(gradient), jax.tree.leaves(params), strict=True)
    )
    np.testing.assert_allclose(slope, (moved[0] - moved[1]) / (2 * h), rtol=1e-5)


def test_unet_attends_where_asked_and_at_the_bottleneck():
    def attending(attention):
        network = UNet(channels=8, multipliers=(1, 1, 1), blocks=1, attention=attention)
        x = jnp.zeros((1, 8, 8, 1), jnp.float32)
        s = jnp.zeros(1, jnp.float32)
        params = jax.eval_shape(network.init, jax.random.key(0), s, s, x)['params']
        return sorted(name for name, block in params.items() if 'qkv' in str(block))

    assert attending(()) == ['middle0']
    assert attending((4,)) == ['decoder1_0', 'decoder1_1', 'encoder1_0', 'middle0']


def test_time_weight_is_one_layer_of_unit_norm_on_the_sum_of_embeddings():
    module = TimeWeight()
    s, t = jnp.array([0.1, 0.1, 0.2]), jnp.array([0.5, 0.6, 0.6])
    params = module.init(jax.random.key(0), s, t)['params']
    assert jax.tree.map(jnp.shape, params) == {'out': {'mp_weight': (128, 1)}}
    drawn = np.asarray(params['out']['mp_weight'], np.float64)[:, 0]
    assert abs(drawn.mean()) < 0.3
    assert 0.8 < drawn.std() < 1.2
    frequency = 1e4 ** (-np.arange(64) / 64)
    angles = np.stack([np.asarray(s), np.asarray(t)])[..., None] * frequency
    embedded = np.sqrt(2) * np.concatenate([np.cos(angles), np.sin(angles)], axis=-1)
    expected = embedded.sum(0) / np.sqrt(2) @ (drawn / np.linalg.norm(drawn))
    np.testing.assert_allclose(module.apply({'params': params}, s, t), expected, rtol=1e-3)
    assert len(np.unique(expected.round(4))) == 3
    # Only the direction of the weights counts, and a projected step leaves their length alone.
    longer = jax.tree.map(lambda w: 3.0 * w, params)
    np.testing.assert_allclose(module.apply({'params': longer}, s, t), expected, rtol=1e-3)
    projected = mp.normalize_weights(longer)['out']['mp_weight']
    np.testing.assert_allclose(jnp.linalg.norm(projected), 128**0.5, rtol=1e-3)


def test_shapes_that_do_not_fit_are_refused():
    s, x = jnp.zeros(1), jnp.zeros((1, 6, 6, 1))
    with pytest.raises(ValueError, match='3 levels needs image sides divisible by 4, got 6x6'):
        UNet(channels=8).init(jax.random.key(0), s, s, x)
    with pytest.raises(ValueError, match='DiT with patch 4 got images of 6x6'):
        DiT(patch=4).init(jax.random.key(0), s, s, x)
    with pytest.raises(ValueError, match='width 8 is not divisible by 3 heads'):
        DiT(width=8, heads=3).init(jax.random.key(0), s, s, x)


class _Layers(nn.Module):
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x):
        gain = self.param('gain', nn.initializers.ones, ())
        hidden = mp.mp_silu(mp.MPConv(6, 3, self.dtype, name='conv')(x))
        return mp.MPDense(2, self.dtype, name='dense')(hidden, gain)


@pytest.mark.parametrize('dtype', [jnp.float64, jnp.bfloat16])
def test_weights_normalised_once_for_two_calls_have_the_same_gradient(dtype):
    network = _Layers(dtype)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 2))
    params = network.init(jax.random.key(1), x)['params']

    def loss(params, shared):
        effective = {'effective': mp.effective_weights(params, dtype)} if shared else {}
        variables = {'params': params, **effective}
        first = network.apply(variables, x)
        return jnp.square(first).sum() + jnp.sin(network.apply(variables, first)).sum()

    apart, shared = (jax.jit(jax.value_and_grad(partial(loss, shared=b)))(params) for b in (0, 1))
    assert shared[0] == apart[0]
    tolerance = 1e-12 if dtype == jnp.float64 else 2e-2
    for one, other in zip(jax.tree.leaves(apart[1]), jax.tree.leaves(shared[1]), strict=True):
        assert one.dtype == other.dtype == jnp.float64
        assert jnp.linalg.norm(one) > 0.0
        assert jnp.linalg.norm(one - other) <= tolerance * jnp.linalg.norm(one)
    # What is given is what the layers use.
    none = jax.tree.map(jnp.zeros_like, mp.effective_weights(params, dtype))
    assert set(none) == {'conv', 'dense'}
    assert not network.apply({'params': params, 'effective': none}, x).any()
