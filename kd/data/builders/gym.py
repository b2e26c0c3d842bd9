"""Problems of the tasks of `reasoning-gym`, which are made when they are asked for.

A problem is known by its task, levels, seed and number: who judges an answer makes it again. No JAX
is imported here, as verifiers run in processes of their own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

from kd import packages
from kd.errors import UserError, did_you_mean

# Options of a task by level: ((('n_people', 3),), (('n_people', 4),)).
Levels = tuple[tuple[tuple[str, Any], ...], ...]
# Problems of a level; what a task may have been given as its size.
_MOST = 1_000_000


def levels_of(levels: Sequence[Mapping[str, Any]]) -> Levels:
    """Levels of a config in a form that can be compared; one without options where none is."""
    return tuple(tuple(sorted(level.items())) for level in levels) or ((),)


def problem(task: str, levels: Levels, seed: int, number: int) -> dict[str, Any]:
    """Problem `number`, of level number mod len(levels): `question`, `answer`, `metadata`.

    Raises:
      UserError: `reasoning-gym` is not installed, an unknown task, or options that it does not
        take.
    """
    return _task(task, levels[number % len(levels)], seed)[number // len(levels)]


def score(answer: str, task: str, levels: Levels, seed: int, number: int) -> float:
    """What the task gives for an answer, in [0, 1]: to what stands last within <answer>, if
    anything does, or to all of it."""
    tagged = packages.need('reasoning_gym', extra='gym').utils.extract_answer(answer)
    of = _task(task, levels[number % len(levels)], seed)
    said = answer.strip() if tagged is None else tagged
    return float(of.score_answer(said, problem(task, levels, seed, number)))


@functools.lru_cache(maxsize=64)
def _task(task: str, level: tuple[tuple[str, Any], ...], seed: int) -> Any:
    package = packages.need('reasoning_gym', extra='gym')
    known = sorted(package.factory.DATASETS)
    if task not in known:
        raise UserError(f"reasoning-gym has no task '{task}'.{did_you_mean(task, known)}")
    try:
        return package.create_dataset(task, seed=seed, size=_MOST, **dict(level))
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f'reasoning-gym: {task} with {dict(level)}: {error}') from error
