"""Packages of the extras, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from kd.errors import UserError


def need(name: str, extra: str = 'lm') -> ModuleType:
    """Imports a package of an extra.

    Raises:
      UserError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition('.')[0]:
            raise
        raise UserError(
            f"The package {error.name} is missing: pip install -e '.[{extra}]' brings it."
        ) from error
