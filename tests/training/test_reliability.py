"""Runs that are killed, stopped, corrupted and poisoned, for real and in processes of their own."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from kd.io import checkpoints
from kd.main import EXIT_NONFINITE, EXIT_PREEMPTED, EXIT_USER

RECIPES = Path(__file__).parents[1] / 'recipes'
CONFIG = str(RECIPES / 'moons.py')


@pytest.fixture(scope='module')
def processes():
    """Starts `kd.main` in fresh processes whose imports were paid for once."""
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(
        ['kd.main', 'kd.training.loop', 'kd.reports.classification', 'clu.metric_writers']
    )
    sys.path.insert(0, str(RECIPES))
    yield context
    sys.path.remove(str(RECIPES))


def _child(arguments, cache, log):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    from kd.main import main

    sys.exit(main(arguments))


class Command:
    """One `kd.main` command that can be started over and over."""

    def __init__(self, context, workdir: Path, argument: str = 'plain', extra=()):
        self.context, self.workdir = context, workdir
        self.arguments = [f'--config={CONFIG}:{argument}', f'--workdir={workdir}', *extra]
        self.log = workdir.parent / f'{workdir.name}.log'
        self.cache = str(Path(__file__).parents[2] / '.cache' / 'jax-processes')

    def start(self):
        arguments = (self.arguments, self.cache, str(self.log))
        process = self.context.Process(target=_child, args=arguments)
        process.start()
        return process

    def run(self) -> int:
        process = self.start()
        process.join(120)
        assert process.exitcode is not None, self.said()
        return process.exitcode

    def said(self) -> str:
        return self.log.read_text()

    def lines(self) -> int:
        """Log lines written by all stages so far."""
        return sum(len(f.read_text().splitlines()) for f in self.workdir.glob('*/metrics.jsonl'))


@pytest.fixture(scope='module')
def uninterrupted(processes, tmp_path_factory):
    command = Command(processes, tmp_path_factory.mktemp('whole') / 'run')
    assert command.run() == 0, command.said()
    return command.workdir


def _copy(source: Path, target: Path) -> None:
    """Copies a run without its lock."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns('.lock'))


def _arrays(workdir: Path, stage: str, item: str) -> dict[str, np.ndarray]:
    """All arrays of the last checkpoint, read without kd."""
    step = max(int(p.name) for p in (workdir / stage / 'checkpoints').iterdir() if p.name.isdigit())
    with warnings.catch_warnings(), ocp.PyTreeCheckpointer() as checkpointer:
        warnings.simplefilter('ignore')  # Reading without being told a sharding is meant.
        tree = checkpointer.restore(workdir / stage / 'checkpoints' / str(step) / item)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path): np.asarray(
            jax.random.key_data(leaf)
            if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            else leaf
        )
        for path, leaf in leaves
    }


def _metrics(workdir: Path, stage: str) -> list[dict]:
    lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith('time/')}
        for line in lines
    ]


def _assert_same_run(first: Path, second: Path) -> None:
    for stage in ('teacher', 'student'):
        assert _metrics(first, stage) == _metrics(second, stage)
        for item in ('variables', 'training'):
            a, b = _arrays(first, stage, item), _arrays(second, stage, item)
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], err_msg=f'{stage} {item} {name}')
    first_report, second_report = (
        json.loads((p / 'report.json').read_text()) for p in (first, second)
    )
    for title, row in first_report.items():
        row.pop('steps_per_s')
        second_report[title].pop('steps_per_s')
    assert first_report == second_report


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
    _assert_same_run(uninterrupted, command.workdir)


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
    _assert_same_run(uninterrupted, command.workdir)


def test_a_finished_run_says_so_at_once(processes, uninterrupted, tmp_path):
    _copy(uninterrupted, tmp_path / 'run')
    before = _metrics(uninterrupted, 'student')
    command = Command(processes, tmp_path / 'run')
    assert command.run() == 0
    assert command.said().count('done at step 240') == 2
    assert _metrics(command.workdir, 'student') == before


@pytest.mark.parametrize('damage', ['truncate', 'delete'])
def test_an_unreadable_newest_checkpoint_falls_back_to_the_one_before(
    processes, uninterrupted, tmp_path, damage
):
    _copy(uninterrupted, tmp_path / 'run')
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
    _assert_same_run(uninterrupted, command.workdir)


def test_a_done_stage_without_its_checkpoint_is_an_error(processes, uninterrupted, tmp_path):
    _copy(uninterrupted, tmp_path / 'run')
    command = Command(processes, tmp_path / 'run')
    done = checkpoints.read_done(command.workdir / 'teacher')
    shutil.rmtree(command.workdir / 'teacher' / 'checkpoints' / str(done['step']))
    metrics = _metrics(command.workdir, 'teacher')
    assert command.run() == EXIT_USER
    assert f'marked as done but checkpoint {done["step"]} is missing' in command.said()
    assert _metrics(command.workdir, 'teacher') == metrics


def test_a_nonfinite_loss_stops_with_the_last_good_state_and_the_batch(
    processes, uninterrupted, tmp_path
):
    command = Command(processes, tmp_path / 'run', argument='poison=100')
    assert command.run() == EXIT_NONFINITE
    student = command.workdir / 'student'
    assert 'non-finite at step 100' in command.said()
    saved = _arrays(command.workdir, 'student', 'variables')
    assert all(np.isfinite(x).all() for x in saved.values())
    assert int(_arrays(command.workdir, 'student', 'training')["['step']"]) == 100
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
    counted = [line['train/nonfinite'] for line in _metrics(command.workdir, 'student')]
    assert sum(counted) * 15 == pytest.approx(1.0)
    assert all(
        np.isfinite(x).all() for x in _arrays(command.workdir, 'student', 'variables').values()
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
