"""What a stage has found out that networks of later stages are made by.

    network=dict(name='kd.models.dit.DiT', dropped=dict(found_by='sensitivity', otherwise=()), ...)

is the network with `dropped` as the stage `sensitivity` of the same run has written it; a recipe
that is only traced has `otherwise`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kd import files
from kd.errors import UserError

__all__ = ['FILE', 'read', 'resolved', 'write']

FILE = 'found.json'
_MARK = 'found_by'


def write(directory: Path, values: Mapping[str, Any]) -> None:
    """Writes what a stage has found, by name."""
    files.write_json(directory / FILE, dict(values))


def read(directory: Path) -> dict[str, Any]:
    """What a stage has found.

    Raises:
      UserError: nothing.
    """
    file = directory / FILE
    if not file.is_file():
        raise UserError(f"{directory} has no {FILE}: run the stage '{directory.name}' first.")
    return files.read_json(file, 'its stage writes it again')


def resolved(
    block: Mapping[str, Any], locate: Callable[[str], Path] | None, where: str
) -> dict[str, Any]:
    """A block with what stages have found in the place of their names.

    Args:
      block: of a network, and blocks within it.
      locate: directory of a stage; None while a recipe is traced.
      where: place in the config, for messages.

    Raises:
      UserError: a stage that has not found it.
    """

    def value(name: str, x: Any) -> Any:
        if not isinstance(x, Mapping):
            return x
        if _MARK not in x:
            return {key: value(key, inner) for key, inner in x.items()}
        if locate is None:
            return _frozen(x.get('otherwise', ()))
        stage = locate(x[_MARK])
        found = read(stage)
        if name not in found:
            raise UserError(f"{where}.{name}: '{stage.name}' has found no '{name}', {list(found)}.")
        return _frozen(found[name])

    return {name: value(name, x) for name, x in block.items()}


def _frozen(value: Any) -> Any:
    return tuple(map(_frozen, value)) if isinstance(value, list | tuple) else value
