"""Teacher outputs on disk: TeacherSignals of every example of a split, in array_record files.

    DIRECTORY/teacher/manifest.json           what the teacher said, of what, and in which form
    DIRECTORY/teacher/00003.array_record      examples 3 S .. 4 S - 1, one record each

A record is the bytes of the fields of one example, little-endian, in the order of `Form.record`;
of a row of text, those of each position that counts, one after the other, and nothing of the
others: as many as the row has. Files are written as `kd.io.shards` says.
Log-probabilities and logits are kept as float32, or as float16: half the bytes, at a relative error
of 2^-11.

With float16, each kept log-probability l of `TopK` is off by at most d = 2^-10 max|l| once they are
rescaled to sum to 1 - tail, which reading does. A forward KL of them is then off by at most
e^d d + (e^d - 1) max|log p - log q| over the kept outcomes and the tail.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd.errors import UserError
from kd.io import checksums, finished, shards
from kd.losses import signal as signal_lib

PREFIX = 'teacher_'
_FOLDER = 'teacher'
_DTYPES = ('float32', 'float16')
_WHAT = 'cache of teacher outputs'


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
      ragged: whether an example has as many positions as count in it, `shape` being [T, V].
    """

    def __init__(
        self,
        directory: Path,
        form: Form,
        shape: tuple[int, ...],
        examples: int,
        per_file: int,
        made_of: Mapping[str, Any],
        *,
        ragged: bool = False,
    ) -> None:
        self.record = form.record(shape[-1:] if ragged else shape)
        self.shape = tuple(shape)
        manifest = {
            **dataclasses.asdict(form),
            'shape': list(shape),
            'ragged': ragged,
            'examples': examples,
            'per_file': per_file,
            'made_of': dict(made_of),
        }
        self.files = shards.Writer(directory / _FOLDER, manifest, _WHAT)

    def begin(self) -> list[int]:
        """As `shards.Writer.begin`."""
        return self.files.begin()

    def write(
        self, index: int, fields: Mapping[str, np.ndarray], lengths: np.ndarray | None = None
    ) -> None:
        """Writes file `index`.

        Args:
          index: of the file.
          fields: by name, with the file's examples on the first axis; of a ragged cache with all
            positions of the first example that count, then those of the second, and so on.
          lengths: int [S], how many positions of each example count; None unless ragged.
        """
        if lengths is None:
            lengths = np.ones(self.files.count(index), int)
        rows = np.empty(int(lengths.sum()), self.record)
        for name in self.record.names or ():
            if len(fields[name]) != len(rows):
                raise ValueError(f'file {index} has {len(rows)} rows, got {len(fields[name])}.')
            with np.errstate(over='ignore'):
                rows[name] = fields[name]
            # Minus infinity stays what it is; what is finite must not become infinite.
            finite = np.isfinite(fields[name])
            if not np.array_equal(np.isfinite(rows[name]), finite):
                raise UserError(
                    f'{name} of the teacher reach {np.abs(fields[name][finite]).max():.3g}, more '
                    "than float16 holds; set the method's dtype to 'float32'."
                )
        size, content = self.record.itemsize, rows.tobytes()
        ends = np.cumsum(lengths) * size
        begins = ends - lengths * size
        self.files.write(index, [content[a:b] for a, b in zip(begins, ends, strict=True)])

    def finish(self) -> dict[str, Any]:
        """Marks the cache as complete; returns the manifest with its sizes in bytes.

        `record_bytes` are those of an example, or of a position of a ragged cache,
        `bytes_per_example` what lies on disk, `dense_bytes_per_example` what the logits alone
        would take as float32.
        """
        dense = 4 * int(np.prod(self.shape))
        return self.files.finish(record_bytes=self.record.itemsize, dense_bytes_per_example=dense)


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
        names = [field.name for field in dataclasses.fields(Form)]
        self._stored = shards.Reader(
            directory / _FOLDER,
            _WHAT,
            keys=(*names, 'shape', 'ragged'),
            made_of=made_of,
            expected=dataclasses.asdict(form) if form else None,
        )
        self.manifest = self._stored.manifest
        self.form = Form(**{name: self.manifest[name] for name in names})
        self.shape, self.ragged = tuple(self.manifest['shape']), self.manifest['ragged']
        self._record = self.form.record(self.shape[-1:] if self.ragged else self.shape)

    def __len__(self) -> int:
        return len(self._stored)

    def fetch(self, indices: np.ndarray, where: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Fields of the examples `indices` [B] as in `Form.spec`, each [B, ...].

        Args:
          indices: int [B].
          where: bool [B, T], the positions that count; for a ragged cache, in which the others are
            nothing: log-probabilities -inf, weights 0.
        """
        records = self._stored.records(indices)
        lengths = np.ones(len(indices), int) if where is None else where.sum(1)
        for index, record, length in zip(indices, records, lengths, strict=True):
            if len(record) != length * self._record.itemsize:
                raise self._stored.refuse(index)
        rows = np.frombuffer(b''.join(records), self._record)
        fields = {}
        for name in self._record.names or ():
            dtype = np.int32 if rows[name].dtype.kind == 'u' else np.float32
            fields[PREFIX + name] = rows[name].astype(dtype)
        if self.form.form == 'top_k':
            _rescale(fields)
        return fields if where is None else _spread(fields, where)


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


def _spread(fields: Mapping[str, np.ndarray], where: np.ndarray) -> dict[str, np.ndarray]:
    """Fields of the positions that count, at their places [B, T, ...]."""
    spread = {}
    for name, rows in fields.items():
        nothing = -np.inf if name == PREFIX + 'log_probs' else 0
        spread[name] = np.full((*where.shape, *rows.shape[1:]), nothing, rows.dtype)
        spread[name][where] = rows
    return spread
