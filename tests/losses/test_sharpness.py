"""Sharpness-aware gradients, curvature, gradient penalty and kernel perturbation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import sharpness

pytestmark = pytest.mark.usefixtures('compiled_quickly')

RNG = np.random.default_rng(0)
gsam = jax.jit(sharpness.gsam_gradient, static_argnums=0, static_argnames='adaptive')
MATRIX = RNG.normal(size=(5, 5))
MATRIX = MATRIX @ MATRIX.T / 5 + np.diag(np.arange(5.0))
THETA = RNG.normal(size=5)


def quadratic(params):
    theta = jnp.concatenate([params['a'], params['b']])
    return theta @ jnp.asarray(MATRIX) @ theta / 2


def quartic(params):
    return quadratic(params) + jnp.sum(params['a'] ** 4) + jnp.sum(jnp.cos(params['b']))


@pytest.fixture
def params():
    with jax.enable_x64(True):
        return {'a': jnp.asarray(THETA[:2]), 'b': jnp.asarray(THETA[2:])}


def flat(tree):
    return np.concatenate([np.asarray(tree['a']), np.asarray(tree['b'])])


def test_without_radius_and_gap_the_gradient_is_the_plain_one_bit_for_bit(params):
    with jax.enable_x64(True):
        for adaptive in (False, True):
            value, grads = gsam(quartic, params, rho=0.0, adaptive=adaptive)
            np.testing.assert_array_equal(flat(grads), flat(jax.grad(quartic)(params)))
            assert value == quartic(params)


def test_sam_on_a_quadratic_follows_its_closed_form(params):
    rho = 0.3
    gradient = MATRIX @ THETA
    ascended = THETA + rho * gradient / np.linalg.norm(gradient)
    with jax.enable_x64(True):
        grads = gsam(quadratic, params, rho=rho)[1]
        np.testing.assert_allclose(flat(grads), MATRIX @ ascended, rtol=1e-10)
        # With the gap: NumPy's projection.
        sharp = MATRIX @ ascended
        orthogonal = gradient - (gradient @ sharp) / (sharp @ sharp) * sharp
        with_gap = gsam(quadratic, params, rho=rho, alpha=0.4)[1]
        np.testing.assert_allclose(flat(with_gap), sharp - 0.4 * orthogonal, rtol=1e-10)


def test_the_gap_direction_is_orthogonal_and_vanishes_with_the_radius(params):
    with jax.enable_x64(True):

        def direction(rho):
            sharp = flat(gsam(quartic, params, rho=rho)[1])
            combined = flat(gsam(quartic, params, rho=rho, alpha=1.0)[1])
            return sharp - combined, sharp

        gap, sharp = direction(0.1)
        plain = np.linalg.norm(flat(jax.grad(quartic)(params)))
        assert np.linalg.norm(gap) > 1e-3 * plain
        assert abs(gap @ sharp) < 1e-10 * plain * np.linalg.norm(sharp)
        small, smaller = (np.linalg.norm(direction(rho)[0]) for rho in (1e-4, 1e-5))
        np.testing.assert_allclose(small / smaller, 10.0, rtol=1e-2)


def test_plain_perturbation_has_length_rho_and_adaptive_leaves_zeros_alone(params):
    with jax.enable_x64(True):
        params['a'] = params['a'].at[0].set(0.0)
        grads = jax.grad(quadratic)(params)
        plain = sharpness.sam_perturbation(params, grads, 0.7, adaptive=False)
        np.testing.assert_allclose(np.linalg.norm(flat(plain)), 0.7, rtol=1e-10)
        adaptive = flat(sharpness.sam_perturbation(params, grads, 0.7, adaptive=True))
        assert adaptive[0] == 0.0
        theta, gradient = flat(params), flat(grads)
        expected = 0.7 * theta**2 * gradient / np.linalg.norm(np.abs(theta) * gradient)
        np.testing.assert_allclose(adaptive, expected, rtol=1e-10)


def test_adaptive_perturbation_scales_with_the_parameters(params):
    scale = 3.0
    with jax.enable_x64(True):
        e = sharpness.sam_perturbation(params, jax.grad(quartic)(params), 0.5, adaptive=True)
        larger = jax.tree.map(lambda x: scale * x, params)
        rescaled = jax.grad(lambda p: quartic(jax.tree.map(lambda x: x / scale, p)))(larger)
        e_larger = sharpness.sam_perturbation(larger, rescaled, 0.5, adaptive=True)
        np.testing.assert_allclose(flat(e_larger), scale * flat(e), rtol=1e-10)


def test_sharpness_of_the_plain_perturbation_is_the_gradient_norm_to_first_order(params):
    with jax.enable_x64(True):
        grads = jax.grad(quartic)(params)
        e = sharpness.sam_perturbation(params, grads, 1e-5, adaptive=False)
        rise = (quartic(jax.tree.map(jnp.add, params, e)) - quartic(params)) / 1e-5
        np.testing.assert_allclose(rise, np.linalg.norm(flat(grads)), rtol=1e-4)


def test_a_vanishing_gradient_gives_a_zero_step():
    with jax.enable_x64(True):
        for adaptive in (False, True):
            zero = {'a': jnp.zeros(2), 'b': jnp.zeros(3)}
            grads = gsam(quadratic, zero, rho=0.1, alpha=0.4, adaptive=adaptive)[1]
            np.testing.assert_array_equal(flat(grads), 0.0)


@pytest.mark.parametrize('sign', [1.0, -1.0])
def test_largest_curvature_is_the_extreme_eigenvalue(params, key, sign):
    with jax.enable_x64(True):
        found = sharpness.largest_curvature(lambda p: sign * quadratic(p), params, key)
        np.testing.assert_allclose(found, sign * np.linalg.eigvalsh(MATRIX)[-1], rtol=1e-6)


def test_gradient_penalty_of_a_linear_network_does_not_depend_on_the_image(key):
    weights = RNG.normal(size=(4, 4, 1, 3)).astype(np.float32)
    images = jax.random.normal(key, (2, 4, 4, 1))

    def apply(x):
        return jnp.einsum('bhwc,hwck->bk', x, weights)

    penalty = sharpness.gradient_penalty(apply, images)
    assert penalty.shape == (2, 4, 4)
    expected = (np.abs(weights.sum(-1)[..., 0]) - 1) ** 2
    np.testing.assert_allclose(penalty, np.broadcast_to(expected, penalty.shape), atol=1e-6)
    # Over all axes: the norm of the whole image's gradient.
    whole = sharpness.gradient_penalty(apply, images, axis=(1, 2, 3))
    np.testing.assert_allclose(whole, (np.linalg.norm(weights.sum(-1)) - 1) ** 2, rtol=1e-5)


def test_gradient_penalty_reaches_the_parameters_as_finite_differences_say(key):
    with jax.enable_x64(True):
        images = jax.random.normal(key, (2, 3, 3, 2), jnp.float64)
        weights = jnp.asarray(RNG.normal(size=(18, 4)))

        def mean_penalty(weights):
            def apply(x):
                return jnp.tanh(x.reshape(2, -1) @ weights) ** 2

            return sharpness.gradient_penalty(apply, images).mean()

        mean_penalty = jax.jit(mean_penalty)
        gradient = jax.jit(jax.grad(mean_penalty))(weights)
        direction = jnp.asarray(RNG.normal(size=weights.shape))
        step = 1e-5
        rise = (
            mean_penalty(weights + step * direction) - mean_penalty(weights - step * direction)
        ) / (2 * step)
        assert abs(float(rise)) > 1e-3
        np.testing.assert_allclose(jnp.vdot(gradient, direction), rise, rtol=1e-5)


def test_gradient_penalty_is_differentiable_where_the_network_ignores_a_pixel():
    def mean_penalty(weight):
        return sharpness.gradient_penalty(lambda x: weight * x[:, :1, :, 0], jnp.ones((1, 2, 2, 1)))

    np.testing.assert_array_equal(mean_penalty(3.0), [[[4.0, 4.0], [1.0, 1.0]]])
    gradient = jax.grad(lambda w: mean_penalty(w).sum())(3.0)
    np.testing.assert_allclose(gradient, 8.0)


def test_kernels_are_perturbed_relative_to_themselves_and_nothing_else_is(key):
    with jax.enable_x64(True):
        kernel = jax.random.normal(key, (3, 3, 2, 4), jnp.float64)
        params = {
            'conv': {'kernel': kernel, 'bias': jnp.ones(4)},
            'head': {'kernel': jnp.ones((8, 2))},
        }
        moved = sharpness.perturb_kernels(key, params, 0.5)
    before, after = (np.asarray(tree['conv']['kernel'], np.float64) for tree in (params, moved))
    np.testing.assert_allclose(np.linalg.norm((after - before) / before), 0.5, rtol=1e-6)
    assert np.linalg.norm(after - before) <= 0.5 * np.abs(before).max()
    assert moved['conv']['bias'] is params['conv']['bias']
    assert moved['head']['kernel'] is params['head']['kernel']
