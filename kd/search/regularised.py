"""Regularised evolution on the host: a population from which the oldest goes, or the worst.

A candidate is anything that `draw` makes and `mutate` changes.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np

Candidate = TypeVar('Candidate')


class Scored(NamedTuple, Generic[Candidate]):
    """A candidate and its score, higher is better."""

    candidate: Candidate
    score: float


class Found(NamedTuple, Generic[Candidate]):
    """What a search has seen.

    Attributes:
      best: of all.
      history: in the order in which they were scored.
    """

    best: Scored[Candidate]
    history: list[Scored[Candidate]]


def evolve(
    rng: np.random.Generator,
    score: Callable[[Any], float],
    draw: Callable[[np.random.Generator], Any],
    mutate: Callable[[np.random.Generator, Any], Any],
    *,
    population: int = 36,
    tournament: int = 8,
    parents: int = 5,
    steps: int = 500,
    drop: str = 'oldest',
) -> Found:
    """Draws a population, then replaces one member by a changed one, `steps` times.

    The parent is one of the best `parents` of a `tournament` of different members; 1 takes the
    best. DisWOT's script for NAS-Bench-201 sorts the tournament from the worst, and draws from the
    worst five of eight.

    Args:
      rng: draws everything.
      score: of a candidate, higher is better; NaN is the worst.
      draw: a candidate, within the budget.
      mutate: a changed copy of one, within the budget.
      population, tournament, parents: see above.
      steps: mutations; `population + steps` candidates are scored.
      drop: 'oldest' or 'worst'.

    Raises:
      ValueError: sizes that do not go together, or another `drop`.

    Source: Real et al. 2018, arXiv:1802.01548; DisWOT 2023, arXiv:2303.15678.
    """
    if not 1 <= parents <= tournament <= population:
        raise ValueError(
            'evolve takes 1 <= parents <= tournament <= population, got '
            f'{(parents, tournament, population)}.'
        )
    if drop not in ('oldest', 'worst'):
        raise ValueError(f"drop must be 'oldest' or 'worst', got {drop!r}.")

    def scored(candidate: Any) -> Scored:
        return Scored(candidate, float(score(candidate)))

    history = [scored(draw(rng)) for _ in range(population)]
    members = deque(history)
    for _ in range(steps):
        places = rng.choice(len(members), tournament, replace=False)
        ordered = sorted((members[i] for i in places), key=_rank, reverse=True)
        parent = ordered[rng.integers(parents)]
        child = scored(mutate(rng, parent.candidate))
        history.append(child)
        members.append(child)
        if drop == 'oldest':
            members.popleft()
        else:
            del members[min(range(len(members)), key=lambda i: _rank(members[i]))]
    return Found(max(history, key=_rank), history)


def _rank(of: Scored) -> float:
    return -np.inf if np.isnan(of.score) else of.score
