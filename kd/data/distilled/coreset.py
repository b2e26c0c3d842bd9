"""Subsets of real examples: baselines for synthetic sets, and places to start one from.

Every function works on the host with NumPy and, but for `clusters`, returns int64
[classes * images_per_class] indices into the data, ordered by class. `features` are any [n, D]
description of the examples, such as flat pixels or a trained network's logits. Classes are
0 .. num_classes - 1, by default up to the largest label; each must have `images_per_class`
examples, or ValueError names the one that has not.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def random_subset(
    rng: np.random.Generator,
    labels: np.ndarray,
    images_per_class: int,
    *,
    num_classes: int | None = None,
) -> np.ndarray:
    """Draws `images_per_class` examples of each class without replacement."""
    return _joined(
        rng.choice(members, images_per_class, replace=False)
        for members in _classes(labels, images_per_class, num_classes)
    )


def herding(
    features: np.ndarray,
    labels: np.ndarray,
    images_per_class: int,
    *,
    num_classes: int | None = None,
) -> np.ndarray:
    """Greedily picks the examples whose mean stays closest to the class mean, best first.

        i_k = argmin_i || mean - (phi_{i_1} + .. + phi_{i_{k-1}} + phi_i) / k ||,  none taken twice

    Raises:
      ValueError: features that are not finite; see the module.

    Source: Welling 2009; in this form Rebuffi et al. 2016, arXiv 1611.07725, algorithm 4.
    """
    _check_finite(features)
    picked = []
    for members in _classes(labels, images_per_class, num_classes):
        points = np.asarray(features[members], np.float64)
        mean, total = points.mean(0), np.zeros(points.shape[1])
        free = np.ones(len(members), bool)
        for count in range(1, images_per_class + 1):
            distances = np.square(mean - (total + points) / count).sum(1)
            best = int(np.argmin(np.where(free, distances, np.inf)))
            free[best] = False
            total += points[best]
            picked.append(members[best : best + 1])
    return _joined(picked)


def kmeans(
    features: np.ndarray,
    labels: np.ndarray,
    images_per_class: int,
    *,
    clusters: int = 10,
    seed: int = 0,
    num_classes: int | None = None,
) -> np.ndarray:
    """Clusters each class and takes the real examples nearest to the centres.

    Every one of the min(clusters, images_per_class) centres gets an equal share of the examples,
    the largest clusters one more where that does not come out even. With one cluster this is the
    example nearest to the class mean.

    Args:
      features: [n, D]; logits of a trained network in the papers.
      labels: int [n].
      images_per_class: examples to take per class.
      clusters: most centres per class.
      seed: of scikit-learn's K-means.
      num_classes: see the module.

    Raises:
      ValueError: features that are not finite; see the module.

    Source: Liu et al. 2023, arXiv 2302.14416 (DREAM); Shen et al. 2023, arXiv 2310.10541.
    """
    _check_finite(features)
    picked = []
    for members in _classes(labels, images_per_class, num_classes):
        points = np.asarray(features[members], np.float64)
        count = min(clusters, images_per_class)
        centres, sizes = _fitted(points, count, seed)
        shares = np.full(count, images_per_class // count)
        by_size = np.argsort(-sizes, kind='stable')
        shares[by_size[: images_per_class % count]] += 1
        free = np.ones(len(members), bool)
        for cluster in range(count):
            distances = np.square(points - centres[cluster]).sum(1)
            nearest = np.argsort(np.where(free, distances, np.inf), kind='stable')
            taken = nearest[: shares[cluster]]
            free[taken] = False
            picked.append(members[taken])
    return _joined(picked)


def clusters(features: np.ndarray, count: int, *, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """A few weighted points for the examples of one class: centres of K-means and their shares.

        P ~ sum_j m_j delta(k_j),   m_j = c_j / sum c

    With one cluster it is the mean of the class.

    Args:
      features: [n, ...], of one class.
      count: K.
      seed: of scikit-learn's K-means.

    Returns:
      (centroids float32 [K, ...], mass float32 [K], summing to 1).

    Raises:
      ValueError: features that are not finite, or fewer than K of them.

    Source: DMGD, arXiv:2605.03877.
    """
    _check_finite(features)
    if not 0 < count <= len(features):
        raise ValueError(f'{count} clusters of {len(features)} examples: take from 1 to as many.')
    centres, sizes = _fitted(
        np.asarray(features, np.float64).reshape(len(features), -1), count, seed
    )
    centroids = centres.astype(np.float32).reshape(count, *features.shape[1:])
    return centroids, (sizes / sizes.sum()).astype(np.float32)


def check(labels: np.ndarray, images_per_class: int, num_classes: int | None = None) -> None:
    """Raises ValueError unless every class has `images_per_class` >= 1 examples, and no other is.

    Args:
      labels: int [n].
      images_per_class: of each class.
      num_classes: classes are 0 .. num_classes - 1; None for those up to the largest label.
    """
    if images_per_class < 1:
        raise ValueError(f'images_per_class must be at least 1, got {images_per_class}.')
    check_labels(labels, num_classes)
    sizes = np.bincount(labels, minlength=num_classes or 0)
    smallest = int(np.argmin(sizes))
    if sizes[smallest] < images_per_class:
        few = 'has no example' if not sizes[smallest] else f'has only {sizes[smallest]} examples'
        raise ValueError(
            f'images_per_class is {images_per_class}, but class {smallest} {few}; lower '
            'images_per_class, or leave the class out.'
        )


def check_labels(labels: np.ndarray, num_classes: int | None = None) -> None:
    """Raises ValueError for labels that are none of 0 .. num_classes - 1, or none at all."""
    if not len(labels):
        raise ValueError('There are no examples.')
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        last = '' if num_classes is None else num_classes - 1
        raise ValueError(f'Labels lie in {low}..{high}; the classes are 0..{last}.')


def _fitted(points: np.ndarray, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Centres [K, D] of the best of ten runs of K-means on [n, D], and how many each has, [K]."""
    from sklearn.cluster import KMeans  # slow to import

    fitted = KMeans(count, n_init=10, random_state=seed).fit(points)
    return fitted.cluster_centers_, np.bincount(fitted.labels_, minlength=count)


def _check_finite(features: np.ndarray) -> None:
    good = np.isfinite(features).all(axis=tuple(range(1, np.ndim(features))))
    if not good.all():
        raise ValueError(
            f'{(~good).sum()} of {len(good)} examples have features that are not finite; the '
            'network that computes them has diverged.'
        )


def _classes(
    labels: np.ndarray, images_per_class: int, num_classes: int | None
) -> Iterator[np.ndarray]:
    check(labels, images_per_class, num_classes)
    for name in range(num_classes or int(labels.max()) + 1):
        yield np.flatnonzero(labels == name)


def _joined(parts) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int64) for part in parts])
