"""Which stages of a recipe a command runs, and whether results that are there are still theirs.

What a stage's result depends on: its own block, the blocks of the stages that it names, the
entries of `pretrained` that they name, the recipe's seed and data, and its place among the stages,
which decides its randomness. As long as these are the same a finished stage is passed over,
whatever else of the recipe has changed.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kd import files
from kd.callables import resolve
from kd.config import Recipe, first_difference
from kd.errors import UserError, did_you_mean
from kd.io import finished
from kd.io.workdir import Workdir

# Fields that decide which checkpoint of a stage is its result.
_OF_RESULT = ('best', 'final', 'keep')
# Where the files of stages that begin anew go.
OLD = 'old'


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a command asks of a recipe's stages, by their names.

    Attributes:
      only: run these and no others; all if empty.
      again: begin these from nothing; what they had is moved to `old/`.
      longer: let these, which are done, go on to the number of steps that they have now.
    """

    only: tuple[str, ...] = ()
    again: tuple[str, ...] = ()
    longer: tuple[str, ...] = ()

    def stages(self, recipe: Recipe) -> tuple[str, ...]:
        """The stages to run, in the recipe's order.

        Raises:
          UserError: a name that is no stage.
        """
        for flag in ('only', 'again', 'longer'):
            for name in getattr(self, flag):
                if name not in recipe.stages:
                    shown = 'stages' if flag == 'only' else flag
                    raise UserError(
                        f"--{shown}: there is no stage '{name}'."
                        f'{did_you_mean(name, recipe.stages)} Stages: {", ".join(recipe.stages)}.'
                    )
        return tuple(name for name in recipe.stages if not self.only or name in self.only)


EVERYTHING = Choice()


def named(recipe: Mapping[str, Any], name: str) -> list[str]:
    """The stages that a stage is made from, directly or not, in the recipe's order.

    A stage is named by any text in a block, or default of the callable that the block names, that
    is its name, also with an average: 'teacher@slow'.

    Args:
      recipe: plain, as of `Recipe.plain`.
      name: of the stage.
    """
    earlier = list(recipe['stages'])[: list(recipe['stages']).index(name)]
    found = {text.partition('@')[0] for text in _texts(recipe[name])} & set(earlier)
    found |= {further for direct in found for further in named(recipe, direct)}
    return [stage for stage in earlier if stage in found]


def check(
    old: Mapping[str, Any],
    new: Mapping[str, Any],
    started: Iterable[str],
    choice: Choice,
    *,
    done: Iterable[str] = (),
) -> None:
    """Refuses what is there of a stage, if it is not of the config that now is asked for.

    Args:
      old, new: plain recipes, after a journey through JSON both.
      started: stages of which there are files.
      choice: what the command asks for.
      done: those of them that are finished; of the others one may still choose which checkpoint
        is the result.

    Raises:
      UserError: says the first difference and what to do.
    """
    for name in started:
        if name in choice.again or name not in new['stages']:
            continue
        stale = [stage for stage in named(new, name) if stage in choice.again]
        if stale:
            both = ','.join([*choice.again, name])
            raise UserError(
                f"'{name}' was made from '{stale[0]}', which begins anew: --again={both}"
            )
        difference = _difference(old, new, name, choice, open_=name not in done)
        if difference:
            steps = f'{name}.steps was'
            more = f', let it go on with --longer={name}' if difference.startswith(steps) else ''
            raise UserError(
                f"stage '{name}' is there, made with another config: {difference}. Choose another "
                f'workdir{more}, or begin it anew with --again={name}.'
            )


def check_workdir(workdir: Workdir, recipe: Recipe, choice: Choice) -> None:
    """Refuses a work directory whose stages are others, or lack what chosen ones are made from."""
    old, started = workdir.stored(), workdir.started()
    done = [name for name in recipe.stages if finished.read_done(workdir.path / name)]
    if old is not None:
        plain = json.loads(files.json_text(recipe.plain()))
        check(old, plain, started, choice, done=done)
    kept = set(done) - set(choice.again)
    check_made(recipe, choice.stages(recipe), kept, workdir.path)


def settle(workdir: Workdir, choice: Choice) -> None:
    """Moves away stages that begin anew, and opens those that go on."""
    for name in choice.again:
        if (workdir.path / name).exists():
            set_aside(workdir.path, name)
    for name in choice.longer:
        finished.unmark_done(workdir.path / name)


def _difference(
    old: Mapping[str, Any], new: Mapping[str, Any], name: str, choice: Choice, *, open_: bool
) -> str | None:
    if name not in old:
        return None
    places = [list(recipe['stages']).index(name) for recipe in (old, new)]
    if places[0] != places[1]:
        return f"'{name}' was stage {places[0] + 1} and is stage {places[1] + 1}"
    parts = ['seed', 'data', *named(new, name), name]
    before: dict[str, Any] = {part: old.get(part) for part in parts}
    now: dict[str, Any] = {part: new.get(part) for part in parts}
    before['pretrained'], now['pretrained'] = (_pretrained(of, parts) for of in (old, new))
    if open_:
        before[name] = {**before[name], **{field: now[name][field] for field in _OF_RESULT}}
    if name in choice.longer:
        if now[name]['steps'] < before[name]['steps']:
            return f'{name}.steps was {before[name]["steps"]} and is {now[name]["steps"]}'
        before[name] = {**before[name], 'steps': now[name]['steps']}
    return first_difference(before, now)


def _pretrained(recipe: Mapping[str, Any], parts: Iterable[str]) -> dict[str, Any]:
    """The entries of `pretrained` that blocks of a recipe name."""
    named = {text for part in parts for text in _texts(recipe.get(part))}
    return {name: x for name, x in recipe.get('pretrained', {}).items() if name in named}


def check_made(recipe: Recipe, chosen: Iterable[str], done: Iterable[str], workdir: Path) -> None:
    """Refuses to run stages whose makings are neither done nor going to be.

    Raises:
      UserError: says which stage is missing and where else it may come from.
    """
    plain, there = recipe.plain(), {*chosen, *done}
    for name in chosen:
        for needed in named(plain, name):
            if needed not in there:
                raise UserError(
                    f"--stages: '{name}' is made from '{needed}', which is not done in {workdir}: "
                    f'add it, or name the stage of another run, as in '
                    f'--config.{name}.teacher=runs/other/{needed}.'
                )


def set_aside(workdir: Path, name: str) -> None:
    """Moves the files of a stage to `old/NAME-1`, or the first number that is free."""
    folder = workdir / OLD
    folder.mkdir(exist_ok=True)
    number = 1
    while (folder / f'{name}-{number}').exists():
        number += 1
    (workdir / name).rename(folder / f'{name}-{number}')


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _defaults(value)
        for item in value.values():
            yield from _texts(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def _defaults(block: Mapping[str, Any]) -> Iterator[str]:
    """Texts that are defaults of the callable that a block names, where the block is silent."""
    path = block.get('name', '')
    if not isinstance(path, str) or '.' not in path:
        return
    for name, parameter in inspect.signature(resolve(path)).parameters.items():
        if name not in block and isinstance(parameter.default, str):
            yield parameter.default
