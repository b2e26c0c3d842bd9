"""Gradient matching, mean embeddings and batch statistics against NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import softmax as scipy_softmax

from kd.losses import batch_statistics, divergence, gradient_matching, mean_embedding

pytestmark = pytest.mark.usefixtures('compiled_quickly')

RNG = np.random.default_rng(0)


def draw():
    shapes = {'conv': (3, 3, 2, 4), 'bias': (4,), 'head': (6, 5)}
    return {name: RNG.normal(size=shape) for name, shape in shapes.items()}


def softmax(logits):
    return scipy_softmax(np.asarray(logits, np.float64), axis=-1)


def cosine(a, b):
    return a @ b / np.linalg.norm(a) / np.linalg.norm(b)


def test_unit_distance_sums_one_minus_cosine_over_the_units_of_the_layers():
    a, b = draw(), draw()
    expected = sum(
        1 - cosine(a[name][..., unit].ravel(), b[name][..., unit].ravel())
        for name in ('conv', 'head')
        for unit in range(a[name].shape[-1])
    )
    with jax.enable_x64(True):
        value = gradient_matching.gradient_distance(a | {}, b)
        np.testing.assert_allclose(value, expected, rtol=1e-6)  # 1e-6 in the denominator
        scaled = gradient_matching.gradient_distance(a, jax.tree.map(lambda x: 7.0 * x, b))
        np.testing.assert_allclose(scaled, expected, rtol=1e-6)


def test_cosine_and_squared_distances_are_of_all_leaves():
    a, b = draw(), draw()
    flat = [np.concatenate([x.ravel() for x in jax.tree.leaves(tree)]) for tree in (a, b)]
    with jax.enable_x64(True):
        value = gradient_matching.gradient_distance(a, b, kind='cosine')
        np.testing.assert_allclose(value, 1 - cosine(*flat), rtol=1e-6)
        value = gradient_matching.gradient_distance(a, b, kind='squared')
        np.testing.assert_allclose(value, np.sum((flat[0] - flat[1]) ** 2), rtol=1e-12)


@pytest.mark.parametrize('kind', ['units', 'cosine', 'squared'])
def test_zero_gradients_have_finite_derivatives(kind):
    zeros = {'w': jnp.zeros((3, 2))}
    ones = {'w': jnp.ones((3, 2))}
    for a, b in ((zeros, ones), (zeros, zeros)):
        value, slope = jax.value_and_grad(gradient_matching.gradient_distance)(a, b, kind=kind)
        assert np.isfinite(value)
        assert np.isfinite(slope['w']).all()


def test_classes_are_matched_apart_and_real_gradients_are_constants():
    params = jnp.asarray(RNG.normal(size=(4, 3)), jnp.float32)
    synthetic, real = (jnp.asarray(RNG.normal(size=(2, n, 4)), jnp.float32) for n in (1, 8))

    def loss(params, examples):
        return jnp.mean(jax.nn.logsumexp(examples @ params, -1))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1), has_aux=True)
    def total(synthetic, real):
        distances = gradient_matching.gradient_matching(loss, params, synthetic, real)
        return distances.sum(), distances

    (to_synthetic, to_real), distances = total(synthetic, real)
    for c in range(2):
        grads = [softmax(x[c] @ params).T @ x[c] / x.shape[1] for x in (synthetic, real)]
        expected = sum(1 - cosine(grads[0][u], grads[1][u]) for u in range(3))
        np.testing.assert_allclose(distances[c], expected, rtol=1e-3)

    assert np.abs(to_synthetic).max() > 1e-3
    assert not to_real.any()


def test_real_gradients_of_more_classes_take_no_more_memory():
    """Their activations, [64, 512] of each class, are there for one class at a time."""
    params = {'w': jnp.ones((4, 512)), 'v': jnp.ones((512, 3))}

    def loss(params, x):
        return jnp.mean(jnp.square(jnp.tanh(x @ params['w']) @ params['v']))

    def held(classes):
        matched = lambda *of: gradient_matching.gradient_matching(loss, params, *of).sum()  # noqa: E731
        sizes = (jnp.ones((classes, n, 4)) for n in (1, 64))
        return jax.jit(matched).lower(*sizes).compile().memory_analysis().temp_size_in_bytes

    activations = 4 * 64 * 512
    assert held(9) - held(1) < 8 * activations / 2


def test_mean_embedding_distance_is_the_discrepancy_of_a_linear_kernel():
    a, b = RNG.normal(size=(3, 2, 5)), RNG.normal(size=(3, 7, 5))
    kernel = [np.einsum('cid,cjd->cij', x, y).mean((1, 2)) for x, y in ((a, a), (b, b), (a, b))]
    expected = kernel[0] + kernel[1] - 2 * kernel[2]
    with jax.enable_x64(True):
        value = mean_embedding.mean_embedding_distance(jnp.asarray(a), jnp.asarray(b))
        np.testing.assert_allclose(value, expected, rtol=1e-10)
        padded = np.concatenate([b, np.full((3, 2, 5), np.nan)], 1)
        masked = mean_embedding.mean_embedding_distance(
            jnp.asarray(a), jnp.asarray(padded), real_where=jnp.arange(9) < 7
        )
        np.testing.assert_allclose(masked, expected, rtol=1e-10)


def test_statistics_distance_weighs_the_first_layer_and_does_not_square():
    layers = [
        batch_statistics.LayerStatistics(*(RNG.normal(size=4) for _ in range(4))) for _ in range(2)
    ]
    norm = np.linalg.norm
    terms = [norm(l.mean - l.running_mean) + norm(l.variance - l.running_variance) for l in layers]
    with jax.enable_x64(True):
        value = batch_statistics.statistics_distance(layers, first_weight=10.0)
        np.testing.assert_allclose(value, 10 * terms[0] + terms[1], rtol=1e-10)


def test_statistics_are_those_of_numpy_and_equal_ones_have_zero_gradient():
    features = RNG.normal(size=(4, 3, 2, 5)).astype(np.float32)
    mean, variance = batch_statistics.statistics_of(jnp.asarray(features))
    rows = features.astype(np.float64).reshape(-1, 5)
    np.testing.assert_allclose(mean, rows.mean(0), atol=1e-6)
    np.testing.assert_allclose(variance, rows.var(0), rtol=1e-5)

    def distance(features):
        layer = batch_statistics.LayerStatistics(
            *batch_statistics.statistics_of(features), mean, variance
        )
        return batch_statistics.statistics_distance([layer])

    value, slope = jax.value_and_grad(distance)(jnp.asarray(features))
    assert value < 1e-6
    assert np.isfinite(slope).all()


def test_distillation_at_high_temperature_becomes_regression_of_centred_logits():
    student, teacher = RNG.normal(size=(4, 5)), RNG.normal(size=(4, 5))
    temperature = 1000.0
    with jax.enable_x64(True):

        def loss(student):
            return divergence.forward_kl(student, teacher, temperature=temperature).sum()

        gradient = jax.grad(loss)(jnp.asarray(student))
    centred = [x - x.mean(-1, keepdims=True) for x in (student, teacher)]
    expected = (centred[0] - centred[1]) / (5 * temperature**2)
    np.testing.assert_allclose(gradient, expected, rtol=1e-2)


def test_unknown_distance_is_named():
    grads = {'w': jnp.ones((2, 2))}
    with pytest.raises(ValueError, match="got 'angle'"):
        gradient_matching.gradient_distance(grads, grads, kind='angle')
