"""Interpolants against their definitions, and the ones that must be refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import interpolant as ip

pytestmark = pytest.mark.usefixtures('compiled_quickly')

NAMES = sorted(ip.INTERPOLANTS)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(name='pair')
def _pair():
    k0, k1 = jax.random.split(jax.random.key(0))
    return jax.random.normal(k0, (5, 3, 2)), jax.random.normal(k1, (5, 3, 2))


@pytest.mark.parametrize('name', NAMES)
def test_path_runs_from_noise_to_data(name, pair):
    path, (x0, x1) = ip.get_interpolant(name), pair
    np.testing.assert_allclose(path.point(0.0, x0, x1), x0, atol=1e-12)
    np.testing.assert_allclose(path.point(1.0, x0, x1), x1, atol=1e-12)


@pytest.mark.parametrize('name', NAMES)
def test_velocity_is_the_derivative_of_the_path(name, pair):
    path, (x0, x1) = ip.get_interpolant(name), pair
    t, h = jnp.linspace(0.05, 0.9, 5), 1e-6
    wanted = (path.point(t + h, x0, x1) - path.point(t - h, x0, x1)) / (2 * h)
    np.testing.assert_allclose(path.velocity(t, x0, x1), wanted, atol=1e-8)


@pytest.mark.parametrize('name', NAMES)
def test_point_and_velocity_determine_noise_and_data(name, pair):
    path, (x0, x1) = ip.get_interpolant(name), pair
    t = jnp.linspace(0.05, 0.9, 5)
    x, v = path.point(t, x0, x1), path.velocity(t, x0, x1)
    np.testing.assert_allclose(path.to_data(t, x, v), x1, atol=1e-10)
    np.testing.assert_allclose(path.to_noise(t, x, v), x0, atol=1e-10)


def test_linear_velocity_is_data_minus_noise_and_the_others_keep_the_variance(pair):
    x0, x1 = pair
    t = jnp.linspace(0.0, 0.999, 5)
    np.testing.assert_array_equal(ip.linear().velocity(t, x0, x1), x1 - x0)
    for path in (ip.trigonometric(), ip.variance_preserving()):
        np.testing.assert_allclose(path.a(t) ** 2 + path.c(t) ** 2, 1.0, atol=1e-12)


def test_wrong_ends_are_refused_when_built():
    with pytest.raises(ValueError, match=r"'reversed': a\(0\) = 0 and a\(1\) = 1, expected 1 and"):
        ip.Interpolant('reversed', lambda t: t, lambda t: 1 - t)
    with pytest.raises(ValueError, match=r"'noisy': c\(0\) = 0 and c\(1\) = 0.9, expected 0 and 1"):
        ip.Interpolant('noisy', lambda t: 1 - t, lambda t: 0.9 * t)
    with pytest.raises(ValueError, match=r'derivative of a is not finite on \[0, 1.0\]'):
        ip.variance_preserving(end=1.0)
    with pytest.raises(ValueError, match='expected 0 < end <= 1'):
        ip.Interpolant('late', lambda t: 1 - t, lambda t: t, end=1.5)
    with pytest.raises(ValueError, match="unknown interpolant 'cubic', expected one of"):
        ip.get_interpolant('cubic')


def test_interpolant_can_be_built_and_used_under_jit(pair):
    x0, x1 = pair
    velocity = jax.jit(lambda t: ip.trigonometric().velocity(t, x0, x1))(0.5)
    np.testing.assert_allclose(velocity, np.pi / 2 * np.sqrt(0.5) * (x1 - x0), atol=1e-12)


def test_teacher_of_another_path_is_refused():
    renamed = ip.Interpolant('straight', lambda t: 1 - t, lambda t: t)
    ip.check_same_interpolant(ip.linear(), renamed)
    with pytest.raises(ValueError, match="teacher was trained on interpolant 'trigonometric'"):
        ip.check_same_interpolant(ip.linear(), ip.trigonometric())
