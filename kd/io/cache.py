"""Teacher outputs on disk: TeacherSignals of every example of a split, in array_record files.

    DIRECTORY/teacher/manifest.json           what the teacher said, of what, and in which form
    DIRECTORY/teacher/00003.array_record      examples 3 S .. 4 S - 1, one record each

A record is the bytes of the fields of one example, little-endian, in the order of `Form.record`.
Files are written whole or not at all, so a cache that was cut off goes on where it was.
Log-probabilities and logits are kept as float32, or as float16: half the bytes, at a relative error
of 2^-11.

With float16, each kept log-probability l of `TopK` is off by at most d = 2^-10 max|l| once they are
rescaled to sum to 1 - tail, which reading does. A forward KL of them is then off by at most
e^d d + (e^d - 1) max|log p - log q| over the kept outcomes and the tail.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from array_record.python.array_record_module import ArrayRecordReader, ArrayRecordWriter

from kd import config as config_lib
from kd import files
from kd.errors import UserError, reason
from kd.io import checksums, finished
from kd.losses import signal as signal_lib

PREFIX = 'teacher_'
_FOLDER = 'teacher'
_DTYPES = ('float32', 'float16')
_AGAIN = 'delete what is damaged, and the recipe of its stage makes it again'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Form:
    """The form in which a teacher's outputs are kept.

    Attributes:
      form: 'dense', 'top_k' or 'sampled'; see `kd.losses.signal`.
      size: k of top_k, the number of draws of sampled; 0 for dense.
      temperature: at which top_k and sampled are recorded.
      proposal_temperature: of sampled; None draws at `temperature`.
      dtype: 'float32' or 'float16', of logits and log-probabilities.
    """

    form: str = 'top_k'
    size: int = 0
    temperature: float = 1.0
    proposal_temperature: float | None = None
    dtype: str = 'float16'

    def __post_init__(self) -> None:
        if self.form not in ('dense', 'top_k', 'sampled'):
            raise UserError(f"form must be 'dense', 'top_k' or 'sampled', got '{self.form}'.")
        if self.dtype not in _DTYPES:
            raise UserError(f"dtype must be 'float32' or 'float16', got '{self.dtype}'.")
        if (self.size > 0) != (self.form != 'dense'):
            raise UserError(f"form '{self.form}' and size={self.size}: only dense has size 0.")
        if self.form == 'dense' and self.temperature != 1.0:
            raise UserError('dense logits are kept as they are: leave temperature at 1.')

    def signal(self, logits: jax.Array, key: jax.Array) -> signal_lib.TeacherSignal:
        """What is kept of `logits` [..., V]; `key` is for the draws of 'sampled'."""
        if self.form == 'dense':
            return signal_lib.Dense(logits)
        if self.form == 'top_k':
            return signal_lib.top_k(logits, self.size, temperature=self.temperature)
        return signal_lib.sample(
            key,
            logits,
            self.size,
            temperature=self.temperature,
            proposal_temperature=self.proposal_temperature,
        )

    def record(self, shape: tuple[int, ...]) -> np.dtype:
        """The record of one example whose logits have `shape` [..., V]."""
        *positions, outcomes = shape
        if self.size > outcomes and self.form == 'top_k':
            raise UserError(f'top_k of {self.size} of only {outcomes} outcomes; lower size.')
        index = '<u2' if outcomes <= 1 << 16 else '<u4'
        real = np.dtype(self.dtype).newbyteorder('<')
        each = (*positions, self.size)
        fields: dict[str, list[tuple]] = {
            'dense': [('logits', real, shape)],
            'top_k': [
                ('log_probs', real, each),
                ('indices', index, each),
                ('tail', '<f4', tuple(positions)),
            ],
            'sampled': [
                ('tokens', index, each),
                ('weights', '<f4', each),
                ('entropy', '<f4', tuple(positions)),
            ],
        }
        return np.dtype(fields[self.form])

    def spec(self, shape: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
        """Shapes and dtypes of the fields as they are read, by their names in a batch."""
        record = self.record(shape)
        spec = {}
        for name in record.names or ():
            field = record[name]
            dtype = np.int32 if field.base.kind == 'u' else np.float32
            spec[PREFIX + name] = jax.ShapeDtypeStruct(field.shape, dtype)
        return spec


def signal_in(batch: Mapping[str, Any], temperature: float) -> signal_lib.TeacherSignal | None:
    """The signal that a batch brings from a cache recorded at `temperature`, or None."""

    def field(name: str) -> Any:
        return batch[PREFIX + name]

    if PREFIX + 'log_probs' in batch:
        return signal_lib.TopK(
            field('log_probs'), field('indices'), field('tail'), temperature=temperature
        )
    if PREFIX + 'tokens' in batch:
        return signal_lib.Sampled(
            field('tokens'), field('weights'), field('entropy'), temperature=temperature
        )
    if PREFIX + 'logits' in batch:
        return signal_lib.Dense(field('logits'))
    return None


class Writer:
    """Writes the cache of one split, file by file.

    Args:
      directory: of the stage.
      form: what is kept.
      shape: of one example's logits [..., V].
      examples: how many there are.
      per_file: S, examples in a file.
      made_of: fingerprints of teacher and data, and whatever else must agree to go on.

    Raises:
      UserError: the directory holds a cache of something else.
    """

    def __init__(
        self,
        directory: Path,
        form: Form,
        shape: tuple[int, ...],
        examples: int,
        per_file: int,
        made_of: Mapping[str, Any],
    ) -> None:
        self.folder = directory / _FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        self.record = form.record(shape)
        self.examples, self.per_file = examples, per_file
        self.manifest = {
            **dataclasses.asdict(form),
            'shape': list(shape),
            'examples': examples,
            'per_file': per_file,
            'made_of': dict(made_of),
        }

    def begin(self) -> list[int]:
        """Starts the cache or goes on with it; returns the files that are still to be written."""
        file = self.folder / 'manifest.json'
        self.complete = False
        if file.exists():
            found = _read(file)
            _check(found, self.manifest, self.folder)
            self.complete = bool(found.get('complete'))
        else:
            files.write_json(file, self.manifest)
        count = -(-self.examples // self.per_file)
        missing = [index for index in range(count) if not _shard(self.folder, index).exists()]
        self.complete = self.complete and not missing
        return missing

    def write(self, index: int, fields: Mapping[str, np.ndarray]) -> None:
        """Writes file `index`; `fields` have its examples on their first axis."""
        count = min(self.per_file, self.examples - index * self.per_file)
        rows = np.empty(count, self.record)
        for name in self.record.names or ():
            if len(fields[name]) != count:
                raise ValueError(f'file {index} has {count} examples, got {len(fields[name])}.')
            with np.errstate(over='ignore'):
                rows[name] = fields[name]
            # Minus infinity stays what it is; what is finite must not become infinite.
            finite = np.isfinite(fields[name])
            if not np.array_equal(np.isfinite(rows[name]), finite):
                raise UserError(
                    f'{name} of the teacher reach {np.abs(fields[name][finite]).max():.3g}, more '
                    "than float16 holds; set the method's dtype to 'float32'."
                )
        with files.replacing(_shard(self.folder, index)) as partial:
            # Groups of one are read no faster, and take 64 bytes more an example.
            writer = ArrayRecordWriter(str(partial), 'group_size:16')
            for row in rows:
                writer.write(row.tobytes())
            writer.close()

    def finish(self) -> dict[str, Any]:
        """Marks the cache as complete; returns the manifest with its sizes in bytes an example.

        `bytes_per_example` is what lies on disk, `dense_bytes_per_example` what the logits alone
        would take as float32.
        """
        on_disk = sum(file.stat().st_size for file in self.folder.glob('*.array_record'))
        sizes = {
            'bytes_per_example': on_disk / self.examples,
            'record_bytes': self.record.itemsize,
            'dense_bytes_per_example': 4 * int(np.prod(self.manifest['shape'])),
            'complete': True,
        }
        files.write_json(self.folder / 'manifest.json', self.manifest | sizes)
        return self.manifest | sizes


class Cache:
    """A complete cache, read at random.

    Args:
      directory: of the stage that wrote it.
      form: what is expected; None takes what there is.
      made_of: fingerprints that are expected; those left out are not compared.

    Raises:
      UserError: no cache, an incomplete one, or one of something else.
    """

    def __init__(
        self, directory: Path, form: Form | None = None, made_of: Mapping[str, Any] | None = None
    ) -> None:
        self.folder = directory / _FOLDER
        file = self.folder / 'manifest.json'
        if not file.exists():
            raise UserError(f'{directory} has no cache of teacher outputs (no {_FOLDER}/ in it).')
        manifest = _read(file)
        if not manifest.get('complete'):
            raise UserError(f'The cache {self.folder} is not complete; run its stage to the end.')
        expected: dict[str, Any] = {'made_of': made_of or {}}
        _check(manifest, expected | (dataclasses.asdict(form) if form else {}), self.folder)
        self.form = Form(**{f.name: manifest[f.name] for f in dataclasses.fields(Form)})
        self.shape = tuple(manifest['shape'])
        self.manifest = manifest
        count = -(-manifest['examples'] // manifest['per_file'])
        missing = [i for i in range(count) if not _shard(self.folder, i).exists()]
        if missing:
            raise UserError(
                f'The cache {self.folder} lacks {len(missing)} of its {count} files, the first is '
                f'{_shard(self.folder, missing[0]).name}; {_AGAIN}.'
            )
        self._record = self.form.record(self.shape)
        self._reader = functools.lru_cache(maxsize=64)(self._open)

    def __len__(self) -> int:
        return self.manifest['examples']

    def _open(self, index: int) -> ArrayRecordReader:
        file = _shard(self.folder, index)
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
            found = reader.read(places)
        except Exception as error:  # As above.
            file = _shard(self.folder, index)
            raise UserError(f'{file} cannot be read ({reason(error)}); {_AGAIN}.') from error
        for record in found:
            if len(record) != self._record.itemsize:
                raise UserError(f'{_shard(self.folder, index)} holds other records; {_AGAIN}.')
        return found

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Fields of the examples `indices` [B] as in `Form.spec`, each [B, ...]."""
        records: list[bytes] = [b''] * len(indices)
        shards, places = np.divmod(np.asarray(indices), self.manifest['per_file'])
        for index in np.unique(shards):
            at = np.flatnonzero(shards == index)
            found = self._read(int(index), places[at].tolist())
            for position, record in zip(at, found, strict=True):
                records[position] = record
        rows = np.frombuffer(b''.join(records), self._record)
        fields = {}
        for name in self._record.names or ():
            dtype = np.int32 if rows[name].dtype.kind == 'u' else np.float32
            fields[PREFIX + name] = rows[name].astype(dtype)
        if self.form.form == 'top_k':
            _rescale(fields)
        return fields


