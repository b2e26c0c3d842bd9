"""Runs of two real processes with two devices each, on loopback."""

import contextlib
import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kd import config as kd_config
from kd.errors import Preempted, UserError
from kd.io import safetensors
from kd.main import EXIT_PREEMPTED, EXIT_USER
from kd.parallel import distributed, mesh
from kd.training import loop, watch

ROOT = Path(__file__).parent.parent
RECIPE = 'configs/vision/logit_kd.py:cpu'
STEPS = 30
SHORT = [
    f'--config.{stage}.{field}={value}'
    for stage in ('teacher', 'baseline', 'student')
    for field, value in (('steps', STEPS), ('log_every', 5), ('checkpoint_every', 10))
] + ['--config.report.seeds=1']


def _child(arguments, devices, log):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_num_cpu_devices', devices)
    jax.config.update('jax_compilation_cache_dir', str(ROOT / '.cache' / 'jax-processes'))
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    os.chdir(ROOT)
    from kd.main import main

    sys.exit(main(arguments))


class Run:
    """One command in one or several processes; `said[i]` is what process i printed."""

    def __init__(self, context, workdir: Path, data_dir: Path, *extra: str):
        self.context, self.workdir, self.count = context, workdir, 0
        self.arguments = [f'--config={RECIPE}', f'--workdir={workdir}', f'--data_dir={data_dir}']
        self.arguments += [*SHORT, *extra]

    def start(self, processes: int, devices: int, extra=((), ())) -> list:
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            port = probe.getsockname()[1]
        self.count += 1
        started = []
        for index in range(processes):
            joined = [f'--distributed=127.0.0.1:{port},{processes},{index}', *extra[index]]
            arguments = self.arguments + (joined if processes > 1 else [])
            process = self.context.Process(
                target=_child, args=(arguments, devices, str(self._log(index)))
            )
            process.start()
            started.append(process)
        return started

    def finish(self, processes: int, devices: int, extra=((), ())) -> list[int]:
        started = self.start(processes, devices, extra)
        for process in started:
            process.join(180)
        assert all(p.exitcode is not None for p in started), self.said(0)
        return [process.exitcode for process in started]

    def said(self, index: int) -> str:
        return self._log(index).read_text()

    def lines(self, stage: str) -> list[dict]:
        file = self.workdir / stage / 'metrics.jsonl'
        return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []

    def _log(self, index: int) -> Path:
        return self.workdir.parent / f'{self.workdir.name}-{self.count}-{index}.log'


@pytest.fixture(scope='module')
def context():
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload(['kd.main', 'kd.training.loop', 'kd.reports.classification'])
    return context


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    return tmp_path_factory.mktemp('data')


@pytest.fixture(scope='module')
def single(context, data_dir, tmp_path_factory):
    """The run in one process with four devices."""
    run = Run(context, tmp_path_factory.mktemp('single') / 'run', data_dir)
    assert run.finish(1, 4) == [0], run.said(0)
    return run


def _parameters(workdir: Path, stage: str) -> dict[str, np.ndarray]:
    return safetensors.flatten(safetensors.stage_variables(workdir / stage)['params'])


def _assert_close(first: Run, second: Run) -> None:
    for stage in ('teacher', 'baseline', 'student'):
        a, b = _parameters(first.workdir, stage), _parameters(second.workdir, stage)
        assert a.keys() == b.keys()
        for name in a:
            if name.endswith('conv/bias'):
                # Cancelled by the normalisation that follows: its gradient is rounding noise, which
                # Adam scales up to steps of full size in whatever direction.
                continue
            np.testing.assert_allclose(a[name], b[name], rtol=0, atol=1e-5, err_msg=stage + name)
        for x, y in zip(first.lines(stage), second.lines(stage), strict=True):
            assert x.keys() == y.keys()
            for key in x:
                if not key.startswith('time/'):
                    assert x[key] == pytest.approx(y[key], abs=2e-5), (stage, key)


def test_two_processes_killed_and_resumed_equal_one_process(context, data_dir, single, tmp_path):
    run = Run(context, tmp_path / 'run', data_dir)
    first, second = run.start(2, 2)
    # By step 25 checkpoint 20 is begun, so 10 is whole.
    while first.is_alive() and second.is_alive() and len(run.lines('student')) < 5:
        time.sleep(0.005)
    assert len(run.lines('student')) == 5, run.said(0) + run.said(1)
    os.kill(second.pid, signal.SIGKILL)
    killed = time.monotonic()
    first.join(60)
    # It does not hang, and says what happened.
    assert first.exitcode == distributed.EXIT_LOST, run.said(0)
    assert time.monotonic() - killed < distributed.HEARTBEAT_S + 10
    last = run.said(0).splitlines()[-1]
    assert last.startswith('kd: process 0 of 2 '), run.said(0)
    assert 'died' in last
    assert 'start all processes again' in last

    assert run.finish(2, 2) == [0, 0], run.said(0) + run.said(1)
    assert f'[teacher] done at step {STEPS}' in run.said(0)
    assert re.search(r'\[student\] resuming from step [12]0', run.said(0))
    # One process speaks for all.
    assert '[student]' not in run.said(1)
    _assert_close(run, single)
    ours, theirs = (json.loads((r.workdir / 'report.json').read_text()) for r in (run, single))
    for title, row in ours.items():
        assert row['nll'] == pytest.approx(theirs[title]['nll'], abs=1e-4)
    starts = [json.loads(x) for x in (run.workdir / 'manifest.json').read_text().splitlines()]
    assert [(start['hosts'], start['devices']) for start in starts] == [(2, 4)] * 2


