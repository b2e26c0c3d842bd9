"""Accuracy, top-k and NLL against scikit-learn and NumPy in float64."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn import metrics as sklearn_metrics

from kd.errors import UserError
from kd.evaluators.classification import classification, negative_log_likelihood, top_k_correct

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def predictions():
    rng = np.random.default_rng(0)
    return rng.normal(size=(200, 10)).astype(np.float32), rng.integers(0, 10, 200)


@pytest.mark.parametrize('k', [1, 2, 5, 9])
def test_top_k_is_scikit_learns(predictions, k):
    logits, labels = predictions
    ours = np.asarray(top_k_correct(logits, labels, k), np.float64).mean()
    theirs = sklearn_metrics.top_k_accuracy_score(labels, logits, k=k, labels=np.arange(10))
    assert ours == pytest.approx(theirs, abs=1e-7)


def test_nll_is_scikit_learns_log_loss(predictions):
    logits, labels = predictions
    log_p = log_softmax(logits.astype(np.float64), axis=-1)
    ours = np.asarray(negative_log_likelihood(logits, labels), np.float64)
    np.testing.assert_allclose(ours, -log_p[np.arange(200), labels], rtol=1e-5)
    theirs = sklearn_metrics.log_loss(labels, np.exp(log_p), labels=np.arange(10))
    assert ours.mean() == pytest.approx(theirs, rel=1e-6)


def test_nll_is_finite_for_large_logits_and_exact_for_masked_ones():
    logits = jnp.array([[1e4, -1e4, 0.0], [0.0, -jnp.inf, 0.0]])
    np.testing.assert_allclose(negative_log_likelihood(logits, [1, 0]), [2e4, np.log(2)], rtol=1e-6)


def test_ties_and_nan_count_against_the_label():
    nan = np.nan
    logits = np.array([[1.0, 1.0, 0.0], [2.0, 1.0, 1.0], [nan, nan, nan], [3.0, nan, 0.0]])
    np.testing.assert_array_equal(top_k_correct(logits, np.zeros(4, int)), [0, 1, 0, 0])
    np.testing.assert_array_equal(top_k_correct(logits, np.zeros(4, int), 2), [1, 1, 0, 1])


@pytest.mark.parametrize('label', [-100, -1, 10, 11])
def test_a_label_that_is_no_class_is_never_right(predictions, label):
    logits, labels = predictions[0][:3], np.array([label, 0, label])
    right = top_k_correct(logits, np.array([3, 0, 3]), 10)
    np.testing.assert_array_equal(right, 1)
    np.testing.assert_array_equal(top_k_correct(logits, labels, 10), [0, 1, 0])
    nll = np.asarray(negative_log_likelihood(logits, labels))
    assert np.isposinf(nll[[0, 2]]).all()
    assert np.isfinite(nll[1])


def test_leading_axes_are_positions(predictions):
    logits, labels = predictions
    cube, rows = logits.reshape(4, 50, 10), labels.reshape(4, 50)
    np.testing.assert_array_equal(top_k_correct(cube, rows).ravel(), top_k_correct(logits, labels))
    np.testing.assert_array_equal(
        negative_log_likelihood(cube, rows).ravel(), negative_log_likelihood(logits, labels)
    )


@pytest.mark.parametrize('weights', ['final', 'slow'])
def test_the_evaluator_merges_batches_and_leaves_padding_out(context, evaluate, examples, weights):
    _, labels, logits = examples
    evaluator = classification(context, weights=weights, top_k=2)
    found = evaluate(evaluator)
    scores = logits[weights]
    log_p = log_softmax(scores, axis=-1)
    assert found == {
        'accuracy': pytest.approx(np.mean(scores.argmax(-1) == labels), abs=1e-7),
        'nll': pytest.approx(-log_p[np.arange(21), labels].mean(), rel=1e-5),
        'top_2': pytest.approx(
            sklearn_metrics.top_k_accuracy_score(labels, scores, k=2, labels=range(5)), abs=1e-7
        ),
    }
    assert evaluate(evaluator, batch_size=21) == pytest.approx(found, rel=1e-6)


def test_an_average_that_is_not_kept_is_refused(context):
    with pytest.raises(UserError, match=r"student\.ema has no 'fast', only \['slow'\]"):
        classification(context, weights='fast')


def test_data_without_labels_are_refused(context):
    with pytest.raises(UserError, match='needs data with class labels'):
        classification(dataclasses.replace(context, num_classes=None))
    with pytest.raises(UserError, match=r'needs student\.network'):
        classification(dataclasses.replace(context, optional_network=None))
