"""Inception-v3 against its description, computed in PyTorch's layout from PyTorch's names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.ndimage
from jax import lax

from kd.errors import UserError
from kd.evaluators.inception import eight_bits, inception_features
from kd.io import safetensors, torch_weights
from kd.models import inception

pytestmark = pytest.mark.usefixtures('compiled_quickly')


class Reference:
    """The network as functions of NCHW arrays and tensors by PyTorch's names."""

    def __init__(self, tensors):
        self.tensors = tensors

    def conv(self, name, x, stride=1, padding=(0, 0)):
        get = lambda rest: self.tensors[f'{name}.{rest}'].astype(np.float32)  # noqa: E731
        pads = [(p, p) for p in padding]
        layout = ('NCHW', 'OIHW', 'NCHW')
        x = lax.conv_general_dilated(
            x, get('conv.weight'), (stride, stride), pads, dimension_numbers=layout
        )
        scale = get('bn.weight') / np.sqrt(get('bn.running_var') + 1e-3)
        shift = get('bn.bias') - get('bn.running_mean') * scale
        return jnp.maximum(x * scale[:, None, None] + shift[:, None, None], 0.0)

    def chain(self, block, x, *steps):
        for name, *rest in steps:
            x = self.conv(f'{block}.{name}', x, *rest)
        return x

    def features(self, x):
        conv, chain = self.conv, self.chain
        row, column, square = (0, 3), (3, 0), (1, 1)
        x = conv('Conv2d_2a_3x3', conv('Conv2d_1a_3x3', x, 2))
        x = shrink(conv('Conv2d_2b_3x3', x, 1, square))
        x = shrink(conv('Conv2d_4a_3x3', conv('Conv2d_3b_1x1', x)))
        for b in ('Mixed_5b', 'Mixed_5c', 'Mixed_5d'):
            x = jnp.concatenate([
                chain(b, x, ('branch1x1',)),
                chain(b, x, ('branch5x5_1',), ('branch5x5_2', 1, (2, 2))),
                chain(b, x, ('branch3x3dbl_1',), ('branch3x3dbl_2', 1, square),
                      ('branch3x3dbl_3', 1, square)),
                chain(b, average(x), ('branch_pool',)),
            ], 1)  # fmt: skip
        x = jnp.concatenate([
            chain('Mixed_6a', x, ('branch3x3', 2)),
            chain('Mixed_6a', x, ('branch3x3dbl_1',), ('branch3x3dbl_2', 1, square),
                  ('branch3x3dbl_3', 2)),
            shrink(x),
        ], 1)  # fmt: skip
        for b in ('Mixed_6b', 'Mixed_6c', 'Mixed_6d', 'Mixed_6e'):
            x = jnp.concatenate([
                chain(b, x, ('branch1x1',)),
                chain(b, x, ('branch7x7_1',), ('branch7x7_2', 1, row), ('branch7x7_3', 1, column)),
                chain(b, x, ('branch7x7dbl_1',), ('branch7x7dbl_2', 1, column),
                      ('branch7x7dbl_3', 1, row), ('branch7x7dbl_4', 1, column),
                      ('branch7x7dbl_5', 1, row)),
                chain(b, average(x), ('branch_pool',)),
            ], 1)  # fmt: skip
        x = jnp.concatenate([
            chain('Mixed_7a', x, ('branch3x3_1',), ('branch3x3_2', 2)),
            chain('Mixed_7a', x, ('branch7x7x3_1',), ('branch7x7x3_2', 1, row),
                  ('branch7x7x3_3', 1, column), ('branch7x7x3_4', 2)),
            shrink(x),
        ], 1)  # fmt: skip
        for b, pool in (('Mixed_7b', average), ('Mixed_7c', largest)):
            three = chain(b, x, ('branch3x3_1',))
            double = chain(b, x, ('branch3x3dbl_1',), ('branch3x3dbl_2', 1, square))
            x = jnp.concatenate([
                chain(b, x, ('branch1x1',)),
                chain(b, three, ('branch3x3_2a', 1, (0, 1))),
                chain(b, three, ('branch3x3_2b', 1, (1, 0))),
                chain(b, double, ('branch3x3dbl_3a', 1, (0, 1))),
                chain(b, double, ('branch3x3dbl_3b', 1, (1, 0))),
                chain(b, pool(x), ('branch_pool',)),
            ], 1)  # fmt: skip
        return x.mean((2, 3))


def windows(x, reduce, start, stride, padding):
    pads = [(0, 0), (0, 0), (padding, padding), (padding, padding)]
    return lax.reduce_window(x, start, reduce, (1, 1, 3, 3), (1, 1, stride, stride), pads)


def shrink(x):
    return windows(x, lax.max, -jnp.inf, 2, 0)


def largest(x):
    return windows(x, lax.max, -jnp.inf, 1, 1)


