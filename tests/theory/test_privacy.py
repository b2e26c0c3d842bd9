"""The accountant against integrals of the laws it speaks of, closed forms and known figures."""

import numpy as np
import pytest
from scipy import integrate, optimize, stats

from kd.theory import privacy

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CARD = tuple(range(2, 64))


def laws(rate, sigma):
    """Densities of what comes out without and with one record."""
    without = stats.norm(0, sigma).pdf
    return without, lambda z: (1 - rate) * without(z) + rate * stats.norm(1, sigma).pdf(z)


def integral(f, sigma, order=1):
    """Over all that counts: the a-th power moves the law up to a."""
    z = np.linspace(-12 * sigma, order + 12 * sigma, 20_001)
    return integrate.trapezoid(f(z), z)


@pytest.mark.parametrize(('rate', 'sigma'), [(0.032, 1.443), (0.2, 0.8), (0.7, 3.0)])
@pytest.mark.parametrize('order', [2, 3, 7, 20])
def test_divergences_are_the_integrals_and_the_larger_of_both_directions(rate, sigma, order):
    without, within = laws(rate, sigma)

    def power(above, below):
        def f(z):
            return np.exp(order * np.log(above(z)) - (order - 1) * np.log(below(z)))

        return np.log(integral(f, sigma, order)) / (order - 1)

    (found,) = privacy.renyi_divergence(rate, sigma, [order])
    assert found == pytest.approx(power(within, without), rel=1e-7)
    assert found >= power(without, within)


def test_the_figures_of_the_reference():
    """A rate of .032, 250 steps, delta 4000^-1.1, orders 2 to 63."""
    delta = 4000**-1.1
    assert privacy.spent(0.032, 1.4430, 250, delta, CARD) == pytest.approx(1.99989, abs=1e-5)
    assert privacy.spent(0.032, 4.5634, 250, delta, CARD) == pytest.approx(0.500001, abs=1e-6)
    for target, sigma in ((2.0, 1.4430), (0.5, 4.5634)):
        found = privacy.noise_multiplier(target, delta, 0.032, 250, CARD)
        assert found == pytest.approx(sigma, abs=1e-4)
        # More orders show no more to be spent.
        assert privacy.spent(0.032, found, 250, delta) <= target


def test_without_coins_it_is_a_over_two_sigma_squared_and_above_the_exact_curve():
    found = 9 * privacy.renyi_divergence(1.0, 2.0, CARD)
    np.testing.assert_allclose(found, 9 * np.array(CARD) / 8, rtol=1e-14)
    # Nearly always taken is nearly the same.
    np.testing.assert_allclose(privacy.renyi_divergence(1 - 1e-9, 2.0, CARD), found / 9, rtol=1e-6)
    # Nine steps of deviation 2 are one of 2 / 3, whose exact curve is known (Balle and Wang 2018).
    sigma, delta = 2 / 3, 1e-5

    def excess(eps):
        near, far = (stats.norm.cdf(side / sigma - eps * sigma) for side in (0.5, -0.5))
        return near - np.exp(eps) * far - delta

    exact = optimize.brentq(excess, 0, 20)
    # An upper bound, and no idle one.
    assert exact < privacy.spent(1.0, 2.0, 9, delta) < 1.2 * exact


def test_epsilon_bounds_what_one_step_gives_away_in_both_directions():
    rate, sigma, delta = 0.1, 1.2, 1e-4
    eps = privacy.spent(rate, sigma, 1, delta)
    without, within = laws(rate, sigma)
    for one, other in ((within, without), (without, within)):
        above = integral(lambda z: np.maximum(one(z) - np.exp(eps) * other(z), 0), sigma)  # noqa: B023
        assert above <= delta


def test_epsilon_falls_with_the_noise_and_grows_with_steps_and_rate():
    def of(rate=0.02, sigma=1.5, steps=100):
        return privacy.spent(rate, sigma, steps, 1e-5)

    assert all(np.diff([of(sigma=s) for s in (0.6, 0.8, 1.5, 4.0, 20.0)]) < 0)
    assert all(np.diff([of(steps=n) for n in (1, 10, 100, 1000)]) > 0)
    assert all(np.diff([of(rate=r) for r in (0.001, 0.02, 0.3, 0.9, 1.0)]) > 0)
    # A tiny rate and much noise give away nothing, and no less.
    assert np.abs(privacy.renyi_divergence(1e-6, 50.0)).max() < 1e-8
    assert privacy.renyi_divergence(1e-6, 50.0).min() >= 0


def test_the_noise_found_is_the_least():
    for target, rate, steps in ((8.0, 0.01, 1000), (0.3, 0.5, 3), (1.0, 1.0, 10)):
        sigma = privacy.noise_multiplier(target, 1e-6, rate, steps)
        assert privacy.spent(rate, sigma, steps, 1e-6) <= target
        assert privacy.spent(rate, sigma * (1 - 1e-6), steps, 1e-6) > target
    with pytest.raises(
        ValueError, match=r'epsilon=0\.02 is out of reach at delta=1e-06: orders up'
    ):
        privacy.noise_multiplier(0.02, 1e-6, 0.1, 10)


def test_batches_overflow_as_often_as_binomials_do():
    counts = np.random.default_rng(0).binomial(200, 0.1, size=(20_000, 5))
    assert privacy.overflow(200, 0.1, 28, 5) == pytest.approx(5 * (counts > 28).mean(), rel=0.05)
    assert privacy.overflow(200, 0.1, 28, 5) >= (counts > 28).any(1).mean()
    assert privacy.overflow(200, 0.1, 200, 5) == 0
    assert privacy.overflow(200, 0.5, 10, 5) == 1


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((0.0, 1.0), r'rate=0.0 must lie in \(0, 1\]'),
        ((0.5, 0.0), r'noise_multiplier=0.0 above 0'),
        ((0.5, 1.0, [1.5]), 'orders must be whole numbers from 2 on'),
    ],
)
def test_what_is_out_of_range_is_told(arguments, message):
    with pytest.raises(ValueError, match=message):
        privacy.renyi_divergence(*arguments)
    with pytest.raises(ValueError, match=r'delta=0 must lie in \(0, 1\)'):
        privacy.epsilon([1.0], 0, [2])
