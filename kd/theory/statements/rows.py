"""What a verified statement looks like: a measured number, what it is held to, and a verdict."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import jax
import numpy as np

Relation = Literal['=', '<=', '>=']


@dataclasses.dataclass(frozen=True)
class Row:
    """One number and what it is held to.

    Attributes:
      quantity: what was measured, in words or symbols.
      measured: the number.
      relation: how it must stand to `bound`.
      bound: an exact value or a proven bound.
      tolerance: absolute slack; 0 for a bound that already says everything.
      note: for counter-examples, what was found; else remarks.
      paper, statement: filled in by `Paper.rows`.
    """

    quantity: str
    measured: float
    relation: Relation
    bound: float
    tolerance: float
    note: str = ''
    paper: str = ''
    statement: str = ''

    @property
    def holds(self) -> bool:
        """The verdict; NaN and infinite measurements fail."""
        if not math.isfinite(self.measured):
            return False
        excess = self.measured - self.bound
        if self.relation == '<=':
            return excess <= self.tolerance
        if self.relation == '>=':
            return -excess <= self.tolerance
        return abs(excess) <= self.tolerance


def equal(quantity: str, measured: Any, exact: Any, tolerance: float, note: str = '') -> Row:
    """measured = exact. Of arrays, the entry that deviates most is reported."""
    measured, exact = np.broadcast_arrays(np.asarray(measured, float), np.asarray(exact, float))
    worst = _worst(np.abs(measured - exact))
    return Row(
        quantity, float(measured.flat[worst]), '=', float(exact.flat[worst]), tolerance, note
    )


def at_most(
    quantity: str, measured: Any, bound: Any, tolerance: float = 0.0, note: str = ''
) -> Row:
    """measured <= bound. Of arrays, the entry that exceeds its bound most is reported."""
    measured, bound = np.broadcast_arrays(np.asarray(measured, float), np.asarray(bound, float))
    worst = _worst(measured - bound)
    return Row(
        quantity, float(measured.flat[worst]), '<=', float(bound.flat[worst]), tolerance, note
    )


def at_least(
    quantity: str, measured: Any, bound: Any, tolerance: float = 0.0, note: str = ''
) -> Row:
    """measured >= bound. Of arrays, the entry that falls short of its bound most is reported."""
    measured, bound = np.broadcast_arrays(np.asarray(measured, float), np.asarray(bound, float))
    worst = _worst(bound - measured)
    return Row(
        quantity, float(measured.flat[worst]), '>=', float(bound.flat[worst]), tolerance, note
    )


def counter_example(quantity: str, excess: Any, margin: float, note: str = '') -> Row:
    """A statement is false: the largest violation found is at least `margin` (beyond rounding)."""
    return Row(quantity, float(np.max(np.asarray(excess, float))), '>=', margin, 0.0, note)


def run(function: Callable, *args: Any, **options: Any) -> Any:
    """function(*args, **options) under one jit, as NumPy; options are compiled in.

    Op by op, a statement would compile hundreds of operations and take ten times as long.
    """
    compiled = jax.jit(functools.partial(function, **options) if options else function)
    return jax.tree.map(np.asarray, compiled(*args))


def _worst(excess: np.ndarray) -> int:
    return int(np.argmax(np.where(np.isnan(excess), np.inf, excess)))


Check = Callable[[np.random.Generator], Iterable[Row]]


@dataclasses.dataclass
class Paper:
    """A paper and its statements, in the order in which they were registered."""

    slug: str
    title: str
    arxiv: str
    checks: dict[str, Check] = dataclasses.field(default_factory=dict)

    def statement(self, name: str) -> Callable[[Check], Check]:
        """Registers a function of a random generator that yields the rows of one statement."""

        if name in self.checks:
            raise ValueError(f'{self.slug}: statement {name!r} is registered twice.')

        def register(check: Check) -> Check:
            self.checks[name] = check
            return check

        return register

    def rows(self, seed: int = 0) -> Iterator[Row]:
        """Runs all statements. One that raises ValueError is a row that fails and says why."""
        for index, (name, check) in enumerate(self.checks.items()):
            try:
                for row in check(np.random.default_rng([seed, index])):
                    yield dataclasses.replace(row, paper=self.slug, statement=name)
            except ValueError as error:
                yield Row('raised', math.nan, '=', 0.0, 0.0, str(error), self.slug, name)
