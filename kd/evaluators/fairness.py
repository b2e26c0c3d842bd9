"""Whether a classifier treats groups alike: ratios of rates, 1 where they are equal."""

from __future__ import annotations

import numpy as np
from jax.typing import ArrayLike


def demographic_parity_ratio(predicted: ArrayLike, group: ArrayLike) -> float:
    """The smallest share of positives that a group gets, over the largest.

    1 where nobody is positive (0 / 0: all groups get the same), 0 where one group alone gets none.

    Args:
      predicted: bool or 0 and 1, [N].
      group: int [N]; groups that do not occur do not count.
    """
    positive, member = np.asarray(predicted).astype(bool), np.asarray(group)
    return _ratio([positive[member == g].mean() for g in np.unique(member)])


def equalized_odds_ratio(predicted: ArrayLike, label: ArrayLike, group: ArrayLike) -> float:
    """The smaller of two such ratios: of true positive rates, and of false positive rates.

    A group without an example of a label has no rate there and does not count; 0 / 0 is 1 as of
    `demographic_parity_ratio`.

    Args:
      predicted, label: bool or 0 and 1, [N].
      group: int [N].
    """
    positive, member = np.asarray(predicted).astype(bool), np.asarray(group)
    truth = np.asarray(label).astype(bool)
    ratios = []
    for of in (True, False):
        inside = [(truth == of) & (member == g) for g in np.unique(member)]
        ratios.append(_ratio([positive[rows].mean() for rows in inside if rows.any()]))
    return min(ratios)


def _ratio(rates: list[float]) -> float:
    most = max(rates, default=0.0)
    return float(min(rates) / most) if most > 0 else 1.0
