"""Calibration against straightforward NumPy loops in float64, and FIRST's recalibrated teachers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax, softmax

from kd.losses import calibration, divergence, signal
from kd.losses.calibration import Bins, confidence_bins, expected_calibration_error


@pytest.fixture(scope='module', autouse=True)
def _quick(quick_compilation):
    with quick_compilation():
        yield


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
def test_a_label_that_is_no_class_is_wrong_in_every_bin(label):
    logits = np.array([np.log(9.0), *np.full(9, 0.0)], np.float32)[None]
    bins = confidence_bins(logits, np.array([label]))
    assert expected_calibration_error(bins) == pytest.approx(0.5, abs=1e-6)


def test_positions_are_masked_one_by_one(predictions):
    logits, labels = predictions
    where = np.arange(300) % 7 < 3
    found = confidence_bins(
        logits.reshape(100, 3, 10), labels.reshape(100, 3), 15, where.reshape(100, 3)
    )
    for field, by_hand in zip(found, bins_by_hand(logits[where], labels[where], 15), strict=True):
        np.testing.assert_allclose(field, by_hand, rtol=1e-5)


def test_labels_drawn_from_the_confidence_have_next_to_no_error():
    rng = np.random.default_rng(1)
    confidence = rng.uniform(0.5, 1.0, 50_000)
    labels = (rng.random(50_000) > confidence).astype(int)
    logits = np.log(np.stack([confidence, 1 - confidence], -1))
    assert expected_calibration_error(confidence_bins(logits, labels, 10)) < 0.01


# Eight positions of five listed outcomes, the last slot of the last position empty.
LOG_PROBS = log_softmax(2 * np.random.default_rng(2).normal(size=(8, 9)), axis=-1)
LOG_PROBS = np.sort(LOG_PROBS, -1)[:, ::-1][:, :5].astype(np.float32)
LOG_PROBS[-1, -1] = -np.inf
P = np.exp(LOG_PROBS.astype(np.float64))


class TestRecalibrate:
    @pytest.mark.parametrize('c', [0.3, 1.0, 1.5])
    def test_temperatures_on_logits_and_on_probabilities(self, c):
        expected = P ** (1 / c) / (P ** (1 / c)).sum(-1, keepdims=True)
        found = np.exp(calibration.recalibrate(LOG_PROBS, temperature=c))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        expected = np.where(P > 0, np.exp(P / c), 0)
        expected /= expected.sum(-1, keepdims=True)
        found = np.exp(calibration.recalibrate(LOG_PROBS, 'probabilities', temperature=c))
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        assert np.all(found[:-1, 0] / found[:-1, -1] <= np.exp(1 / c))

    @pytest.mark.parametrize('kind', ['logits', 'probabilities'])
    def test_the_order_stays_between_the_first_alone_and_all_alike(self, kind):
        for c in (0.05, 0.5, 5.0):
            found = calibration.recalibrate(LOG_PROBS, kind, temperature=c)
            assert np.all(np.diff(found[:-1]) <= 0)
        cold = np.exp(calibration.recalibrate(LOG_PROBS, kind, temperature=1e-4))
        np.testing.assert_allclose(cold, np.tile(np.eye(5)[0], (8, 1)), atol=1e-6)
        hot = np.exp(calibration.recalibrate(LOG_PROBS, kind, temperature=1e5))
        np.testing.assert_allclose(hot[:-1], 0.2, atol=1e-4)
        np.testing.assert_allclose(hot[-1], [0.25] * 4 + [0], atol=1e-4)

    def test_smoothing_takes_from_the_first_what_it_gives_to_the_others(self):
        found = np.exp(calibration.recalibrate(LOG_PROBS, 'smoothing', smoothing=0.08))
        expected = P + 0.08 / 4
        expected[:, 0] = P[:, 0] - 0.08
        expected[-1] = [P[-1, 0] - 0.08, *(P[-1, 1:4] + 0.08 / 3), 0]
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(found.sum(-1), P.sum(-1), rtol=1e-6)

    def test_smoothing_takes_no_more_than_there_is(self):
        p = np.array([[0.1, 0.06, 0.04], [0.7, 0.0, 0.0]])
        with np.errstate(divide='ignore'):
            found = np.exp(calibration.recalibrate(np.log(p), 'smoothing', smoothing=0.3))
        np.testing.assert_allclose(found, [[0, 0.11, 0.09], [0.7, 0, 0]], rtol=1e-5)

    def test_the_students_gradient_is_q_less_the_recalibrated(self):
        """Over all outcomes; all listed at c = 1 it is that of the full forward KL."""
        student, teacher = np.random.default_rng(3).normal(size=(2, 4, 9)).astype(np.float32)
        q = softmax(student, -1)

        @jax.jit
        def slope(student, log_probs, indices):
            recorded = signal.TopK(log_probs, indices, jnp.zeros(4))
            return jax.grad(lambda z: divergence.forward_kl(z, recorded).sum())(student)

        order = np.argsort(-teacher, -1)
        ranked = np.take_along_axis(log_softmax(teacher, -1), order, -1)
        for k, c in ((3, 1.7), (9, 1.0)):
            log_probs = calibration.recalibrate(ranked[:, :k], temperature=c)
            scattered = np.zeros((4, 9))
            np.put_along_axis(scattered, order[:, :k], np.exp(log_probs), -1)
            found = slope(student, log_probs, order[:, :k])
            np.testing.assert_allclose(found, q - scattered, atol=1e-6)
        np.testing.assert_allclose(found, q - softmax(teacher, -1), atol=1e-6)


@pytest.fixture(scope='module')
def overconfident():
    """Labels of softmax(z), a teacher that says softmax(2 z), and its top 4 of 6."""
    rng = np.random.default_rng(4)
    logits = 1.5 * rng.normal(size=(20_000, 6))
    labels = (logits + rng.gumbel(size=logits.shape)).argmax(-1)
    indices = np.argsort(-logits, -1)
    log_probs = np.take_along_axis(log_softmax(2 * logits, -1), indices, -1)
    return log_probs.astype(np.float32), indices, labels


class TestFitTemperature:
    def test_finds_the_temperature_that_was_lost(self, overconfident):
        assert calibration.fit_temperature(*overconfident) == pytest.approx(2, abs=0.15)

    @pytest.mark.parametrize('kind', ['logits', 'probabilities'])
    def test_is_the_least_error_of_the_grid(self, overconfident, kind):
        log_probs, indices, labels = (x[:500] for x in overconfident)
        log_probs, indices = log_probs[:, :4], indices[:, :4]
        grid = (0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 4.0)
        errors = []
        for c in grid:
            p = np.exp(log_probs.astype(np.float64))
            p = softmax(p / c if kind == 'probabilities' else np.log(p) / c, axis=-1)
            right = indices[:, 0] == labels
            index = np.ceil(10 * p[:, 0])
            gaps = [(right - p[:, 0])[index == i].sum() for i in range(1, 11)]
            errors.append(np.abs(gaps).sum())
        found = calibration.fit_temperature(log_probs, indices, labels, kind, grid=grid)
        assert found == grid[np.argmin(errors)]
        assert 0 < np.argmin(errors) < 6

    def test_what_does_not_count_changes_nothing(self, overconfident):
        log_probs, indices, labels = (x[:600] for x in overconfident)
        where = np.arange(600) < 300
        options = {'grid': (1.0, 1.5, 2.0, 2.5)}
        poisoned = np.where(where, labels, (labels + 1) % 6)
        found = calibration.fit_temperature(log_probs, indices, poisoned, where=where, **options)
        kept = calibration.fit_temperature(log_probs[:300], indices[:300], labels[:300], **options)
        assert found == kept

    @pytest.mark.parametrize(
        ('options', 'message'),
        [
            ({'kind': 'smoothing'}, "kind must be 'logits' or 'probabilities', got 'smoothing'"),
            ({'grid': ()}, 'grid is empty'),
            ({'grid': (1.0, 0.0)}, 'grid must be positive'),
            ({'where': np.zeros(3, bool), 'grid': (1.0,)}, 'no label counts'),
        ],
    )
    def test_bad_input_is_refused(self, options, message):
        inputs = LOG_PROBS[:3], np.tile(np.arange(5), (3, 1)), np.zeros(3, int)
        with pytest.raises(ValueError, match=message):
            calibration.fit_temperature(*inputs, **options)


def test_another_kind_of_recalibration_is_refused():
    with pytest.raises(ValueError, match="'probabilities' or 'smoothing', got 'ts'"):
        calibration.recalibrate(LOG_PROBS, 'ts')
