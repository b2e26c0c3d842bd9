"""The end of a stage: what it leaves behind, and whether that is still there."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax

from kd import callables, files, ranges
from kd.config import Recipe
from kd.data.context import splits
from kd.errors import UserError, did_you_mean, one_line
from kd.io import checkpoints, checksums, finished
from kd.io.progress import say
from kd.io.workdir import read_metrics
from kd.network import parameter_count
from kd.parallel import distributed
from kd.state import State
from kd.training import nonfinite
from kd.training.stage import Stage

_REPORT = '.report.json'
# What a stage's directory holds beside the files of its writers.
_OWN = ('checkpoints', 'broken_checkpoints', 'tensorboard', 'figures', 'texts', 'profile')


def finish(stage: Stage, directory: Path, saved: checkpoints.Checkpoints, state: State) -> None:
    """Marks a stage as done, with the checksums of its result and the files that it wrote.

    Raises:
      UserError: files that it wrote before are gone, and its last state does not make them again.
    """
    step, last = stage.config.steps, stage.config.steps
    variables = checkpoints.variables(state)
    if stage.config.final == 'best' and (step := saved.best_step()) != last:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), variables
        )
        variables = finished.restore_variables(directory, step, abstract, stage.name)
    weights = checksums.of_tree(variables)
    parameters = parameter_count({'params': state.params[state.result]})

    def mark() -> None:
        nonfinite.check_updates(stage.name, directory, stage.config.steps)
        # From the log and not from this process, which may have come after the last step.
        lines = read_metrics(directory)
        logged = {name: value for line in lines for name, value in line.items()}
        speeds = [line['time/steps_per_s'] for line in lines if 'time/steps_per_s' in line]
        others = ('step', 'time/steps_per_s')
        record = {
            'step': step,
            'steps_per_s': next(filter(math.isfinite, reversed(speeds)), None),
            'metrics': {name: value for name, value in logged.items() if name not in others},
            'result': state.result,
            'parameters': parameters,
            'weights': weights,
            'files': _products(directory) if stage.writers else {},
        }
        gone = lost(directory, finished.read_done(directory) or {})
        if gone:
            raise UserError(
                f'{directory / gone[0]} is gone, and the last checkpoint does not hold what made '
                f'it: bring it back, or delete {directory} to run the stage from its beginning.'
            )
        finished.mark_done(directory, record)

    distributed.from_first(mark)


def check_report(recipe: Recipe) -> None:
    """Raises `UserError` for a report that could not be made, before anything is trained."""
    if not recipe.report:
        return
    function, arguments = callables.named(recipe.report, where='report')
    with one_line('report'):
        inspect.signature(function).bind(None, **arguments)
    hints = ranges.hints(function)
    for argument, value in arguments.items():
        where, hint = f'report.{argument}', hints.get(argument)
        for kind, name in ranges.names(hint, value):
            known = _known(kind, recipe, arguments)
            if name not in known:
                raise UserError(
                    f"{where} names the {kind} '{name}', and the recipe has "
                    f'{", ".join(known)}.{did_you_mean(name, known)}'
                )
        _check_blocks(value, where)


def _known(kind: str, recipe: Recipe, arguments: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of a kind that the recipe has, or its report with these arguments."""
    if kind == 'row':
        return tuple(row[0] for row in arguments['rows'])
    return tuple(recipe.stages) if kind == 'stage' else splits(recipe.data)


def _check_blocks(value: Any, where: str) -> None:
    """Looks at the blocks inside an argument, such as those of networks."""
    if isinstance(value, Mapping):
        if '.' in str(value.get('name', '')):
            callables.named(value, where=where)
        for key, item in value.items():
            _check_blocks(item, f'{where}.{key}')


def reported(recipe: Recipe, chosen: Iterable[str], workdir: Path) -> bool:
    """Whether a run makes its report now; where it makes none, says what its stages have found."""
    left = [name for name in recipe.stages if finished.read_done(workdir / name) is None]
    if recipe.report and not left:
        return True
    if recipe.report:
        say('report', f'left out: not done in {workdir} are {", ".join(left)}')
    for name in chosen:
        done = finished.read_done(workdir / name) or {'metrics': {}}
        found = [
            f'{metric} {value:.4g}'
            for metric, value in done['metrics'].items()
            if not metric.startswith(('train/', 'time/')) and value is not None
        ]
        if found:
            say(name, ', '.join(found))
    return False


def report_there(recipe: Recipe, workdir: Path) -> Path | None:
    """The report, if it is there and of this recipe and these results."""
    noted = workdir / _REPORT
    if not noted.exists():
        return None
    found = files.read_json(noted, 'delete it, and the report is made again')
    report = workdir / str(found.get('path'))
    return report if found.get('of') == _made_of(recipe, workdir) and report.exists() else None


def note_report(recipe: Recipe, workdir: Path, report: Path) -> None:
    """Notes what a report was made of."""
    record = {'path': str(report.relative_to(workdir)), 'of': _made_of(recipe, workdir)}
    files.write_json(workdir / _REPORT, record)


def _made_of(recipe: Recipe, workdir: Path) -> str:
    plain = recipe.plain()
    results = {name: finished.read_done(workdir / name) for name in recipe.stages}
    kept = {name: plain[name] for name in ('report', 'data', 'seed', *recipe.stages)}
    return hashlib.sha256(files.json_text([kept, results]).encode()).hexdigest()[:16]


def lost(directory: Path, done: dict[str, Any]) -> list[str]:
    """Files of a finished stage that are missing, or cut short.

    Raises:
      UserError: its checkpoint is missing.
    """
    if done and not (directory / 'checkpoints' / str(done['step'])).is_dir():
        raise UserError(
            f'{directory} is marked as done but checkpoint {done["step"]} is missing: bring it '
            f'back, or begin the stage anew with --again={directory.name}.'
        )
    return [
        name
        for name, size in done.get('files', {}).items()
        if not (directory / name).exists() or (directory / name).stat().st_size != size
    ]


def discard(directory: Path, names: list[str]) -> None:
    """Removes what was left of such files, so that their writers make them again."""
    for name in names:
        (directory / name).unlink(missing_ok=True)


def _products(directory: Path) -> dict[str, int]:
    """{path: bytes} of the files that writers made."""
    found = {}
    for path in sorted(directory.rglob('*/*')):
        inside = path.relative_to(directory)
        if path.is_file() and inside.parts[0] not in _OWN and path.suffix != '.partial':
            found[str(inside)] = path.stat().st_size
    return found
