"""Vision networks against published sizes, NumPy float64, and their symmetries."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import signal, special

from kd.models import layers
from kd.models.convnet import ConvNet
from kd.models.mlp import MLP
from kd.models.resnet import ResNet, WideResNet
from kd.models.vit import ViT

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CIFAR = (1, 32, 32, 3)


def count(module, shape):
    variables = jax.eval_shape(lambda key: module.init(key, jnp.zeros(shape)), jax.random.key(0))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(variables))
    return sum(x.size for x in jax.tree.leaves(variables['params']))


@pytest.mark.parametrize(
    ('module', 'shape', 'expected'),
    [
        (ConvNet(3, 128), CIFAR, 320_010),
        (ConvNet(3, 128), (1, 28, 28, 1), 317_706),
        # 3 x 8 channels: 3x3 or 3 kernel, bias, scale, shift; and 10 logits of the rest.
        (ConvNet(2, 8), (1, 9, 9, 1), 9 * 8 + 24 + 9 * 64 + 24 + 4 * 8 * 10 + 10),
        (ConvNet(3, 8), (1, 40, 1), 3 * 8 + 24 + 2 * (3 * 64 + 24) + 5 * 8 * 10 + 10),
        (MLP((16,)), (1, 8, 8, 1), 65 * 16 + 17 * 10),
        (MLP(()), (1, 40, 1), 410),
        (ResNet(8), CIFAR, 78_042),
        (ResNet(20), CIFAR, 272_474),
        (ResNet(56), CIFAR, 855_770),
        (ResNet(110), CIFAR, 1_730_714),
        (WideResNet(16, widen=2), CIFAR, 691_674),
        (WideResNet(40, widen=2), CIFAR, 2_243_546),
        (WideResNet(28, widen=10), CIFAR, 36_479_194),
        (ViT(16, 192, 12, 3, 1000, pool='cls'), (1, 224, 224, 3), 5_717_416),
        (ViT(16, 384, 12, 6, 1000, pool='cls'), (1, 224, 224, 3), 22_050_664),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_parameter_counts_are_the_published_ones(module, shape, expected):
    assert count(module, shape) == expected


# --- Forward passes against NumPy and SciPy in float64. -------------------------------------------

IMAGES = np.random.default_rng(0).normal(size=(3, 8, 8, 2))
X = jnp.asarray(IMAGES, jnp.float32)

NETWORKS = {
    'MLP': MLP((7, 5), 4, activation='gelu'),
    'ConvNet': ConvNet(2, 6, 4),
    'ResNet': ResNet(8, 4),
    'WideResNet': WideResNet(10, 4, widen=2),
    'ViT': ViT(4, 12, 2, 3, 4),
    'ViT-cls': ViT(2, 12, 2, 3, 4, pool='cls'),
    'ViT-patches': ViT(2, 12, 2, 3, 4, pool='patches', places='grid', drop_path=0.5),
}


@functools.cache
def randomised(name):
    """Variables of a network with every leaf random, so that no scale, shift or bias is trivial."""
    return randomise(NETWORKS[name])


def randomise(network):
    shapes = jax.eval_shape(network.init, jax.random.key(0), X)
    rng = np.random.default_rng(2)

    def draw(path, leaf):
        if 'kernel' in jax.tree_util.keystr(path):
            fan_in = leaf.size // leaf.shape[-1]
            values = rng.normal(size=leaf.shape) / np.sqrt(fan_in)
        else:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    return jax.tree.map_with_path(draw, shapes)


def apply(network, variables, x, train=False):
    """(logits, {feature or submodule: its output}, updated batch statistics)."""
    mutable = ['intermediates', *(['batch_stats'] if train else [])]
    logits, updates = network.apply(
        variables, x, train=train, capture_intermediates=True, mutable=mutable
    )
    return logits, updates['intermediates'], updates.get('batch_stats')


@functools.cache
def jitted(name, train=False):
    return jax.jit(functools.partial(apply, NETWORKS[name], train=train))


def float64(tree):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), tree)


VIT_HEADS = 3


def dense(p, x):
    return x @ p['kernel'] + p.get('bias', 0)


def conv(p, x, stride=1):
    """Cross-correlation, zero-padded by half the kernel on every side, then strided."""
    kernel = p['kernel']
    out = np.zeros((*x.shape[:3], kernel.shape[-1]))
    for n in range(len(x)):
        for o in range(kernel.shape[-1]):
            for c in range(x.shape[-1]):
                out[n, ..., o] += signal.correlate2d(x[n, ..., c], kernel[..., c, o], mode='same')
    return out[:, ::stride, ::stride] + p.get('bias', 0)


def standardise(p, x, axes, epsilon):
    centred = x - x.mean(axis=axes, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=axes, keepdims=True) + epsilon)
    return centred / scale * p['scale'] + p['bias']


def batch_norm(p, s, x):
    return (x - s['mean']) / np.sqrt(s['var'] + 1e-5) * p['scale'] + p['bias']


def relu(x):
    return np.maximum(x, 0)


def gelu(x, exact=True):
    if exact:
        return x * special.ndtr(x)
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def numpy_mlp(p, s, x):
    x = x.reshape(len(x), -1)
    for name in ('hidden0', 'hidden1'):
        x = gelu(dense(p[name], x), exact=False)
    return dense(p['head'], x)


def numpy_convnet(p, s, x):
    for name in ('block0', 'block1'):
        x = relu(standardise(p[name]['norm'], conv(p[name]['conv'], x), (1, 2), 1e-5))
        x = x.reshape(len(x), x.shape[1] // 2, 2, x.shape[2] // 2, 2, -1).mean(axis=(2, 4))
    return dense(p['head'], x.reshape(len(x), -1))


def numpy_resnet(p, s, x):
    x = relu(batch_norm(p['stem_norm'], s['stem_norm'], conv(p['stem'], x)))
    for stage, stride in (('stage1', 1), ('stage2', 2), ('stage3', 2)):
        q, t = p[stage]['block0'], s[stage]['block0']
        y = relu(batch_norm(q['norm1'], t['norm1'], conv(q['conv1'], x, stride)))
        y = batch_norm(q['norm2'], t['norm2'], conv(q['conv2'], y))
        if 'shortcut' in q:
            x = batch_norm(q['shortcut_norm'], t['shortcut_norm'], conv(q['shortcut'], x, stride))
        x = relu(x + y)
    return dense(p['head'], x.mean(axis=(1, 2)))


def numpy_wide_resnet(p, s, x):
    x = conv(p['stem'], x)
    for stage, stride in (('stage1', 1), ('stage2', 2), ('stage3', 2)):
        q, t = p[stage]['block0'], s[stage]['block0']
        a = relu(batch_norm(q['norm1'], t['norm1'], x))
        y = relu(batch_norm(q['norm2'], t['norm2'], conv(q['conv1'], a, stride)))
        x = conv(q['shortcut'], a, stride) + conv(q['conv2'], y)
    x = relu(batch_norm(p['final_norm'], s['final_norm'], x))
    return dense(p['head'], x.mean(axis=(1, 2)))


def numpy_vit(p, s, x, *, pool):
    kernel = p['patch_embed']['kernel']
    side, width = kernel.shape[0], kernel.shape[-1]
    n, h, w, c = x.shape
    x = x.reshape(n, h // side, side, w // side, side, c).transpose(0, 1, 3, 2, 4, 5)
    x = x.reshape(n, -1, side * side * c) @ kernel.reshape(-1, width) + p['patch_embed']['bias']
    if pool != 'gap':
        x = np.concatenate([np.broadcast_to(p['cls'], (n, 1, width)), x], axis=1)
    x = x + p['positions']
    for name in ('block0', 'block1'):
        q, a = p[name], p[name]['attention']
        y = standardise(q['norm1'], x, -1, 1e-6)
        query, key, value = (
            np.stack(np.split(dense(a[role], y), VIT_HEADS, axis=-1), axis=1)
            for role in ('query', 'key', 'value')
        )
        scores = np.einsum('nhtd,nhsd->nhts', query, key) / np.sqrt(query.shape[-1])
        mixed = special.softmax(scores, axis=-1) @ value
        x = x + dense(a['out'], np.concatenate(mixed.swapaxes(0, 1), axis=-1))
        y = standardise(q['norm2'], x, -1, 1e-6)
        x = x + dense(q['mlp']['down'], gelu(dense(q['mlp']['up'], y)))
    if pool == 'patches':
        return dense(p['head'], standardise(p['encoder_norm'], x[:, 1:].mean(axis=1), -1, 1e-6))
    x = standardise(p['encoder_norm'], x, -1, 1e-6)
    return dense(p['head'], x.mean(axis=1) if pool == 'gap' else x[:, 0])


NUMPY = {
    'MLP': numpy_mlp,
    'ConvNet': numpy_convnet,
    'ResNet': numpy_resnet,
    'WideResNet': numpy_wide_resnet,
    'ViT': functools.partial(numpy_vit, pool='gap'),
    'ViT-cls': functools.partial(numpy_vit, pool='cls'),
    'ViT-patches': functools.partial(numpy_vit, pool='patches'),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_forward_pass_equals_numpy_in_float64(name):
    variables = randomised(name)
    logits, _, _ = jitted(name)(variables, X)
    p, s = (float64(variables.get(key, {})) for key in ('params', 'batch_stats'))
    expected = NUMPY[name](p, s, IMAGES)
    assert logits.dtype == jnp.float32
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize('padding', ['SAME', 'VALID', ((1, 1), (2, 0))])
@pytest.mark.parametrize('stride', [1, 2])
def test_convolution_by_matrix_product_equals_the_plain_one(stride, padding):
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(2, 6, 7, 3)), rng.normal(size=(3, 2, 3, 4))
    with jax.enable_x64(True):
        strides = (stride, stride)
        expected = jax.lax.conv_general_dilated(
            x, kernel, strides, padding, dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        np.testing.assert_allclose(
            layers.matmul_conv(x, kernel, strides, padding), expected, atol=1e-12
        )


def test_convnet_by_matrix_products_has_the_same_value_and_gradient():
    variables = randomised('ConvNet')

    def loss(network, variables):
        return jnp.sum(jnp.tanh(network.apply(variables, X) / 10))

    results = [
        jax.jit(jax.value_and_grad(functools.partial(loss, NETWORKS['ConvNet'].clone(conv=conv))))(
            variables
        )
        for conv in ('direct', 'matmul')
    ]
    assert jnp.abs(results[0][1]['params']['block0']['conv']['kernel']).max() > 1e-3
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), *results)


def test_convnet_sees_mnist_images_as_32x32():
    network = ConvNet(1, 4)
    images = jax.random.normal(jax.random.key(1), (2, 28, 28, 1))
    variables = network.init(jax.random.key(0), images)
    padded = jnp.pad(images, ((0, 0), (2, 2), (2, 2), (0, 0)))
    np.testing.assert_allclose(
        network.apply(variables, images), network.apply(variables, padded), atol=1e-5
    )


@pytest.fixture(scope='module')
def signals():
    """A one-dimensional ConvNet, signals [3, 9, 2], and variables as initialised."""
    network = ConvNet(2, 6, 4)
    x = np.random.default_rng(1).normal(size=(3, 9, 2))
    return network, x, jax.jit(network.init)(jax.random.key(0), jnp.asarray(x, jnp.float32))


def test_signals_equal_numpy_in_float64(signals):
    network, x, variables = signals
    p = float64(variables['params'])
    y = x
    for name in ('block0', 'block1'):
        kernel = p[name]['conv']['kernel']
        padded = np.pad(y, ((0, 0), (1, 1), (0, 0)))
        y = sum(padded[:, k : k + y.shape[1]] @ kernel[k] for k in range(3))
        y = relu(standardise(p[name]['norm'], y + p[name]['conv']['bias'], 1, 1e-5))
        y = y[:, : y.shape[1] // 2 * 2].reshape(3, y.shape[1] // 2, 2, -1).mean(axis=2)
    expected = dense(p['head'], y.reshape(3, -1))
    logits = jax.jit(network.apply)(variables, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', ['ConvNet', 'ResNet', 'ViT'])
def test_logits_without_jit_equal_those_with_it(name):
    variables = randomised(name)
    plain = NETWORKS[name].apply(variables, X)
    scale = float(jnp.abs(plain).max())
    logits, _, _ = jitted(name)(variables, X)
    np.testing.assert_allclose(logits, plain, rtol=1e-5, atol=1e-5 * scale)


# --- Symmetries. ----------------------------------------------------------------------------------


def test_instance_norm_makes_the_convnet_blind_to_contrast():
    """logits(a x) = logits(x) for a > 0, exactly but for epsilon; without the norm they differ."""
    gap = {}
    for norm in ('instance', 'none'):
        network = NETWORKS['ConvNet'].clone(norm=norm)
        run = jax.jit(network.apply)
        plain, bright = (run(randomised('ConvNet'), a * X) for a in (1, 3))
        gap[norm] = jnp.abs(bright - plain).max() / jnp.abs(plain).max()
    assert gap['instance'] < 1e-3
    assert gap['none'] > 0.1


@pytest.mark.parametrize(
    ('name', 'last', 'side'), [('ConvNet', 'block1', 8), ('ResNet', 'stage3', 9)]
)
def test_mirrored_kernels_see_mirrored_images_alike(name, last, side):
    """Mirroring images and kernels mirrors the features: padding and strides favour no side."""
    x = jnp.asarray(np.random.default_rng(3).normal(size=(3, side, side, 2)), jnp.float32)
    variables = randomised(name)
    mirrored = jax.tree.map(lambda w: w[:, ::-1] if w.ndim == 4 else w, variables)

    def features(variables, x):
        return jitted(name)(variables, x)[1][last]['__call__'][0]

    plain = features(variables, x)
    flipped = x[:, :, ::-1]
    np.testing.assert_allclose(features(mirrored, flipped)[:, :, ::-1], plain, atol=1e-4)
    assert jnp.abs(features(variables, flipped)[:, :, ::-1] - plain).max() > 0.05


def test_a_path_that_is_dropped_leaves_an_example_as_it_was():
    """In training the first block of two is whole, and each branch of the second a coin."""
    network = NETWORKS['ViT-patches'].copy(drop_path=0.5, depth=2)
    variables = randomised('ViT-patches')

    @jax.jit
    def blocks(variables, key):
        _, state = network.apply(
            variables, X[:1].repeat(40, 0), train=True, rngs={'dropout': key},
            capture_intermediates=lambda m, _: '/'.join(m.path) in BRANCHES,
        )  # fmt: skip
        found = state['intermediates']
        return [
            found['block0']['__call__'][0], found['block1']['__call__'][0],
            *(found['block1'][name]['__call__'][0] for name in ('attention', 'mlp')),
        ]  # fmt: skip

    first, second, attention, mlp = map(np.asarray, blocks(variables, jax.random.key(0)))
    assert np.abs(first - first[:1]).max() == 0
    kinds = set()
    for example in range(40):
        left = second[example] - first[example]
        which = [
            (a, m)
            for a in (0, 2)
            for m in (0, 2)
            if np.allclose(left, a * attention[example] + m * mlp[example], atol=1e-4)
        ]
        assert len(which) == 1
        kinds |= set(which)
    assert kinds == {(0, 0), (0, 2), (2, 0), (2, 2)}


BRANCHES = ('block0', 'block1', 'block1/attention', 'block1/mlp')


def test_fixed_places_are_those_that_a_grid_starts_from():
    network = NETWORKS['ViT-patches']
    variables = jax.jit(network.init)(jax.random.key(0), X)
    table = variables['params'].pop('positions')
    np.testing.assert_array_equal(table[0, 0], 0.0)
    # Column 2 of row 0: sin 2, sin .0928..., then cosines; rows sin 0, cos 0.
    np.testing.assert_allclose(table[0, 3, [0, 6, 9]], [0.9092974, 0.0, 1.0], atol=1e-6)
    fixed = jax.jit(network.copy(places='fixed').apply)(variables, X)
    variables['params']['positions'] = table
    np.testing.assert_allclose(fixed, jax.jit(network.apply)(variables, X), atol=1e-6)


def test_vit_sees_the_order_of_patches_only_by_its_positions():
    variables = randomised('ViT')
    swapped = jnp.concatenate([X[:, 4:], X[:, :4]], axis=1)
    blind = {'params': {**variables['params'], 'positions': 0 * variables['params']['positions']}}

    def logits(variables, x):
        return jitted('ViT')(variables, x)[0]

    np.testing.assert_allclose(logits(blind, swapped), logits(blind, X), atol=1e-4)
    assert jnp.abs(logits(variables, swapped) - logits(variables, X)).max() > 1e-2


# --- Batch norm. ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('name', 'norm'), [('ResNet', ('stem_norm',)), ('WideResNet', ('stage1', 'block0', 'norm1'))]
)
def test_training_uses_and_averages_batch_statistics(name, norm):
    variables = randomised(name)
    run = jitted(name, train=True)

    def pick(tree):
        return functools.reduce(lambda t, key: t[key], norm, tree)

    logits, intermediates, updated = run(variables, X)
    raw = conv(float64(variables['params'])['stem'], IMAGES)
    mean, var = raw.mean(axis=(0, 1, 2)), raw.var(axis=(0, 1, 2))
    old, new = pick(variables['batch_stats']), pick(updated)
    np.testing.assert_allclose(new['mean'], 0.9 * old['mean'] + 0.1 * mean, atol=1e-5)
    np.testing.assert_allclose(new['var'], 0.9 * old['var'] + 0.1 * var, atol=1e-5)
    p = pick(float64(variables['params']))
    expected = (raw - mean) / np.sqrt(var + 1e-5) * p['scale'] + p['bias']
    np.testing.assert_allclose(pick(intermediates)['__call__'][0], expected, atol=1e-4)
    # Running statistics do not enter.
    other = {**variables, 'batch_stats': jax.tree.map(lambda s: s + 1, variables['batch_stats'])}
    np.testing.assert_array_equal(run(other, X)[0], logits)


def test_group_norm_standardises_groups_of_channels_and_keeps_no_state():
    network = NETWORKS['ConvNet'].clone(norm='group', width=16)
    variables = randomise(network)
    assert set(variables) == {'params'}
    _, intermediates, _ = jax.jit(functools.partial(apply, network))(variables, X)
    affine = variables['params']['block0']['norm']
    out = float64(intermediates['block0']['norm']['__call__'][0])
    out = (out - affine['bias']) / affine['scale']
    groups = out.reshape(3, 64, layers.GROUPS, -1)
    np.testing.assert_allclose(groups.mean(axis=(1, 3)), 0, atol=1e-5)
    np.testing.assert_allclose(groups.var(axis=(1, 3)), 1, atol=1e-3)


# --- Types, features, errors. ---------------------------------------------------------------------


@pytest.mark.parametrize('name', NETWORKS)
def test_bfloat16_computes_close_to_float32_and_returns_float32(name):
    network = NETWORKS[name].clone(dtype='bfloat16')
    shapes = jax.eval_shape(network.init, jax.random.key(0), X)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype(jnp.float32)}
    variables = randomised(name)
    logits, intermediates, _ = jax.jit(functools.partial(apply, network))(variables, X)
    exact, _, _ = jitted(name)(variables, X)
    assert logits.dtype == jnp.float32
    # bfloat16 keeps 8 bits: each of a few layers adds relative errors of up to 2^-8.
    relative = float(jnp.linalg.norm(logits - exact) / jnp.linalg.norm(exact))
    assert 1e-6 < relative < 0.04
    inner = {
        key: {leaf.dtype for leaf in jax.tree.leaves(value)}
        for key, value in intermediates.items()
        if key not in ('__call__', 'head')
    }
    assert all(dtypes == {jnp.dtype(jnp.bfloat16)} for dtypes in inner.values()), inner


@pytest.mark.parametrize(
    ('name', 'shapes'),
    [
        ('MLP', {'hidden0': (3, 7), 'hidden1': (3, 5), 'features': (3, 5)}),
        ('ConvNet', {'block0': (3, 4, 4, 6), 'block1': (3, 2, 2, 6), 'features': (3, 24)}),
        (
            'ResNet',
            {
                'stem': (3, 8, 8, 16),
                'stage1': (3, 8, 8, 16),
                'stage2': (3, 4, 4, 32),
                'stage3': (3, 2, 2, 64),
                'features': (3, 64),
            },
        ),
        ('WideResNet', {'stage2': (3, 4, 4, 64), 'stage3': (3, 2, 2, 128), 'features': (3, 128)}),
        ('ViT', {'block0': (3, 4, 12), 'block1': (3, 4, 12), 'features': (3, 12)}),
        ('ViT-cls', {'block0': (3, 17, 12), 'features': (3, 12)}),
    ],
)
def test_features_have_the_documented_names_and_shapes(name, shapes):
    variables = randomised(name)
    logits, found, _ = jitted(name)(variables, X)
    assert {key: found[key]['__call__'][0].shape for key in shapes} == shapes
    # The head reads 'features': the logits follow from them.
    features = np.asarray(found['features']['__call__'][0], np.float64)
    expected = dense(float64(variables['params'])['head'], features)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def test_initialisation_has_the_stated_scale(signals):
    """PyTorch's default, uniform on +-1/sqrt(fan_in), biases too; He's variance, 2 / fan_out."""
    p = signals[2]['params']
    for layer, fan_in in ((p['block0']['conv'], 6), (p['block1']['conv'], 18), (p['head'], 12)):
        bound = fan_in**-0.5
        drawn = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(layer)])
        assert 0.9 * bound < np.abs(drawn).max() <= bound
        # Deviation of the uniform: bound / sqrt(3), estimated from 42 draws or more.
        np.testing.assert_allclose(drawn.std(), bound / 3**0.5, rtol=0.2)
        assert np.unique(layer['bias']).size > 1
    shapes = jax.eval_shape(ResNet(8).init, jax.random.key(0), X)['params']
    drawn = layers.he_init(jax.random.key(0), shapes['stage3']['block0']['conv1']['kernel'].shape)
    np.testing.assert_allclose(drawn.var(), 2 / (9 * 64), rtol=0.05)


@pytest.mark.parametrize(
    ('make', 'shape', 'text'),
    [
        (
            lambda: ConvNet(4),
            (1, 8, 8, 1),
            'depth=4 halves its input 4 times and needs at least 16',
        ),
        (lambda: ConvNet(2), (1, 64), r'ConvNet takes images \[B, H, W, C\] or signals'),
        (lambda: ConvNet(norm='layer'), None, "norm='layer' must be one of 'instance', 'group'"),
        (lambda: ConvNet(conv='fft'), None, "conv='fft' must be one of 'auto', 'direct', 'matmul'"),
        (lambda: MLP(activation='rellu'), None, "activation='rellu' must be one of 'relu'"),
        (lambda: ResNet(18), None, r'depth=18 must be 6n \+ 2 with n >= 1; the nearest is 20'),
        (lambda: ResNet(2), None, r'depth=2 must be 6n \+ 2 with n >= 1; the nearest is 8'),
        (lambda: WideResNet(20), None, r'depth=20 must be 6n \+ 4 with n >= 1; the nearest is 22'),
        (lambda: ResNet(8), (1, 40, 1), r'ResNet takes images \[B, H, W, C\], got shape'),
        (lambda: ViT(width=100), None, 'width=100 must be divisible by heads=3'),
        (lambda: ViT(pool='mean'), None, "pool='mean' must be one of 'gap', 'cls'"),
        (lambda: ViT(3, 12, 1), (1, 8, 8, 1), 'squares of patch=3 pixels, which must divide'),
    ],
)
def test_mistakes_are_told_in_one_line(make, shape, text):
    with pytest.raises(ValueError, match=text) as caught:
        make().init(jax.random.key(0), jnp.zeros(shape or (1, 8, 8, 1)))
    assert '\n' not in str(caught.value)
    if shape is None:  # Seen before any input.
        with pytest.raises(ValueError, match=text):
            make()


def test_matmul_convolution_refuses_dilation_and_groups():
    for option in ({'rhs_dilation': (1, 2)}, {'feature_group_count': 2}):
        with pytest.raises(ValueError, match='neither dilation nor groups'):
            layers.matmul_conv(X, jnp.ones((3, 3, 2, 4)), (1, 1), 'SAME', **option)
