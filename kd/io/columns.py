"""Numbers that a stage has found of every example of a split, by name: weights, choices, outputs.

    DIRECTORY/columns/00003.array_record      columns of the examples 3 S .. 4 S - 1, a record each

Files are written as `kd.io.shards` says. A writer says which columns it writes:

    @columns.written(lambda source: {'weight': columns.NUMBER})
    def weights(context, ...) -> Writer: ...

from which those who read them know their shapes before there are any (`kd.data.columns`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from kd.errors import UserError
from kd.io import shards

WHAT = 'set of columns'
_FOLDER, _MARK = 'columns', 'columns_of'
NUMBER = jax.ShapeDtypeStruct((), np.float32)
TRUTH = jax.ShapeDtypeStruct((), np.bool_)
# {name: shape and dtype for one example}
Spec = Mapping[str, jax.ShapeDtypeStruct]
F = TypeVar('F', bound=Callable[..., Any])


def written(spec: Callable[[Any], Spec]) -> Callable[[F], F]:
    """Marks a writer of columns; `spec(source)` are those of the examples of a source."""

    def mark(function: F) -> F:
        setattr(function, _MARK, spec)
        return function

    return mark


def spec_of(writer: Callable[..., Any], source: Any) -> Spec | None:
    """The columns of a writer's function for the examples of a source; None if it writes none."""
    spec = getattr(writer, _MARK, None)
    return None if spec is None else spec(source)


class Writer:
    """Writes the columns of one split.

    Args:
      directory: of the stage.
      spec: of the columns.
      examples: how many there are.
      made_of: fingerprints of what must agree to go on.
      per_file: S.

    Raises:
      UserError: the directory holds columns of something else.
    """

    def __init__(
        self,
        directory: Path,
        spec: Spec,
        examples: int,
        made_of: Mapping[str, Any],
        *,
        per_file: int = 1 << 16,
    ) -> None:
        self._record = _record(spec)
        manifest = {
            'fields': _fields(spec),
            'examples': examples,
            'per_file': per_file,
            'made_of': dict(made_of),
        }
        self.files = shards.Writer(directory / _FOLDER, manifest, WHAT)

    def complete(self) -> bool:
        """Whether there is nothing left to write."""
        self.files.begin()
        return self.files.complete

    def write(self, values: Mapping[str, np.ndarray]) -> None:
        """Writes what is missing of columns [N, ...], and marks them as complete."""
        examples, size = self.files.manifest['examples'], self.files.manifest['per_file']
        rows = np.empty(examples, self._record)
        for name in self._record.names or ():
            if len(values[name]) != examples:
                raise ValueError(f"'{name}' has {len(values[name])} of {examples} examples.")
            rows[name] = values[name]
        for index in self.files.begin():
            part = rows[index * size : (index + 1) * size]
            self.files.write(index, [row.tobytes() for row in part])
        self.files.finish()


class Columns:
    """Complete columns, read at random.

    Args:
      directory: of the stage that wrote them.
      spec: what is expected.
      made_of: fingerprints that are expected; those left out are not compared.

    Raises:
      UserError: no columns, not all of them, or those of something else.
    """

    def __init__(
        self, directory: Path, spec: Spec, made_of: Mapping[str, Any] | None = None
    ) -> None:
        self.spec, self._record = dict(spec), _record(spec)
        self._stored = shards.Reader(
            directory / _FOLDER, WHAT, made_of=made_of, expected={'fields': _fields(spec)}
        )

    def __len__(self) -> int:
        return len(self._stored)

    def fetch(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Columns of the examples `indices` [B], each [B, ...]."""
        indices = np.asarray(indices)
        records = self._stored.records(indices)
        for index, record in zip(indices, records, strict=True):
            if len(record) != self._record.itemsize:
                raise self._stored.refuse(index)
        rows = np.frombuffer(b''.join(records), self._record)
        return {name: rows[name].astype(x.dtype) for name, x in self.spec.items()}

    def all(self) -> dict[str, np.ndarray]:
        """Columns of all examples."""
        return self.fetch(np.arange(len(self)))


def check_names(names: Mapping[str, Any] | tuple[str, ...], spec: Spec, where: str) -> None:
    """Raises `UserError` for a name that is no column."""
    for name in names:
        if name not in spec:
            raise UserError(f"{where}: there is no column '{name}', only {', '.join(spec)}.")


def _record(spec: Spec) -> np.dtype:
    return np.dtype(
        [(name, np.dtype(x.dtype).newbyteorder('<'), x.shape) for name, x in spec.items()]
    )


def _fields(spec: Spec) -> dict[str, Any]:
    return {name: [str(np.dtype(x.dtype)), list(x.shape)] for name, x in spec.items()}
