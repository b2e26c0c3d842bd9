"""ResNets, MobileNetV2, EfficientNet, ShuffleNets and VGG: published sizes, NumPy blocks."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage, special

from kd import config as kd_config
from kd.models import layers
from kd.models.efficientnet import EfficientNet, MBConv, SqueezeExcitation
from kd.models.mobilenet import InvertedResidual, MobileNetV2
from kd.models.resnet import BottleneckBlock, ImageNetResNet
from kd.models.shufflenet import (
    ShuffleNet,
    ShuffleNetV2,
    ShuffleUnit,
    ShuffleUnitV2,
    channel_shuffle,
)
from kd.models.vgg import VGG, Stage

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SMALL = {
    'ResNet': ImageNetResNet(18, 10, 'cifar'),
    'MobileNetV2': MobileNetV2(10, stem='cifar'),
    'EfficientNet': EfficientNet(10, stem='cifar'),
    'ShuffleNet': ShuffleNet(10, stem='cifar'),
    'ShuffleNetV2': ShuffleNetV2(10, stem='cifar'),
}
CONFIG = Path(__file__).parents[2] / 'configs' / 'vision' / 'classical.py'
IMAGES = np.random.default_rng(0).normal(size=(2, 6, 6, 8))
X = jnp.asarray(IMAGES, jnp.float32)


@functools.cache
def shapes(module, side):
    """Parameters and intermediates of one image, nothing computed."""

    def run(key):
        variables = module.init(key, jnp.zeros((1, side, side, 3)))
        found = module.apply(
            variables, jnp.zeros((1, side, side, 3)), capture_intermediates=True,
            mutable=['intermediates'],
        )  # fmt: skip
        return variables['params'], found[1]['intermediates']

    params, found = jax.eval_shape(run, jax.random.key(0))
    return params, {name: x['__call__'][0].shape for name, x in found.items() if '__call__' in x}


def count(module, side):
    leaves = jax.tree.leaves(shapes(module, side)[0])
    assert all(x.dtype == jnp.float32 for x in leaves)
    return sum(x.size for x in leaves)


@pytest.mark.parametrize(
    ('module', 'expected'),
    [
        (ImageNetResNet(18), 11_689_512),
        (ImageNetResNet(34), 21_797_672),
        (ImageNetResNet(50), 25_557_032),
        (ImageNetResNet(101), 44_549_160),
        (MobileNetV2(), 3_504_872),
        (MobileNetV2(width=0.5), 1_968_680),
        (ShuffleNetV2(size=0.5), 1_366_792),
        (ShuffleNetV2(), 2_278_604),
        (EfficientNet(), 5_288_548),
        (EfficientNet(depth=1.1), 7_794_184),
        (EfficientNet(width=1.1, depth=1.2), 9_109_994),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_parameter_counts_with_1000_classes_are_those_of_torchvision(module, expected):
    assert count(module, 224) == expected


def test_the_networks_of_the_cifar_pairs_have_the_published_counts():
    """With 100 classes: those of the networks of mdistiller and of the benchmark before it."""
    published = {
        'res20': 278_324, 'res32': 472_756, 'res56': 861_620, 'res110': 1_736_564,
        'res8x4': 1_233_540, 'res32x4': 7_433_860,
        'wrn16x2': 703_284, 'wrn40x1': 569_780, 'wrn40x2': 2_255_156,
        'vgg8': 3_965_028, 'vgg13': 9_462_180, 'res50': 23_705_252,
        'mobile': 812_836, 'shuffle1': 949_258, 'shuffle2': 1_355_528,
    }  # fmt: skip
    config = kd_config.load_module(CONFIG)
    pairs = [pair for name, pair in config.PAIRS.items() if name != 'digits']
    assert len(pairs) == len(set(pairs)) == 13
    assert {name for pair in pairs for name in pair} == set(published)
    for name, expected in published.items():
        block, _ = config.NETWORKS[name]
        module = kd_config.build({**block, 'num_classes': 100}, where=name)
        assert count(module, 32) == expected, name
        if name in config.MAP_WIDTHS:
            assert shapes(module, 32)[1]['map'][-1] == config.MAP_WIDTHS[name]


def shuffle_net_size(groups, width, classes):
    """Kernels, scales and shifts, unit by unit."""
    total, channels = 3 * 24 + 48, 24
    for stage, units in enumerate((4, 8, 4)):
        for unit in range(units):
            out = width * 2**stage - (channels if unit == 0 else 0)
            inner = out // 4
            reduce = channels * inner // (1 if channels == 24 else groups)
            total += reduce + 9 * inner + inner * out // groups + 2 * (2 * inner + out)
            channels = width * 2**stage
    return total + (channels + 1) * classes


def test_parameter_counts_of_small_images_differ_by_stem_and_head_alone():
    # A 7x7 kernel becomes 3x3; 1000 logits become 10.
    assert count(SMALL['ResNet'], 32) == 11_689_512 - (49 - 9) * 3 * 64 - 990 * 513
    assert count(SMALL['MobileNetV2'], 32) == 3_504_872 - 990 * 1281
    assert count(SMALL['EfficientNet'], 32) == 5_288_548 - 990 * 1281
    # The published counts of ShuffleNet-G2 and -G3 for CIFAR-10.
    assert count(SMALL['ShuffleNet'], 32) == shuffle_net_size(2, 200, 10) == 887_582
    three = ShuffleNet(10, groups=3, stem='cifar')
    assert count(three, 32) == shuffle_net_size(3, 240, 10) == 862_768


@pytest.mark.parametrize(
    ('module', 'side', 'strides'),
    [
        (
            ImageNetResNet(50),
            224,
            {'stem': 2, 'stage1': 4, 'stage2': 8, 'stage3': 16, 'stage4': 32},
        ),
        (SMALL['ResNet'], 32, {'stem': 1, 'stage1': 1, 'stage2': 2, 'stage3': 4, 'stage4': 8}),
        (
            MobileNetV2(),
            224,
            {'stem': 2, 'block0': 2, 'block1': 4, 'block3': 8, 'block6': 16, 'block13': 32},
        ),
        (SMALL['MobileNetV2'], 32, {'stem': 1, 'block2': 1, 'block3': 2, 'block6': 4, 'last': 8}),
        (
            EfficientNet(),
            224,
            {'stem': 2, 'block0': 2, 'block1': 4, 'block3': 8, 'block5': 16, 'block11': 32},
        ),
        (SMALL['EfficientNet'], 32, {'stem': 1, 'block1': 2, 'block5': 8, 'last': 16}),
        (ShuffleNet(), 224, {'stem': 2, 'block0': 8, 'block4': 16, 'block12': 32}),
        (SMALL['ShuffleNet'], 32, {'stem': 1, 'block0': 2, 'block4': 4, 'block15': 8}),
        (SMALL['ShuffleNetV2'], 32, {'stem': 1, 'block0': 2, 'block4': 4, 'last': 8}),
        (MobileNetV2(stem='benchmark'), 32, {'stem': 2, 'block2': 2, 'block5': 4, 'map': 16}),
        (VGG(8), 32, {'stage1': 1, 'stage2': 2, 'stage3': 4, 'stage5': 8}),
        (VGG(13), 64, {'stage1': 1, 'stage3': 4, 'stage4': 8, 'map': 16}),
    ],
)
def test_every_part_has_its_stride(module, side, strides):
    _, found = shapes(module, side)
    assert {name: side // found[name][1] for name in strides} == strides
    assert all(found[name][1] == found[name][2] for name in strides)


def test_the_last_channels_are_those_of_the_papers():
    wanted = {
        'ResNet': 512, 'MobileNetV2': 1280, 'EfficientNet': 1280, 'ShuffleNet': 800,
        'ShuffleNetV2': 1024,
    }  # fmt: skip
    found = {name: shapes(module, 32)[1] for name, module in SMALL.items()}
    assert {name: parts['features'][-1] for name, parts in found.items()} == wanted
    assert shapes(ImageNetResNet(101), 224)[1]['features'] == (1, 2048)


@pytest.mark.parametrize('name', ['MobileNetV2', 'EfficientNet', 'ShuffleNet'])
def test_depthwise_kernels_have_one_plane_per_channel(name):
    params, _ = shapes(SMALL[name], 32)
    for block in [key for key in params if key.startswith('block')]:
        part = params[block]
        after = part.get('project', part.get('restore'))['kernel']
        size = part['depthwise']['kernel'].shape
        assert size[0] == size[1]
        assert size[2] == 1
        # Grouped kernels have fewer inputs.
        assert size[3] == after.shape[2] * (2 if name == 'ShuffleNet' else 1)


def test_widths_are_rounded_to_multiples_of_eight_within_ten_percent():
    for width in np.linspace(4, 400, 200):
        rounded = layers.divisible(width)
        nearest = min(range(8, 500, 8), key=lambda n: (abs(n - width), -n))
        assert rounded == (nearest if nearest >= 0.9 * width else nearest + 8)


# --- Blocks against NumPy and SciPy in float64. ---------------------------------------------------


def randomised(module, *, train=False):
    """Variables, every leaf random, and the output for X."""
    made = jax.eval_shape(functools.partial(module.init, train=train), jax.random.key(0), X)
    rng = np.random.default_rng(1)

    def draw(path, leaf):
        if 'kernel' in jax.tree_util.keystr(path):
            values = rng.normal(size=leaf.shape) / np.sqrt(leaf.size / leaf.shape[-1])
        else:
            values = rng.uniform(0.5, 1.5, leaf.shape)
        return jnp.asarray(values, jnp.float32)

    variables = jax.tree.map_with_path(draw, made)
    out = jax.jit(functools.partial(module.apply, train=train))(variables, X)
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), variables)
    return tree['params'], tree.get('batch_stats'), out


def pointwise(x, kernel, groups=1):
    """1x1 convolution: one matrix product per group of channels."""
    parts = np.split(x, groups, -1), np.split(kernel[0, 0], groups, -1)
    return np.concatenate([a @ b for a, b in zip(*parts, strict=True)], -1)


def depthwise(x, kernel, stride=1):
    """Every channel of every image correlated with its own plane."""
    out = np.empty_like(x)
    for n in range(len(x)):
        for c in range(x.shape[-1]):
            out[n, ..., c] = ndimage.correlate(x[n, ..., c], kernel[:, :, 0, c], mode='constant')
    return out[:, ::stride, ::stride]


def batch_norm(params, stats, name, x):
    p, s = params[f'{name}_norm'], stats[f'{name}_norm']
    return (x - s['mean']) / np.sqrt(s['var'] + 1e-5) * p['scale'] + p['bias']


def silu(x):
    return x * special.expit(x)


def relu6(x):
    return np.clip(x, 0, 6)


@pytest.mark.parametrize('stride', [1, 2])
def test_depthwise_convolution_is_a_correlation_per_channel(stride):
    for size in (3, 5):
        module = layers.conv(8, size, stride, groups=8, dtype=jnp.float32, name='conv')
        kernel = np.random.default_rng(2).normal(size=(size, size, 1, 8))
        out = module.apply({'params': {'kernel': jnp.asarray(kernel, jnp.float32)}}, X)
        np.testing.assert_allclose(out, depthwise(IMAGES, kernel, stride), atol=1e-5)


@pytest.mark.parametrize(
    ('expansion', 'stride', 'width', 'benchmark'),
    [(6, 1, 8, False), (6, 2, 8, False), (1, 1, 5, False), (1, 1, 5, True)],
)
def test_inverted_residual_equals_numpy(expansion, stride, width, benchmark):
    p, s, out = randomised(InvertedResidual(expansion, width, stride, jnp.float32, benchmark))
    y, relu = IMAGES, (lambda x: np.maximum(x, 0)) if benchmark else relu6
    if expansion > 1 or benchmark:
        y = relu(batch_norm(p, s, 'expand', pointwise(y, p['expand']['kernel'])))
    y = relu(batch_norm(p, s, 'depthwise', depthwise(y, p['depthwise']['kernel'], stride)))
    y = batch_norm(p, s, 'project', pointwise(y, p['project']['kernel']))
    expected = IMAGES + y if (stride, width) == (1, 8) else y
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_mbconv_equals_numpy():
    p, s, out = randomised(MBConv(6, 5, 8, 1, 0.2, jnp.float32))
    y = silu(batch_norm(p, s, 'expand', pointwise(IMAGES, p['expand']['kernel'])))
    y = silu(batch_norm(p, s, 'depthwise', depthwise(y, p['depthwise']['kernel'])))
    squeezed = p['excitation']
    assert squeezed['down']['kernel'].shape == (48, 2)  # A quarter of the block's 8 channels.
    z = silu(y.mean((1, 2)) @ squeezed['down']['kernel'] + squeezed['down']['bias'])
    z = special.expit(z @ squeezed['up']['kernel'] + squeezed['up']['bias'])
    y = batch_norm(p, s, 'project', pointwise(y * z[:, None, None], p['project']['kernel']))
    np.testing.assert_allclose(out, IMAGES + y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('stride', 'width'), [(1, 8), (2, 24)])
def test_shuffle_unit_equals_numpy(stride, width):
    p, s, out = randomised(ShuffleUnit(width, stride, 2, jnp.float32))
    inner = (width - 8 if stride == 2 else width) // 4
    y = np.maximum(batch_norm(p, s, 'reduce', pointwise(IMAGES, p['reduce']['kernel'], 2)), 0)
    # Groups in turn: 0, inner / 2, 1, inner / 2 + 1, ...
    y = y[..., [g * (inner // 2) + i for i in range(inner // 2) for g in range(2)]]
    y = np.maximum(batch_norm(p, s, 'depthwise', depthwise(y, p['depthwise']['kernel'], stride)), 0)
    y = batch_norm(p, s, 'restore', pointwise(y, p['restore']['kernel'], 2))
    if stride == 1:
        expected = np.maximum(IMAGES + y, 0)
    else:
        average = depthwise(IMAGES, np.full((3, 3, 1, 8), 1 / 9), 2)
        expected = np.maximum(np.concatenate([y, average], -1), 0)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(('stride', 'width'), [(1, 8), (2, 12)])
def test_shuffle_unit_of_the_second_form_equals_numpy(stride, width):
    p, s, out = randomised(ShuffleUnitV2(width, stride, jnp.float32))

    def unit(name, x, relu=True, groups=0):
        kernel = p[name]['kernel']
        y = depthwise(x, kernel, stride) if groups else pointwise(x, kernel)
        y = batch_norm(p, s, name, y)
        return np.maximum(y, 0) if relu else y

    beside, y = (IMAGES[..., :4], IMAGES[..., 4:]) if stride == 1 else (IMAGES, IMAGES)
    if stride == 2:
        beside = unit('beside', unit('beside_depthwise', beside, relu=False, groups=1))
    y = unit('restore', unit('depthwise', unit('reduce', y), relu=False, groups=1))
    # The halves in turn.
    expected = np.stack([beside, y], -1).reshape(*y.shape[:-1], width)
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)


def test_a_stage_of_vgg_equals_numpy():
    p, s, out = randomised(Stage(2, 5, 'batch', jnp.float32))
    y = IMAGES
    for i in range(2):
        kernel, given = p[f'conv{i}']['kernel'], y
        y = sum(
            depthwise(np.repeat(given[..., c : c + 1], 5, -1), kernel[:, :, c : c + 1])
            for c in range(given.shape[-1])
        )
        q, t = p[f'norm{i}'], s[f'norm{i}']
        y = (y + p[f'conv{i}']['bias'] - t['mean']) / np.sqrt(t['var'] + 1e-5)
        y = np.maximum(y * q['scale'] + q['bias'], 0)
    np.testing.assert_allclose(out, y, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('stride', [1, 2])
def test_bottleneck_equals_numpy_with_its_stride_in_the_middle(stride):
    p, s, out = randomised(BottleneckBlock(3, stride, 'batch', jnp.float32))

    def norm(name, x):
        q, t = p[name], s[name]
        return (x - t['mean']) / np.sqrt(t['var'] + 1e-5) * q['scale'] + q['bias']

    y = np.maximum(norm('norm1', pointwise(IMAGES, p['conv1']['kernel'])), 0)
    kernel = p['conv2']['kernel']
    whole = sum(
        depthwise(np.repeat(y[..., c : c + 1], 3, -1), kernel[:, :, c : c + 1], stride)
        for c in range(3)
    )
    y = np.maximum(norm('norm2', whole), 0)
    y = norm('norm3', pointwise(y, p['conv3']['kernel']))
    short = norm('shortcut_norm', pointwise(IMAGES[:, ::stride, ::stride], p['shortcut']['kernel']))
    np.testing.assert_allclose(out, np.maximum(short + y, 0), rtol=1e-4, atol=1e-4)


def test_channel_shuffle_is_a_permutation_undone_by_its_mirror_image():
    x = jnp.arange(12)
    shuffled = channel_shuffle(x, 3)
    np.testing.assert_array_equal(shuffled, [0, 4, 8, 1, 5, 9, 2, 6, 10, 3, 7, 11])
    np.testing.assert_array_equal(channel_shuffle(shuffled, 4), x)
    for groups in (1, 12):
        np.testing.assert_array_equal(channel_shuffle(x, groups), x)


def test_excitation_of_zero_weights_halves_its_input():
    module = SqueezeExcitation(2, jnp.float32)
    variables = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(0), X))
    np.testing.assert_allclose(module.apply(variables, X), IMAGES / 2, rtol=1e-6)


# --- Whole networks. ------------------------------------------------------------------------------


def test_the_branch_is_dropped_for_whole_images_at_its_rate_and_kept_in_the_mean():
    module, many = MBConv(1, 3, 8, 1, 0.25, jnp.float32), jnp.tile(X[:1], (400, 1, 1, 1))
    variables = module.init(jax.random.key(0), many, train=False)
    key = {'dropout': jax.random.key(1)}
    out, _ = jax.jit(
        lambda v, x: module.apply(v, x, train=True, rngs=key, mutable=['batch_stats'])
    )(variables, many)
    branch = np.asarray(out - many)
    dropped = np.abs(branch).max((1, 2, 3)) == 0
    assert 0.17 < dropped.mean() < 0.33  # 0.25 +- 3.7 standard deviations
    # All images are the same, so that the rest are too, scaled by 1 / 0.75.
    kept = branch[~dropped]
    np.testing.assert_allclose(kept, np.broadcast_to(kept[:1], kept.shape), atol=1e-5)
    plain, _ = module.clone(drop_path=0.0).apply(
        variables, many, train=True, mutable=['batch_stats']
    )
    np.testing.assert_allclose(kept[0], np.asarray(plain - many)[0] / 0.75, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('name', SMALL)
def test_bfloat16_networks_have_float32_parameters_statistics_and_logits(name):
    module = SMALL[name].clone(dtype='bfloat16')

    def run(key):
        variables = module.init(key, jnp.zeros((1, 32, 32, 3)))
        logits, updated = module.apply(
            variables, jnp.zeros((2, 32, 32, 3)), train=True, rngs={'dropout': key},
            mutable=['batch_stats', 'intermediates'], capture_intermediates=True,
        )  # fmt: skip
        return variables, logits, updated['batch_stats'], updated['intermediates']

    variables, logits, stats, inner = jax.eval_shape(run, jax.random.key(0))
    assert logits.shape == (2, 10)
    assert {x.dtype for x in jax.tree.leaves((variables, logits, stats))} == {
        jnp.dtype(jnp.float32)
    }
    assert jax.tree.structure(stats) == jax.tree.structure(variables['batch_stats'])
    assert inner['stem']['__call__'][0].dtype == jnp.bfloat16


def test_a_whole_mobilenet_under_jit_equals_numpy():
    p, s, out = randomised(MobileNetV2(3, width=0.1, stem='cifar'))
    stem = sum(
        depthwise(np.repeat(IMAGES[..., c : c + 1], 8, -1), p['stem']['kernel'][:, :, c : c + 1])
        for c in range(8)
    )
    x = relu6(batch_norm(p, s, 'stem', stem))
    strides = {3: 2, 6: 2, 13: 2}  # Those left for small images.
    for i in range(17):
        q, t = p[f'block{i}'], s[f'block{i}']
        y = x
        if i > 0:
            y = relu6(batch_norm(q, t, 'expand', pointwise(y, q['expand']['kernel'])))
        y = relu6(
            batch_norm(q, t, 'depthwise', depthwise(y, q['depthwise']['kernel'], strides.get(i, 1)))
        )
        y = batch_norm(q, t, 'project', pointwise(y, q['project']['kernel']))
        x = x + y if x.shape == y.shape else y
    x = relu6(batch_norm(p, s, 'last', pointwise(x, p['last']['kernel']))).mean((1, 2))
    expected = x @ p['head']['kernel'] + p['head']['bias']
    assert expected.std() > 0.1
    np.testing.assert_allclose(out, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ('make', 'text'),
    [
        (lambda: ImageNetResNet(20), 'depth=20 must be one of 10, 18, 34, 50'),
        (lambda: ImageNetResNet(stem='small'), "stem='small' must be one of 'imagenet', 'cifar'"),
        (lambda: MobileNetV2(stem='tiny'), "stem='tiny'"),
        (lambda: EfficientNet(stem=''), "stem=''"),
        (lambda: ShuffleNet(groups=5), 'groups=5 must be one of 1, 2, 3'),
    ],
)
def test_mistakes_are_told_before_any_input(make, text):
    with pytest.raises(ValueError, match=text):
        make()
