"""Evolutionary search on the host, in NumPy.

A candidate is a row of genes, int [G], gene i one of 0 .. sizes[i] - 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Values = Callable[[np.ndarray], np.ndarray]


class Front(NamedTuple):
    """Candidates of which none is better than another in all objectives.

    Attributes:
      genes: int [n, G], all different.
      values: float [n, k], their objectives, lower is better.
    """

    genes: np.ndarray
    values: np.ndarray


def pareto_front(values: np.ndarray) -> np.ndarray:
    """Which rows of values [n, k], lower is better, no other row dominates: bool [n].

    A row dominates another that is nowhere lower and somewhere higher; equal rows do not.
    """
    return np.logical_not(np.any(dominates(values), axis=0))


def dominates(values: np.ndarray, violation: np.ndarray | None = None) -> np.ndarray:
    """bool [n, n]: whether row i dominates row j, see `pareto_front`.

    With `violation` [n], 0 where a constraint holds, of two that break it the one that breaks it
    less dominates, and one that keeps it dominates all that do not.
    """
    values = np.asarray(values, float)
    not_above = np.ones((len(values), len(values)), bool)
    below = np.zeros_like(not_above)
    for column in values.T:
        not_above &= column[:, None] <= column[None]
        below |= column[:, None] < column[None]
    better = not_above & below
    if violation is None:
        return better
    violation = np.maximum(np.asarray(violation, float), 0.0)
    same = violation[:, None] == violation[None]
    return np.where(same, better, violation[:, None] < violation[None])


def ranks(values: np.ndarray, violation: np.ndarray | None = None) -> np.ndarray:
    """The front of each row, int [n]: 0 for those that none dominates, 1 once these are gone."""
    better = dominates(values, violation)
    found = np.full(len(values), -1)
    above = better.sum(0)
    for rank in range(len(values)):
        front = (above == 0) & (found < 0)
        if not front.any():
            break
        found[front] = rank
        above = above - better[front].sum(0)
    return found


def crowding(values: np.ndarray) -> np.ndarray:
    """Crowding distance of each row of a front, float [n]; infinite at the ends.

    Summed over objectives: the gap between the two neighbours, over the range of the front.

    Source: Deb et al. 2002, NSGA-II, section III.B.
    """
    values = np.asarray(values, float)
    distance = np.zeros(len(values))
    for column in values.T:
        order = np.argsort(column, kind='stable')
        span = column[order[-1]] - column[order[0]]
        distance[order[[0, -1]]] = np.inf
        if span > 0:
            distance[order[1:-1]] += (column[order[2:]] - column[order[:-2]]) / span
    return distance


def nsga2(
    rng: np.random.Generator,
    objectives: Values,
    sizes: Sequence[int],
    *,
    constraint: Values | None = None,
    population: int = 100,
    generations: int = 100,
    mutation: float = 0.1,
) -> Front:
    """The best compromises that an elitist genetic algorithm has seen last.

    Parents are winners of tournaments of two, by front, then by crowding distance; children take
    each gene from either parent by a coin, and with probability `mutation` draw it anew. Of parents
    and children, without repetitions, the best `population` live on.

    Args:
      rng: draws everything.
      objectives: genes [n, G] -> [n, k], lower is better.
      sizes: choices of each gene.
      constraint: genes [n, G] -> [n], at most 0 where it holds; see `dominates`.
      population, generations: sizes of the search.
      mutation: per gene.

    Returns:
      The front of the last population, without those that break the constraint, by the first
      objective.

    Source: Deb et al. 2002, A Fast and Elitist Multiobjective Genetic Algorithm: NSGA-II.
    """
    choices = np.asarray(sizes)
    genes = _different(rng.integers(0, choices, (population, len(choices))))
    values, violation = _measured(genes, objectives, constraint)
    for _ in range(generations):
        rank, distance = _standing(values, violation)
        first, second = (_winners(rng, rank, distance, population) for _ in range(2))
        coins = rng.random((population, len(choices))) < 0.5
        children = np.where(coins, genes[first], genes[second])
        anew = rng.random(children.shape) < mutation
        children = np.where(anew, rng.integers(0, choices, children.shape), children)
        children = _unseen(children, genes)
        if len(children):
            measured = _measured(children, objectives, constraint)
            genes = np.concatenate([genes, children])
            values = np.concatenate([values, measured[0]])
            violation = np.concatenate([violation, measured[1]])
        rank, distance = _standing(values, violation)
        kept = np.lexsort((-distance, rank))[:population]
        genes, values, violation = genes[kept], values[kept], violation[kept]
    held = violation <= 0
    genes, values = genes[held], values[held]
    best = pareto_front(values)
    genes, values = genes[best], values[best]
    order = np.lexsort(values.T[::-1])
    return Front(genes[order], values[order])


def _measured(genes, objectives, constraint):
    values = np.asarray(objectives(genes), float)
    if values.ndim != 2 or len(values) != len(genes):
        raise ValueError(f'objectives of {len(genes)} candidates have shape {values.shape}.')
    violation = np.zeros(len(genes)) if constraint is None else np.asarray(constraint(genes), float)
    return values, np.maximum(violation, 0.0)


def _standing(values, violation):
    rank = ranks(values, violation)
    distance = np.zeros(len(values))
    for number in np.unique(rank):
        of = rank == number
        distance[of] = crowding(values[of])
    return rank, distance


def _winners(rng, rank, distance, count):
    a, b = rng.integers(0, len(rank), (2, count))
    better = (rank[a] < rank[b]) | ((rank[a] == rank[b]) & (distance[a] > distance[b]))
    return np.where(better, a, b)


def _different(genes):
    return genes[np.sort(np.unique(genes, axis=0, return_index=True)[1])]


def _unseen(children, genes):
    known = {row.tobytes() for row in genes}
    children = _different(children)
    return children[[row.tobytes() not in known for row in children]]
