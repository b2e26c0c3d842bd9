"""`kd.main` in processes of their own: started, stopped and compared."""

import json
import os
import resource
import shutil
import signal
import time
import warnings
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / 'tests' / 'recipes'
CONFIG = str(RECIPES / 'moons.py')


def _child(arguments, cache, log, hold, room):
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    if room:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    os.environ |= {'JAX_COMPILATION_CACHE_DIR': cache, 'MOONS_HOLD': hold}
    jax.config.update('jax_platforms', 'cpu')
    jax.config.update('jax_compilation_cache_dir', cache)
    jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
    # As a program in a terminal has them, also where the tests run in the background or by nohup.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    from kd import process
    from kd.main import main

    # Through the door of a command: the interpreter's own end crashes in JAX now and then.
    process.command(lambda: main(arguments))


class Command:
    """One `kd.main` command that can be started over and over."""

    def __init__(
        self, context, workdir: Path, argument: str = 'plain', extra=(), config: str = CONFIG
    ):
        self.context, self.workdir = context, workdir
        self.arguments = [f'--config={config}:{argument}', f'--workdir={workdir}', *extra]
        self.log = workdir.parent / f'{workdir.name}.log'
        self.hold = workdir.parent / f'{workdir.name}.hold'
        self.room = 0  # Bytes that a file may have, if not 0.
        self.cache = str(ROOT / '.cache' / 'jax-processes')

    def start(self):
        arguments = (self.arguments, self.cache, str(self.log), str(self.hold), self.room)
        process = self.context.Process(target=_child, args=arguments)
        process.start()
        return process

    def run(self) -> int:
        process = self.start()
        process.join(120)
        assert process.exitcode is not None, self.said()
        return process.exitcode

    def wait(self, process, text: str) -> None:
        """Until the process has said something."""
        while process.is_alive() and not (self.log.exists() and text in self.said()):
            time.sleep(0.01)
        assert process.is_alive(), self.said()

    def said(self) -> str:
        return self.log.read_text()

    def lines(self) -> int:
        """Log lines written by all stages so far."""
        return sum(len(f.read_text().splitlines()) for f in self.workdir.glob('*/metrics.jsonl'))


def copy(source: Path, target: Path) -> None:
    """Copies a run without its lock."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns('.lock'))


def arrays(workdir: Path, stage: str, item: str) -> dict[str, np.ndarray]:
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


def metrics(workdir: Path, stage: str) -> list[dict]:
    lines = (workdir / stage / 'metrics.jsonl').read_text().splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if not key.startswith('time/')}
        for line in lines
    ]


def assert_same_run(first: Path, second: Path) -> None:
    for stage in ('teacher', 'student'):
        assert metrics(first, stage) == metrics(second, stage)
        for item in ('variables', 'training'):
            a, b = arrays(first, stage, item), arrays(second, stage, item)
            assert a.keys() == b.keys()
            for name in a:
                np.testing.assert_array_equal(a[name], b[name], err_msg=f'{stage} {item} {name}')
    first_report, second_report = (
        json.loads((p / 'report.json').read_text()) for p in (first, second)
    )
    for title, row in first_report.items():
        row.pop('steps_per_s')
        second_report[title].pop('steps_per_s', None)
    assert first_report == second_report
