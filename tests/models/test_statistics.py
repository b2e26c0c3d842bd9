"""Recorded batch statistics against those of the features themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd import network
from kd.losses import batch_statistics
from kd.models import convnet, statistics

pytestmark = pytest.mark.usefixtures('compiled_quickly')

IMAGES = np.random.default_rng(0).normal(size=(6, 8, 8, 2)).astype(np.float32)


@pytest.fixture(scope='module')
def net():
    module = convnet.ConvNet(depth=2, width=5, num_classes=3, norm='batch')
    return network.from_linen(module, jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32))


@pytest.fixture(scope='module')
def recorder(net):
    @jax.jit
    def record(variables, images):
        output, layers = statistics.with_batch_statistics(net.apply, variables, images)
        return output.logits, layers

    return record


def test_statistics_are_those_of_the_inputs_of_each_batch_norm(net, recorder):
    variables = jax.jit(net.init)(jax.random.key(0))
    logits, layers = recorder(variables, IMAGES)
    capture = ('block0/conv', 'block1/conv')
    output = jax.jit(lambda v: net.apply(v, IMAGES, capture=capture))(variables)
    np.testing.assert_allclose(logits, output.logits, rtol=1e-5, atol=1e-6)
    assert len(layers) == 2
    for number, layer in enumerate(layers):
        rows = np.asarray(output.features[f'block{number}/conv'], np.float64).reshape(-1, 5)
        np.testing.assert_allclose(layer.mean, rows.mean(0), atol=1e-5)
        np.testing.assert_allclose(layer.variance, rows.var(0), rtol=1e-4)
        seen = variables['batch_stats'][f'block{number}']['norm']
        np.testing.assert_array_equal(layer.running_mean, seen['mean'])
        np.testing.assert_array_equal(layer.running_variance, seen['var'])


def test_distance_is_zero_once_the_batch_is_what_training_has_seen(net, recorder):
    variables = jax.jit(net.init)(jax.random.key(0))
    first = batch_statistics.statistics_distance(recorder(variables, IMAGES)[1])
    for number in range(2):  # a layer's statistics depend on the running ones before it
        layer = recorder(variables, IMAGES)[1][number]
        seen = variables['batch_stats'][f'block{number}']['norm']
        seen['mean'], seen['var'] = layer.mean, layer.variance
    assert first > 1.0
    assert batch_statistics.statistics_distance(recorder(variables, IMAGES)[1]) < 1e-6


def test_a_network_without_batch_norm_is_refused():
    module = convnet.ConvNet(depth=1, width=2, norm='none')
    plain = network.from_linen(module, jax.ShapeDtypeStruct((1, 8, 8, 2), jnp.float32))
    with pytest.raises(ValueError, match='no batch normalisation'):
        jax.eval_shape(
            lambda key: statistics.with_batch_statistics(plain.apply, plain.init(key), IMAGES),
            jax.random.key(0),
        )
