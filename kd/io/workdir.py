"""The directory of a run: lock, config, metrics."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import math
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from clu import parameter_overview

from kd import config as config_lib
from kd import files
from kd.errors import UserError
from kd.io import events, manifest
from kd.state import PyTree

log = logging.getLogger('kd')

# What flock answers on file systems that have no locks: Lustre without the option, some NFS.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


class Workdir:
    """A run's directory, held by one run at a time; of several processes the first holds it."""

    def __init__(self, path: str | os.PathLike, recipe: config_lib.Recipe) -> None:
        """Creates or opens the directory and takes its lock.

        Raises:
          UserError: an address, not writable, or in use by another run.
        """
        path = self.path = files.local(path, '--workdir').absolute()
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = open(path / '.lock', 'a+')  # noqa: SIM115  held until `close`
        except OSError as error:
            raise UserError(f'Cannot write to workdir {path}: {error.strerror}.') from error
        self._config = recipe.plain()
        try:
            if jax.process_index() == 0:
                self._take_lock()
        except UserError:
            self.close()
            raise

    def stored(self) -> dict[str, Any] | None:
        """The plain recipe that was recorded last, if there is one."""
        file = self.path / 'config.json'
        if not file.exists():
            return None
        return files.read_json(
            file, 'if the run there is of this very command, delete the file; else choose another '
            'workdir'
        )  # fmt: skip

    def started(self) -> list[str]:
        """Stages of the recipe of which there are files."""
        return [name for name in self._config['stages'] if any((self.path / name).glob('*'))]

    def record(self) -> None:
        """Writes config and manifest; from now on the directory belongs to this config."""
        files.write_json(self.path / 'config.json', self._config)
        manifest.record(self.path, self._config)

    def stage(self, name: str) -> Path:
        """Directory of a stage."""
        directory = self.path / name
        try:
            directory.mkdir(exist_ok=True)
        except FileExistsError as error:
            raise UserError(
                f"{directory} is a file, and stage '{name}' needs a folder there; move it away."
            ) from error
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
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise UserError(f'Cannot lock workdir {self.path}: {error.strerror}.') from error
            log.warning(
                'The file system of %s has no locks: see to it that no other run uses it.',
                self.path,
            )
        with files.naming(self.path / '.lock'):
            self._lock.truncate(0)
            self._lock.write(f'process {os.getpid()} on {socket.gethostname()}')
            self._lock.flush()


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
        kept = [line for line in read_metrics(directory) if line['step'] <= resume_step]
        files.write_whole(self._file, ''.join(files.json_text(line) + '\n' for line in kept))
        self._events = events.EventFile(directory / 'tensorboard')
        self._events.text(resume_step, 'stage', directory.name)
        self._stream = self._file.open('a')

    def write(self, step: int, scalars: Mapping[str, float]) -> None:
        if not self._writes:
            return
        with files.naming(self._file):
            self._stream.write(files.json_text({'step': step, **scalars}) + '\n')
            self._stream.flush()
        self._events.scalars(step, scalars)

    def close(self) -> None:
        if not self._writes:
            return
        self._stream.close()
        self._events.close()


def write_overview(directory: Path, params: PyTree) -> None:
    """Writes `parameters.txt`, what is trained: names, shapes, types, numbers, and how the mesh has
    them.

    Of several processes only the first writes.
    """
    if jax.process_index() == 0:
        table = parameter_overview.get_parameter_overview(params, include_stats='sharding')
        files.write_whole(directory / 'parameters.txt', table + '\n')


def read_metrics(directory: Path) -> list[dict[str, float]]:
    """The lines of a stage's `metrics.jsonl`; what was not finite, `null` there, is NaN.

    Raises:
      UserError: a line that is damaged. A last line without its end is left out: a process that
        dies while it writes leaves one.
    """
    file = directory / 'metrics.jsonl'
    content = file.read_bytes().decode(errors='replace') if file.exists() else ''
    return [_metrics(file, i, line) for i, line in enumerate(content.split('\n')[:-1], 1)]


def _metrics(file: Path, number: int, line: str) -> dict[str, float]:
    try:
        values = json.loads(line)
        int(values['step'])
        return {name: math.nan if value is None else value for name, value in values.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'{file} is damaged: line {number} is not the JSON that was written; delete the line.'
        ) from error
