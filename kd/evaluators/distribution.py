"""Are two sets of points drawn from the same distribution?

Metrics of whole sample sets, on the host in float64: they are computed once per evaluation, and
differences of nearly equal means would drown in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import scipy.linalg
import scipy.special
from numpy.typing import ArrayLike
from scipy.optimize import linear_sum_assignment
from scipy.spatial.distance import cdist

from kd.data.builders.toys import CHECKERBOARD_CORNERS, CHECKERBOARD_SIDE

__all__ = [
    'Moments',
    'energy_distance',
    'frechet_distance',
    'histogram_kl',
    'in_checkerboard',
    'kernel_kl',
    'mmd',
    'moments',
    'off_support',
    'sliced_wasserstein',
    'wasserstein',
    'wasserstein_1d',
]


def histogram_kl(
    data: ArrayLike,
    samples: ArrayLike,
    *,
    bins: int = 64,
    low: float = -1.2,
    high: float = 1.2,
    pseudo_count: float = 0.1,
) -> float:
    """KL(data || samples) in nats between histograms of points in the plane.

    sum_k p_k log(p_k / q_k), where p and q are the shares of data and samples in cell k, after
    `pseudo_count` is added to every count. All that falls outside the square is one more cell, so
    samples that escape (or are not finite) are not forgiven. Biased by the pseudo-count and by
    few samples: compare only numbers of the same sizes.

    Args:
      data: [N, 2].
      samples: [M, 2].
      bins: cells along each axis.
      low: lower edge of the square, both axes.
      high: upper edge of the square.
      pseudo_count: above 0.
    """
    if pseudo_count <= 0:
        raise ValueError(f'histogram_kl: pseudo_count={pseudo_count}, expected above 0.')
    edges = np.linspace(low, high, bins + 1)

    def log_share(points: ArrayLike) -> np.ndarray:
        points = _points(points, 2, finite=False)
        shown = points[np.all(np.isfinite(points), axis=1)]
        counts = np.histogram2d(shown[:, 0], shown[:, 1], bins=[edges, edges])[0].ravel()
        counts = np.append(counts, len(points) - counts.sum()) + pseudo_count
        return np.log(counts / counts.sum())

    log_p, log_q = log_share(data), log_share(samples)
    return float(np.sum(np.exp(log_p) * (log_p - log_q)))


def kernel_kl(
    data: ArrayLike, samples: ArrayLike, *, bandwidth: float | None = None, chunk: int = 1024
) -> float:
    """KL(data || samples) in nats between Gaussian kernel density estimates.

    mean_i [log p_{-i}(x_i) - log q(x_i)] over the data, p leaving x_i itself out, both with
    isotropic kernels of one bandwidth, so equal distributions give about 0 (either sign).

    Args:
      data: [N, d], N at least 2.
      samples: [M, d].
      bandwidth: standard deviation of a kernel; None is Scott's N^(-1 / (d + 4)) times the root
        mean variance of the data.
      chunk: data points handled at a time; memory is chunk x max(N, M).
    """
    data, samples = _points(data), _points(samples)
    n, dimension = data.shape
    if bandwidth is None:
        bandwidth = float(np.sqrt(np.mean(np.var(data, axis=0))) * n ** (-1 / (dimension + 4)))
    if not bandwidth > 0:
        raise ValueError(f'kernel_kl: bandwidth={bandwidth}, expected above 0.')
    total = 0.0
    for rows, own in _chunks(data, chunk):
        to_data = -0.5 * (cdist(rows, data) / bandwidth) ** 2
        to_data[np.arange(len(rows)), own] = -np.inf
        to_samples = -0.5 * (cdist(rows, samples) / bandwidth) ** 2
        total += np.sum(
            scipy.special.logsumexp(to_data, axis=1) - scipy.special.logsumexp(to_samples, axis=1)
        )
    return float(total / n - np.log(n - 1) + np.log(len(samples)))


def off_support(samples: ArrayLike, inside: Callable[[np.ndarray], np.ndarray]) -> float:
    """Share of samples [M, d] for which `inside` [M, d] -> bool [M] is false, in [0, 1]."""
    return float(np.mean(~inside(_points(samples, finite=False))))


def in_checkerboard(points: ArrayLike) -> np.ndarray:
    """Whether points [N, 2] lie in one of the eight (closed) squares of the board, bool [N]."""
    offset = _points(points, 2, finite=False)[:, None] - CHECKERBOARD_CORNERS
    return np.any(np.all((offset >= 0) & (offset <= CHECKERBOARD_SIDE), axis=-1), axis=-1)


def wasserstein_1d(x: ArrayLike, y: ArrayLike, *, p: float = 2.0) -> np.ndarray:
    """W_p^p = int_0^1 |F^-1(q) - G^-1(q)|^p dq between the columns of x [N, K] and y [M, K]: [K].

    Exact for empirical measures, also of different sizes. Note the p-th power: it averages.
    """
    x, y = np.sort(np.asarray(x, np.float64), axis=0), np.sort(np.asarray(y, np.float64), axis=0)
    n, m = len(x), len(y)
    if n == m:
        return np.mean(np.abs(x - y) ** p, axis=0)
    # Both quantile functions are constant between the levels i/n and j/m, in units of 1/(nm).
    levels = np.union1d(np.arange(1, n + 1) * m, np.arange(1, m + 1) * n)
    widths = np.diff(levels, prepend=0) / (n * m)
    gap = np.abs(x[(levels - 1) // m] - y[(levels - 1) // n]) ** p
    return widths @ gap


def sliced_wasserstein(
    x: ArrayLike, y: ArrayLike, *, projections: int = 128, p: float = 2.0, seed: int = 0
) -> float:
    """(mean_theta W_p^p(theta . x, theta . y))^(1/p) over random unit vectors theta.

    Args:
      x: [N, ...], flattened to points.
      y: [M, ...].
      projections: number of directions; the same for the same seed and dimension.
      p: order.
      seed: of the directions.

    Source: Bonneel et al., "Sliced and Radon Wasserstein barycenters of measures", 2015.
    """
    x, y = _points(x), _points(y)
    theta = np.random.default_rng(seed).standard_normal((x.shape[1], projections))
    theta /= np.linalg.norm(theta, axis=0)
    return float(np.mean(wasserstein_1d(x @ theta, y @ theta, p=p)) ** (1 / p))


def wasserstein(x: ArrayLike, y: ArrayLike) -> float:
    """W_1 between empirical measures, min over plans of E |x - y|, exactly: by an assignment.

    Args:
      x: [N, ...], flattened to points; each stands for M / N of the others.
      y: [M, ...], M a multiple of N.

    Raises:
      ValueError: sizes that do not divide.
    """
    x, y = _points(x), _points(y)
    if len(y) % len(x):
        raise ValueError(f'wasserstein: {len(y)} points are no multiple of {len(x)}.')
    cost = np.repeat(cdist(x, y), len(y) // len(x), axis=0)
    return float(cost[linear_sum_assignment(cost)].mean())


def mmd(
    x: ArrayLike, y: ArrayLike, *, bandwidths: Sequence[float] | None = None, chunk: int = 1024
) -> float:
    """Squared maximum mean discrepancy, unbiased: E k(x,x') + E k(y,y') - 2 E k(x,y).

    k(a, b) = mean_h exp(-|a - b|^2 / (2 h^2)) over `bandwidths` h. May be slightly negative.

    Args:
      x: [N, ...], flattened to points, N at least 2.
      y: [M, ...].
      bandwidths: None takes 1/2, 1 and 2 times the median distance of (at most 1000 points of) x.
      chunk: rows handled at a time.

    Source: Gretton et al., "A kernel two-sample test", JMLR 2012, eq. 3.
    """
    x, y = _points(x), _points(y)
    if bandwidths is None:
        head = x[:1000]
        median = np.median(cdist(head, head)[np.triu_indices(len(head), 1)])
        bandwidths = [0.5 * median, median, 2.0 * median]

    def kernel(distance: np.ndarray) -> np.ndarray:
        terms = [np.exp(-0.5 * (distance / width) ** 2) for width in bandwidths]
        return np.mean(terms, axis=0)

    def within(points: np.ndarray) -> float:
        n = len(points)
        # The kernel of a point with itself is 1 and does not count.
        return (_pair_sum(points, points, kernel, chunk) - n) / (n * (n - 1))

    cross = _pair_sum(x, y, kernel, chunk) / (len(x) * len(y))
    return within(x) + within(y) - 2 * cross


def energy_distance(x: ArrayLike, y: ArrayLike, *, chunk: int = 1024) -> float:
    """2 E|x - y| - E|x - x'| - E|y - y'| between empirical measures, >= 0, 0 only if equal.

    x [N, ...] and y [M, ...] are flattened to points. Source: Szekely & Rizzo, 2013.
    """
    x, y = _points(x), _points(y)

    def mean_distance(a: np.ndarray, b: np.ndarray) -> float:
        return _pair_sum(a, b, lambda distance: distance, chunk) / (len(a) * len(b))

    return 2 * mean_distance(x, y) - mean_distance(x, x) - mean_distance(y, y)


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over features, float64: count [], first [D], second [D, D]; they merge by adding."""

    count: float
    first: np.ndarray
    second: np.ndarray

    def merge(self, other: Moments) -> Moments:
        """The moments of both sets together."""
        return Moments(
            self.count + other.count, self.first + other.first, self.second + other.second
        )

    def gaussian(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [D] and unbiased covariance [D, D]."""
        if self.count < 2:
            raise ValueError(f'a covariance needs at least 2 examples, got {self.count:g}.')
        mean = self.first / self.count
        covariance = (self.second - self.count * np.outer(mean, mean)) / (self.count - 1)
        return mean, covariance


def moments(features: ArrayLike, *, where: ArrayLike | None = None) -> Moments:
    """Moments of features [N, ...], flattened to [N, D]; `where` bool [N] leaves out padding."""
    rows = np.asarray(features)
    points = _points(rows if where is None else rows[np.asarray(where, bool)])
    return Moments(float(len(points)), points.sum(0), points.T @ points)


def frechet_distance(a: Moments, b: Moments) -> float:
    """|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)): squared W_2 of the fitted Gaussians.

    tr (C_a C_b)^(1/2) is the nuclear norm of C_a^(1/2) C_b^(1/2), so no root of a matrix that is
    not symmetric is needed and singular covariances are exact.
    Source: Dowson & Landau 1982; Heusel et al., arXiv 1706.08500.
    """
    (mean_a, cov_a), (mean_b, cov_b) = a.gaussian(), b.gaussian()
    roots = [_symmetric_root(cov_a), _symmetric_root(cov_b)]
    overlap = scipy.linalg.svdvals(roots[0] @ roots[1]).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * overlap
    return float(max(distance, 0.0))


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = scipy.linalg.eigh(matrix)
    # Rounding makes zero eigenvalues of a covariance slightly negative.
    return (vectors * np.sqrt(np.maximum(values, 0.0))) @ vectors.T


def _points(x: ArrayLike, dimension: int | None = None, *, finite: bool = True) -> np.ndarray:
    points = np.asarray(x, np.float64)
    points = points.reshape(len(points), -1)
    if dimension is not None and points.shape[1] != dimension:
        raise ValueError(f'expected points of {dimension} dimensions, got {points.shape[1]}.')
    bad = ~np.all(np.isfinite(points), axis=1)
    if finite and bad.any():
        raise ValueError(
            f'{bad.sum()} of {len(points)} points are not finite: the sampler diverged.'
        )
    return points


def _chunks(points: np.ndarray, size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    for start in range(0, len(points), size):
        rows = points[start : start + size]
        yield rows, start + np.arange(len(rows))


def _pair_sum(
    x: np.ndarray, y: np.ndarray, function: Callable[[np.ndarray], np.ndarray], chunk: int
) -> float:
    return float(sum(function(cdist(rows, y)).sum() for rows, _ in _chunks(x, chunk)))