def test_a_run_of_one_process_goes_on_in_two_with_sharded_parameters(
    context, data_dir, single, tmp_path
):
    sharded = ('--config.mesh.fsdp=2', "--config.sharding=(('params|opt_state', 'fsdp'),)")
    run = Run(context, tmp_path / 'run', data_dir)
    [process] = run.start(1, 1)
    while process.is_alive() and len(run.lines('teacher')) < 4:
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == EXIT_PREEMPTED, run.said(0)
    run.arguments += sharded
    first, second = run.start(2, 2)
    while first.is_alive() and second.is_alive() and len(run.lines('baseline')) < 3:
        time.sleep(0.005)
    # Told to one process, obeyed by both at one step.
    os.kill(second.pid, signal.SIGTERM)
    for process in (first, second):
        process.join(60)
    assert [first.exitcode, second.exitcode] == [EXIT_PREEMPTED] * 2, run.said(0) + run.said(1)
    assert '[teacher] resuming from step' in run.said(0)
    stops = {run.said(i).split('stopped at step ')[1].split(';')[0] for i in (0, 1)}
    assert len(stops) == 1
    # And on in one process again.
    run.arguments = [x for x in run.arguments if x not in sharded]
    assert run.finish(1, 4) == [0], run.said(0)
    assert f'resuming from step {stops.pop()}' in run.said(0)
    _assert_close(run, single)


def test_a_stop_that_falls_on_the_last_step_of_a_stage_saves_and_looks_when_resumed(
    monkeypatch, tmp_path
):
    asked = []

    def reached(call):  # As JAX's: yes at one call only.
        asked.append(call)
        return call == 4

    monkeypatch.setattr(distributed.multihost_utils, 'reached_preemption_sync_point', reached)
    config = kd_config.load(RECIPE)
    config.stages = ('teacher',)
    del config['student'], config['baseline']
    config.report = {}
    config.teacher.update(steps=4, log_every=2, checkpoint_every=4, eval_every=0)
    with monkeypatch.context() as patch:
        patch.setattr(watch, 'asking', distributed.preemption)
        with pytest.raises(Preempted, match='teacher: stopped at step 4; a checkpoint is written'):
            loop.run(config, tmp_path / 'run')
    # Before the stage and after each step.
    assert asked == [0, 1, 2, 3, 4]
    log = tmp_path / 'run' / 'teacher' / 'metrics.jsonl'
    assert [json.loads(line)['step'] for line in log.read_text().splitlines()] == [2]
    loop.run(config, tmp_path / 'run')
    last = json.loads(log.read_text().splitlines()[-1])
    assert last['step'] == 4
    assert {'train/loss', 'validation/accuracy'} <= set(last)


def test_probes_of_two_processes_tell_what_those_of_one_do(context, data_dir, tmp_path):
    # Samples and paths of a flow, whose parameters lie in parts in both processes.
    short = [
        '--config=configs/flow/checkerboard.py:cpu,lsd',
        "--config.sharding=(('params|opt_state|ema', 'fsdp'),)",
        '--config.mesh.data=1',
        *(
            f'--config.{stage}.{field}={value}'
            for stage in ('flow', 'map')
            for field, value in (
                ('steps', 2), ('checkpoint_every', 2), ('log_every', 1),
                ('evaluators.samples.samples', 64), ('evaluators.samples.steps', '(1,)'),
                ('evaluators.geometry.samples', 16), ('network.width', 32),
            )
        ),
    ]  # fmt: skip
    runs = {}
    for processes in (1, 2):
        run = Run(context, tmp_path / f'run{processes}', data_dir)
        run.arguments = [*short, f'--workdir={run.workdir}', f'--config.mesh.fsdp={processes}']
        assert run.finish(processes, 1) == [0] * processes, run.said(0)
        runs[processes] = run.lines('map')[-1]
        assert (run.workdir / 'map' / 'figures' / 'samples_samples_2.png').exists()
    probed = [key for key in runs[1] if key.startswith(('samples/', 'geometry/'))]
    assert {'samples/kl_1', 'geometry/semigroup'} <= set(probed)
    for key in probed:
        assert runs[2][key] == pytest.approx(runs[1][key], rel=1e-3, abs=1e-6), key


