"""Entropic transport against a linear program, kernels in NumPy and finite differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from scipy.spatial.distance import cdist

from kd.evaluators import distribution
from kd.losses import transport

pytestmark = pytest.mark.usefixtures('compiled_quickly')

N, K, D = 5, 4, 3
RNG = np.random.default_rng(0)
POINTS, CENTROIDS = RNG.normal(size=(N, D)), RNG.normal(size=(K, D))
MASS = np.array([0.4, 0.3, 0.2, 0.1])
UNIFORM = np.full(N, 1 / N)
COST = cdist(POINTS, CENTROIDS)


@functools.partial(jax.jit, static_argnames=('iterations',))
def sinkhorn(cost, a, b, epsilon, where, iterations):
    return transport.sinkhorn(cost, a, b, epsilon=epsilon, iterations=iterations, where=where)


def solved(cost, a, b, *, epsilon=0.1, iterations=5, where=None):
    there = np.ones(len(cost), bool) if where is None else where
    with jax.enable_x64(True):
        return jax.device_get(sinkhorn(cost, a, b, epsilon, there, iterations))


def program(cost, a, b):
    """The least <plan, cost> by a linear program over the plans with these marginals."""
    n, k = cost.shape
    rows = np.kron(np.eye(n), np.ones(k))
    columns = np.kron(np.ones(n), np.eye(k))
    found = scipy.optimize.linprog(
        cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=np.concatenate([a, b])
    )
    return found.fun


def kernels(cost, a, b, epsilon, iterations):
    """Scalings of exp(-C / epsilon), as the release has them."""
    kernel, v = np.exp(-cost / epsilon), np.ones(len(b))
    for _ in range(iterations):
        u = a / (kernel @ v)
        v = b / (kernel.T @ u)
    return u[:, None] * kernel * v


def test_plans_are_those_of_scaled_kernels_where_these_do_not_underflow():
    for iterations in (1, 5):
        plan, (f, g) = solved(COST, UNIFORM, MASS, iterations=iterations)
        wanted = kernels(COST, UNIFORM, MASS, 0.1, iterations)
        np.testing.assert_allclose(plan, wanted, rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(np.exp((f[:, None] + g - COST) / 0.1), plan, rtol=1e-9)


def test_columns_are_met_exactly_and_rows_in_the_end():
    cost = cdist(*(x / np.linalg.norm(x, axis=1, keepdims=True) for x in (POINTS, CENTROIDS)))
    off = []
    for iterations in (1, 5, 500):
        plan, _ = solved(cost, UNIFORM, MASS, iterations=iterations)
        np.testing.assert_allclose(plan.sum(0), MASS, atol=1e-12)
        off.append(np.abs(plan.sum(1) - UNIFORM).max())
    assert off[0] > off[1] > off[2]
    assert off[2] < 1e-6


def test_with_little_entropy_the_energy_is_that_of_the_linear_program():
    exact = program(COST, UNIFORM, MASS)
    energies = []
    for epsilon in (0.5, 0.1, 0.01):
        plan, _ = solved(COST, UNIFORM, MASS, epsilon=epsilon, iterations=500)
        energies.append(np.sum(plan * COST))
    assert energies[0] > energies[1] > energies[2]
    assert energies[2] == pytest.approx(exact, abs=1e-2)
    # As many points as centroids, all of one mass: an assignment.
    square, equal = COST[:K], np.full(K, 1 / K)
    rows, columns = scipy.optimize.linear_sum_assignment(square)
    plan, _ = solved(square, equal, equal, epsilon=0.01, iterations=500)
    assert np.sum(plan * square) == pytest.approx(square[rows, columns].mean(), abs=1e-2)


def test_costs_of_hundreds_of_entropies_stay_finite_where_kernels_do_not():
    cost = 1e3 * COST
    with np.errstate(all='ignore'):
        assert not np.isfinite(kernels(cost, UNIFORM, MASS, 0.1, 5)).all()
    with jax.enable_x64(False):
        given = (jnp.asarray(x, jnp.float32) for x in (cost, UNIFORM, MASS))
        plan, _ = sinkhorn(*given, jnp.float32(0.1), np.ones(N, bool), 5)
    np.testing.assert_allclose(plan.sum(0), MASS, atol=1e-5)


def test_padded_rows_and_empty_columns_are_not_there():
    where = np.array([True, False, True, True, False])
    share = where / where.sum()
    cost = np.where(where[:, None], COST, np.nan)
    mass = np.array([0.5, 0.0, 0.25, 0.25])
    plan, (f, g) = solved(cost, share, mass, where=where)
    kept = mass > 0
    wanted, _ = solved(COST[where][:, kept], np.full(3, 1 / 3), mass[kept])
    np.testing.assert_allclose(plan[where][:, kept], wanted, rtol=1e-9)
    np.testing.assert_array_equal(plan[~where], 0.0)
    np.testing.assert_array_equal(plan[:, ~kept], 0.0)
    assert (f[~where] == -np.inf).all()
    assert (g[~kept] == -np.inf).all()


@functools.cache
def energy_and_slope(sphere, through_plan=True):
    def energy(x, centroids, mass, where):
        return transport.transport_energy(
            x, centroids, mass, where=where, sphere=sphere, through_plan=through_plan
        )

    compiled = jax.jit(jax.value_and_grad(energy))

    def in_float64(*given):
        with jax.enable_x64(True):
            return jax.device_get(compiled(*given))

    return in_float64


@pytest.mark.parametrize('sphere', [True, False])
def test_energy_and_gradient_against_numpy_and_finite_differences(sphere):
    where = np.array([True, True, False, True, False])

    def oracle(x):
        def unit(y):
            return y / np.linalg.norm(y, axis=1, keepdims=True) if sphere else y

        cost = cdist(unit(x[where]), unit(CENTROIDS))
        plan = kernels(cost, np.full(3, 1 / 3), MASS, 0.1, 5)
        return np.sum(plan * cost)

    x = np.where(where[:, None], POINTS, np.nan)
    value, slope = energy_and_slope(sphere)(x, CENTROIDS, MASS, where)
    assert value == pytest.approx(oracle(x), rel=1e-9)
    expected = np.zeros((N, D))
    for index in np.ndindex(N, D):
        step = np.zeros((N, D))
        step[index] = 1e-6
        expected[index] = (oracle(POINTS + step) - oracle(POINTS - step)) / 2e-6
    np.testing.assert_allclose(slope, expected, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(slope[~where], 0.0)


def test_a_plan_that_is_held_has_the_gradient_of_its_costs_alone():
    everything = np.ones(N, bool)
    through = energy_and_slope(False)(POINTS, CENTROIDS, MASS, everything)
    held = energy_and_slope(False, False)(POINTS, CENTROIDS, MASS, everything)
    assert float(through[0]) == pytest.approx(float(held[0]), rel=1e-12)
    plan = kernels(COST, UNIFORM, MASS, 0.1, 5)
    away = POINTS[:, None] - CENTROIDS
    wanted = np.sum(plan[..., None] * away / COST[..., None], axis=1)
    np.testing.assert_allclose(held[1], wanted, rtol=1e-9)
    assert np.abs(through[1] - held[1]).max() > 1e-2


def test_one_point_and_one_centroid_on_the_sphere():
    x, k = POINTS[:1], CENTROIDS[:1]
    value, slope = energy_and_slope(True)(x, k, np.ones(1), np.ones(1, bool))
    same = energy_and_slope(True)(k, k, np.ones(1), np.ones(1, bool))
    unit = x / np.linalg.norm(x) - k / np.linalg.norm(k)
    assert value == pytest.approx(np.linalg.norm(unit), rel=1e-12)
    assert abs(np.sum(slope * x)) < 1e-6
    assert same[0] == 0
    np.testing.assert_array_equal(same[1], 0.0)


def test_an_entropy_of_nothing_is_refused():
    with pytest.raises(ValueError, match='epsilon must be positive'):
        transport.sinkhorn(jnp.asarray(COST), UNIFORM, MASS, epsilon=0.0)


def test_exact_distance_of_sets_of_two_sizes_against_the_linear_program():
    many = RNG.normal(size=(3 * N, D))
    wanted = program(cdist(POINTS, many), UNIFORM, np.full(3 * N, 1 / (3 * N)))
    assert distribution.wasserstein(POINTS, many) == pytest.approx(wanted, rel=1e-6)
    with pytest.raises(ValueError, match='4 points are no multiple of 5'):
        distribution.wasserstein(POINTS, CENTROIDS)
