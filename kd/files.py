"""Files of a run: written whole or not at all, and read with their name in every complaint.

What is written is JSON as others read it: a number that is not finite is `null`.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kd.errors import UserError

# As pathlib writes it, the address of a bucket has one slash: gs:/bucket.
_ADDRESS = re.compile(r'[A-Za-z][A-Za-z0-9+.-]+:/.*')


def local(path: str | os.PathLike, where: str = '') -> Path:
    """A path as given by a person; `where` is the flag or field that gave it.

    Raises:
      UserError: the address of a bucket or of another machine, which would become a local folder.
    """
    text = os.fspath(path)
    if _ADDRESS.fullmatch(text):
        raise UserError(
            f"{where}{': ' if where else ''}'{text}' is an address; kd reads and writes folders of "
            'this machine only: mount the bucket (with gcsfuse, say) and name the folder.'
        )
    return Path(text)


@contextlib.contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """Gives a place to write to, which becomes `file` at the end: whole, and on the disk.

    A process that dies meanwhile leaves the old file; an error leaves nothing beside it.
    """
    partial = file.with_name(file.name + '.partial')
    try:
        with naming(file):
            yield partial
        _sync(partial)
        partial.replace(file)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise
    # Some file systems have no directories to be synced.
    with contextlib.suppress(OSError):
        _sync(file.parent)


@contextlib.contextmanager
def naming(file: Path) -> Iterator[None]:
    """An `OSError` of a write does not say of which file it is: within, it does."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(file)
        raise


def write_whole(file: Path, text: str) -> None:
    """Writes a text file; see `replacing`."""
    with replacing(file) as partial:
        partial.write_text(text, encoding='utf-8')


def write_json(file: Path, value: Any) -> None:
    """Writes a JSON file; see `replacing` and `json_text`."""
    write_whole(file, json_text(value, indent=1) + '\n')


def json_text(value: Any, *, indent: int | None = None) -> str:
    """A plain value as JSON, with `null` for NaN and the infinities, which JSON does not have."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def read_json(file: Path, advice: str) -> dict[str, Any]:
    """The object in a JSON file.

    Args:
      file: that exists.
      advice: what to do if it is damaged.

    Raises:
      UserError: it holds anything else; its name comes first.
    """
    try:
        value = json.loads(file.read_text(encoding='utf-8'))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f'{file} is damaged: it is not the JSON that was written; {advice}.')
    return value


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
