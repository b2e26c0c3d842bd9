"""The fitted temperature and the errors around it, against NumPy in float64."""

import numpy as np
import pytest
from scipy.special import softmax

from kd.evaluators.temperature import temperature
from kd.losses.calibration import GRIDS

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SIZE, BINS = 3, 4


def error_by_hand(confidence, right):
    inside = np.ceil(confidence * BINS)
    gaps = [(right - confidence)[inside == i].sum() for i in range(1, BINS + 1)]
    return np.abs(gaps).sum() / len(right)


@pytest.mark.parametrize(
    ('of', 'kind'), [('teacher', 'logits'), ('network', 'logits'), ('teacher', 'probabilities')]
)
def test_the_evaluator_is_as_by_hand(context, evaluate, examples, of, kind):
    _, labels, logits = examples
    p = softmax(logits['final' if of == 'network' else of], axis=-1)
    right = p.argmax(-1) == labels
    kept = -np.sort(-p, axis=-1)[:, :SIZE]
    errors = []
    for c in GRIDS[kind]:
        tempered = softmax(np.log(kept) / c if kind == 'logits' else kept / c, axis=-1)
        errors.append(error_by_hand(tempered[:, 0], right))
    found = evaluate(temperature(context, of=of, size=SIZE, kind=kind, bins=BINS))
    assert found == {
        'accuracy': pytest.approx(right.mean()),
        'kept': pytest.approx(kept.sum(-1).mean(), rel=1e-5),
        'ece': pytest.approx(error_by_hand(p.max(-1), right), rel=1e-4),
        'temperature': GRIDS[kind][np.argmin(errors)],
        'recalibrated': pytest.approx(min(errors), rel=1e-4),
    }
