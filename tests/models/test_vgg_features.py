"""VGG: its convolutions against SciPy's, and under the names of torchvision."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal

from kd.io import vgg_names
from kd.losses.perceptual import feature_distance
from kd.models.discriminator import PatchHead
from kd.models.vgg_features import VGGFeatures

pytestmark = pytest.mark.usefixtures('compiled_quickly')
# Convolutions in the list of layers of torchvision's VGG16.
PLACES = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)


def test_levels_are_convolutions_and_pools():
    module = VGGFeatures(widths=(2, 3), convolutions=(1, 2))
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (1, 6, 4, 3)).astype(np.float32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), x)
    params = jax.tree.map(lambda y: rng.standard_normal(y.shape).astype(np.float32), shapes)
    said, state = jax.jit(
        lambda v: module.apply(v, x, capture_intermediates=lambda m, _: 'level' in (m.name or ''))
    )(params)
    found = {name: y['__call__'][0] for name, y in state['intermediates'].items()}

    def conv(y, name):
        kernel, bias = params['params'][name]['kernel'], params['params'][name]['bias']
        out = np.stack([
            sum(scipy.signal.correlate(y[..., i], kernel[..., i, o], 'same')
                for i in range(y.shape[-1])) + bias[o]
            for o in range(kernel.shape[-1])
        ], -1)  # fmt: skip
        return np.maximum(out, 0)

    y = conv((x[0] - [-0.03, -0.088, -0.188]) / [0.458, 0.448, 0.45], 'features_0')
    np.testing.assert_allclose(found['level0'][0], y, rtol=1e-4, atol=1e-4)
    y = y.reshape(3, 2, 2, 2, 2).max((1, 3))
    y = conv(conv(y, 'features_3'), 'features_5')
    np.testing.assert_allclose(found['level1'][0], y, rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(said[0], y.mean((0, 1)), rtol=1e-4)


def test_parameters_are_those_of_sixteen_layers_under_their_names():
    module = VGGFeatures()
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))['params']
    assert sum(math.prod(x.shape) for x in jax.tree.leaves(shapes)) == 14_714_688
    find, left = vgg_names.find(module, (), '')
    names = {
        find((module, leaf), x.shape).name
        for module, leaves in shapes.items()
        for leaf, x in leaves.items()
    }
    assert names == {f'features.{i}.{leaf}' for i in PLACES for leaf in ('weight', 'bias')}
    assert left == r'^(pre_logits|head|classifier)\.'


def test_a_distance_of_features_is_of_their_directions():
    rng = np.random.default_rng(1)
    a, b = ([rng.standard_normal((2, 3, 3, 4)), rng.standard_normal((2, 5))] for _ in range(2))
    weights = [rng.uniform(size=4), rng.uniform(size=5)]
    wanted = np.zeros(2)
    for x, y, w in zip(a, b, weights, strict=True):
        x, y = (z / np.linalg.norm(z, axis=-1, keepdims=True) for z in (x, y))
        wanted += (np.square(x - y) * w).sum(-1).reshape(2, -1).mean(1)
    np.testing.assert_allclose(feature_distance(a, b, weights), wanted, rtol=1e-5)
    np.testing.assert_allclose(feature_distance(a, [7 * x for x in a]), 0.0, atol=1e-9)
    # Of a dead place there is no direction and no slope, and nothing that is not a number.
    slope = jax.grad(lambda x: feature_distance([x], [jnp.ones((1, 2, 3))]).sum())
    np.testing.assert_array_equal(slope(jnp.zeros((1, 2, 3))), 0.0)


def test_a_discriminator_tells_part_by_part():
    head = PatchHead(width=8, depth=3)
    x = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(head.init, jax.random.key(0), x)
    assert jax.eval_shape(head.apply, variables, x).shape == (2, 16)
    widths = [variables['params'][f'layer{i}']['kernel'].shape[-1] for i in range(4)]
    assert widths == [8, 16, 32, 64]
