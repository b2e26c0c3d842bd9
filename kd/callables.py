"""Callables that a config names by import path, and the keywords that they take."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ml_collections import ConfigDict

from kd import ranges
from kd.errors import UserError, did_you_mean, one_line


def resolve(path: str) -> Any:
    """The object at a dotted import path, such as 'kd.losses.divergence.forward_kl'."""
    module_path, _, attribute = path.rpartition('.')
    if not module_path:
        raise UserError(f"'{path}' is not an import path such as 'kd.models.mlp.MLP'.")
    with one_line(f"'{path}'"):
        try:
            module = importlib.import_module(module_path)
        except ModuleNotFoundError as error:
            if error.name is None or not module_path.startswith(error.name):
                raise
            raise UserError(f"'{path}': there is no module {error.name}.") from error
    if not hasattr(module, attribute):
        raise UserError(
            f"'{path}': {module_path} has no '{attribute}'.{did_you_mean(attribute, dir(module))}"
        )
    return getattr(module, attribute)


def named(
    block: Mapping[str, Any], *, where: str, reserved: Iterable[str] = ()
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """The callable that a block names and the keywords for it, which it takes.

    Raises:
      UserError: no name, one that cannot be imported, or keywords that it does not take; numbers
        outside what it declares.
    """
    if not isinstance(block, Mapping | ConfigDict):
        raise UserError(f"{where} must be a block with a 'name', got {block!r}.")
    arguments = dict(block)
    if 'name' not in arguments:
        raise UserError(f"{where} has no 'name'; it must be an import path.")
    function = resolve(arguments.pop('name'))
    check_arguments(function, arguments, where=where, reserved=reserved)
    ranges.check(function, arguments, where=where)
    _check_keywords(function, arguments, where)
    return function, arguments


def _check_keywords(function: Callable, arguments: Mapping[str, Any], where: str) -> None:
    """Looks into arguments that are keywords of another function."""
    hints = ranges.hints(function)
    for argument, value in arguments.items():
        mark = ranges.keywords(hints.get(argument))
        if mark and value:
            place = f'{where}.{argument}'
            check_arguments(mark.function, value, where=place, reserved=mark.reserved)
            ranges.check(mark.function, value, where=place)


def check_arguments(
    function: Callable, arguments: Iterable[str], *, where: str, reserved: Iterable[str] = ()
) -> None:
    """Raises `UserError` for keywords that `function` does not take."""
    parameters = inspect.signature(function).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    hidden = {'self', 'parent', *reserved}
    known = [
        n for n, p in parameters.items() if p.kind is not p.POSITIONAL_ONLY and n not in hidden
    ]
    for argument in arguments:
        if argument not in known:
            raise UserError(
                f"{where} has an unknown key '{argument}'.{did_you_mean(argument, known)} "
                f'{getattr(function, "__name__", function)} takes: {", ".join(known)}.'
            )