def training_fingerprint(place: Path) -> str:
    """A digest of how the training of a stage ended: its step and metrics, not its speed.

    Of the weights themselves, where others have trained them.
    """
    done = finished.read_done(place)
    if done is None:
        return checksums.sample(place)
    record = {name: value for name, value in done.items() if name != 'steps_per_s'}
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _rescale(fields: dict[str, np.ndarray]) -> None:
    """Makes the kept probabilities sum to 1 - tail again, which rounding has cost them."""
    log_probs = fields[PREFIX + 'log_probs']
    total = np.exp(log_probs, dtype=np.float64).sum(-1)
    kept = 1.0 - fields[PREFIX + 'tail'].astype(np.float64)
    scale = np.log(np.where((kept > 0) & (total > 0), kept / np.where(total > 0, total, 1), 1))
    fields[PREFIX + 'log_probs'] = (log_probs + scale[..., None]).astype(np.float32)


def _check(found: Mapping[str, Any], expected: Mapping[str, Any], folder: Path) -> None:
    for name, value in expected['made_of'].items():
        if found['made_of'].get(name) != value:
            raise UserError(
                f'The cache {folder} was made from another {name} ({found["made_of"].get(name)}, '
                f'not {value}); delete it, or name the stage that made the right one.'
            )
    plain = {name: value for name, value in expected.items() if name != 'made_of'}
    difference = config_lib.first_difference({name: found[name] for name in plain}, plain)
    if difference:
        raise UserError(f'The cache {folder} does not fit: {difference}.')


def _read(file: Path) -> dict[str, Any]:
    manifest = files.read_json(file, f'delete {file.parent.parent} and run its recipe again')
    needed = {f.name for f in dataclasses.fields(Form)} | {'shape', 'examples', 'per_file'}
    if missing := sorted((needed | {'made_of'}) - set(manifest)):
        raise UserError(f'{file} lacks {", ".join(missing)}; delete the cache it belongs to.')
    return manifest


def _shard(folder: Path, index: int) -> Path:
    return folder / f'{index:05d}.array_record'