def test_what_is_wrong_in_one_process_stops_both(context, tmp_path):
    (tmp_path / 'unwritable').write_text('a file')
    run = Run(context, tmp_path / 'run', tmp_path / 'data')
    extra = ((), (f'--data_dir={tmp_path}/unwritable', '--config.data.name=mnist'))
    assert run.finish(2, 2, extra) == [EXIT_USER] * 2, run.said(0) + run.said(1)
    assert 'kd: process 1: ' in run.said(0)
    assert 'mnist' in run.said(0)


def _at_its_own_pace(address, index, error):
    """A process whose part takes long after the other's, which may only be gone together."""
    jax.config.update('jax_platforms', 'cpu')
    distributed.SHUTDOWN_S = 2
    with contextlib.suppress(UserError), distributed.session(f'{address},2,{index}'):
        distributed.agree(lambda: None)
        if index == 0:
            time.sleep(6)
            if error:
                raise UserError('the report cannot be made')


@pytest.mark.parametrize('error', [False, True])
def test_a_process_that_is_done_waits_for_the_report_of_the_first(context, error):
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        address = f'127.0.0.1:{probe.getsockname()[1]}'
    pair = [
        context.Process(target=_at_its_own_pace, args=(address, index, error)) for index in (0, 1)
    ]
    for process in pair:
        process.start()
    for process in pair:
        process.join(60)
    assert [process.exitcode for process in pair] == [0, 0]


class _Device:
    def __init__(self, process_index):
        self.process_index = process_index


def _mesh(layout):
    """A stand-in of a mesh [data, fsdp, tensor] whose devices are named by their process."""
    devices = np.vectorize(_Device, otypes=[object])(np.asarray(layout))
    shape = dict(zip(mesh.AXES, devices.shape, strict=True))
    return type('Mesh', (), {'devices': devices, 'shape': shape})()


@pytest.mark.parametrize(
    ('layout', 'process', 'part'),
    [
        ([[[0], [0], [1], [1]]], 1, (1, 2)),
        ([[[0], [1], [0], [1]]], 1, (1, 2)),
        # The four processes of one tensor group all read the same examples.
        ([[[0, 1], [0, 1]], [[2, 3], [2, 3]]], 3, (1, 2)),
        ([[[0, 1, 2, 3]]], 2, (0, 1)),
    ],
)
def test_processes_that_share_examples_read_the_same_part(layout, process, part, monkeypatch):
    monkeypatch.setattr(jax, 'process_index', lambda: process)
    assert mesh.batch_part(_mesh(layout)) == part


def test_processes_with_overlapping_parts_are_refused():
    with pytest.raises(UserError, match='unequal or overlapping parts'):
        mesh.batch_part(_mesh([[[0, 0], [0, 1], [1, 1]]]))


@pytest.mark.parametrize('spec', ['yes', '10.0.0.1,2,0', 'host:1,2'])
def test_an_unreadable_way_to_join_is_one_clear_line(spec):
    with pytest.raises(UserError, match='HOST:PORT,COUNT,INDEX'), distributed.session(spec):
        pass


def test_without_being_asked_nothing_is_joined(monkeypatch):
    monkeypatch.delenv(distributed.ENVIRONMENT, raising=False)
    monkeypatch.setattr(jax.distributed, 'initialize', lambda **_: pytest.fail('joined'))
    with distributed.session():
        assert distributed.is_first()
    assert distributed.from_first(lambda: {'a': 1}) == {'a': 1}


def test_a_config_that_asks_for_the_devices_finds_those_of_all_processes(context, tmp_path):
    mine = tmp_path / 'mine.py'
    mine.write_text(
        'import jax\n'
        'from kd import config\n'
        'def get_config():\n'
        f"    made = config.load('{RECIPE}')\n"
        '    made.teacher.batch_size = jax.device_count()\n'
        '    return made\n'
    )
    run = Run(context, tmp_path / 'run', tmp_path / 'data', '--config.teacher.optimizer.lrr=1')
    run.arguments[0] = f'--config={mine}'
    # It is read, and what is wrong with the rest is told; the processes had come together.
    assert run.finish(2, 2) == [EXIT_USER] * 2, run.said(0)
    assert "no field 'teacher.optimizer.lrr'" in run.said(0)


def test_jax_that_was_used_before_the_processes_join_is_one_clear_line():
    jax.devices()
    with (
        pytest.raises(UserError, match='JAX was used before the processes joined'),
        distributed.session('127.0.0.1:1,2,0'),
    ):
        pass
