"""Metrics are (sum, count) pairs: exact against NumPy, whatever the cut of the data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd import metrics


@pytest.fixture(scope='module')
def values():
    rng = np.random.default_rng(0)
    return rng.normal(size=(24, 3)).astype(np.float32), rng.random((24, 3)) < 0.6


def test_mean_is_the_masked_sum_and_count_of_numpy(values):
    x, where = values
    total, count = metrics.mean(x, where)
    np.testing.assert_allclose(total, x.astype(np.float64)[where].sum(), rtol=1e-6)
    assert count == where.sum()
    total, count = metrics.mean(x)
    np.testing.assert_allclose(total, x.astype(np.float64).sum(), rtol=1e-5)
    assert count == x.size


def test_a_mask_of_rows_counts_whole_rows(values):
    x, _ = values
    rows = np.arange(24) % 3 == 0
    for mask in (rows, rows[:, None]):
        total, count = metrics.mean(x, mask)
        np.testing.assert_allclose(total, x[rows].sum(dtype=np.float64), rtol=1e-5)
        assert count == 3 * rows.sum()
    # Also where NumPy would take the mask for one of columns.
    square, first = x[:3], np.array([True, False, False])
    total, count = metrics.mean(square, first)
    np.testing.assert_allclose(total, square[0].sum(dtype=np.float64), rtol=1e-5)
    assert count == 3


def test_a_masked_nan_is_in_neither_the_sum_nor_the_gradient(values):
    x, where = values
    poisoned = np.where(where, x, np.nan).astype(np.float32)
    clean = metrics.mean(x, where)
    total, gradient = jax.value_and_grad(lambda v: metrics.mean(v, where).total)(poisoned)
    assert total == clean.total
    np.testing.assert_array_equal(gradient, where.astype(np.float32))


def test_half_precision_values_are_summed_in_float32():
    # In bfloat16 the sum of ones stops at 256, in float16 at 2048.
    for dtype in (jnp.bfloat16, jnp.float16):
        total, count = metrics.mean(jnp.ones(5000, dtype), jnp.ones(5000, bool))
        assert (total, count) == (5000.0, 5000.0)
        assert total.dtype == count.dtype == jnp.float32


def test_merging_unequal_parts_is_one_pass_over_everything(values):
    x, where = values
    whole = {'a': metrics.mean(x, where), 'b': metrics.scalar(2.0)}
    merged = metrics.zeros_like(jax.eval_shape(lambda: whole))
    for part in (slice(0, 1), slice(1, 9), slice(9, 9), slice(9, 24)):
        merged = metrics.merge(
            merged, {'a': metrics.mean(x[part], where[part]), 'b': metrics.scalar(2.0)}
        )
    divided, expected = metrics.divide(merged), metrics.divide(whole)
    np.testing.assert_allclose(divided['a'], expected['a'], rtol=1e-6)
    np.testing.assert_allclose(divided['a'], x.astype(np.float64)[where].mean(), rtol=1e-6)
    assert merged['a'].count == where.sum()
    # A scalar is the mean over the steps in which it was reported.
    assert (divided['b'], float(merged['b'].count)) == (2.0, 4.0)


def test_a_metric_that_was_never_counted_is_left_out():
    nothing = metrics.mean(np.ones(4), np.zeros(4, bool))
    assert metrics.divide({'seen': metrics.scalar(3.0), 'unseen': nothing}) == {'seen': 3.0}


@pytest.mark.parametrize(
    ('values', 'lower', 'place'),
    [
        ((0.9, 0.3, math.nan, 0.7, 0.8), True, 1),
        ((math.nan, 0.5, 0.7), False, 2),
        ((math.nan, 0.5, 0.7), True, 1),
        ((0.5, math.inf, None, 0.6), False, 3),
        ((-math.inf, 0.5, 0.4), True, 2),
        ((0.5, 0.5), False, 0),
        ((math.nan, None, math.inf), False, None),
        ((), True, None),
    ],
)
def test_the_best_is_a_number_that_is_there(values, lower, place):
    assert metrics.best(values, lower=lower) == place
