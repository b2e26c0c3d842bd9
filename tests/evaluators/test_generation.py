"""Metrics of generated samples against SciPy, scikit-learn, brute force and closed forms."""

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import pytest
import scipy.linalg
import scipy.spatial
import scipy.stats
import sklearn.metrics.pairwise
import sklearn.neighbors

from kd.data.builders import toys
from kd.evaluators import distribution as dist
from kd.evaluators import generation as gen

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(name='rng')
def _rng():
    return np.random.default_rng(0)


# Kullback-Leibler and support.


def test_histogram_kl_counts_cells_one_by_one(rng):
    data, samples = rng.uniform(-1.3, 1.3, (300, 2)), rng.normal(0, 0.7, (200, 2))

    def shares(points):
        counts = np.zeros(17)
        for x, y in points:
            i, j = int(np.floor((x + 1.2) / 0.6)), int(np.floor((y + 1.2) / 0.6))
            counts[4 * i + j if 0 <= i < 4 and 0 <= j < 4 else 16] += 1
        return (counts + 0.1) / np.sum(counts + 0.1)

    p, q = shares(data), shares(samples)
    wanted = scipy.stats.entropy(p, q)
    assert abs(dist.histogram_kl(data, samples, bins=4) - wanted) < 1e-12
    assert dist.histogram_kl(data, data) == 0.0


def test_histogram_kl_charges_for_samples_that_escape_or_diverge(rng):
    data, samples = rng.uniform(-1, 1, (2000, 2)), rng.uniform(-1, 1, (2000, 2))
    near = dist.histogram_kl(data, samples)
    for value in (5.0, np.nan):
        escaped = samples.copy()
        escaped[::2] = value
        # Halving q everywhere costs log 2, less what pseudo-counts soften.
        assert near + 0.5 < dist.histogram_kl(data, escaped)
    with pytest.raises(ValueError, match='pseudo_count=0, expected above 0'):
        dist.histogram_kl(data, samples, pseudo_count=0)
    with pytest.raises(ValueError, match='expected points of 2 dimensions, got 3'):
        dist.histogram_kl(np.zeros((4, 3)), samples)


def test_kernel_kl_equals_leave_one_out_density_estimates(rng):
    data, samples = rng.normal(0, 1, (50, 3)), rng.normal(0.3, 1, (70, 3))

    def log_density(at, support):
        kde = sklearn.neighbors.KernelDensity(bandwidth=0.4, rtol=1e-12).fit(support)
        return kde.score_samples(at)

    own = [log_density(data[i : i + 1], np.delete(data, i, axis=0))[0] for i in range(50)]
    wanted = np.mean(np.array(own) - log_density(data, samples))
    assert abs(dist.kernel_kl(data, samples, bandwidth=0.4, chunk=16) - wanted) < 1e-9


def test_kernel_kl_is_near_the_closed_form_of_two_gaussians(rng):
    data, samples = rng.normal(0, 1, (4000, 1)), rng.normal(0.5, 1, (4000, 1))
    # KL of N(0,1) and N(1/2,1) is 1/8; smoothing by h multiplies it by 1 / (1 + h^2).
    assert abs(dist.kernel_kl(data, samples, bandwidth=0.2) - 0.125 / 1.04) < 0.02
    scott = float(np.std(data)) * 4000 ** (-1 / 5)
    np.testing.assert_allclose(
        dist.kernel_kl(data, samples), dist.kernel_kl(data, samples, bandwidth=scott), rtol=1e-12
    )
    with pytest.raises(ValueError, match=r'bandwidth=0.0, expected above 0'):
        dist.kernel_kl(np.zeros((3, 1)), samples)


