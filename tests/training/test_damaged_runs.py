"""Runs whose files are lost or damaged: made again where they can be, told by name where not."""

import json
import warnings

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import CONFIG, RECIPES, Command, assert_same_run, copy, metrics

from kd.main import EXIT_USER, main


def test_a_log_that_is_lost_with_the_last_checkpoint_there_gets_its_last_line_again(
    processes, uninterrupted, tmp_path
):
    copy(uninterrupted, tmp_path / 'run')
    command = Command(processes, tmp_path / 'run')
    student = command.workdir / 'student'
    (student / 'metrics.jsonl').unlink()
    (student / 'done.json').unlink()
    assert command.run() == 0, command.said()
    assert 'resuming from step 240' in command.said()
    # The window of the checkpoint is that of its last steps.
    assert metrics(command.workdir, 'student') == metrics(uninterrupted, 'student')[-1:]
    done = json.loads((student / 'done.json').read_text())
    assert done['steps_per_s'] is None
    before = json.loads((uninterrupted / 'student' / 'done.json').read_text())
    assert done['metrics'] == before['metrics']
    assert done['weights'] == before['weights']
    (student / 'metrics.jsonl').write_text(
        (uninterrupted / 'student' / 'metrics.jsonl').read_text()
    )
    assert_same_run(uninterrupted, command.workdir)


@pytest.fixture
def run(uninterrupted, tmp_path, monkeypatch):
    """A copy of the run, and the command in this process: what it says in one line."""
    copy(uninterrupted, tmp_path / 'run')
    monkeypatch.syspath_prepend(str(RECIPES))
    return tmp_path / 'run'


def told(workdir, capsys, *extra, config='plain'):
    assert main([f'--config={CONFIG}:{config}', f'--workdir={workdir}', *extra]) == EXIT_USER
    lines = [x for x in capsys.readouterr().err.splitlines() if not x.startswith('[')]
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize('content', ['', '{"step": 24', '[]', '{}'])
@pytest.mark.parametrize('name', ['teacher/done.json', 'config.json'])
def test_damaged_json_is_told_by_its_name(run, capsys, name, content):
    if (name, content) == ('config.json', '{}'):
        pytest.skip('a config without a stage is another config')
    (run / name).write_text(content)
    line = told(run, capsys)
    assert line.startswith(f'kd: {run / name} is damaged: ')
    assert 'delete' in line


def test_what_the_message_about_a_marker_says_helps(processes, uninterrupted, tmp_path):
    copy(uninterrupted, tmp_path / 'run')
    command = Command(processes, tmp_path / 'run')
    marker = command.workdir / 'teacher' / 'done.json'
    marker.write_text('')
    assert command.run() == EXIT_USER
    marker.unlink()
    assert command.run() == 0, command.said()
    assert_same_run(uninterrupted, command.workdir)


@pytest.mark.parametrize('line', ['', 'x', '{"step": 3', '{"loss": 1}', '[1]', '\0\0\0'])
def test_a_damaged_line_of_the_log_is_told_by_its_number(run, capsys, line):
    log = run / 'student' / 'metrics.jsonl'
    lines = log.read_text().splitlines()
    log.write_text('\n'.join([*lines[:2], line, *lines[3:], '']))
    (run / 'student' / 'done.json').unlink()
    assert told(run, capsys) == (
        f'kd: {log} is damaged: line 3 is not the JSON that was written; delete the line.'
    )


def of_another_run(run):
    return ('--stages=student', '--config.report=', f'--config.student.teacher={run}/teacher')


@pytest.mark.parametrize('name', ['teacher/done.json', 'config.json'])
def test_damaged_json_of_a_teacher_of_another_run_is_told_by_its_name(run, tmp_path, capsys, name):
    (run / name).write_text('')
    line = told(tmp_path / 'new', capsys, *of_another_run(run))
    assert line.startswith(f'kd: {run / name} is damaged: ')


@pytest.mark.parametrize('damage', ['bit', 'missing'])
def test_damaged_weights_of_a_teacher_of_another_run_are_told(
    processes, uninterrupted, tmp_path, damage
):
    copy(uninterrupted, tmp_path / 'old')
    checkpoint = tmp_path / 'old' / 'teacher' / 'checkpoints' / '240'
    if damage == 'bit':
        # Whole files, in which one bit of one parameter is another.
        with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
            warnings.simplefilter('ignore')
            tree = checkpointer.restore(checkpoint / 'variables')
            leaves, structure = jax.tree.flatten(tree)
            leaves = [np.array(leaf) for leaf in leaves]
            leaves[-1].view(np.uint32).flat[0] ^= 1
            tree = jax.tree.unflatten(structure, leaves)
            checkpointer.save(checkpoint / 'variables', tree, force=True)
        (checkpoint / 'checksums.json').unlink()
    else:
        for file in (checkpoint / 'variables').rglob('d/*'):
            file.unlink()
    command = Command(processes, tmp_path / 'new', extra=of_another_run(tmp_path / 'old'))
    assert command.run() == EXIT_USER
    [line] = [x for x in command.said().splitlines() if not x.startswith('[')]
    assert line.startswith('kd: student.teacher: ')
    assert str(checkpoint) in line
    assert ('is not what the stage ended with' if damage == 'bit' else 'is missing') in line


def test_a_file_in_the_way_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(RECIPES))
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run' / 'teacher').write_text('')
    assert told(tmp_path / 'run', capsys) == (
        f"kd: {tmp_path}/run/teacher is a file, and stage 'teacher' needs a folder there; move it "
        'away.'
    )
