"""Kernel self-distillation against linear solves, scikit-learn and hand-written Jacobians."""

import flax.linen as nn
import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.kernel_ridge import KernelRidge
from sklearn.metrics import pairwise

from kd.theory import kernel_regression as kr

pytestmark = pytest.mark.usefixtures('compiled_quickly')

RNG = np.random.default_rng(0)
X, X_NEW = RNG.normal(size=(30, 3)), RNG.normal(size=(12, 3))
Y = RNG.normal(size=(30, 2))


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize(
    ('ours', 'theirs'),
    [
        (kr.rbf_kernel(X_NEW, X, 0.7), pairwise.rbf_kernel(X_NEW, X, 0.7)),
        (kr.laplace_kernel(X_NEW, X, 0.7), pairwise.laplacian_kernel(X_NEW, X, 0.7)),
        (
            kr.polynomial_kernel(X_NEW, X, 3, 0.5, 2.0),
            pairwise.polynomial_kernel(X_NEW, X, 3, 0.5, 2.0),
        ),
    ],
    ids=['rbf', 'laplace', 'polynomial'],
)
def test_kernels_equal_scikit_learns_in_the_default_float32(ours, theirs):
    np.testing.assert_allclose(ours, theirs, rtol=2e-4, atol=1e-6)


def test_rbf_kernel_in_float64_is_exact_far_from_the_origin():
    exact = pairwise.rbf_kernel(X_NEW, X, 0.7)
    np.testing.assert_allclose(kr.rbf_kernel(X_NEW, X, 0.7), exact, atol=1e-14)
    shifted = kr.rbf_kernel(X_NEW + 1e4, X + 1e4, 0.7)
    np.testing.assert_allclose(shifted, exact, atol=1e-9)


def test_chain_equals_refitting_scikit_learns_kernel_ridge():
    alphas, lam = (0.3, 0.8, 0.0), 0.2
    smoother = kr.ridge_smoother(kr.rbf_kernel(X, X, 0.5), lam)
    filters = kr.spectral_filter_path(smoother.s, alphas)
    gram_new = kr.rbf_kernel(X_NEW, X, 0.5)
    labels = Y
    for filter, alpha in zip(filters, (*alphas, None), strict=True):
        model = KernelRidge(alpha=lam, kernel='rbf', gamma=0.5).fit(X, labels)
        ours = kr.predict(gram_new, smoother.V, smoother.d, filter, Y)
        np.testing.assert_allclose(ours, model.predict(X_NEW), atol=1e-10)
        fitted = kr.fitted_values(smoother.V, filter, Y)
        np.testing.assert_allclose(fitted, model.predict(X), atol=1e-10)
        if alpha is not None:
            labels = np.asarray(kr.mixed_targets(Y, model.predict(X), alpha))


def test_null_directions_of_a_singular_gram_contribute_nothing():
    # A linear kernel on 3 features: rank 3 of 30. The primal ridge solution is the oracle.
    smoother = kr.ridge_smoother(X @ X.T, 0.1)
    ours = kr.predict(X_NEW @ X.T, smoother.V, smoother.d, smoother.s, Y)
    beta = np.linalg.solve(X.T @ X + 0.1 * np.eye(3), X.T @ Y)
    np.testing.assert_allclose(ours, X_NEW @ beta, atol=1e-10)


def test_effective_regularisation_inverts_the_ridge_filter():
    d = np.array([0.01, 1.0, 30.0])
    np.testing.assert_allclose(kr.effective_regularisation(kr.shrinkage(d, 0.3), d), 0.3)
    limit = kr.spectral_filter_limit(d, 0.3, 0.25)
    np.testing.assert_allclose(kr.effective_regularisation(limit, d), 0.3 / 0.25)


def test_optimal_alpha_minimises_the_error_and_is_one_where_all_weights_tie():
    first, distilled, targets = RNG.normal(size=(3, 20, 2))
    alpha = float(kr.optimal_alpha(first, distilled, targets))

    def error(weight):
        return np.sum((targets - weight * first - (1 - weight) * distilled) ** 2)

    assert error(alpha) < min(error(alpha - 1e-3), error(alpha + 1e-3))
    assert float(kr.optimal_alpha(first, first, targets)) == 1.0
    slope = jax.grad(lambda f: kr.optimal_alpha(f, first, targets))(first)
    assert np.all(np.isfinite(slope))


def test_optimal_path_with_bounds_keeps_its_weights_in_them():
    smoother = kr.ridge_smoother(kr.rbf_kernel(X, X, 0.5), 3.0)
    arguments = kr.rbf_kernel(X_NEW, X, 0.5), smoother, Y, RNG.normal(size=(12, 2)), 6
    free, _ = kr.optimal_alpha_path(*arguments)
    clipped, filters = kr.optimal_alpha_path(*arguments, bounds=(0.0, 1.0))
    assert np.max(np.abs(free - 0.5)) > 0.5
    assert np.all((clipped >= 0) & (clipped <= 1))
    np.testing.assert_allclose(filters, kr.spectral_filter_path(smoother.s, clipped), atol=1e-14)


