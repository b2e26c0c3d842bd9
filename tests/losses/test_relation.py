"""DIST: what a correlation does and does not see."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from kd.losses import relation

pytestmark = pytest.mark.usefixtures('compiled_quickly')

GENERATOR = np.random.default_rng(4)
STUDENT, TEACHER = GENERATOR.normal(size=(2, 8, 5)) * 2


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def test_inter_class_ignores_a_positive_scale_and_shift_of_probabilities():
    p = scipy.special.softmax(TEACHER, axis=-1)
    q = np.log(0.3 * p + 0.7 / 5)  # probabilities again: an affine image of the teacher's
    np.testing.assert_allclose(relation.inter_class_correlation(q, TEACHER), 0, atol=1e-6)
    assert np.all(np.abs(scipy.special.softmax(q, axis=-1) - p).max(-1) > 0.05)


def test_opposite_order_costs_two_with_two_outcomes():
    logits = STUDENT[:, :2]
    np.testing.assert_allclose(
        relation.inter_class_correlation(-logits, logits, eps=0.0), 2, rtol=1e-12
    )


def test_eps_enters_the_denominator_as_in_the_published_code():
    q, p = (scipy.special.softmax(x / 4, axis=-1) for x in (STUDENT, TEACHER))
    q, p = (x - x.mean(-1, keepdims=True) for x in (q, p))
    norms = np.linalg.norm(q, axis=-1) * np.linalg.norm(p, axis=-1)
    value = relation.inter_class_correlation(STUDENT, TEACHER, temperature=4.0, eps=0.1)
    np.testing.assert_allclose(value, 1 - np.sum(q * p, -1) / (norms + 0.1), rtol=1e-12)


@pytest.mark.parametrize('axis', [0, 1])
def test_where_leaves_examples_and_outcomes_out(axis):
    f = (relation.intra_class_correlation, relation.inter_class_correlation)[axis]
    rows = np.arange(8) != 2
    value = f(np.where(rows[:, None], STUDENT, np.nan), TEACHER, where=rows[:, None])
    expected = f(STUDENT[rows], TEACHER[rows])
    np.testing.assert_allclose(value[rows] if axis else value, expected, rtol=1e-12)
    keep = np.arange(5) != 1
    value = f(STUDENT, TEACHER, where=keep)
    expected = f(STUDENT[:, keep], TEACHER[:, keep])
    np.testing.assert_allclose(value if axis else value[keep], expected, rtol=1e-12)
    assert np.all(np.asarray(value)[~keep if not axis else ~rows & False] == 0)


def test_a_constant_class_has_correlation_zero_and_zero_gradient():
    student = np.where(np.arange(5) == 0, -np.inf, STUDENT)  # class 0 has probability 0 throughout

    def first_class(s):
        return relation.intra_class_correlation(s, TEACHER)[0]

    value, gradient = jax.value_and_grad(first_class)(jnp.asarray(student))
    assert value == 1
    np.testing.assert_array_equal(gradient, 0)


def test_shapes_that_differ_are_refused():
    with pytest.raises(ValueError, match=r'one shape \[B, V\], got \(8, 5\) and \(8, 4\)'):
        relation.inter_class_correlation(STUDENT, TEACHER[:, :4])