def average(x):
    return windows(x, lax.add, 0.0, 1, 1) / windows(jnp.ones_like(x), lax.add, 0.0, 1, 1)


def network(resolution=None):
    module = inception.InceptionV3(resolution=resolution)
    example = jax.ShapeDtypeStruct((1, 75, 75, 3), jnp.float32)
    return module, jax.eval_shape(module.init, jax.random.key(0), example)


@pytest.fixture(scope='module')
def tensors():
    """Random weights by PyTorch's names, in PyTorch's layout; activations keep their scale."""
    rng = np.random.default_rng(0)
    _, abstract = network()
    found = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        *modules, last = [key.key for key in path[1:]]
        name, shape = '.'.join(modules), leaf.shape
        if last == 'kernel':
            height, width, inputs, outputs = shape
            value = rng.standard_normal((outputs, inputs, height, width))
            found[f'{name}.weight'] = value * np.sqrt(2 / (height * width * inputs))
        elif last in ('scale', 'var'):
            other = {'scale': 'weight', 'var': 'running_var'}[last]
            found[f'{name}.{other}'] = rng.uniform(0.5, 1.5, shape)
        else:
            other = {'bias': 'bias', 'mean': 'running_mean'}[last]
            found[f'{name}.{other}'] = 0.1 * rng.standard_normal(shape)
    return {name: value.astype(np.float32) for name, value in found.items()}


@pytest.fixture(scope='module')
def file(tensors, tmp_path_factory):
    file = tmp_path_factory.mktemp('inception') / 'weights.safetensors'
    safetensors.save(file, {**tensors, 'fc.weight': np.zeros((1008, 2048), np.float32)})
    return file


def test_as_many_parameters_as_published():
    # torchvision's inception_v3 has 27,161,264, of which 3,326,696 are the auxiliary classifier
    # and 2,049,000 the last layer.
    _, abstract = network()
    count = sum(x.size for x in jax.tree.leaves(abstract['params']))
    assert count == 27_161_264 - 3_326_696 - 2_049_000


def test_features_equal_a_computation_in_the_layout_of_pytorch(tensors, file):
    module, abstract = network()
    variables = torch_weights.load(file, abstract, ignore=r'^fc\.')
    images = np.random.default_rng(1).uniform(-1, 1, (2, 75, 75, 3)).astype(np.float32)
    found = jax.jit(module.apply)(variables, images)
    wanted = jax.jit(Reference(tensors).features)(images.transpose(0, 3, 1, 2))
    assert found.shape == (2, 2048)
    np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-5 * float(jnp.abs(wanted).max()))


def test_averages_leave_out_the_padding():
    x = np.random.default_rng(0).standard_normal((5, 7))
    sums = scipy.ndimage.uniform_filter(x, 3, mode='constant') * 9
    counts = scipy.ndimage.uniform_filter(np.ones((5, 7)), 3, mode='constant') * 9
    found = inception.average_pool(jnp.asarray(x, jnp.float32)[None, :, :, None])[0, :, :, 0]
    np.testing.assert_allclose(found, sums / counts, atol=1e-6)


def test_images_are_resized_with_pixel_centres_and_clamped_edges():
    # Bilinear without corners aligned: pixel i of 299 lies at (i + 1/2) 32 / 299 - 1/2.
    image = np.random.default_rng(0).standard_normal((32, 32)).astype(np.float32)
    at = np.clip((np.arange(299) + 0.5) * 32 / 299 - 0.5, 0, 31)
    grid = np.meshgrid(at, at, indexing='ij')
    wanted = scipy.ndimage.map_coordinates(image.astype(np.float64), grid, order=1)
    found = jax.image.resize(image, (299, 299), 'bilinear', antialias=False)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_eight_bits_are_256_levels():
    levels = eight_bits(jnp.linspace(-1.3, 1.3, 10_001))
    assert len(np.unique(np.asarray(levels))) == 256
    assert (levels.min(), levels.max()) == (-1.0, 1.0)
    np.testing.assert_allclose(eight_bits(levels), levels, atol=1e-6)


def test_wrong_weights_are_refused(tensors, tmp_path):
    file = tmp_path / 'weights.safetensors'
    safetensors.save(file, {'fc.weight': np.zeros((1000, 2048), np.float32)})
    with pytest.raises(UserError, match='1,000 classes: these are not the weights that FID'):
        inception_features(file)
    with pytest.raises(UserError, match=r'missing\.safetensors is not there'):
        inception_features(tmp_path / 'missing.safetensors')
    _, abstract = network()
    name = 'Mixed_7c.branch_pool.conv.weight'
    safetensors.save(file, {**tensors, name: tensors[name][:, :5]})
    with pytest.raises(UserError, match=rf"'{name}' has shape \[192, 5, 1, 1\]"):
        torch_weights.load(file, abstract)
    safetensors.save(file, {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(UserError, match=f"no tensor '{name}'"):
        torch_weights.load(file, abstract)
