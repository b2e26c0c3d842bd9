"""The directory of a run: lock, config, manifest, metrics."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shlex
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

from kd import config as config_lib
from kd.errors import UserError

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'grain', 'tensorflow-datasets')


class Workdir:
    """A run's directory, held by one run at a time; of several processes the first holds it."""

    def __init__(self, path: Path, recipe: config_lib.Recipe) -> None:
        """Creates or opens the directory and takes its lock.

        Raises:
          UserError: not writable, in use by another run, or made with another config.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / '.lock', 'a+')  # noqa: SIM115  held until `close`
        except OSError as error:
            raise UserError(f'Cannot write to workdir {path}: {error.strerror}.') from error
        self._config = recipe.plain()
        try:
            if jax.process_index() == 0:
                self._take_lock()
            self._check_config(json.loads(json.dumps(self._config)))
        except UserError:
            self.close()
            raise

    def record(self) -> None:
        """Writes config and manifest; from now on the directory belongs to this config."""
        write_whole(self.path / 'config.json', json.dumps(self._config, indent=1))
        self._write_manifest(self._config)

    def stage(self, name: str) -> Path:
        """Directory of a stage."""
        directory = self.path / name
        directory.mkdir(exist_ok=True)
        return directory

    def close(self) -> None:
        self._lock.close()

    def _take_lock(self) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.seek(0)
            holder = self._lock.read().strip() or 'another process'
            raise UserError(
                f'{self.path} is in use by {holder}; wait for it or choose another workdir.'
            ) from error
        self._lock.truncate(0)
        self._lock.write(f'process {os.getpid()} on {socket.gethostname()}')
        self._lock.flush()

    def _check_config(self, new: dict[str, Any]) -> None:
        file = self.path / 'config.json'
        if not file.exists():
            return
        try:
            old = json.loads(file.read_text())
        except ValueError as error:
            raise UserError(f'{file} is not readable JSON; choose another workdir.') from error
        for field in config_lib.RUNTIME_FIELDS:
            old.pop(field, None)
            new = {key: value for key, value in new.items() if key != field}
        difference = config_lib.first_difference(old, new)
        if difference:
            raise UserError(
                f'{self.path} holds a run with another config: {difference}. '
                'Choose another workdir, or delete this one.'
            )

    def _write_manifest(self, config: dict[str, Any]) -> None:
        device = jax.devices()[0]
        manifest = {
            'command': shlex.join([sys.executable, '-m', 'kd.main', *sys.argv[1:]]),
            'cwd': os.getcwd(),
            'commit': commit(),
            'python': platform.python_version(),
            'packages': {name: metadata.version(name) for name in _PACKAGES},
            'device': device.device_kind,
            'platform': device.platform,
            'devices': jax.device_count(),
            'hosts': jax.process_count(),
            'host': socket.gethostname(),
            'config': config,
        }
        write_whole(self.path / 'manifest.json', json.dumps(manifest, indent=1))


def commit() -> str:
    """The commit of the source tree, '+' appended if it has changes; '' outside a repository."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ['git', '-C', str(root), *arguments], capture_output=True, text=True, check=False
        )
        return done.stdout.strip() if done.returncode == 0 else ''

    head = git('rev-parse', 'HEAD')
    return head + ('+' if head and git('status', '--porcelain', '-uno') else '')


class MetricLog:
    """Writes scalars to `metrics.jsonl` and to TensorBoard.

    `metrics.jsonl` has one object per line, {"step": 100, "train/loss": 0.3, ...}. Keys that start
    with `time/` are measurements of speed; all others are the same in every run of one config.
    """

    def __init__(self, directory: Path, *, resume_step: int) -> None:
        """Opens the log; lines after `resume_step` are of a run cut off and are dropped.

        Of several processes only the first writes.
        """
        self._writes = jax.process_index() == 0
        if not self._writes:
            return
        self._file = directory / 'metrics.jsonl'
        kept = [line for line in _lines(self._file) if json.loads(line)['step'] <= resume_step]
        write_whole(self._file, ''.join(kept))
        # Imports TensorFlow, which takes seconds: only where something is written.
        from clu import metric_writers

        self._writer = metric_writers.SummaryWriter(str(directory / 'tensorboard'))
        # TensorFlow's first write takes most of a second: here, and not between two steps.
        self._writer.write_texts(resume_step, {'stage': directory.name})
        self._stream = self._file.open('a')

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._writes:
            return
        self._stream.write(json.dumps({'step': step, **scalars}) + '\n')
        self._stream.flush()
        self._writer.write_scalars(step, dict(scalars))

    def close(self) -> None:
        if not self._writes:
            return
        self._stream.close()
        self._writer.flush()
        self._writer.close()


def write_whole(file: Path, text: str) -> None:
    """Writes a file so that a process that dies meanwhile leaves the old one."""
    partial = file.with_name(file.name + '.partial')
    partial.write_text(text)
    partial.rename(file)


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The lines of a stage's `metrics.jsonl`."""
    return [json.loads(line) for line in _lines(directory / 'metrics.jsonl')]


def _lines(file: Path) -> list[str]:
    # A process that dies while it writes leaves a last line without its end.
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [line for line in lines if line.endswith('\n')]