def test_empirical_ntk_of_a_linear_layer_is_its_inner_products_plus_one():
    module = nn.Dense(3, param_dtype=jnp.float64)
    params = module.init(jax.random.key(0), X)['params']

    @jax.jit
    def kernel(x, y):
        return kr.empirical_ntk(lambda p, x: module.apply({'params': p}, x), params, x, y)

    ntk = kernel(X_NEW, X)
    np.testing.assert_allclose(ntk, X_NEW @ X.T + 1, atol=1e-12)


def test_empirical_ntk_of_a_network_equals_the_jacobian_by_finite_differences():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            hidden = nn.tanh(nn.Dense(4, param_dtype=jnp.float64)(x))
            return nn.Dense(2, param_dtype=jnp.float64)(hidden)

    module = Mlp()
    params = module.init(jax.random.key(1), X)['params']
    apply = jax.jit(lambda p, x: module.apply({'params': p}, x))
    kernel = jax.jit(lambda x, y: kr.empirical_ntk(apply, params, x, y))
    ntk = kernel(X_NEW[:5], X[:5])
    flat, unravel = jax.flatten_util.ravel_pytree(params)

    def jacobian(x):
        columns = []
        for direction in 1e-5 * np.eye(flat.size):
            up, down = apply(unravel(flat + direction), x), apply(unravel(flat - direction), x)
            columns.append((up - down) / 2e-5)
        return np.stack(columns, axis=-1)

    exact = np.einsum('icp,jcp->ij', jacobian(X_NEW[:5]), jacobian(X[:5])) / 2
    np.testing.assert_allclose(ntk, exact, atol=1e-8)
    gram = kernel(X[:5], X[:5])
    assert np.min(np.linalg.eigvalsh(gram)) > -1e-10


def test_self_distillation_loss_is_the_mixture_of_two_brier_scores():
    logits, teacher = RNG.normal(size=(2, 5, 4))
    labels = np.eye(4)[RNG.integers(4, size=5)]
    p, q = (np.exp(z) / np.exp(z).sum(-1, keepdims=True) for z in (teacher, logits))
    exact = 0.3 * np.mean((q - labels) ** 2, -1) + 0.7 * np.mean((q - p) ** 2, -1)
    ours = kr.self_distillation_loss(logits, labels, teacher, 0.3)
    np.testing.assert_allclose(ours, exact, atol=1e-14)
    slope = jax.jit(jax.grad(lambda z: jnp.sum(kr.self_distillation_loss(z, labels, teacher, 0.3))))
    assert np.all(np.isfinite(slope(1e4 * np.sign(logits))))


@pytest.mark.parametrize(
    ('gram', 'lam', 'message'),
    [
        (np.ones((3, 2)), 1.0, 'must be square'),
        (np.array([[1.0, 0.5], [0.4, 1.0]]), 1.0, 'must be symmetric'),
        (np.array([[1.0, np.nan], [np.nan, 1.0]]), 1.0, 'must be symmetric'),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), 1.0, 'positive semi-definite'),
        (np.eye(2), 0.0, 'lam must be positive'),
        (np.eye(2), -1.0, 'lam must be positive'),
        (np.float32(np.eye(2)), 1e-6, 'Use lam >='),
    ],
)
def test_bad_gram_matrices_and_regularisations_are_refused(gram, lam, message):
    with pytest.raises(ValueError, match=message):
        kr.ridge_smoother(gram, lam)


def test_the_same_small_regularisation_is_accepted_in_float64():
    assert kr.ridge_smoother(np.eye(2), 1e-6).s.dtype == jnp.float64


@pytest.mark.parametrize('alpha', [-0.1, 1.1])
def test_constant_weights_outside_the_unit_interval_are_refused(alpha):
    with pytest.raises(ValueError, match=r'alpha must be in \[0, 1\]'):
        kr.spectral_filter_limit(np.ones(2), 1.0, alpha)
    with pytest.raises(ValueError, match=r'alpha must be in \[0, 1\]'):
        kr.spectral_filter_constant(np.full(2, 0.5), alpha, 2)


def test_kernels_refuse_points_of_different_dimension():
    with pytest.raises(ValueError, match=r'needs points \[m, p\] and \[n, p\]'):
        kr.rbf_kernel(X, X[:, :2], 1.0)


def test_checks_are_skipped_under_jit():
    # -1 would be refused outside; traced, it computes.
    limit = jax.jit(kr.spectral_filter_limit)(np.ones(2), 1.0, -0.5)
    np.testing.assert_allclose(limit, -1.0)
    smoother = jax.jit(kr.ridge_smoother)(np.eye(2), 0.5)
    np.testing.assert_allclose(smoother.s, 1 / 1.5)
