"""Agreement of student and teacher against SciPy in float64."""

import dataclasses

import jax
import numpy as np
import pytest
from scipy.special import rel_entr, softmax
from scipy.stats import entropy as scipy_entropy

from kd.errors import UserError
from kd.evaluators.agreement import agreement, top_1_agreement

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def test_agreement_is_the_share_of_equal_predictions():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 200, 5)).astype(np.float32)
    found = top_1_agreement(student, teacher)
    np.testing.assert_array_equal(found, student.argmax(-1) == teacher.argmax(-1))
    assert 0.1 < found.mean() < 0.3  # One in five, as they are independent.


def expected_values(student, teacher, labels):
    q, p = softmax(student, axis=-1), softmax(teacher, axis=-1)
    return {
        'top_1': pytest.approx(np.mean(q.argmax(-1) == p.argmax(-1)), abs=1e-7),
        'kl': pytest.approx(rel_entr(p, q).sum(-1).mean(), rel=1e-5),
        'student_entropy': pytest.approx(scipy_entropy(q, axis=-1).mean(), rel=1e-5),
        'teacher_entropy': pytest.approx(scipy_entropy(p, axis=-1).mean(), rel=1e-5),
        'teacher_nll': pytest.approx(-np.log(p[np.arange(len(p)), labels]).mean(), rel=1e-5),
    }


@pytest.mark.parametrize('weights', ['final', 'slow'])
def test_the_evaluator_merges_batches_and_leaves_padding_out(context, evaluate, examples, weights):
    _, labels, logits = examples
    evaluator = agreement(context, weights=weights)
    found = evaluate(evaluator)
    assert found == expected_values(logits[weights], logits['teacher'], labels)
    assert evaluate(evaluator, batch_size=21) == pytest.approx(found, rel=1e-5)


def test_a_student_with_the_teachers_weights_agrees_in_everything(context, state, examples):
    x, labels, _ = examples
    twin = state.with_params(state.frozen['teacher']['params'])
    evaluator = agreement(context)
    batch = {'input': x, 'label': labels, 'mask': np.ones(21, bool)}
    found = evaluator.finish(jax.device_get(evaluator.update(twin, batch)))
    assert (found['top_1'], found['kl']) == (1.0, pytest.approx(0.0, abs=1e-7))
    assert found['student_entropy'] == found['teacher_entropy']


def test_a_stage_without_a_teacher_is_refused(context):
    with pytest.raises(UserError, match=r'needs student\.teacher'):
        agreement(dataclasses.replace(context, optional_teacher=None))
