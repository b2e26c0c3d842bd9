"""IMDN against a forward pass of its own in NumPy, and the released names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from scipy import signal

from kd import resample
from kd.errors import UserError
from kd.io import torch_weights
from kd.models.imdn import IMDN, Block, IMDNAnyScale, IMDNEnhance, IMDNSmall, statistic
from kd.models.layers import pixel_shuffle, pixel_unshuffle
from kd.models.restorers import EDSR, OverBicubic, PlainSR, over_bicubic
from kd.network import from_linen, parameter_count

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LOW = jax.ShapeDtypeStruct((1, 8, 12, 3), jnp.float32)
SMALL = IMDN(3, channels=8, blocks=2)


def shapes(module, side=8):
    low = jax.ShapeDtypeStruct((1, side, side + 4, 3), LOW.dtype)
    return jax.eval_shape(from_linen(module, low).init, jax.random.key(0))


def released(module, seed=0, side=8):
    """Random tensors with the names and shapes of PyTorch, float32."""
    rng, tensors = np.random.default_rng(seed), {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(shapes(module, side)['params'])[0]:
        *modules, last = (key.key for key in path)
        shape = leaf.shape
        if last == 'kernel':
            shape = (shape[3], shape[2], *shape[:2])
        name = module.released_name('.'.join([*modules, torch_weights.LEAVES[last]]))
        tensors[name] = 0.3 * rng.standard_normal(shape).astype(np.float32)
    return tensors


def conv(tensors, name, x, stride=1):
    """[C, H, W], zeros around it, as PyTorch does it."""
    kernel = tensors[f'{name}.weight'].astype(float)
    pad = kernel.shape[-1] // 2
    x = np.pad(x.astype(float), ((0, 0), (pad, pad), (pad, pad)))
    planes = [
        sum(signal.correlate(a, k, 'valid') for a, k in zip(x, one, strict=True)) for one in kernel
    ]
    y = np.stack(planes)[:, ::stride, ::stride]
    return y + tensors[f'{name}.bias'][:, None, None] if f'{name}.bias' in tensors else y


def leaky(x):
    return np.where(x > 0, x, 0.05 * x)


def block(tensors, name, x, attention=True):
    d, rest, kept = len(x) // 4, x, []
    for i in (1, 2, 3):
        y = leaky(conv(tensors, f'{name}.c{i}', rest))
        kept, rest = [*kept, y[:d]], y[d:]
    g = np.concatenate([*kept, conv(tensors, f'{name}.c4', rest)])
    if attention:
        z = (g.mean((1, 2)) + g.std((1, 2)))[:, None, None]
        z = np.maximum(conv(tensors, f'{name}.cca.conv_du.0', z), 0)
        g = g / (1 + np.exp(-conv(tensors, f'{name}.cca.conv_du.2', z)))
    return conv(tensors, f'{name}.c5', g) + x


def shuffled(x, s):
    channels, height, width = x.shape
    out = np.zeros((channels // s**2, height * s, width * s))
    for c, i, j in np.ndindex(*out.shape):
        out[c, i, j] = x[c * s * s + (i % s) * s + j % s, i // s, j // s]
    return out


def picture(seed=1, height=8, width=12):
    return np.random.default_rng(seed).uniform(-1, 1, (1, height, width, 3)).astype(np.float32)


def loaded(module, tensors, tmp_path, side=8):
    file = tmp_path / 'weights.safetensors'
    safetensors.numpy.save_file(tensors, file)
    return torch_weights.load(file, shapes(module, side), rename=module.released_name)


def applied(module, variables, low):
    return np.asarray(jax.jit(module.apply)(variables, low))[0].transpose(2, 0, 1)


@pytest.mark.parametrize(
    ('module', 'count'),
    [
        (IMDN(2), 694_404),
        (IMDN(3), 703_059),
        (IMDN(4), 715_176),
        (IMDNAnyScale(), 752_104),
        (IMDNSmall(), 20_190),
        (IMDNEnhance(), 89_748),
        (IMDN(2, channels=16, blocks=3), 24_987),
        (PlainSR(2, channels=14, blocks=3), 25_632),
        (EDSR(2), 1_369_859),
    ],
)
def test_parameters_are_as_many_as_published(module, count):
    variables = shapes(module)
    assert parameter_count(variables) == count
    if count == 694_404:
        assert sum(x.size for x in jax.tree.leaves(variables['params']['IMDB6'])) == 104_020


def test_released_weights_load_and_the_network_is_what_numpy_makes_of_them(tmp_path):
    tensors, low = released(SMALL), picture()
    assert {'fea_conv.weight', 'IMDB2.cca.conv_du.2.bias', 'c.0.weight', 'LR_conv.bias'} <= {
        *tensors
    }
    assert {'upsampler.0.weight', 'upsampler.0.bias', 'IMDB1.c4.weight'} <= {*tensors}
    x = (low[0].transpose(2, 0, 1) + 1.0) / 2
    first = conv(tensors, 'fea_conv', x)
    one = block(tensors, 'IMDB1', first)
    two = block(tensors, 'IMDB2', one)
    y = leaky(conv(tensors, 'c.0', np.concatenate([one, two])))
    y = conv(tensors, 'LR_conv', y) + first
    expected = 2 * shuffled(conv(tensors, 'upsampler.0', y), 3) - 1
    found = applied(SMALL, loaded(SMALL, tensors, tmp_path), low)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


def test_the_small_variants_are_what_numpy_makes_of_them(tmp_path):
    low = picture()
    x = (low[0].transpose(2, 0, 1) + 1.0) / 2
    module = IMDNSmall(channels=8, blocks=1)
    tensors = released(module)
    first = conv(tensors, 'model.0', x)
    y = first + conv(tensors, 'model.1.sub.1', block(tensors, 'model.1.sub.0', first, False))
    expected = 2 * shuffled(conv(tensors, 'model.2', y), 2) - 1
    found = applied(module, loaded(module, tensors, tmp_path), low)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())

    module = IMDNEnhance(channels=8, blocks=1)
    tensors = released(module)
    first = conv(tensors, 'fea_conv.2', np.maximum(conv(tensors, 'fea_conv.0', x), 0), 2)
    rest, kept = first, []
    for i in range(1, 7):
        rest = np.maximum(conv(tensors, f'block1.c{i}', rest), 0)
        kept, rest = [*kept, rest[:2]], rest[2:]
    y = first + conv(tensors, 'block1.c7', np.concatenate(kept))
    y = conv(tensors, 'LR_conv', y) + first
    expected = 2 * shuffled(conv(tensors, 'upsampler.0', y), 4) - 1
    found = applied(module, loaded(module, tensors, tmp_path), low)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_any_scale_begins_with_strides_padded_on_both_sides(tmp_path):
    module, low = IMDNAnyScale(channels=8, blocks=1), picture()
    tensors = released(module)
    x = (low[0].transpose(2, 0, 1) + 1.0) / 2
    first = conv(tensors, 'fea_conv.2', leaky(conv(tensors, 'fea_conv.0', x, 2)), 2)
    y = leaky(conv(tensors, 'c.0', block(tensors, 'IMDB1', first)))
    y = conv(tensors, 'LR_conv', y) + first
    expected = 2 * shuffled(conv(tensors, 'upsampler.0', y), 4) - 1
    found = applied(module, loaded(module, tensors, tmp_path), low)
    assert found.shape == (3, 8, 12)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())
    with pytest.raises(ValueError, match='sides that are multiples of 4'):
        module.apply(shapes(module), np.zeros((1, 10, 12, 3)))


def test_weights_of_another_scale_or_of_a_wrapped_network_are_refused(tmp_path):
    tensors = released(SMALL)
    with pytest.raises(UserError, match=r"'upsampler\.0\.(weight|bias)' has shape \[27"):
        loaded(IMDN(2, channels=8, blocks=2), tensors, tmp_path)
    with pytest.raises(UserError, match=r"has no tensor .* Did you mean 'module\."):
        loaded(SMALL, {f'module.{name}': x for name, x in tensors.items()}, tmp_path)


def test_pixels_are_shuffled_in_the_order_of_channels():
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 18)).astype(np.float32)
    found = np.asarray(pixel_shuffle(jnp.asarray(x), 3))
    for one, out in zip(x, found, strict=True):
        np.testing.assert_array_equal(out.transpose(2, 0, 1), shuffled(one.transpose(2, 0, 1), 3))
    np.testing.assert_array_equal(pixel_unshuffle(jnp.asarray(found), 3), x)


def test_the_statistic_is_a_mean_and_a_deviation():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 5, 4, 3)), jnp.float32)
    z = statistic(x)[:, 0, 0]
    np.testing.assert_allclose(z, x.mean((1, 2)) + x.std((1, 2)), rtol=1e-5)
    np.testing.assert_allclose(statistic(3 * x)[:, 0, 0], 3 * z, rtol=1e-5)
    np.testing.assert_allclose(statistic(x + 2)[:, 0, 0], z + 2, rtol=1e-5)
    np.testing.assert_array_equal(
        statistic(jnp.full((1, 4, 4, 2), 1.5)), jnp.full((1, 1, 1, 2), 1.5)
    )
    grads = jax.grad(lambda x: statistic(x).sum())(jnp.zeros((1, 4, 4, 2)))
    np.testing.assert_allclose(grads, 1 / 16)


def test_a_black_picture_has_finite_gradients_and_a_block_of_zeros_is_the_identity():
    variables = jax.jit(SMALL.init)(jax.random.key(0), np.zeros((1, 6, 6, 3), np.float32))
    variables = jax.tree.map(jnp.asarray, variables)

    @jax.jit
    def grads(low):
        return jax.grad(lambda v: jnp.abs(SMALL.apply(v, low)).mean())(variables)

    assert all(
        np.isfinite(x).all() for x in jax.tree.leaves(grads(-np.ones((1, 6, 6, 3), np.float32)))
    )
    module = Block()
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 5, 8)), jnp.float32)
    zeros = jax.tree.map(jnp.zeros_like, module.init(jax.random.key(0), x))
    np.testing.assert_array_equal(module.apply(zeros, x), x)
    # An attention of zeros halves what it weighs.
    half, none = (
        Block(kind).apply(
            {'params': _half(module.init(jax.random.key(1), x)['params'], kind != 'none')}, x
        )
        for kind in ('contrast', 'none')
    )
    bias = module.init(jax.random.key(1), x)['params']['c5']['bias']
    np.testing.assert_allclose(half - x - bias, 0.5 * (none - x - bias), atol=1e-6)


def _half(params, attention):
    params = dict(params)
    cca = jax.tree.map(jnp.zeros_like, params.pop('cca'))
    return {**params, 'cca': cca} if attention else params


@pytest.mark.parametrize('kind', ['none', 'contrast'])
def test_only_attention_sees_what_lies_beyond_the_windows(kind):
    module, low = IMDN(2, channels=8, blocks=2, attention=kind), picture(2, 30, 30)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.standard_normal(x.shape), jnp.float32), shapes(module)
    )
    other = low.copy()
    # Windows of all convolutions together reach 11 pixels.
    other[:, :1] = other[:, :, :1] = -1.0
    apply = jax.jit(module.apply)
    change = np.abs(np.asarray(apply(variables, low)) - np.asarray(apply(variables, other)))
    middle = change[:, 28:34, 28:34].max()
    assert middle < 1e-6 if kind == 'none' else middle > 1e-4


def test_over_bicubic_is_bicubic_and_a_share():
    inner, low = PlainSR(2, channels=4, blocks=1), picture()
    module = OverBicubic(inner, share=0.25)
    variables = jax.jit(module.init)(jax.random.key(0), low)
    found, own = (np.asarray(jax.jit(m.apply)(variables, low)) for m in (module, inner))
    large = resample.resize(low.astype(float), (16, 24), 'matlab')
    np.testing.assert_allclose((found + 1) / 2, (large + 1) / 2 + 0.25 * (own + 1) / 2, atol=1e-5)
    block = dict(name='kd.models.restorers.PlainSR', scale=2, channels=4, blocks=1)
    assert over_bicubic(network=block, share=0.25) == module


def test_what_a_network_does_not_have_is_refused():
    with pytest.raises(ValueError, match=r'IMDN takes pictures \[B, h, w, 3\], got shape'):
        shapes_of(IMDN(2), (1, 8, 8, 1))
    with pytest.raises(
        ValueError, match="attention='se' must be one of 'contrast', 'mean', 'none'"
    ):
        shapes_of(IMDN(2, attention='se'), (1, 8, 8, 3))
    with pytest.raises(ValueError, match='EDSR has scale=2, 3 or 4, got 5'):
        shapes_of(EDSR(5), (1, 8, 8, 3))


def shapes_of(module, shape):
    low = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.eval_shape(from_linen(module, low).init, jax.random.key(0))
