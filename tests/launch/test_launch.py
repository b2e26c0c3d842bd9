"""Launchers, started as far as they can be on one machine."""

import importlib.util
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from kd import main as kd_main
from kd.overrides import override

ROOT = Path(__file__).parent.parent.parent
LAUNCH = ROOT / 'launch'
RECIPE = '--config=configs/vision/logit_kd.py:cpu'


def _run(*command, environment=None):
    return subprocess.run(
        [str(x) for x in command],
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def _parses(command: str) -> tuple:
    """What `kd.main` makes of a printed command."""
    words = shlex.split(command)
    return _parsed(words[words.index('kd.main') + 1 :])


def _parsed(words: list[str]) -> tuple:
    """The config, the work directory, and how processes are joined."""
    known, assignments = kd_main.parse(words)
    return kd_main.read(known, assignments), known.workdir, known.distributed


def test_local_processes_get_their_places_in_one_run():
    done = _run(
        sys.executable, LAUNCH / 'local_multiprocess.py', '--processes=3', '--devices=4',
        '--port=1234', '--dry_run', '--', RECIPE, '--workdir=runs/x',
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, '')
    lines = done.stdout.splitlines()
    assert all(line.startswith('JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES=4 ') for line in lines)
    joined = [_parses(line)[2] for line in lines]
    assert joined == [f'127.0.0.1:1234,3,{index}' for index in range(3)]


def test_local_processes_end_with_the_status_of_the_first_that_fails():
    done = _run(
        sys.executable, LAUNCH / 'local_multiprocess.py', '--', '--config=none.py', '--workdir=x'
    )
    assert done.returncode == kd_main.EXIT_USER
    assert 'There is no config file none.py' in done.stderr
    assert re.search(r'process [01] ended with status 2', done.stderr)


def test_a_sweep_is_the_product_of_its_lists():
    done = _run(
        sys.executable, LAUNCH / 'xm_launch.py', RECIPE, '--workdir=runs/s', '--dry_run',
        '--sweep=student.optimizer.lr=[1e-3, 3e-3]', '--sweep=seed=[0, 1, 2]',
        '--config.student.steps=7',
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, '')
    head, *commands = done.stdout.splitlines()
    assert head == '6 work unit(s) on local {}'
    parsed = [_parses(command) for command in commands]
    found = {(config.student.optimizer.lr, config.seed) for config, _, _ in parsed}
    assert found == {(lr, seed) for lr in (1e-3, 3e-3) for seed in range(3)}
    assert len({workdir for _, workdir, _ in parsed}) == 6
    assert {config.student.steps for config, _, _ in parsed} == {7}


@pytest.mark.parametrize('executor', ['vertex', 'kubernetes'])
def test_cloud_executors_are_told_the_accelerator_and_join_their_hosts(executor):
    done = _run(
        sys.executable, LAUNCH / 'xm_launch.py', RECIPE, '--workdir=/gcs/x', '--dry_run',
        f'--executor={executor}', '--accelerator=V100=8', '--hosts=2',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    head, command = done.stdout.splitlines()
    assert head == f"1 work unit(s) on {executor} {{'V100': 8}}"
    assert _parses(command)[1:] == ('/gcs/x', 'auto')


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--sweep=seed=3'], 'must be FIELD=[VALUE, ...], a Python list'),
        (['--steps=3'], "unknown argument '--steps=3'"),
        (['--executor=borg'], 'invalid choice'),
        (['--workdir=gs://bucket/x'], "'gs://bucket/x' is an address"),
        (['--data_dir=gs://bucket/x'], 'is an address: mount the bucket'),
    ],
)
def test_bad_arguments_of_a_launch_are_told(arguments, message):
    done = _run(sys.executable, LAUNCH / 'xm_launch.py', RECIPE, '--workdir=x', *arguments)
    assert done.returncode == 2
    assert message in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec('xmanager') is not None, reason='XManager is installed'
)
def test_without_xmanager_the_extra_is_named():
    done = _run(sys.executable, LAUNCH / 'xm_launch.py', RECIPE, '--workdir=x')
    assert done.returncode == 2
    assert "pip install -e '.[launch]'" in done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec('xmanager') is None,
    reason="running XManager's local executor takes it: pip install -e '.[launch]'",
)
def test_the_local_executor_runs_a_sweep(tmp_path):
    steps = [f'--config.{stage}.steps=4' for stage in ('teacher', 'baseline', 'student')]
    done = _run(
        sys.executable, LAUNCH / 'xm_launch.py', RECIPE, f'--workdir={tmp_path}/sweep',
        f'--data_dir={tmp_path}/data', '--sweep=seed=[0, 1]', *steps, '--config.report.seeds=1',
        environment={'HOME': str(tmp_path), 'JAX_PLATFORMS': 'cpu'},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for seed in (0, 1):
        assert (tmp_path / 'sweep' / f'seed={seed}' / 'report.json').exists()


POD = (LAUNCH / 'tpu_pod.sh', '--name=slice', '--zone=us-west4-a', '--project=mine', '--dry_run')


def test_a_pod_is_made_used_by_all_workers_and_deleted():
    done = _run(*POD, '--type=v5litepod-256', '--', RECIPE, '--workdir=/gcs/a b')
    assert (done.returncode, done.stderr) == (0, '')
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    tpu = ['gcloud', 'compute', 'tpus', 'tpu-vm']
    verbs = [line[4] for line in lines if line[:4] == tpu]
    assert verbs == ['create', 'scp', 'ssh', 'ssh', 'delete']
    where = {'--zone=us-west4-a', '--project=mine'}
    assert all(where <= set(line) for line in lines if line[:4] == tpu)
    assert '--accelerator-type=v5litepod-256' in lines[0]
    assert all('--worker=all' in line for line in lines if line[4] in ('scp', 'ssh'))
    [command] = [word for word in lines[-2] if word.startswith('--command=')]
    config, workdir, joined = _parses(command)
    assert (workdir, joined) == ('/gcs/a b', 'auto')
    override(config, {'student.steps': '3'})


def test_a_pod_is_not_made_for_a_work_directory_that_is_an_address():
    done = _run(*POD, '--type=v5litepod-256', '--', RECIPE, '--workdir=gs://bucket/x')
    assert (done.returncode, done.stdout) == (2, '')
    assert "'--workdir=gs://bucket/x' is an address" in done.stderr


def test_a_pod_that_exists_is_left_alone():
    done = _run(*POD, '--', RECIPE, '--workdir=/gcs/x')
    assert done.returncode == 0
    assert 'create' not in done.stdout
    assert 'delete' not in done.stdout


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--zone=z', '--', 'x'], '--name and --zone are needed'),
        (['--name=n', '--zone=z'], 'the arguments of kd.main are missing'),
        (['--nme=n'], "unknown argument '--nme=n'"),
    ],
)
def test_bad_arguments_of_a_pod_are_told(arguments, message):
    done = _run(LAUNCH / 'tpu_pod.sh', *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert 'launch/tpu_pod.sh --name=NAME' in done.stdout


@pytest.mark.parametrize(('status', 'requeued'), [(0, False), (2, False), (75, True), (76, True)])
def test_a_slurm_job_joins_its_processes_and_is_queued_again_if_interrupted(
    tmp_path, status, requeued
):
    """With stand-ins for srun and scontrol."""
    for name, text in {
        'srun': f'echo "$@" > {tmp_path}/srun\nexit {status}',
        'scontrol': f'echo "$@" > {tmp_path}/scontrol',
    }.items():
        file = tmp_path / 'bin' / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f'#!/usr/bin/env bash\n{text}\n')
        file.chmod(file.stat().st_mode | stat.S_IEXEC)
    done = _run(
        'bash', LAUNCH / 'slurm.sbatch', RECIPE, '--workdir=/shared/x',
        environment={'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}', 'SLURM_JOB_ID': '42'},
    )  # fmt: skip
    assert done.returncode == status
    started = (tmp_path / 'srun').read_text()
    assert '--kill-on-bad-exit=1 .venv/bin/python -m kd.main' in started
    assert _parses(started)[1:] == ('/shared/x', 'auto')
    assert (tmp_path / 'scontrol').exists() == requeued
    if requeued:
        assert (tmp_path / 'scontrol').read_text() == 'requeue 42\n'


