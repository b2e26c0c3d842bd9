"""Calibration against straightforward NumPy loops in float64."""

import numpy as np
import pytest
from scipy.special import softmax
from sklearn.preprocessing import label_binarize

from kd.evaluators.calibration import (
    Bins,
    brier_score,
    calibration,
    confidence_bins,
    expected_calibration_error,
)


def bins_by_hand(logits, labels, bins):
    """Each example looked at alone: (count, sum of confidences, number correct) of every bin."""
    table = np.zeros((bins, 3))
    for row, label in zip(softmax(logits.astype(np.float64), axis=-1), labels, strict=True):
        edges = np.arange(1, bins + 1) / bins
        table[np.searchsorted(edges, row.max())] += (1, row.max(), row.argmax() == label)
    return table.T


def ece_by_hand(logits, labels, bins=15):
    count, confidence, correct = bins_by_hand(logits, labels, bins)
    shown = count > 0
    gap = np.abs(correct[shown] / count[shown] - confidence[shown] / count[shown])
    return float((count[shown] / len(labels)) @ gap)


@pytest.fixture(scope='module')
def predictions():
    rng = np.random.default_rng(0)
    logits = 2 * rng.normal(size=(300, 10)).astype(np.float32)
    # Right more often than it is sure, so that accuracy and confidence differ.
    labels = np.where(rng.random(300) < 0.8, logits.argmax(-1), rng.integers(0, 10, 300))
    return logits, labels


@pytest.mark.parametrize('bins', [1, 10, 15])
def test_bins_and_ece_are_those_of_a_loop_over_examples(predictions, bins):
    logits, labels = predictions
    found = confidence_bins(logits, labels, bins)
    count, confidence, correct = bins_by_hand(logits, labels, bins)
    np.testing.assert_array_equal(found.examples, count)
    np.testing.assert_allclose(found.confidence, confidence, rtol=1e-5)
    np.testing.assert_array_equal(found.correct, correct)
    expected = ece_by_hand(logits, labels, bins)
    assert expected > 0.01
    assert expected_calibration_error(found) == pytest.approx(expected, rel=1e-4)


def test_a_calibrated_network_has_an_error_of_zero_and_a_sure_one_of_its_mistakes():
    # Confidence 3/4, right in three cases of four.
    logits = np.tile(np.log([[3.0, 1.0]]), (8, 1)).astype(np.float32)
    bins = confidence_bins(logits, np.array([0, 0, 0, 1] * 2))
    assert expected_calibration_error(bins) == pytest.approx(0.0, abs=1e-6)
    bins = confidence_bins(1e4 * logits, np.array([0, 0, 0, 1] * 2))
    assert expected_calibration_error(bins) == pytest.approx(0.25, abs=1e-6)
    np.testing.assert_array_equal(np.flatnonzero(bins.examples), [14])


def test_masked_examples_are_in_no_bin(predictions):
    logits, labels = predictions
    where = np.arange(300) % 3 != 0
    poisoned = np.where(where[:, None], logits, np.nan).astype(np.float32)
    found = confidence_bins(poisoned, labels, 15, where)
    count, confidence, correct = bins_by_hand(logits[where], labels[where], 15)
    np.testing.assert_array_equal(found.examples, count)
    np.testing.assert_allclose(found.confidence, confidence, rtol=1e-5)
    np.testing.assert_array_equal(found.correct, correct)


def test_several_positions_per_example_count_each_and_are_masked_together(predictions):
    logits, labels = predictions
    where = np.arange(100) % 4 != 0
    found = confidence_bins(logits.reshape(100, 3, 10), labels.reshape(100, 3), 15, where)
    kept = np.repeat(where, 3)
    count, confidence, correct = bins_by_hand(logits[kept], labels[kept], 15)
    np.testing.assert_array_equal(found.examples, count)
    np.testing.assert_allclose(found.confidence, confidence, rtol=1e-5)
    np.testing.assert_array_equal(found.correct, correct)


def test_bins_of_parts_add_up_to_those_of_the_whole(predictions):
    logits, labels = predictions
    parts = [confidence_bins(logits[i::3], labels[i::3]) for i in range(3)]
    merged = Bins(*(sum(fields) for fields in zip(*parts, strict=True)))
    assert expected_calibration_error(merged) == pytest.approx(
        ece_by_hand(logits, labels), rel=1e-4
    )


@pytest.mark.parametrize('label', [-1, 10])
def test_a_label_that_is_no_class_is_wrong_in_every_bin_and_one_more_outcome_for_brier(label):
    logits = np.array([np.log(9.0), *np.full(9, 0.0)], np.float32)[None]
    bins = confidence_bins(logits, np.array([label]))
    # p = (1/2, 1/18 x 9): sum p^2 = 1/4 + 1/36.
    assert expected_calibration_error(bins) == pytest.approx(0.5, abs=1e-6)
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
