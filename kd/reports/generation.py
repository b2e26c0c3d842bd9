"""The report of a run that trains generators: metrics by number of sampling steps, and samples."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from kd import figures, files
from kd.config import Recipe
from kd.context import ReportContext
from kd.io import finished
from kd.ranges import StageName

# {metric: {steps: value}}
ByStep = dict[str, dict[int, float]]
_NUMBERED = re.compile(r'(?P<metric>\w+)_(?P<steps>\d+)')
# The row of what a perfect sampler scores, where an evaluator says so by METRIC_floor.
_PERFECT, _FLOOR = 'a perfect sampler', '_floor'
_UNITS = {
    'psnr': 'PSNR, dB',
    'kl': 'KL(data || samples), nats',
    'off_support': 'share of samples off the support',
}


def generation(
    context: ReportContext,
    *,
    rows: Sequence[tuple[str, StageName] | tuple[str, StageName, str]],
    samples: str = 'samples',
) -> Path:
    """Compares generators by what their stages' evaluators found at the end.

    Args:
      context: the run; nothing is evaluated again.
      rows: (title, stage) in the order of the tables, or (title, stage, evaluator) where samples
        are those of another evaluator of the stage.
      samples: name of the evaluator whose metrics end in a number of sampling steps, see
        `kd.evaluators.flow_samples.flow_samples`.

    Returns:
      Path of `report.md`; figures lie in `figures/` beside it, numbers in `report.json`.
    """
    recipe, workdir = context.recipe, context.workdir
    tables, others, results, pages = {}, {}, {}, []
    perfect: ByStep = {}
    measured = [(*row, samples)[:3] for row in rows]
    of_rows = {(stage, evaluator) for _, stage, evaluator in measured}
    for title, stage, evaluator in measured:
        done = finished.read_done(workdir / stage) or {'metrics': {}, 'step': 0}
        # Not those of a row of its own.
        others_rows = {name for of, name in of_rows if of == stage} - {evaluator}
        found = {
            name: value
            for name, value in done['metrics'].items()
            if name.partition('/')[0] not in others_rows
        }
        results[title] = found
        tables[title], others[title], floors = _split(found, evaluator)
        perfect |= floors
        # Evaluators draw at the end of a stage, whichever step counts as its result.
        for file in sorted(
            (workdir / stage / 'figures').glob(f'*_{recipe.stages[stage].steps}.png')
        ):
            name = file.stem.rpartition('_')[0]
            if not any(name.startswith(f'{other}_') for other in others_rows):
                pages.append((f'{title}: {name}', file.relative_to(workdir)))
    if perfect:
        tables[_PERFECT] = perfect
    folder = workdir / 'figures'
    folder.mkdir(exist_ok=True)
    page = metrics_by_steps(tables)
    if page is not None:
        page.savefig(folder / 'metrics_by_steps.png')
        pages.insert(0, ('Metrics by sampling steps', Path('figures/metrics_by_steps.png')))
    files.write_json(workdir / 'report.json', results)
    report = workdir / 'report.md'
    files.write_whole(report, _markdown(recipe, tables, others, pages))
    return report


def metrics_by_steps(tables: Mapping[str, ByStep]) -> Figure | None:
    """One panel per metric, one curve per row; None where no row has such metrics."""
    metrics = list(dict.fromkeys(name for table in tables.values() for name in table))
    if not metrics:
        return None
    figure = figures.new_figure(4.2 * len(metrics), 3.6)
    axes = np.atleast_1d(figure.subplots(1, len(metrics)))
    for axis, metric in zip(axes, metrics, strict=True):
        for colour, (title, table) in zip(figures.COLOURS, tables.items(), strict=False):
            if metric in table:
                steps, values = zip(*sorted(table[metric].items()), strict=True)
                style = dict(color=colour, marker='o')
                if title == _PERFECT:
                    style = dict(color='black', linestyle='--')
                axis.plot(steps, values, label=title, **style)
        axis.set(xscale='log', xlabel='sampling steps', title=_UNITS.get(metric, metric))
        axis.set_ylim(bottom=0.0)
        ticks = sorted({n for table in tables.values() for n in table.get(metric, {})})
        axis.set_xticks(ticks, [str(n) for n in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=len(tables), frameon=False)
    return figure


def _split(metrics: Mapping[str, float], samples: str) -> tuple[ByStep, dict[str, float], ByStep]:
    """Metrics of the samples by steps, those of all other evaluators, and a perfect sampler's."""
    table: ByStep = {}
    others, floors = {}, {}
    for name, value in metrics.items():
        evaluator, _, metric = name.partition('/')
        match = _NUMBERED.fullmatch(metric)
        if evaluator == samples and match:
            table.setdefault(match['metric'], {})[int(match['steps'])] = value
        elif evaluator == samples and metric.endswith(_FLOOR):
            floors[metric.removesuffix(_FLOOR)] = value
        elif evaluator not in ('train', 'time'):
            others[name] = value
    perfect = {metric: dict.fromkeys(table[metric], value) for metric, value in floors.items()}
    return table, others, perfect


def _markdown(
    recipe: Recipe,
    tables: Mapping[str, ByStep],
    others: Mapping[str, Mapping[str, float]],
    pages: list[tuple[str, Path]],
) -> str:
    data = recipe.data.get('name') or recipe.data['source'].get('of', 'data')
    while isinstance(data, Mapping):  # The block of a source.
        data = data.get('of', 'data')
    lines = [f'# {data}: {", ".join(tables)}', '', f'Seed {recipe.seed}. ']
    lines[-1] += 'The command and versions are in `manifest.json`.'
    for metric in dict.fromkeys(name for table in tables.values() for name in table):
        steps = sorted({n for table in tables.values() for n in table.get(metric, {})})
        lines += ['', f'## {_UNITS.get(metric, metric)}', '']
        lines += ['| sampling steps | ' + ' | '.join(map(str, steps)) + ' |']
        lines += ['|---|' + '---:|' * len(steps)]
        for title, table in tables.items():
            cells = [f'{table[metric][n]:.4f}' if n in table.get(metric, {}) else '' for n in steps]
            lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    columns = list(dict.fromkeys(name for row in others.values() for name in row))
    if columns:
        lines += ['', '## Other metrics', '', '| network | ' + ' | '.join(columns) + ' |']
        lines += ['|---|' + '---:|' * len(columns)]
        for title, row in others.items():
            cells = [f'{row[c]:.4f}' if c in row else '' for c in columns]
            lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    for title, file in pages:
        lines += ['', f'## {title}', '', f'![{title}]({file})']
    return '\n'.join(lines) + '\n'