def test_points_off_the_checkerboard_are_counted(rng):
    data, _ = toys.checkerboard(rng, 5000)
    assert dist.off_support(data, dist.in_checkerboard) == 0.0
    points = rng.uniform(-2, 2, (4000, 2))
    inside = [
        -1 <= x <= 1 and -1 <= y <= 1 and (np.floor(2 * x + 2) + np.floor(2 * y + 2)) % 2 == 0
        for x, y in points
    ]
    np.testing.assert_array_equal(dist.in_checkerboard(points), inside)
    assert dist.off_support(points, dist.in_checkerboard) == 1 - np.mean(inside)
    assert dist.off_support([[np.nan, 0.1], [0.1, 0.1]], dist.in_checkerboard) == 0.5


# Transport and kernels.


@pytest.mark.parametrize('m', [40, 25, 7])
def test_one_dimensional_wasserstein_distances_equal_scipy(rng, m):
    x, y = rng.normal(size=(40, 2)), rng.exponential(size=(m, 2))
    wanted = [scipy.stats.wasserstein_distance(x[:, k], y[:, k]) for k in range(2)]
    np.testing.assert_allclose(dist.wasserstein_1d(x, y, p=1.0), wanted, rtol=1e-12)
    # p = 2 by repeating every point until both sets have the same size.
    size = np.lcm(40, m)
    a, b = (np.sort(np.repeat(z, size // len(z), axis=0), axis=0) for z in (x, y))
    np.testing.assert_allclose(dist.wasserstein_1d(x, y), np.mean((a - b) ** 2, axis=0), rtol=1e-12)


def test_sliced_wasserstein_of_a_shift_is_its_length_over_root_dimension(rng):
    x, shift = rng.normal(size=(100, 3)), np.array([2.0, -1.0, 0.5])
    value = dist.sliced_wasserstein(x, x + shift, projections=20_000)
    # E (theta . a)^2 = |a|^2 / d over the sphere.
    np.testing.assert_allclose(value, np.linalg.norm(shift) / np.sqrt(3), rtol=0.02)
    # Another order of the rows may round a product otherwise.
    assert dist.sliced_wasserstein(x, x[::-1]) == pytest.approx(0, abs=1e-15)
    images = rng.normal(size=(10, 4, 4, 1))
    flat = images.reshape(10, 16)
    assert dist.sliced_wasserstein(images, images + 1) == dist.sliced_wasserstein(flat, flat + 1)


def test_mmd_equals_the_unbiased_estimate_by_scikit_learn(rng):
    x, y = rng.normal(size=(30, 3)), rng.normal(0.5, 1, (20, 3))

    def kernel(a, b):
        gammas = [1 / (2 * h**2) for h in (0.5, 2.0)]
        return sum(sklearn.metrics.pairwise.rbf_kernel(a, b, gamma=g) for g in gammas) / 2

    kxx, kyy = kernel(x, x), kernel(y, y)
    np.fill_diagonal(kxx, 0)
    np.fill_diagonal(kyy, 0)
    wanted = kxx.sum() / (30 * 29) + kyy.sum() / (20 * 19) - 2 * kernel(x, y).mean()
    assert abs(dist.mmd(x, y, bandwidths=(0.5, 2.0), chunk=8) - wanted) < 1e-12
    median = np.median(scipy.spatial.distance.pdist(x))
    by_hand = dist.mmd(x, y, bandwidths=(median / 2, median, 2 * median))
    assert abs(dist.mmd(x, y) - by_hand) < 1e-12


def test_energy_distance_equals_scipy(rng):
    x, y = rng.normal(size=30), rng.exponential(size=20)
    wanted = scipy.stats.energy_distance(x, y) ** 2
    np.testing.assert_allclose(dist.energy_distance(x, y, chunk=7), wanted, rtol=1e-10)


def test_diverged_samples_are_named(rng):
    x = rng.normal(size=(5, 2))
    broken = np.where(np.arange(5)[:, None] == 2, np.inf, x)
    for metric in (dist.mmd, dist.energy_distance, dist.sliced_wasserstein, dist.kernel_kl):
        with pytest.raises(ValueError, match='1 of 5 points are not finite: the sampler diverged'):
            metric(x, broken)


# Frechet distance.


def test_frechet_distance_equals_the_matrix_root_of_scipy(rng):
    x = rng.normal(size=(60, 5)) @ rng.normal(size=(5, 5))
    y = rng.normal(size=(50, 5)) + 1
    cov_x, cov_y = np.cov(x.T), np.cov(y.T)
    root = scipy.linalg.sqrtm(cov_x @ cov_y).real
    wanted = np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(cov_x + cov_y - 2 * root)
    np.testing.assert_allclose(
        dist.frechet_distance(dist.moments(x), dist.moments(y)), wanted, rtol=1e-9
    )


def test_frechet_distance_of_singular_gaussians_is_the_wasserstein_distance(rng):
    # Points on the first axis only: N(m, a^2) and N(0, b^2) are (m^2 + (a - b)^2) apart.
    x = np.zeros((50, 3))
    x[:, 0] = scipy.stats.zscore(rng.normal(size=50), ddof=1)
    other = np.zeros((50, 3))
    other[:, 0] = 3 * x[:, 0] + 2
    value = dist.frechet_distance(dist.moments(x), dist.moments(other))
    np.testing.assert_allclose(value, 4 + 4, rtol=1e-9)
    assert dist.frechet_distance(dist.moments(x), dist.moments(x)) < 1e-12


def test_moments_merge_to_those_of_the_whole_and_skip_padding(rng):
    x = rng.normal(100.0, 1.0, (30, 2, 2))
    padded = np.concatenate([x[20:], np.full((3, 2, 2), np.nan)])
    where = np.arange(13) < 10
    merged = dist.moments(x[:20]).merge(dist.moments(padded, where=where))
    mean, covariance = merged.gaussian()
    flat = x.reshape(30, 4)
    np.testing.assert_allclose(mean, flat.mean(0), rtol=1e-12)
    np.testing.assert_allclose(covariance, np.cov(flat.T), rtol=1e-8)
    with pytest.raises(ValueError, match='at least 2 examples, got 1'):
        dist.moments(x[:1]).gaussian()


def test_frechet_metric_is_named_after_its_network(rng):
    images = rng.normal(size=(2, 8, 4, 4, 1)).astype(np.float32)

    def features(x):
        return x.reshape(len(x), -1)[:, :3] ** 2

    real = gen.feature_moments(features, images)
    fake = gen.feature_moments(features, [images[0] + 1])
    flat = images.reshape(16, 16)[:, :3].astype(np.float64) ** 2
    np.testing.assert_allclose(real.gaussian()[0], flat.mean(0), rtol=1e-5)
    value = gen.frechet_metric('digits_convnet', real, fake)
    assert value == {'frechet_digits_convnet': dist.frechet_distance(real, fake)}
    assert list(gen.frechet_metric('inception_v3', real, fake)) == ['fid']
    with pytest.raises(ValueError, match='name the network whose features these are'):
        gen.frechet_metric('FID', real, fake)
    with pytest.raises(ValueError, match='no batches'):
        gen.feature_moments(features, [])


# The map itself.


def linear_field(s, t, x):
    """v = k x for both times: the field of x' = k x, read as a (wrong) map."""
    return 0.5 * x


def test_straightness_is_zero_on_straight_paths_and_known_on_a_curved_one():
    x0 = jnp.array([[1.0, 2.0], [0.5, 0.0]])
    constant = gen.straightness(lambda s, t, x: jnp.full_like(x, 0.7), x0)
    np.testing.assert_allclose(constant, 0.0, atol=1e-8)
    # x_t = x0 e^{kt}: the integral of (e^k - 1 - k e^{kt})^2 |x0|^2.
    k, steps = 0.5, 400
    t = np.linspace(0, 1, 20_001)
    exact = np.trapezoid((np.exp(k) - 1 - k * np.exp(k * t)) ** 2, t)
    value = gen.straightness(linear_field, x0, steps=steps)
    np.testing.assert_allclose(value, exact * np.array([5.0, 0.25]), rtol=0.01)


def test_semigroup_error_by_hand_and_zero_for_a_flow_map():
    x = jnp.array([[1.0, 2.0], [0.5, 0.0]])
    error = gen.semigroup_error(linear_field, 0.0, 0.5, 1.0, x)
    # (1 + k/2)^2 - (1 + k) = k^2 / 4.
    np.testing.assert_allclose(error, (0.25 / 4) ** 2 * np.array([5.0, 0.25]), rtol=1e-5)

    def exact(s, t, x):
        h = (t - s)[:, None]
        return x * jnp.expm1(0.5 * h) / h

    np.testing.assert_allclose(gen.semigroup_error(exact, 0.1, 0.4, 0.9, x), 0.0, atol=1e-12)


def test_generated_samples_do_not_depend_on_the_batch():
    key = jax.random.key(0)
    sampler = jax.jit(lambda noise: 2 * noise + 1)
    whole = gen.generate(key, sampler, 7, (3,), scale=0.5, batch=7)
    np.testing.assert_array_equal(gen.generate(key, sampler, 7, (3,), scale=0.5, batch=2), whole)
    many = gen.generate(key, sampler, 5000, (3,), scale=0.5)
    np.testing.assert_allclose([many.mean(), many.std()], [1.0, 1.0], atol=0.03)


# Figures.


def test_image_grid_puts_every_pixel_in_its_place(tmp_path, rng):
    images = rng.uniform(-1, 1, (5, 3, 4, 1))
    images[0, 0, 0], images[1, 0, 0], images[2, 0, 0] = 7.0, np.nan, -1.0
    page = gen.image_grid(images, columns=3)
    assert page.shape == (3 * 2 + 1, 4 * 3 + 2, 3)
    expected = np.round((np.clip(images, -1, 1) + 1) * 127.5)
    np.testing.assert_array_equal(page[4:7, 5:9, 1], expected[4, ..., 0])
    assert page[0, 0, 0] == 255
    assert page[0, 5, 0] == page[0, 10, 0] == 0
    assert np.all(page[3] == 255)
    assert np.all(page[4:, 10:] == 255)
    gen.save_image_grid(tmp_path / 'grid.png', images, columns=3, zoom=2)
    stored = matplotlib.image.imread(tmp_path / 'grid.png')
    np.testing.assert_array_equal(np.round(255 * stored[::2, ::2, :3]), page)
    with pytest.raises(ValueError, match=r'got shape \(5, 3, 4\), expected \[N, H, W, 1 or 3\]'):
        gen.image_grid(images[..., 0])


def test_density_page_shows_the_density_of_each_panel(rng):
    board, _ = toys.checkerboard(rng, 20_000)
    corner = np.full((10, 2), 0.9)
    figure = gen.density_page(
        {'board': {'1': board, '2': corner}, 'other': {'1': corner, '2': board}}, bins=24
    )
    assert [axis.get_title() for axis in figure.axes] == ['1', '2', '', '']
    assert [axis.get_ylabel() for axis in figure.axes] == ['board', '', 'other', '']
    shown = [np.asarray(axis.images[0].get_array()) for axis in figure.axes]
    np.testing.assert_array_equal(shown[0], shown[3])
    # The row of the picture is y, the lower left square is on the board, and density 1/2.
    np.testing.assert_allclose(shown[0][3:6, 3:6].mean(), 0.5, atol=0.1)
    assert shown[0][8:11, 3:6].mean() == 0.0
    assert np.argwhere(shown[1] > 0).tolist() == [[21, 21]]
    with pytest.raises(ValueError, match="row 'b' has columns"):
        gen.density_page({'a': {'1': board}, 'b': {'2': board}})
