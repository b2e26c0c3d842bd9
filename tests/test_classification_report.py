"""The numbers of the report on classifiers, against scikit-learn and NumPy."""

import numpy as np
import pytest
from scipy.special import log_softmax
from sklearn import metrics

from kd.losses.calibration import confidence_bins, expected_calibration_error
from kd.reports import classification


def test_scores_of_a_network_and_against_its_teacher():
    rng = np.random.default_rng(0)
    logits, reference = (rng.normal(size=(50, 6)).astype('f4') for _ in range(2))
    labels = rng.integers(0, 6, 50)
    found = classification._scores(logits, labels, reference)
    log_p, log_q = (log_softmax(x.astype('f8'), -1) for x in (logits, reference))
    p = np.exp(log_p)
    bins = confidence_bins(logits, labels)
    assert found == pytest.approx(
        {
            'accuracy': metrics.accuracy_score(labels, logits.argmax(-1)),
            'nll': metrics.log_loss(labels, p, labels=range(6)),
            'brier': ((p - np.eye(6)[labels]) ** 2).sum(-1).mean(),
            'ece': expected_calibration_error(bins),
            'agreement': (logits.argmax(-1) == reference.argmax(-1)).mean(),
            'kl': (np.exp(log_q) * (log_q - log_p)).sum(-1).mean(),
        },
        rel=1e-4,
    )
    assert 'kl' not in classification._scores(logits, labels, None)
