"""Signals to real processes, wherever they are: a checkpoint, one line, a status of their own."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from runs import ROOT, Command, assert_same_run, copy

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def stopped(command: Command, where: str, number: int) -> int:
    """The exit status of a process that gets a signal while it waits, and goes on waiting."""
    command.hold.write_text(where)
    process = command.start()
    command.wait(process, f'waiting in the {where}')
    os.kill(process.pid, number)
    process.join(60)
    command.hold.unlink()
    return process.exitcode


@pytest.mark.parametrize(
    ('number', 'status'), [(signal.SIGTERM, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)]
)
def test_a_signal_during_an_evaluation_saves_first(
    processes, uninterrupted, tmp_path, number, status
):
    command = Command(processes, tmp_path / 'run')
    assert stopped(command, 'probe', number) == status, command.said()
    told = [line for line in command.said().splitlines() if line.startswith('kd:')]
    assert told == ['kd: teacher: stopped at step 60; a checkpoint is written.']
    assert 'Traceback' not in command.said()
    teacher = command.workdir / 'teacher'
    assert (teacher / 'checkpoints' / '60').is_dir()
    lines = (teacher / 'metrics.jsonl').read_text().splitlines()
    assert [json.loads(line)['step'] for line in lines] == [15, 30, 45]
    if number == signal.SIGTERM:
        # What was due at step 60 is done by the process that goes on from there.
        assert command.run() == 0, command.said()
        assert_same_run(uninterrupted, command.workdir)


def test_a_signal_while_the_report_is_made_leaves_it_to_the_next_start(
    processes, uninterrupted, tmp_path
):
    copy(uninterrupted, tmp_path / 'run')
    command = Command(processes, tmp_path / 'run')
    (command.workdir / 'report.md').unlink()
    assert stopped(command, 'report', signal.SIGTERM) == 75, command.said()
    assert 'kd: Stopped by SIGTERM; run the same command to go on.' in command.said()
    assert not (command.workdir / 'report.md').exists()
    assert command.run() == 0, command.said()
    assert_same_run(uninterrupted, command.workdir)


def _caught(process: int) -> bool:
    """Whether a process has a handler for SIGTERM (Linux)."""
    status = Path(f'/proc/{process}/status').read_text()
    [mask] = [line.split()[1] for line in status.splitlines() if line.startswith('SigCgt')]
    return bool(int(mask, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize('when', ['imports', 'config'])
def test_a_signal_before_there_is_anything_to_save(tmp_path, when):
    config = tmp_path / 'waits.py'
    config.write_text(
        'import time\n'
        'def get_config():\n'
        f'    open({str(tmp_path / "read")!r}, "w")\n'
        '    time.sleep(60)\n'
    )
    process = subprocess.Popen(
        [sys.executable, '-m', 'kd.main', f'--config={config}', f'--workdir={tmp_path}/run'],
        cwd=ROOT, env=os.environ | {'JAX_PLATFORMS': 'cpu'}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    ready = (tmp_path / 'read').exists if when == 'config' else lambda: _caught(process.pid)
    while process.poll() is None and not ready():
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 75, said
    assert said == 'kd: stopped by SIGTERM.\n'


def test_output_that_cannot_be_written_does_not_end_a_run(processes, uninterrupted, tmp_path):
    command = Command(processes, tmp_path / 'run')
    copy(uninterrupted, command.workdir)
    for file in ('student/done.json', 'report.md'):
        (command.workdir / file).unlink()
    # A checkpoint in the middle, so that there are steps to tell of.
    for step in (command.workdir / 'student' / 'checkpoints').glob('240*'):
        step.rename(tmp_path / step.name)
    command.log = Path('/dev/full')
    assert command.run() == 0
    assert_same_run(uninterrupted, command.workdir)
