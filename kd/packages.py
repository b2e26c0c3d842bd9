"""Packages of the extra `lm`, imported where they are needed."""

from __future__ import annotations

import importlib
from types import ModuleType

from kd.errors import UserError


def need(name: str) -> ModuleType:
    """Imports a package of the extra.

    Raises:
      UserError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name.partition('.')[0]:
            raise
        raise UserError(
            f"The package {error.name} is missing: pip install -e '.[lm]' brings it."
        ) from error
