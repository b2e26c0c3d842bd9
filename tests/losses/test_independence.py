"""Dependence of Gaussian latents on a group against integration, and against all pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.stats
from scipy.spatial.distance import cdist

from kd.evaluators import distribution
from kd.losses import independence

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, D, S = 23, 3, 3


@pytest.fixture(scope='module')
def latents():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, D)), 0.3 + rng.random((B, D)), rng.integers(S, size=B)


def k(m1, v1, m2, v2):
    """[N, M] densities of SciPy."""
    return np.array([
        [scipy.stats.multivariate_normal.pdf(a - c, np.zeros(len(a)), np.diag(b + d))
         for c, d in zip(m2, v2, strict=True)] for a, b in zip(m1, v1, strict=True)
    ])  # fmt: skip


def covariance(mean, variance, group, *, diagonal=True, where=None):
    """V^2 from all pairs, group by group."""
    where = np.ones(len(mean), bool) if where is None else where
    mean, variance, group = mean[where], variance[where], group[where]
    pairs = k(mean, variance, mean, variance)
    counted = np.ones_like(pairs) if diagonal else 1 - np.eye(len(mean))
    total, found = (pairs * counted).sum() / counted.sum(), 0.0
    for s in np.unique(group):
        own = group == s
        if own.all() or (not diagonal and own.sum() < 2):
            continue
        inside = (pairs * counted)[np.ix_(own, own)].sum() / counted[np.ix_(own, own)].sum()
        across = (pairs * counted)[own].sum() / counted[own].sum()
        found += own.mean() ** 2 * (total + inside - 2 * across)
    return found


def test_the_closed_form_is_all_pairs_and_its_chunks_do_not_matter(latents):
    mean, variance, group = latents
    where = np.arange(B) % 4 > 0
    with jax.enable_x64(True):
        for chunk in (4, 23, 100):
            for options in ({}, {'diagonal': False}, {'where': where}):
                found = independence.distance_covariance(
                    jnp.asarray(mean), jnp.asarray(variance), group, S, chunk=chunk, **options
                )
                wanted = covariance(mean, variance, group, **options)
                assert float(found) == pytest.approx(wanted, rel=1e-9)
        # Nothing is read of what does not count.
        told = (np.where(where[:, None], x, np.nan) for x in (mean, variance))
        unread = independence.distance_covariance(*told, group, S, where=where)
        wanted = covariance(mean, variance, group, where=where)
        assert float(unread) == pytest.approx(wanted, rel=1e-9)
        overlap = independence.gauss_overlap(
            mean, variance, mean[:5] + 1, variance[:5], where1=where, log_scale=2.0, chunk=7
        )
    wanted = k(mean[where], variance[where], mean[:5] + 1, variance[:5]).mean() * np.exp(2)
    assert float(overlap) == pytest.approx(wanted, rel=1e-9)
    one = independence.gauss_overlap(mean, variance, mean, variance, diagonal=False)
    pairs = k(mean, variance, mean, variance)
    assert float(one) == pytest.approx(pairs[~np.eye(B, dtype=bool)].mean(), rel=1e-5)


def test_it_is_the_integral_of_the_squared_difference_in_one_dimension():
    rng = np.random.default_rng(1)
    mean, variance, group = rng.normal(size=9), 0.2 + rng.random(9), np.arange(9) % 2

    def density(z, rows):
        return scipy.stats.norm.pdf(z, mean[rows], np.sqrt(variance[rows])).mean()

    every = np.ones(9, bool)
    wanted = sum(
        np.mean(group == s) ** 2
        * scipy.integrate.quad(lambda z, s=s: (density(z, group == s) - density(z, every)) ** 2,
                               -12, 12)[0]
        for s in (0, 1)
    )  # fmt: skip
    found = independence.distance_covariance(mean[:, None], variance[:, None], group, 2)
    assert float(found) == pytest.approx(wanted, rel=1e-3)
    # Two unit Gaussians at +-m, equal groups.
    for m in (0.0, 0.5, 3.0):
        found = independence.distance_covariance(
            jnp.array([[m], [-m]]), jnp.ones((2, 1)), jnp.array([0, 1]), 2
        )
        wanted = (1 - np.exp(-(m**2))) / (8 * np.sqrt(np.pi))
        assert float(found) == pytest.approx(wanted, rel=1e-5, abs=1e-8)


def test_it_is_zero_for_equal_groups_and_blind_to_order_names_and_place(latents):
    mean, variance, group = (jnp.asarray(x) for x in latents)
    covariance = jax.jit(lambda m, v, s: independence.distance_covariance(m, v, s, S))
    found = covariance(mean, variance, group)
    assert float(found) > 1e-5
    order = np.random.default_rng(2).permutation(B)
    for other in (
        covariance(mean[order], variance[order], group[order]),
        covariance(mean, variance, (group + 1) % S),
        covariance(mean + 5.0, variance, group),
    ):
        assert float(other) == pytest.approx(float(found), rel=2e-4, abs=1e-7)
    twice = [jnp.concatenate([x, x]) for x in (mean, variance)]
    same = independence.distance_covariance(*twice, jnp.repeat(jnp.arange(2), B), 2)
    assert abs(float(same)) < 1e-7
    # One group alone, and groups that are absent.
    assert float(covariance(mean, variance, jnp.zeros(B, int))) == 0.0
    two = independence.distance_covariance(mean, variance, group % 2, 2)
    more = independence.distance_covariance(mean, variance, group % 2, 7)
    assert float(two) == pytest.approx(float(more), rel=1e-6)


def test_many_dimensions_need_the_scale(latents):
    rng = np.random.default_rng(3)
    mean, variance = rng.normal(size=(8, 200)), np.ones((8, 200))
    group = np.arange(8) % 2
    assert float(independence.distance_covariance(mean, variance, group, 2)) == 0.0
    found = independence.distance_covariance(mean, variance, group, 2, log_scale=250.0)
    assert np.isfinite(found)
    assert float(found) > 0


def test_gradients_are_finite_differences(latents):
    mean, variance, group = latents

    def energies(m, v):
        far = independence.energy_distance(m, m[::-1] * 0.5 + v, chunk=5)
        kl = independence.gaussian_kl(m, v).sum()
        return independence.distance_covariance(m, v, group, S, chunk=5) * 100 + far + kl

    with jax.enable_x64(True):
        m, v = jnp.asarray(mean), jnp.asarray(variance)
        value = jax.jit(energies)
        gradient = jax.jit(jax.grad(energies, (0, 1)))(m, v)
        rng = np.random.default_rng(4)
        for number in (0, 1):
            along = rng.normal(size=(B, D))
            ends = [
                value(*(x + sign * 1e-5 * along * (i == number) for i, x in enumerate((m, v))))
                for sign in (1, -1)
            ]
            told = float(np.sum(gradient[number] * along))
            assert float(ends[0] - ends[1]) / 2e-5 == pytest.approx(told, rel=1e-6)


def test_energies_are_those_of_the_evaluators_and_zero_of_a_sample_with_itself():
    rng = np.random.default_rng(5)
    a, b = rng.normal(size=(37, D)), rng.normal(size=(20, D)) + 0.5
    found = independence.energy_distance(jnp.asarray(a), jnp.asarray(b), chunk=8)
    assert float(found) == pytest.approx(distribution.energy_distance(a, b), rel=1e-5)
    wanted = 2 * cdist(a, b).mean() - cdist(a, a).mean() - cdist(b, b).mean()
    assert float(found) == pytest.approx(wanted, rel=1e-5)
    assert abs(float(independence.energy_distance(jnp.asarray(a), jnp.asarray(a)))) < 1e-6
    gradient = jax.grad(lambda x: independence.energy_distance(x, jnp.asarray(b)))(jnp.asarray(a))
    assert np.isfinite(gradient).all()


def test_the_divergence_from_a_unit_gaussian():
    assert float(independence.gaussian_kl(jnp.zeros(4), jnp.ones(4))) == 0.0
    mean, variance = np.array([0.3, -1.0]), np.array([0.5, 2.0])

    def integrand(z, m, v):
        p = scipy.stats.norm(m, np.sqrt(v))
        return p.pdf(z) * (p.logpdf(z) - scipy.stats.norm.logpdf(z))

    wanted = sum(
        scipy.integrate.quad(integrand, -15, 15, args=(m, v))[0]
        for m, v in zip(mean, variance, strict=True)
    )
    found = independence.gaussian_kl(jnp.asarray(mean), jnp.asarray(variance))
    assert float(found) == pytest.approx(wanted, rel=1e-5)


def test_a_large_batch_takes_an_eighth_of_the_memory_of_all_pairs():
    count, latent = 2_048, 8
    shapes = [jax.ShapeDtypeStruct((count, latent), jnp.float32)] * 2
    group = jnp.arange(count) % 2

    def chunked(m, v):
        return independence.distance_covariance(m, v, group, 2)

    memory = jax.jit(jax.grad(chunked)).lower(*shapes).compile().memory_analysis()
    # [B, B, D] in float32.
    assert memory.temp_size_in_bytes <= count * count * latent * 4 / 8
