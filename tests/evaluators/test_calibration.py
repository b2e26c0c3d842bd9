"""Calibration against straightforward NumPy loops in float64."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.preprocessing import label_binarize

from kd.evaluators.calibration import brier_score, calibration

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def ece_by_hand(logits, labels, bins=15):
    p, total = softmax(logits.astype(np.float64), axis=-1), 0.0
    inside = np.ceil(p.max(-1) * bins)
    for i in np.unique(inside):
        total += abs(np.sum((p.argmax(-1) == labels) - p.max(-1), where=inside == i))
    return total / len(labels)


@pytest.fixture(scope='module')
def predictions():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(300, 10)).astype(np.float32)
    # Right more often than it is sure, so that accuracy and confidence differ.
    labels = np.where(rng.random(300) < 0.8, logits.argmax(-1), rng.integers(0, 10, 300))
    return logits, labels


@pytest.mark.parametrize('label', [-1, 10])
def test_a_label_that_is_no_class_is_one_more_outcome_for_brier(label):
    logits = np.array([np.log(9.0), *np.full(9, 0.0)], np.float32)[None]
    # p = (1/2, 1/18 x 9): sum p^2 = 1/4 + 1/36.
    np.testing.assert_allclose(
        brier_score(logits, np.array([label])), [1 + 1 / 4 + 1 / 36], rtol=1e-6
    )


def test_brier_is_the_squared_distance_to_the_one_hot_label(predictions):
    logits, labels = predictions
    p = softmax(logits.astype(np.float64), axis=-1)
    onehot = label_binarize(labels, classes=range(10))
    np.testing.assert_allclose(
        brier_score(logits, labels), ((p - onehot) ** 2).sum(-1), rtol=1e-5, atol=1e-7
    )
    worst = brier_score(np.array([[-1e4, 1e4]], np.float32), np.array([0]))
    np.testing.assert_allclose(worst, [2.0])


@pytest.mark.parametrize('weights', ['final', 'slow'])
def test_the_evaluator_merges_batches_and_leaves_padding_out(context, evaluate, examples, weights):
    _, labels, logits = examples
    evaluator = calibration(context, weights=weights)
    found = evaluate(evaluator)
    scores = logits[weights]
    p = softmax(scores, axis=-1)
    assert found == {
        'ece': pytest.approx(ece_by_hand(scores, labels), rel=1e-4),
        'nll': pytest.approx(-np.log(p[np.arange(21), labels]).mean(), rel=1e-5),
        'brier': pytest.approx(((p - np.eye(5)[labels]) ** 2).sum(-1).mean(), rel=1e-5),
        'accuracy': pytest.approx(np.mean(p.argmax(-1) == labels), abs=1e-7),
    }
    assert evaluate(evaluator, batch_size=21) == pytest.approx(found, rel=1e-5)
