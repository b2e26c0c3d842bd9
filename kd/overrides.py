"""Fields of a config set from the command line."""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from typing import Any

from kd.callables import resolve
from kd.config import ConfigDict
from kd.errors import UserError, did_you_mean


def override(config: ConfigDict, assignments: Mapping[str, str]) -> list[str]:
    """Sets fields from text, in place: `override(config, {'student.optimizer.lr': '1e-3'})`.

    A field takes the type of the value it has. A block that names a callable also takes arguments
    of it that the config leaves at their defaults; named another one, it loses the arguments that
    the other does not take. Where names are free (`ema`, `references`, `data`, `pretrained`,
    labels of `evaluators` and `writers`) new ones may be given. The empty text empties a block:
    `{'report': ''}` is no report.

    Returns:
      Sentences to be told: arguments that were lost.

    Raises:
      UserError: no such field, or text that is not of the field's type.
    """
    told = []
    # Names first: they decide which arguments there are.
    for path in sorted(assignments, key=lambda path: not path.endswith('.name')):
        text = assignments[path]
        *parents, field = path.split('.')
        block = _block(config, parents)
        if field in block and isinstance(block[field], ConfigDict):
            if text:
                raise UserError(
                    f'config.{path} is a block; set one of: {", ".join(block[field])}. '
                    f'To empty it, write --config.{path}= and nothing behind it.'
                )
            value: Any = ConfigDict()
        elif field in block:
            value = _parse(path, text, block[field])
        else:
            _check_new(block, parents, field)
            value = _literal(text)
        with block.unlocked(), block.ignore_type():
            if field == 'name' and block.get('name', value) != value and '.' in value:
                told += _renamed(block, parents, value)
            block[field] = value
    return told


def _block(config: ConfigDict, parents: list[str]) -> ConfigDict:
    """The block at a path; an empty one is made where its name is free."""
    block = config
    for depth, name in enumerate(parents):
        if name not in block and _free(parents[:depth]):
            with block.unlocked():
                block[name] = ConfigDict()
        if name not in block or not isinstance(block[name], ConfigDict):
            blocks = [key for key, value in block.items() if isinstance(value, ConfigDict)]
            raise UserError(
                f'config.{".".join(parents[: depth + 1])} is no block of the config.'
                f'{did_you_mean(name, blocks)}'
            )
        block = block[name]
    return block


def _free(parents: list[str]) -> bool:
    """Whether a block takes any name."""
    free = ('ema', 'references', 'data', 'evaluators', 'writers')
    return parents[:1] == ['pretrained'] or parents[-1:] in [[name] for name in free]


def _check_new(block: ConfigDict, parents: list[str], field: str) -> None:
    """Refuses a field that the block neither has nor may take."""
    if _free(parents) or (field == 'name' and not block and parents):
        return
    named, more = _arguments(block, parents)
    known = {*block, *named}
    near = did_you_mean(field, known)
    # What goes on to another function is checked there, unless it looks like a slip.
    if field not in known and (near or not more):
        raise UserError(
            f"The config has no field '{'.'.join([*parents, field])}'.{near} "
            f'{".".join(parents) or "It"} has: {", ".join(sorted(known))}.'
        )


def _renamed(block: ConfigDict, parents: list[str], name: str) -> list[str]:
    """Drops the arguments that the callable does not take; says which."""
    named, more = _arguments(ConfigDict({'name': name}), parents)
    # An evaluator's split and a writer's period are their stage's.
    kept = {'name', 'split', 'every', *named}
    lost = [] if more else [key for key in block if key not in kept]
    for key in lost:
        del block[key]
    return [f'{".".join(parents)}: {name} does not take {", ".join(lost)}.'] if lost else []


def _arguments(block: ConfigDict, parents: list[str]) -> tuple[list[str], bool]:
    """Arguments of the callable that a block names, and whether it passes others on."""
    hidden = {'context', 'parent', 'name'}
    if parents[-1:] == ['optimizer']:
        path = 'kd.training.optimizer.optimizer'
        # Those of the stage.
        hidden.add('steps')
    elif 'name' in block and '.' in block.name:
        path = block.name
    else:
        return [], False
    parameters = inspect.signature(resolve(path)).parameters.values()
    # An evaluator's split is read by its stage.
    names = ['split'] if parents[-2:-1] == ['evaluators'] else []
    names += [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in hidden]
    return names, any(p.kind is p.VAR_KEYWORD for p in parameters)


def _parse(path: str, text: str, old: Any) -> Any:
    if isinstance(old, str):
        return text
    value = _literal(text)
    if isinstance(old, bool):
        value = {'true': True, 'false': False}.get(text.lower(), value)
        fits = isinstance(value, bool)
    elif isinstance(old, int):
        value = int(value) if isinstance(value, float) and value.is_integer() else value
        fits = isinstance(value, int) and not isinstance(value, bool)
    elif isinstance(old, float):
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        value = float(value) if fits else value
    elif isinstance(old, tuple):
        value = tuple(value) if isinstance(value, list) else value
        fits = isinstance(value, tuple)
    else:
        fits = True
    if not fits:
        kind = type(old).__name__
        raise UserError(
            f'config.{path} takes a value of type {kind}, such as {old!r}; got {text!r}.'
        )
    return value


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
