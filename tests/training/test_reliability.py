"""Runs that are killed, stopped, corrupted and poisoned, for real and in processes of their own."""

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from runs import Command, arrays, assert_same_run, copy, metrics

from kd.io import finished
from kd.io.manifest import commit
from kd.main import EXIT_NONFINITE, EXIT_PREEMPTED, EXIT_USER


def test_a_run_killed_at_random_moments_ends_bit_identical(processes, uninterrupted, tmp_path):
    command = Command(processes, tmp_path / 'run')
    rng, kills = random.Random(0), 0
    total = Command(processes, uninterrupted).lines()
    while kills < 6:
        process = command.start()
        # Somewhere within the next part of the run, also between two lines of the log.
        target = command.lines() + rng.randint(1, max(2, total // 6))
        while process.is_alive() and command.lines() < target:
            time.sleep(0.002)
        time.sleep(rng.uniform(0.0, 0.05))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 5
    assert command.run() == 0, command.said()
    assert command.said().count('resuming from step') >= 2
    assert_same_run(uninterrupted, command.workdir)


def test_sigterm_saves_and_exits_with_its_own_status(processes, uninterrupted, tmp_path):
    command = Command(processes, tmp_path / 'run')
    process = command.start()
    while process.is_alive() and command.lines() < 3:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == EXIT_PREEMPTED
    stopped = int(command.said().split('stopped at step ')[1].split(';')[0])
    assert (command.workdir / 'teacher' / 'checkpoints' / str(stopped)).is_dir()
    assert command.run() == 0
    assert f'resuming from step {stopped}' in command.said()
    assert_same_run(uninterrupted, command.workdir)


def test_a_finished_run_says_so_at_once(processes, uninterrupted, tmp_path):
    copy(uninterrupted, tmp_path / 'run')
    before = metrics(uninterrupted, 'student')
    command = Command(processes, tmp_path / 'run')
    report = command.workdir / 'report.md'
    report.write_text('as it was')
    assert command.run() == 0
    assert command.said().count('done at step 240') == 2
    assert metrics(command.workdir, 'student') == before
    assert f'[report] is there; delete {report}' in command.said()
    assert report.read_text() == 'as it was'
    # Both starts are told of, with what their numbers depend on.
    lines = (command.workdir / 'manifest.json').read_text().splitlines()
    assert [json.loads(line)['commit'] for line in lines] == [commit()] * 2
    report.unlink()
    assert command.run() == 0
    assert report.read_text() == (uninterrupted / 'report.md').read_text()


def test_a_checkpoint_that_finds_no_room_is_one_line_and_loses_nothing(
    processes, uninterrupted, tmp_path
):
    copy(uninterrupted, tmp_path / 'run')
    command = Command(processes, tmp_path / 'run')
    student = command.workdir / 'student'
    for file in (student / 'done.json', command.workdir / 'report.md'):
        file.unlink()
    shutil.rmtree(student / 'checkpoints' / '240')
    # Less than the description of the optimiser's state has.
    command.room = 6000
    assert command.run() == EXIT_USER, command.said()
    [line] = [x for x in command.said().splitlines() if not x.startswith('[')]
    assert line == (
        f'kd: {student}: checkpoint 240 cannot be written (File too large). Those before it stand: '
        'put this right, and run the same command to go on from the last.'
    )
    assert [x.name for x in (student / 'checkpoints').iterdir() if x.name.isdigit()] == ['220']
    command.room = 0
    assert command.run() == 0, command.said()
    assert_same_run(uninterrupted, command.workdir)


@pytest.mark.parametrize('damage', ['truncate', 'delete'])
def test_an_unreadable_newest_checkpoint_falls_back_to_the_one_before(
    processes, uninterrupted, tmp_path, damage
):
    copy(uninterrupted, tmp_path / 'run')
    command = Command(processes, tmp_path / 'run')
    student = command.workdir / 'student'
    (student / 'done.json').unlink()
    steps = sorted(int(p.name) for p in (student / 'checkpoints').iterdir() if p.name.isdigit())
    newest = student / 'checkpoints' / str(steps[-1])
    for file in (newest / 'training').rglob('d/*'):
        if damage == 'truncate':
            os.truncate(file, file.stat().st_size // 2)
        else:
            file.unlink()
    assert command.run() == 0, command.said()
    assert f'Checkpoint {steps[-1]} is damaged' in command.said()
    assert f'resuming from step {steps[-2]}' in command.said()
    assert (student / 'broken_checkpoints' / str(steps[-1])).is_dir()
    assert_same_run(uninterrupted, command.workdir)


def test_a_done_stage_without_its_checkpoint_is_an_error(processes, uninterrupted, tmp_path):
    copy(uninterrupted, tmp_path / 'run')
    command = Command(processes, tmp_path / 'run')
    done = finished.read_done(command.workdir / 'teacher')
    shutil.rmtree(command.workdir / 'teacher' / 'checkpoints' / str(done['step']))
    before = metrics(command.workdir, 'teacher')
    assert command.run() == EXIT_USER
    assert f'marked as done but checkpoint {done["step"]} is missing' in command.said()
    assert metrics(command.workdir, 'teacher') == before


def test_a_nonfinite_loss_stops_with_the_last_good_state_and_the_batch(
    processes, uninterrupted, tmp_path
):
    command = Command(processes, tmp_path / 'run', argument='poison=100')
    assert command.run() == EXIT_NONFINITE
    student = command.workdir / 'student'
    assert 'non-finite at step 100' in command.said()
    saved = arrays(command.workdir, 'student', 'variables')
    assert all(np.isfinite(x).all() for x in saved.values())
    assert int(arrays(command.workdir, 'student', 'training')["['step']"]) == 100
    # The batch is the one that step 100 of an undisturbed run reads.
    batch = np.load(student / 'nonfinite_100' / 'batch.npz')
    from kd.data import catalogue, pipeline

    iterator = pipeline.train_iterator(catalogue.load('two_moons', 'train'), 64, seed=0)
    for _ in range(101):
        expected = next(iterator)
    np.testing.assert_array_equal(batch['index'], expected['index'])
    np.testing.assert_array_equal(batch['input'], expected['input'])
    # It stops again at the same place, and goes on where told to leave the update out.
    assert command.run() == EXIT_NONFINITE
    skipping = Command(
        processes, command.workdir, argument='poison=100', extra=['--config.on_nonfinite=skip']
    )
    assert skipping.run() == 0, skipping.said()
    counted = [line['train/nonfinite'] for line in metrics(command.workdir, 'student')]
    assert sum(counted) * 15 == pytest.approx(1.0)
    assert all(
        np.isfinite(x).all() for x in arrays(command.workdir, 'student', 'variables').values()
    )


def test_two_runs_in_one_workdir_are_refused(processes, tmp_path):
    command = Command(processes, tmp_path / 'run')
    first = command.start()
    while first.is_alive() and command.lines() < 2:
        time.sleep(0.002)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        second = Command(processes, command.workdir)
        second.log = tmp_path / 'second.log'
        assert second.run() == EXIT_USER
        assert f'in use by process {first.pid}' in second.said()
    finally:
        os.kill(first.pid, signal.SIGKILL)
        first.join()