def test_the_image_copies_what_is_there_and_installs_extras_that_exist():
    """Docker itself is not at hand: every path and extra that the file names must exist."""
    text = (LAUNCH / 'Dockerfile').read_text()
    for sources in re.findall(r'^COPY (.+) \S+$', text, re.M):
        for source in sources.split():
            assert (ROOT / source).exists(), source
    extras = re.search(r'EXTRAS = \{(.*?)^\}', (ROOT / 'setup.py').read_text(), re.M | re.S)[1]
    for extra in ('gpu', 'tpu'):
        assert f"'{extra}':" in extras
    assert re.search(r'^ARG EXTRA=gpu$', text, re.M)
    assert re.search(r'^ENTRYPOINT \["python", "-m", "kd.main"\]$', text, re.M)


def _documented():
    """Commands of the page that start a launcher."""
    page = (ROOT / 'docs' / 'scale.md').read_text()
    return re.findall(r'^  `((?:python |sbatch .*|docker build -f )?launch/.*)`$', page, re.M)


def test_every_launcher_is_documented():
    files = [file.name for file in LAUNCH.iterdir() if file.is_file()]
    page = (ROOT / 'docs' / 'scale.md').read_text()
    assert all(f'(../launch/{name})' in page for name in files)
    files.remove('device_check.sh')  # It launches nothing but measures.
    for name in files:
        [command] = [c for c in _documented() if f'launch/{name}' in c]
        given = [w for w in shlex.split(command) if w.startswith(('--config=', '--workdir='))]
        assert _parsed(given)[0].stages
    assert len(_documented()) == len(files)


@pytest.mark.parametrize(
    'command', [c for c in _documented() if not c.startswith(('sbatch', 'docker'))]
)
def test_documented_commands_are_right(command):
    launcher, *arguments = shlex.split(command.removeprefix('python '))
    start = [sys.executable] if command.startswith('python') else []
    done = _run(*start, ROOT / launcher, '--dry_run', *arguments)
    assert (done.returncode, done.stderr) == (0, '')
    runs = [line for line in done.stdout.splitlines() if 'kd.main' in line]
    assert runs
    for line in runs:
        words = shlex.split(line)
        inner = next((w for w in words if w.startswith('--command=')), line)
        config, workdir, _ = _parses(inner.removeprefix('--command='))
        assert config.stages
        assert workdir
