"""Runs side by side: what differs in their configs, what their stages ended with, their curves.

    python -m kd.compare runs/a runs/b
    python -m kd.compare runs/sweep/* --stage=student --metrics=validation/accuracy --out=sweep

A run is a work directory, finished or not. The table has a row for each stage of each run, with the
settings in which the runs differ; several runs that differ in nothing but their seed are one row of
means and standard errors. It is printed, and written with the curves to `--out`: compare.md,
compare.png and compare.json.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd import figures, files, process
from kd.errors import UserError, did_you_mean
from kd.io import finished
from kd.io.workdir import read_metrics

# Keys of a config that say where and not what.
_WHERE = ('data_dir',)
# Columns and panels, unless metrics are named.
_MOST = 8


class Row(NamedTuple):
    """A stage of a run.

    Attributes:
      run, stage: its names.
      settings: {key of the config: value}, flat, of the run but for other stages.
      seed: of the run.
      step: of the checkpoint that it ended with, or the last one logged.
      done: whether it is finished.
      metrics: what was logged last.
      lines: of metrics.jsonl.
    """

    run: str
    stage: str
    settings: Mapping[str, Any]
    seed: int
    step: int
    done: bool
    metrics: Mapping[str, float]
    lines: Sequence[Mapping[str, float]]


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table and writes it with its figure; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.compare', description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    path = process.path_argument
    parser.add_argument('runs', nargs='+', type=path, metavar='RUN', help='a work directory')
    parser.add_argument('--stage', default='', help='names, with commas; all by default')
    parser.add_argument('--metrics', default='', help='names, with commas; validation by default')
    parser.add_argument('--out', type=path, help='a directory for the page; printed alone if not')
    arguments = parser.parse_args(argv)
    rows = [row for run in arguments.runs for row in read(run)]
    rows = _of_stages(rows, tuple(filter(None, arguments.stage.split(','))))
    metrics = _metrics(rows, tuple(filter(None, arguments.metrics.split(','))))
    text = table(rows, metrics)
    print(text)
    if arguments.out:
        with files.naming(arguments.out):
            arguments.out.mkdir(parents=True, exist_ok=True)
        curves(rows, metrics).savefig(arguments.out / 'compare.png')
        files.write_json(arguments.out / 'compare.json', [_record(row) for row in rows])
        page = f'# {len(arguments.runs)} runs\n\n{text}\n\n![Curves](compare.png)\n'
        files.write_whole(arguments.out / 'compare.md', page)
    return 0


def read(run: Path) -> list[Row]:
    """The stages of a work directory, as far as they have begun.

    Raises:
      UserError: no work directory.
    """
    file = run / 'config.json'
    if not file.is_file():
        raise UserError(f"'{run}' is no work directory: it has no config.json.")
    config = files.read_json(file, 'the lines of manifest.json beside it hold it too')
    stages = [name for name, block in config.items() if _is_stage(block)]
    found = []
    for name in stages:
        done, lines = finished.read_done(run / name), read_metrics(run / name)
        if done is None and not lines:
            continue
        own = {key: value for key, value in config.items() if key not in stages or key == name}
        settings = {key: value for key, value in _flat(own).items() if key not in _WHERE}
        seed = settings.pop('seed', 0)
        logged = {key: value for line in lines for key, value in line.items()}
        metrics = {key: value for key, value in logged.items() if key != 'step'}
        step = done['step'] if done else int(logged.get('step', 0))
        ended = {**metrics, **(done or {}).get('metrics', {})}
        found.append(Row(run.name, name, settings, seed, step, done is not None, ended, lines))
    return found


def table(rows: Sequence[Row], metrics: Sequence[str]) -> str:
    """A Markdown table, a line for each group of runs that differ in their seed alone."""
    differing = differences(rows)
    several = len({row.stage for row in rows}) > 1
    heads = ['run', *(['stage'] if several else []), *differing, 'step', *metrics]
    lines = ['| ' + ' | '.join(heads) + ' |', '|---' * (len(heads) - len(metrics)) + '|']
    lines[1] += '---:|' * len(metrics)
    for group in grouped(rows):
        first = group[0]
        name = first.run if len(group) == 1 else f'{first.run} and {len(group) - 1} more seeds'
        steps = sorted({row.step for row in group})
        shown = ' to '.join(str(step) for step in dict.fromkeys((steps[0], steps[-1])))
        shown += '' if all(row.done for row in group) else ', not finished'
        cells = [name, *([first.stage] if several else [])]
        cells += [_setting(first.settings.get(key)) for key in differing] + [shown]
        lines.append('| ' + ' | '.join([*cells, *(_cell(group, x) for x in metrics)]) + ' |')
    return '\n'.join(lines)


def differences(rows: Sequence[Row]) -> list[str]:
    """Settings that are not the same for all runs of a stage, in the order of their configs."""
    keys = dict.fromkeys(key for row in rows for key in row.settings)
    found = []
    for key in keys:
        for stage in dict.fromkeys(row.stage for row in rows):
            values = [repr(row.settings.get(key)) for row in rows if row.stage == stage]
            if len(set(values)) > 1:
                found.append(key)
                break
    return found


def grouped(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows of one stage and equal settings, in their order."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault((row.stage, repr(sorted(row.settings.items()))), []).append(row)
    return list(groups.values())


def curves(rows: Sequence[Row], metrics: Sequence[str]) -> Any:
    """Metrics over steps, a curve for each stage of each run."""
    several = len({row.stage for row in rows}) > 1
    titles = [f'{row.run}/{row.stage}' if several else row.run for row in rows]
    lines = {title: row.lines for title, row in zip(titles, rows, strict=True)}
    return figures.learning_curves(lines, {}, [(name, name) for name in metrics])


def _is_stage(block: Any) -> bool:
    return isinstance(block, dict) and {'method', 'network'} <= set(block)


def _flat(block: Any, prefix: str = '') -> dict[str, Any]:
    if not isinstance(block, dict) or not block:
        return {prefix: block}
    inner = {
        key: _flat(value, f'{prefix}.{key}' if prefix else key) for key, value in block.items()
    }
    return {name: value for found in inner.values() for name, value in found.items()}


def _of_stages(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    known = list(dict.fromkeys(row.stage for row in rows))
    if not known:
        raise UserError('None of these runs has begun: there is nothing to compare.')
    for name in names:
        if name not in known:
            raise UserError(
                f"No run has a stage '{name}'.{did_you_mean(name, known)} Stages: {known}."
            )
    return [row for row in rows if not names or row.stage in names]


def _metrics(rows: Sequence[Row], names: Sequence[str]) -> list[str]:
    """The metrics that are named, else those of evaluators, else all but speeds."""
    known = list(dict.fromkeys(name for row in rows for name in row.metrics))
    for name in names:
        if name not in known:
            raise UserError(f"No run has logged '{name}'.{did_you_mean(name, known)}")
    if names:
        return list(names)
    other = [name for name in known if not name.startswith('time/')]
    return ([name for name in other if not name.startswith('train/')] or other)[:_MOST]


def _cell(group: Sequence[Row], metric: str) -> str:
    values = np.array([row.metrics.get(metric, math.nan) for row in group], float)
    if np.isnan(values).all():
        return ''
    if len(values) == 1:
        return f'{values[0]:.4g}'
    error = values.std(ddof=1) / np.sqrt(len(values))
    return f'{values.mean():.4g} ± {error:.2g}'


def _setting(value: Any) -> str:
    return '' if value is None else str(value).replace('|', '\\|')


def _record(row: Row) -> dict[str, Any]:
    kept = ('run', 'stage', 'seed', 'step', 'done', 'metrics', 'settings')
    return {name: getattr(row, name) for name in kept}


if __name__ == '__main__':
    process.command(main)
