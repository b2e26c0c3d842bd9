"""One record for each example of a split, in files that a stage writes one after the other.

    FOLDER/manifest.json           what the records are and what they were made of
    FOLDER/00003.array_record      examples 3 S .. 4 S - 1, one record each

Files are written whole or not at all, so a folder that was cut off goes on where it was. What a
record holds is the caller's affair: `kd.io.cache`, `kd.io.answers`.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from kd import config as config_lib
from kd import files
from kd.errors import UserError, reason

_AGAIN = 'delete what is damaged, and the recipe of its stage makes it again'
_NEEDED = ('examples', 'per_file', 'made_of')


class Writer:
    """Writes the records of one split, file by file.

    Args:
      folder: of the files.
      manifest: what the records are: `examples`, how many there are; `per_file`, S; `made_of`,
        fingerprints of what must agree to go on; and whatever else must.
      what: the records, in messages.
    """

    def __init__(self, folder: Path, manifest: Mapping[str, Any], what: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        # As it will be read again, with lists for tuples.
        self.manifest = json.loads(files.json_text(dict(manifest)))
        self.folder, self.what = folder, what
        self.complete = False

    def begin(self) -> list[int]:
        """Starts the folder or goes on with it; returns the files that are still to be written.

        Raises:
          UserError: it holds records of something else.
        """
        file = self.folder / 'manifest.json'
        self.complete = False
        if file.exists():
            found = read_manifest(file, tuple(self.manifest))
            check(found, self.manifest, self.folder, self.what)
            self.complete = bool(found.get('complete'))
        else:
            files.write_json(file, self.manifest)
        count = -(-self.manifest['examples'] // self.manifest['per_file'])
        missing = [index for index in range(count) if not shard(self.folder, index).exists()]
        self.complete = self.complete and not missing
        return missing

    def count(self, index: int) -> int:
        """Examples of file `index`."""
        per_file = self.manifest['per_file']
        return min(per_file, self.manifest['examples'] - index * per_file)

    def write(self, index: int, records: Sequence[bytes]) -> None:
        """Writes file `index`."""
        if len(records) != self.count(index):
            raise ValueError(
                f'file {index} has {self.count(index)} examples, got {len(records)} records.'
            )
        with files.replacing(shard(self.folder, index)) as partial:
            # Groups of one are read no faster, and take 64 bytes more an example.
            writer = ArrayRecordWriter(str(partial), 'group_size:16')
            for record in records:
                writer.write(record)
            writer.close()

    def finish(self, **found: Any) -> dict[str, Any]:
        """Marks the folder as complete; returns the manifest with what else was `found`.

        Of the disk `bytes_per_example` are taken.
        """
        on_disk = sum(file.stat().st_size for file in self.folder.glob('*.array_record'))
        sizes = {'bytes_per_example': on_disk / self.manifest['examples'], **found}
        whole = self.manifest | sizes | {'complete': True}
        files.write_json(self.folder / 'manifest.json', whole)
        return whole


class Reader:
    """A complete folder, read at random.

    Args:
      folder: of the files.
      what: the records, in messages.
      keys: of the manifest that must be there, beside those of every one.
      made_of: fingerprints that are expected; those left out are not compared.
      expected: further entries of the manifest.

    Raises:
      UserError: no records, not all of them, or those of something else.
    """

    def __init__(
        self,
        folder: Path,
        what: str,
        *,
        keys: Sequence[str] = (),
        made_of: Mapping[str, Any] | None = None,
        expected: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.what = folder, what
        file = folder / 'manifest.json'
        if not file.exists():
            raise UserError(f'{folder.parent} has no {what} (no {folder.name}/ in it).')
        manifest = read_manifest(file, (*keys, *(expected or {})))
        if not manifest.get('complete'):
            raise UserError(f'The {what} in {folder} is not complete; run its stage to the end.')
        check(manifest, {**(expected or {}), 'made_of': made_of or {}}, folder, what)
        self.manifest = manifest
        count = -(-manifest['examples'] // manifest['per_file'])
        missing = [i for i in range(count) if not shard(folder, i).exists()]
        if missing:
            raise UserError(
                f'The {what} in {folder} lacks {len(missing)} of its {count} files, the first is '
                f'{shard(folder, missing[0]).name}; {_AGAIN}.'
            )
        self._reader = functools.lru_cache(maxsize=64)(self._open)

    def __len__(self) -> int:
        return self.manifest['examples']

    def records(self, indices: np.ndarray) -> list[bytes]:
        """The records of the examples `indices` [B]."""
        records: list[bytes] = [b''] * len(indices)
        shards, places = np.divmod(np.asarray(indices), self.manifest['per_file'])
        for index in np.unique(shards):
            at = np.flatnonzero(shards == index)
            found = self._read(int(index), places[at].tolist())
            for position, record in zip(at, found, strict=True):
                records[position] = record
        return records

    def refuse(self, example: int) -> UserError:
        """What to raise for a record that cannot be what it should."""
        file = shard(self.folder, int(example) // self.manifest['per_file'])
        return UserError(f'{file} holds other records; {_AGAIN}.')

    def _open(self, index: int) -> ArrayRecordReader:
        file = shard(self.folder, index)
        per_file = self.manifest['per_file']
        try:
            reader = ArrayRecordReader(str(file))
            found = reader.num_records()
        except Exception as error:  # RuntimeError, whatever is wrong.
            raise UserError(f'{file} cannot be read ({reason(error)}); {_AGAIN}.') from error
        if found != min(per_file, len(self) - index * per_file):
            raise UserError(f'{file} is damaged: it has {found} records; {_AGAIN}.')
        return reader

    def _read(self, index: int, places: list[int]) -> list[bytes]:
        reader = self._reader(index)
        try:
            return reader.read(places)
        except Exception as error:  # As above.
            file = shard(self.folder, index)
            raise UserError(f'{file} cannot be read ({reason(error)}); {_AGAIN}.') from error


def shard(folder: Path, index: int) -> Path:
    """File `index` of a folder."""
    return folder / f'{index:05d}.array_record'


def read_manifest(file: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A manifest with at least these keys."""
    manifest = files.read_json(file, f'delete {file.parent.parent} and run its recipe again')
    if missing := sorted({*keys, *_NEEDED} - set(manifest)):
        raise UserError(f'{file} lacks {", ".join(missing)}; delete {file.parent}.')
    return manifest


def check(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path, what: str) -> None:
    """Refuses records that were made of something else, or are of another kind."""
    for name, value in expected['made_of'].items():
        if found['made_of'].get(name) != value:
            raise UserError(
                f'The {what} in {folder} was made from another {name} '
                f'({found["made_of"].get(name)}, not {value}); delete it, or name the stage that '
                'made the right one.'
            )
    plain = {name: value for name, value in expected.items() if name != 'made_of'}
    difference = config_lib.first_difference({name: found[name] for name in plain}, plain)
    if difference:
        raise UserError(f'The {what} in {folder} does not fit: {difference}.')
