"""A finished run once more: loaded, evaluated again, and beside others."""

import dataclasses
import json

import numpy as np
import pytest

import kd
from kd import compare, evaluate, loading
from kd.data.sources import DataSet, Source, example_spec, in_memory
from kd.data.transforms.mapped import MappedSource
from kd.errors import UserError
from kd.io import finished
from kd.process import entry


def started(module, *arguments):
    """The exit status of a command."""
    return entry(lambda: module.main([str(x) for x in arguments]))


def test_a_loaded_network_says_what_the_evaluator_measured(uninterrupted):
    model = kd.load(uninterrupted / 'student')
    assert model.splits[0] == 'train'
    source = model.source('validation')
    batch = source.fetch(np.arange(len(source)))
    logits = np.asarray(model(batch['input']), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    measured = finished.read_done(uninterrupted / 'student')['metrics']
    right = (logits.argmax(1) == batch['label']).mean()
    assert right == pytest.approx(measured['validation/accuracy'], abs=1e-6)
    nll = -log_probs[np.arange(len(logits)), batch['label']].mean()
    assert nll == pytest.approx(measured['validation/nll'], rel=1e-4)


def test_images_come_to_a_loaded_network_as_its_data_do(uninterrupted):
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 1), dtype=np.uint8)
    raw = {'input': images.astype(np.float32) / 127.5 - 1}
    spec = example_spec((4, 4, 1), labelled=False)
    data = DataSet('images', {'all': 5}, lambda split: in_memory(raw), spec, None)
    halved = MappedSource(Source(data, 'all'), lambda x: x[:, ::2, ::2] * 0.5, (2, 2, 1))
    model = loading.untrained(uninterrupted / 'student')
    model = dataclasses.replace(model, source=lambda split: halved)
    expected = halved.fetch(np.arange(5))['input']
    np.testing.assert_allclose(model.inputs(images), expected, atol=1e-6)
    np.testing.assert_allclose(model.inputs(raw['input']), expected, atol=1e-6)
    with pytest.raises(ValueError, match='takes'):
        model.inputs(images[:, :2])
    with pytest.raises(ValueError, match='int64'):
        model.inputs(images.astype(np.int64))


def test_a_stage_that_is_evaluated_again_has_the_same_numbers(uninterrupted, tmp_path, capsys):
    before = {file: file.stat().st_mtime_ns for file in uninterrupted.rglob('*')}
    table = tmp_path / 'found.json'
    command = (f'--run={uninterrupted}/student', f'--json={table}', f'--out={tmp_path}/out')
    assert started(evaluate, *command) == 0
    found = json.loads(table.read_text())
    measured = finished.read_done(uninterrupted / 'student')['metrics']
    assert found == {name: pytest.approx(measured[name], rel=1e-5) for name in found}
    assert {'validation/accuracy', 'validation/nll'} <= set(found)
    said = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert float(said['validation/nll']) == pytest.approx(measured['validation/nll'], rel=1e-4)
    # The run is as it was.
    assert before == {file: file.stat().st_mtime_ns for file in uninterrupted.rglob('*')}


def test_a_stage_is_evaluated_on_another_split(uninterrupted, tmp_path):
    found = evaluate.evaluate(
        uninterrupted / 'student', tmp_path, split='test', evaluators=['validation']
    )
    model = kd.load(uninterrupted / 'student')
    batch = model.source('test').fetch(np.arange(len(model.source('test'))))
    right = (np.asarray(model(batch['input'])).argmax(1) == batch['label']).mean()
    assert found['validation/accuracy'] == pytest.approx(right, abs=1e-6)
    assert all(name.startswith('validation/') for name in found)


def test_what_cannot_be_loaded_or_evaluated_is_said(uninterrupted, tmp_path, capfd):
    with pytest.raises(UserError, match='not the directory of a finished stage'):
        kd.load(uninterrupted)
    with pytest.raises(UserError, match="no weights 'slow'"):
        kd.load(uninterrupted / 'student', 'slow')
    student = f'--run={uninterrupted}/student'
    for arguments, said in (
        ([student, '--split=tests'], "no split 'tests'"),
        ([student, '--evaluators=validations'], "Did you mean 'validation'"),
        ([f'--run={tmp_path}'], 'not the directory of a finished stage'),
    ):
        assert started(evaluate, *arguments) == 2
        assert said in capfd.readouterr().err


def _run(directory, *, seed, lr, nll, done=True):
    """A work directory of one stage as the loop leaves it."""
    stage = directory / 'student'
    stage.mkdir(parents=True)
    block = dict(method=dict(name='x'), network=dict(name='y'), optimizer=dict(lr=lr), steps=2)
    (directory / 'config.json').write_text(json.dumps(dict(seed=seed, student=block)))
    lines = [{'step': i + 1, 'train/loss': 1.0, 'validation/nll': x} for i, x in enumerate(nll)]
    (stage / 'metrics.jsonl').write_text(''.join(json.dumps(line) + '\n' for line in lines))
    if done:
        record = dict(step=2, metrics={'validation/nll': nll[-1]})
        (stage / 'done.json').write_text(json.dumps(record))
    return directory


def test_runs_are_compared_by_what_differs_with_seeds_together(tmp_path, capsys):
    values = (0.5, 0.7, 0.9)
    runs = [
        _run(tmp_path / f's{seed}', seed=seed, lr=0.1, nll=[1.0, x])
        for seed, x in enumerate(values)
    ]
    runs.append(_run(tmp_path / 'other', seed=0, lr=0.2, nll=[0.4], done=False))
    assert started(compare, *runs, f'--out={tmp_path}/out') == 0
    said = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip('|').split('|')] for line in said]
    assert cells[0] == ['run', 'student.optimizer.lr', 'step', 'validation/nll']
    error = np.std(values, ddof=1) / np.sqrt(3)
    assert cells[2] == ['s0 and 2 more seeds', '0.1', '2', f'0.7 ± {error:.2g}']
    assert cells[3] == ['other', '0.2', '1, not finished', '0.4']
    assert (tmp_path / 'out' / 'compare.png').stat().st_size > 5_000
    records = json.loads((tmp_path / 'out' / 'compare.json').read_text())
    assert [record['metrics']['validation/nll'] for record in records] == [*values, 0.4]
    assert said[0] in (tmp_path / 'out' / 'compare.md').read_text()


def test_a_finished_run_is_compared_with_itself(uninterrupted, capsys):
    assert started(compare, uninterrupted, '--stage=student', '--metrics=validation/accuracy') == 0
    *_, last = capsys.readouterr().out.splitlines()
    measured = finished.read_done(uninterrupted / 'student')['metrics']['validation/accuracy']
    assert float(last.strip('|').split('|')[-1]) == pytest.approx(measured, rel=1e-3)


def test_what_cannot_be_compared_is_said(uninterrupted, tmp_path, capfd):
    for arguments, said in (
        ([tmp_path], 'no work directory'),
        ([uninterrupted, '--stage=pupil'], "No run has a stage 'pupil'"),
        ([uninterrupted, '--metrics=validation/accurac'], "Did you mean 'validation/accuracy'"),
    ):
        assert started(compare, *arguments) == 2
        assert said in capfd.readouterr().err
