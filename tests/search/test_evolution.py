"""Fronts and NSGA-II against enumeration."""

import itertools

import numpy as np
import pytest

from kd.search.evolution import crowding, nsga2, pareto_front, ranks

SIZES = (4, 3, 5, 2, 3)
ALL = np.array(list(itertools.product(*map(range, SIZES))))
WEIGHTS = np.random.default_rng(3).normal(size=(2, len(SIZES), 5))


def dominated(a, others):
    return any(all(b <= a) and any(b < a) for b in others)


def test_the_front_is_what_no_row_dominates_with_ties_and_repetitions():
    values = np.random.default_rng(0).integers(0, 5, (60, 3)).astype(float)
    values = np.concatenate([values, values[:5]])
    expected = [not dominated(row, values) for row in values]
    np.testing.assert_array_equal(pareto_front(values), expected)
    # Front after front, as they are peeled off.
    left, found = np.arange(len(values)), ranks(values)
    for rank in range(found.max() + 1):
        front = left[pareto_front(values[left])]
        np.testing.assert_array_equal(np.flatnonzero(found == rank), front)
        left = np.setdiff1d(left, front)
    assert not len(left)


def test_whatever_breaks_a_constraint_comes_after_all_that_keep_it():
    values = np.array([[0.0, 0.0], [5.0, 5.0], [0.0, 9.0], [1.0, 1.0]])
    found = ranks(values, np.array([2.0, 0.0, 0.0, 1.0]))
    np.testing.assert_array_equal(found, [2, 0, 0, 1])


def test_crowding_is_the_gap_of_the_neighbours_over_the_range():
    values = np.array([[0.0, 8.0], [1.0, 4.0], [3.0, 3.0], [4.0, 0.0]])
    np.testing.assert_allclose(crowding(values), [np.inf, 3 / 4 + 5 / 8, 3 / 4 + 4 / 8, np.inf])


def objectives(genes):
    """Two sums of a weight for each gene, as different as random numbers are."""
    at = np.arange(len(SIZES))
    return np.stack([weights[at, genes].sum(1) for weights in WEIGHTS], 1)


def budget(genes):
    return genes.sum(1) - 7.0


@pytest.mark.parametrize('constraint', [None, budget])
def test_the_search_finds_the_front_of_an_enumerated_space(constraint):
    allowed = ALL if constraint is None else ALL[budget(ALL) <= 0]
    best = pareto_front(objectives(allowed))
    expected = {tuple(row) for row in allowed[best]}
    assert 4 < len(expected) < 40
    seen = []

    def watched(genes):
        seen.extend(map(tuple, genes))
        return objectives(genes)

    found = nsga2(
        np.random.default_rng(1), watched, SIZES, constraint=constraint, population=40,
        generations=8,
    )  # fmt: skip
    assert {tuple(row) for row in found.genes} == expected
    # Of the 360 candidates it needs no more than it may see.
    assert len(seen) <= 40 * 9
    assert len(set(seen)) < len(ALL)
    np.testing.assert_array_equal(found.values, objectives(found.genes))
    assert (np.diff(found.values[:, 0]) >= 0).all()
    again = nsga2(
        np.random.default_rng(1), objectives, SIZES, constraint=constraint, population=40,
        generations=8,
    )  # fmt: skip
    np.testing.assert_array_equal(found.genes, again.genes)


def test_where_nothing_keeps_the_constraint_the_front_is_empty():
    found = nsga2(
        np.random.default_rng(0), objectives, SIZES, constraint=lambda g: np.ones(len(g)),
        population=10, generations=2,
    )  # fmt: skip
    assert found.genes.shape == (0, len(SIZES))
    assert found.values.shape == (0, 2)


def test_objectives_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r'objectives of \d+ candidates have shape'):
        nsga2(np.random.default_rng(0), lambda g: g.sum(1), SIZES, population=4)
