"""Coverage of data by samples, against loops, scikit-learn and cases that are known."""

import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from kd.data.builders import mixtures
from kd.evaluators import fidelity

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(name='points')
def _points():
    rng = np.random.default_rng(0)
    return rng.standard_normal((60, 3)), 0.3 + 1.4 * rng.standard_normal((50, 3))


def test_modes_of_a_ring_and_of_one_that_lost_some():
    ring = mixtures.ring()
    rng = np.random.default_rng(0)
    found = fidelity.modes(ring.draw(rng, 8_000)[0], ring.means, 3 * ring.deviation)
    assert found.covered == 8
    # Of a round Gaussian in the plane, exp(-9/2) lies outside of three deviations.
    assert found.hit == pytest.approx(1 - np.exp(-4.5), abs=0.004)
    assert found.entropy == pytest.approx(np.log(8), abs=0.002)
    half = fidelity.modes(np.repeat(ring.means[:4], 5, axis=0), ring.means, 0.1)
    assert (half.covered, half.hit) == (4, 1.0)
    assert half.entropy == pytest.approx(np.log(4))
    nowhere = fidelity.modes(np.zeros((3, 2)), ring.means, 0.1)
    assert (nowhere.covered, nowhere.hit, nowhere.entropy) == (0, 0.0, 0.0)


def test_balls_against_scikit_learn(points):
    real, samples = points
    k = 4

    def radii(x):
        return NearestNeighbors(n_neighbors=k + 1).fit(x).kneighbors(x)[0][:, -1]

    inside = np.array([
        [np.linalg.norm(a - b) <= r for b in samples]
        for a, r in zip(real, radii(real), strict=True)
    ])  # fmt: skip
    other = np.array([
        [np.linalg.norm(a - b) <= r for b, r in zip(samples, radii(samples), strict=True)]
        for a in real
    ])  # fmt: skip
    precision, recall = fidelity.precision_recall(real, samples, k)
    assert precision == pytest.approx(inside.any(0).mean())
    assert recall == pytest.approx(other.any(1).mean())
    density, coverage = fidelity.density_coverage(real, samples, k)
    assert density == pytest.approx(inside.sum() / k / len(samples))
    assert coverage == pytest.approx(inside.any(1).mean())
    assert 0 < precision < 1
    assert 0 < coverage < 1


def test_data_cover_themselves(points):
    real, _ = points
    assert fidelity.precision_recall(real, real) == (1.0, 1.0)
    assert fidelity.density_coverage(real, real)[1] == 1.0
    assert fidelity.spread(real, real) == (1.0, 0.0)


def test_diversity_and_spread(points):
    real, samples = points
    pairs = [np.linalg.norm(samples[i] - samples[j]) for i in range(50) for j in range(i + 1, 50)]
    assert fidelity.pairwise_distance(samples) == pytest.approx(np.mean(pairs))
    assert fidelity.pairwise_distance(np.ones((4, 2, 2))) == 0
    wide, drift = fidelity.spread(real, 2 * real + 1)
    deviation = np.sqrt(real.var(0).sum())
    assert wide == pytest.approx(2)
    assert drift == pytest.approx(np.linalg.norm(real.mean(0) + 1) / deviation)
