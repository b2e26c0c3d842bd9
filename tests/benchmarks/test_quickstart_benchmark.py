"""The quickstart written plainly measures what ours measures, and both sides run as commands."""

import argparse
import json

import jax
import numpy as np
import pytest
from sklearn import metrics

from kd.benchmarks import guard, imports, quickstart, turns
from kd.benchmarks.plain import quickstart as plain
from kd.errors import UserError
from kd.losses import calibration

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def test_plain_scores_are_those_of_sklearn_and_the_calibration_error_ours():
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(200, 10)).astype('f4') * 2, rng.integers(0, 10, 200)
    found = jax.device_get(plain.scores(logits, labels))
    p = np.asarray(jax.nn.softmax(logits))
    assert found['nll'] == pytest.approx(metrics.log_loss(labels, p), rel=1e-4)
    assert found['accuracy'] == pytest.approx(metrics.accuracy_score(labels, p.argmax(-1)))
    assert found['brier'] == pytest.approx(((p - np.eye(10)[labels]) ** 2).sum(-1).mean(), rel=1e-5)
    bins = calibration.confidence_bins(logits, labels)
    assert found['ece'] == pytest.approx(calibration.expected_calibration_error(bins), abs=1e-6)
    assert found['counts'].sum() == 200


def test_plain_crops_move_an_image_by_up_to_a_pixel():
    image = np.zeros((1, 5, 5, 1), 'f4')
    image[0, 2, 2] = 1
    images = np.repeat(image, 64, 0)
    moved = np.asarray(plain.crop(jax.random.key(0), images))
    places = {tuple(np.argwhere(each[..., 0] == 1)[0]) for each in moved}
    assert places == {(i, j) for i in (1, 2, 3) for j in (1, 2, 3)}


def test_plain_training_lowers_the_loss_and_writes_curve_and_network(tmp_path):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 80).astype('i4')
    x = (np.eye(64)[y] + 0.1 * rng.normal(size=(80, 64))).reshape(80, 8, 8, 1).astype('f4')
    train = plain.Trainer(plain.MLP(), 200)
    file = tmp_path / 'student'
    _, curve = train(0, x, y, (x, y), file)
    assert [each['step'] for each in curve] == [100, 200]
    assert curve[1]['loss'] < curve[0]['loss']
    assert curve[1]['accuracy'] == 1
    assert json.loads(file.with_suffix('.json').read_text()) == curve
    assert file.stat().st_size > 4 * (64 * 64 + 640)


def test_both_sides_run_in_turn_and_the_first_turn_does_not_count(monkeypatch):
    asked, seconds = [], iter([50, 90, 6, 3, 8, 2])

    def run(command, environment=None):
        asked.append(command)
        return next(seconds)

    monkeypatch.setattr(turns, 'process_seconds', run)
    [row] = quickstart.rows(argparse.Namespace(rounds=2))
    assert row.ratios == [2, 4]
    assert [each[2] for each in asked] == ['kd.main', 'kd.benchmarks.plain.quickstart'] * 3
    assert len({each[-1] for each in asked}) == 6  # a new directory each
    seconds = iter([1, 1, 3, 2])
    [row] = imports.rows(argparse.Namespace(rounds=1))
    assert row.ratios == [1.5]
    assert [each[-1] for each in asked[-2:]] == ['import kd.losses', 'import optax']


def test_a_command_that_fails_is_one_line():
    command = ['python', '-c', 'raise ValueError("no such thing")']
    with pytest.raises(UserError, match=r'python -c .*: ValueError: no such thing$'):
        turns.process_seconds(command)
    # Of a child that computes, and not of one that waits.
    assert turns.process_seconds(['sleep', '0.2']) < 0.1


def test_the_guarded_step_is_the_plain_one():
    made = guard.steps(8, 4)
    for step in made.values():
        step()
        step()
    states = [made[name]._state for name in ('guarded', 'plain')]
    leaves = zip(*(jax.tree.leaves(state.params) for state in states), strict=True)
    for a, b in leaves:
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
    assert int(states[0].step) == int(states[1].step) == 2
    assert made['guarded'].temporaries > 0
