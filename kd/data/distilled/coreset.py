"""Subsets of real examples: baselines for synthetic sets, and places to start one from.

Every function works on the host with NumPy and returns int64 [classes * images_per_class] indices
into the data, ordered by class. `features` are any [n, D] description of the examples, such as flat
pixels or a trained network's logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np


def random_subset(
    rng: np.random.Generator, labels: np.ndarray, images_per_class: int
) -> np.ndarray:
    """Draws `images_per_class` examples of each class without replacement.

    Raises:
      ValueError: where a class is smaller than that.
    """
    return _joined(
        rng.choice(members, images_per_class, replace=False)
        for members in _classes(labels, images_per_class)
    )


def herding(features: np.ndarray, labels: np.ndarray, images_per_class: int) -> np.ndarray:
    """Greedily picks the examples whose mean stays closest to the class mean, best first.

        i_k = argmin_i || mean - (phi_{i_1} + .. + phi_{i_{k-1}} + phi_i) / k ||,  none taken twice

    Raises:
      ValueError: where a class is smaller than `images_per_class`.

    Source: Welling 2009; in this form Rebuffi et al. 2016, arXiv 1611.07725, algorithm 4.
    """
    picked = []
    for members in _classes(labels, images_per_class):
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

    Raises:
      ValueError: where a class is smaller than `images_per_class`.

    Source: Liu et al. 2023, arXiv 2302.14416 (DREAM); Shen et al. 2023, arXiv 2310.10541.
    """
    from sklearn.cluster import KMeans  # slow to import

    picked = []
    for members in _classes(labels, images_per_class):
        points = np.asarray(features[members], np.float64)
        count = min(clusters, images_per_class)
        fitted = KMeans(count, n_init=10, random_state=seed).fit(points)
        sizes = np.bincount(fitted.labels_, minlength=count)
        shares = np.full(count, images_per_class // count)
        by_size = np.argsort(-sizes, kind='stable')
        shares[by_size[: images_per_class % count]] += 1
        free = np.ones(len(members), bool)
        for cluster in range(count):
            distances = np.square(points - fitted.cluster_centers_[cluster]).sum(1)
            nearest = np.argsort(np.where(free, distances, np.inf), kind='stable')
            taken = nearest[: shares[cluster]]
            free[taken] = False
            picked.append(members[taken])
    return _joined(picked)


def check(labels: np.ndarray, images_per_class: int) -> None:
    """Raises ValueError unless every class has `images_per_class` >= 1 examples."""
    if images_per_class < 1:
        raise ValueError(f'images_per_class must be at least 1, got {images_per_class}.')
    names, sizes = np.unique(labels, return_counts=True)
    smallest = int(np.argmin(sizes))
    if sizes[smallest] < images_per_class:
        raise ValueError(
            f'images_per_class is {images_per_class}, but class {names[smallest]} has only '
            f'{sizes[smallest]} examples; lower images_per_class.'
        )


def _classes(labels: np.ndarray, images_per_class: int) -> Iterator[np.ndarray]:
    check(labels, images_per_class)
    for name in np.unique(labels):
        yield np.flatnonzero(labels == name)


def _joined(parts) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int64) for part in parts])
