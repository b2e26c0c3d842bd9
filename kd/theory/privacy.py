"""What a training run gives away: the accountant of the Poisson-subsampled Gaussian mechanism.

Every step takes each record by a coin of probability gamma, adds what the records say, no more than
C each, and N(0, (sigma C)^2). With or without one record the laws of what comes out are, along the
one direction that tells them apart and in units of C,

    N(0, sigma^2)    and    (1 - gamma) N(0, sigma^2) + gamma N(1, sigma^2)

and the Renyi divergence of the second from the first, of a whole order a >= 2, is

    log( sum_j binom(a, j) (1 - gamma)^{a - j} gamma^j exp(j (j - 1) / (2 sigma^2)) ) / (a - 1)

which is the larger of the two directions (Mironov, Talwar, Zhang 2019, arXiv:1908.10530, theorem 5
and section 3.3). Divergences of steps add up. A run whose divergences are R(a) is (epsilon, delta)-
differentially private for adding or removing a record with

    epsilon = min_a R(a) + log(1 / delta) / (a - 1)     (Mironov 2017, arXiv:1702.07476, prop. 3)

an upper bound, and not the least one. The orders are part of the answer: `ORDERS` unless others are
given. All is computed on the host in float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from scipy import optimize, special, stats

# Small orders serve large epsilon, large ones small.
ORDERS = (*range(2, 64), 64, 80, 96, 128, 192, 256, 384, 512)


def renyi_divergence(
    rate: float, noise_multiplier: float, orders: Sequence[int] = ORDERS
) -> np.ndarray:
    """R(a) of a single step by order, float64 [orders], in nats; see above.

    With rate 1 it is a / (2 sigma^2) exactly.

    Args:
      rate: gamma in (0, 1], probability of a record to be taken.
      noise_multiplier: sigma, deviation of the noise in units of the clip norm.
      orders: whole numbers from 2 on.

    Raises:
      ValueError: a number out of range.
    """
    if not 0 < rate <= 1 or not noise_multiplier > 0:
        raise ValueError(
            f'rate={rate} must lie in (0, 1] and noise_multiplier={noise_multiplier} above 0.'
        )
    if any(a != int(a) or a < 2 for a in orders):
        raise ValueError(f'orders must be whole numbers from 2 on, got {list(orders)}.')
    if rate == 1:
        return np.asarray(orders, float) / (2 * noise_multiplier**2)
    return np.array([_log_moment(rate, noise_multiplier, a) / (a - 1) for a in orders])


def _log_moment(rate: float, noise_multiplier: float, order: int) -> float:
    """log E_{z ~ N(0, sigma^2)} of the a-th power of the ratio of both laws."""
    j = np.arange(order + 1)
    binomial = -special.betaln(order - j + 1, j + 1) - np.log1p(order)
    coins = (order - j) * np.log1p(-rate) + j * np.log(rate)
    shifts = j * (j - 1) / (2 * noise_multiplier**2)
    # Below 0 by rounding alone.
    return max(0.0, float(special.logsumexp(binomial + coins + shifts)))


def epsilon(
    divergences: Sequence[float] | np.ndarray, delta: float, orders: Sequence[int] = ORDERS
) -> float:
    """The least epsilon that divergences R(a) [orders] of a run show for a delta in (0, 1)."""
    if not 0 < delta < 1:
        raise ValueError(f'delta={delta} must lie in (0, 1).')
    return float(np.min(np.asarray(divergences) + surcharges(delta, orders)))


def surcharges(delta: float, orders: Sequence[int] = ORDERS) -> np.ndarray:
    """log(1 / delta) / (a - 1) by order: what delta costs, and the least epsilon of any noise."""
    return -np.log(delta) / (np.asarray(orders) - 1.0)


def spent(
    rate: float,
    noise_multiplier: float,
    steps: int,
    delta: float,
    orders: Sequence[int] = ORDERS,
) -> float:
    """epsilon of so many steps; arguments as of `renyi_divergence` and `epsilon`."""
    return epsilon(steps * renyi_divergence(rate, noise_multiplier, orders), delta, orders)


def noise_multiplier(
    target: float, delta: float, rate: float, steps: int, orders: Sequence[int] = ORDERS
) -> float:
    """The least sigma, to 1e-9 of itself, whose steps spend at most `target`.

    Args:
      target: epsilon.
      delta, rate, steps, orders: as of `spent`.

    Raises:
      ValueError: an epsilon that no noise reaches with these orders and this delta.
    """
    least = surcharges(delta, orders).min()
    if not target > least:
        raise ValueError(
            f'epsilon={target} is out of reach at delta={delta:.3g}: orders up to {max(orders)} '
            f'show {least:.3g} at the least, whatever the noise.'
        )

    def excess(log_sigma: float) -> float:
        return spent(rate, float(np.exp(log_sigma)), steps, delta, orders) - target

    low, high = -3.0, 0.0
    while excess(high) > 0:
        low, high = high, high + 1
    while excess(low) < 0:
        low, high = low - 1, low
    root = optimize.brentq(excess, low, high, xtol=1e-10)
    # On the private side of the root.
    while excess(root) > 0:
        root += 1e-10
    return float(np.exp(root))


def overflow(records: int, rate: float, rows: int, steps: int) -> float:
    """Probability, at most, that more than `rows` of the records are taken at once in some step.

    A step that has room for `rows` leaves the others out then, and is not what the accountant
    counts: a run that is (epsilon, delta)-private but for an event of probability p is
    (epsilon, delta + (1 + exp(epsilon)) p)-private.
    """
    return float(min(1.0, steps * stats.binom.sf(rows, records, rate)))
