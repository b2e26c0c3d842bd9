"""Buffers of expert trajectories: one file per snapshot of a group of experts, and a manifest.

    DIRECTORY/trajectories/manifest.json
    DIRECTORY/trajectories/round_0003/epoch_007.npy     float32 [k, P]

Experts are trained k at a time; round r holds the experts r k .. r k + k - 1. Files are written
whole or not at all, so a build that was cut off goes on where it was, and they are memory-mapped,
so a buffer may be larger than memory.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd import config as config_lib
from kd import files
from kd.errors import UserError, reason

_FOLDER = 'trajectories'


class Manifest(NamedTuple):
    """What a buffer holds.

    Attributes:
      experts: how many.
      together: k, experts per round.
      epochs: T; every trajectory has the snapshots 0..T.
      parameters: P, numbers in a snapshot.
      fingerprint: what the experts are of: `network` and `data`, and how they were trained.
    """

    experts: int
    together: int
    epochs: int
    parameters: int
    fingerprint: dict[str, Any]


def fingerprint(**parts: Any) -> dict[str, Any]:
    """Config blocks by name as plain values, the same before and after a journey through JSON."""
    return json.loads(json.dumps(config_lib.to_plain(parts)))


def write_manifest(directory: Path, manifest: Manifest) -> None:
    """Writes the manifest of the buffer in a stage's directory."""
    folder = directory / _FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(folder / 'manifest.json', manifest._asdict())


def write_snapshot(directory: Path, number: int, epoch: int, values: np.ndarray) -> None:
    """Writes the parameters [k, P] of the experts of round `number` after `epoch` epochs."""
    file = _file(directory, number, epoch)
    file.parent.mkdir(parents=True, exist_ok=True)
    with files.replacing(file) as partial, partial.open('wb') as stream:
        np.save(stream, np.ascontiguousarray(values, np.float32))


class Buffer:
    """A finished buffer, read through the page cache.

    Raises:
      UserError: there is none in `directory`, or it lacks snapshots.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        file = directory / _FOLDER / 'manifest.json'
        if not file.exists():
            raise UserError(
                f'{directory} holds no trajectories; it must be a stage of the method '
                'kd.methods.dataset.expert_trajectories with its writer `snapshots`.'
            )
        advice = f'bring back a copy, or delete {directory} and run its recipe again'
        try:
            self.manifest = Manifest(**files.read_json(file, advice))
        except TypeError as error:
            raise UserError(f'{file} is damaged: {reason(error)}; {advice}.') from error
        rounds = self.manifest.experts // self.manifest.together
        wanted = [(r, e) for r in range(rounds) for e in range(self.manifest.epochs + 1)]
        missing = [_file(directory, *place) for place in wanted]
        missing = [file for file in missing if not file.exists()]
        if missing:
            raise UserError(
                f'The buffer in {directory} is not finished: {len(missing)} of {len(wanted)} '
                f'snapshots are missing, the first is {missing[0].name} of {missing[0].parent.name}'
                '; run its recipe again to finish it.'
            )
        self._opened = functools.cache(self._open)

    def snapshot(self, expert: int, epoch: int) -> np.ndarray:
        """Parameters of one expert after some epochs, float32 [P], memory-mapped."""
        number, place = divmod(expert, self.manifest.together)
        return self._opened(number, epoch)[place]

    def _open(self, number: int, epoch: int) -> np.ndarray:
        file = _file(self.directory, number, epoch)
        wanted = (self.manifest.together, self.manifest.parameters)
        try:
            values = np.load(file, mmap_mode='r')
            problem = '' if values.shape == wanted else f'it holds {values.shape}, not {wanted}'
        except (OSError, ValueError, EOFError) as error:
            problem = reason(error)
        if problem:
            raise UserError(
                f'{file} cannot be read: {problem}; bring back a copy, or delete {self.directory} '
                'and run its recipe again.'
            )
        return values

    def check(self, expected: Mapping[str, Any], where: str) -> None:
        """Raises `UserError` where the fingerprint differs from `expected` in one of its parts."""
        found = {name: self.manifest.fingerprint.get(name) for name in expected}
        for name in expected:
            difference = config_lib.first_difference({name: found[name]}, {name: expected[name]})
            if difference:
                raise UserError(
                    f'{where}: the trajectories in {self.directory} were made with another {name}: '
                    f'{difference}. Name another buffer, change the config, or make a new buffer.'
                )


def _file(directory: Path, number: int, epoch: int) -> Path:
    return directory / _FOLDER / f'round_{number:04}' / f'epoch_{epoch:03}.npy'
