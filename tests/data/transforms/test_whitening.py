"""ZCA whitening against the spectrum that NumPy finds."""

import jax
import numpy as np
import pytest

from kd.data.transforms import whitening


@pytest.fixture(scope='module')
def images():
    rng = np.random.default_rng(0)
    mixing = rng.normal(size=(18, 18)) / 4
    return np.tanh(rng.normal(size=(400, 18)) @ mixing).reshape(400, 3, 3, 2).astype(np.float32)


@pytest.fixture(scope='module')
def fitted(images):
    return whitening.fit(images, 0.05, chunk=128)


def test_matrix_and_inverse_multiply_to_the_identity(fitted):
    np.testing.assert_allclose(fitted.matrix @ fitted.inverse, np.eye(18), atol=1e-5)
    np.testing.assert_array_equal(fitted.matrix, fitted.matrix.T)


def test_covariance_of_whitened_data_is_the_shrunk_spectrum(images, fitted):
    whitened = np.asarray(jax.jit(lambda w, x: w.apply(x))(fitted, images), np.float64)
    variances, axes = np.linalg.eigh(np.cov(images.reshape(400, -1).astype(np.float64).T))
    expected = (axes * (variances / (variances + 0.05))) @ axes.T
    actual = np.cov(whitened.reshape(400, -1).T)
    np.testing.assert_allclose(actual, expected, atol=1e-4 * np.abs(expected).max())
    np.testing.assert_allclose(whitened.mean(0), 0.0, atol=1e-5)


def test_inversion_returns_the_pixels(images, fitted):
    np.testing.assert_allclose(fitted.invert(fitted.apply(images)), images, atol=1e-5)
    # Leading axes are free.
    folded = images.reshape(20, 20, 3, 3, 2)
    np.testing.assert_allclose(fitted.apply(folded).reshape(images.shape), fitted.apply(images))


def test_units_of_the_pixels_only_rescale_eps(images, fitted):
    unit = whitening.fit((images + 1) / 2, 0.05 / 4)
    np.testing.assert_allclose(unit.apply((images + 1) / 2), fitted.apply(images), atol=1e-5)


def test_without_eps_data_is_white_on_its_span_and_nothing_is_left_off_it():
    rng = np.random.default_rng(1)
    flat = (rng.normal(size=(50, 3)) @ rng.normal(size=(3, 8))).astype(np.float32)
    fitted = whitening.fit(flat.reshape(50, 2, 2, 2).astype(np.float64), 0.0)
    whitened = np.asarray(fitted.apply(flat.reshape(50, 2, 2, 2)), np.float64).reshape(50, 8)
    span = np.linalg.svd(flat - flat.mean(0), full_matrices=False)[2][:3]
    np.testing.assert_allclose(np.cov(whitened.T), span.T @ span, atol=1e-4)


def test_bad_input_is_named(images, fitted):
    with pytest.raises(ValueError, match=r'\[n >= 2, H, W, C\], got \[1, 3, 3, 2\]'):
        whitening.fit(images[:1])
    with pytest.raises(ValueError, match=r'cannot be negative, got -0\.1'):
        whitening.fit(images, -0.1)
    with pytest.raises(ValueError, match=r'images of 18 values.*\[4, 4, 1\]'):
        fitted.apply(np.zeros((2, 4, 4, 1), np.float32))
