"""How samples cover data: modes, precision and recall, diversity, saturation. NumPy, no network."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jax.typing import ArrayLike
from scipy.spatial.distance import cdist, pdist

__all__ = [
    'Modes',
    'class_diversity',
    'commitment',
    'density_coverage',
    'modes',
    'pairwise_distance',
    'precision_recall',
    'spread',
]


class Modes(NamedTuple):
    """How samples are spread over modes.

    Attributes:
      shares: [K], of the samples that hit a mode, those that hit each.
      hit: share of samples within the radius of a mode.
      covered: number of modes with at least a fifth of an equal share.
      entropy: of the shares, in nats; log K where all are equal.
    """

    shares: np.ndarray
    hit: float
    covered: int
    entropy: float


def modes(samples: ArrayLike, means: ArrayLike, radius: float) -> Modes:
    """Which of the modes each sample hits, the nearest, if it is within `radius`.

    Args:
      samples: [N, ...], flattened to points.
      means: [K, ...].
      radius: three deviations of a mode, as a rule.
    """
    x, centres = _points(samples), _points(means)
    distance = cdist(x, centres)
    inside = distance.min(1) <= radius
    counts = np.bincount(distance.argmin(1)[inside], minlength=len(centres))
    shares = counts / max(counts.sum(), 1)
    known = shares[shares > 0]
    return Modes(
        shares=shares,
        hit=float(inside.mean()),
        covered=int(np.sum(shares >= 0.2 / len(centres))),
        entropy=float(-np.sum(known * np.log(known))),
    )


def precision_recall(real: ArrayLike, samples: ArrayLike, k: int = 3) -> tuple[float, float]:
    """Share of samples on the manifold of the data, and of data on that of the samples.

    A manifold is the union of balls around points up to their k-th neighbour.

    Args:
      real: [N, ...], points or features.
      samples: [M, ...].
      k: of the neighbour, not counting a point itself.

    Source: Kynkaanniemi et al. 2019, arXiv:1904.06991.
    """
    x, y = _points(real), _points(samples)
    across = cdist(x, y)
    precision = (across <= _radii(x, k)[:, None]).any(0).mean()
    recall = (across <= _radii(y, k)[None]).any(1).mean()
    return float(precision), float(recall)


def density_coverage(real: ArrayLike, samples: ArrayLike, k: int = 5) -> tuple[float, float]:
    """How densely samples lie in the balls of the data, and the share of balls that hold one.

    Density is the number of balls that a sample lies in over k, and may exceed 1. Outliers among
    the samples do not help either. Arguments as of `precision_recall`.

    Source: Naeem et al. 2020, arXiv:2002.09797.
    """
    x, y = _points(real), _points(samples)
    inside = cdist(x, y) <= _radii(x, k)[:, None]
    return float(inside.sum() / (k * len(y))), float(inside.any(1).mean())


def pairwise_distance(samples: ArrayLike) -> float:
    """Mean Euclidean distance between two samples [N, ...]: 0 where all are one."""
    return float(pdist(_points(samples)).mean())


def commitment(said: ArrayLike, end: ArrayLike) -> np.ndarray:
    """Mean distance of what is said of a sample at every step from what it becomes, [S].

    Args:
      said: [S, N, ...], see `kd.sampling.diffusion.said`.
      end: samples [N, ...].

    Source: arXiv:2503.10637, DT-Visualization.
    """
    last = _points(end)
    return np.asarray([np.linalg.norm(_points(x) - last, axis=1).mean() for x in np.asarray(said)])


def class_diversity(samples: ArrayLike, labels: ArrayLike) -> float:
    """`pairwise_distance` within each class, the mean over classes of two samples or more."""
    x, label = np.asarray(samples), np.asarray(labels)
    within = [x[label == c] for c in np.unique(label)]
    return float(np.mean([pairwise_distance(part) for part in within if len(part) > 1]))


def spread(real: ArrayLike, samples: ArrayLike) -> tuple[float, float]:
    """(deviation of samples over that of data, distance of the means over that deviation).

    A generator that saturates has more of the first, one that drifts of the second. Deviations are
    roots of the summed variances.
    """
    x, y = _points(real), _points(samples)
    deviation = float(np.sqrt(x.var(0).sum()))
    drift = float(np.linalg.norm(x.mean(0) - y.mean(0)))
    return float(np.sqrt(y.var(0).sum())) / deviation, drift / deviation


def _radii(x: np.ndarray, k: int) -> np.ndarray:
    """Distance of each point to its k-th neighbour, [N]."""
    return np.partition(cdist(x, x), k, axis=1)[:, k]


def _points(x: ArrayLike) -> np.ndarray:
    x = np.asarray(x, np.float64)
    return x.reshape(len(x), -1)
