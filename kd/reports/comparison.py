"""The report of a run whose stages are compared by what their evaluators found at the end."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kd import figures, files
from kd.context import ReportContext
from kd.io import finished
from kd.io.workdir import read_metrics
from kd.ranges import StageName


def comparison(
    context: ReportContext,
    *,
    rows: Sequence[tuple[str, StageName]],
    metrics: Sequence[tuple[str, str]],
    curves: Sequence[tuple[str, str]] = (),
    notes: str = '',
) -> Path:
    """A table of final metrics, a panel for each of them, and learning curves.

    Args:
      context: the run; nothing is evaluated again.
      rows: (title, stage) in the order of the table.
      metrics: (name, label) of metrics as stages log them, such as ('validation/tv', 'total
        variation'); those that all stages have are drawn.
      curves: such metrics to be drawn over steps; () for training losses, accuracies and NLL.
      notes: a sentence or two under the table: what to see.

    Returns:
      Path of `report.md`; figures lie in `figures/` beside it, numbers in `report.json`.
    """
    workdir = context.workdir
    done = {title: finished.read_done(workdir / stage) or {} for title, stage in rows}
    results = {title: dict(found.get('metrics', {})) for title, found in done.items()}
    folder = workdir / 'figures'
    folder.mkdir(exist_ok=True)
    panels = {
        label: {title: ([found[name]], found[name], 0.0) for title, found in results.items()}
        for name, label in metrics
        if all(name in found for found in results.values())
    }
    figures.comparison(panels).savefig(folder / 'comparison.png')
    logged = {title: read_metrics(workdir / stage) for title, stage in rows}
    # Losses of different methods are not to be compared, nor of one with other options.
    methods = {title: dict(context.recipe.stages[stage].method) for title, stage in rows}
    losses = {
        title: ', '.join(other for other, its in methods.items() if its == method)
        for title, method in methods.items()
    }
    figures.learning_curves(logged, losses, curves).savefig(folder / 'learning_curves.png')
    files.write_json(workdir / 'report.json', results)
    lines = [f'# {", ".join(results)}', '', f'Seed {context.recipe.seed}.']
    lines.append('The command and versions are in `manifest.json`.')
    lines += ['', '| stage | ' + ' | '.join(label for _, label in metrics) + ' |']
    lines.append('|---|' + '---:|' * len(metrics))
    for title, found in results.items():
        cells = [f'{found[name]:.4f}' if name in found else '' for name, _ in metrics]
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    lines += ['', notes] if notes else []
    lines += ['', '![Comparison](figures/comparison.png)']
    lines += ['', '![Learning curves](figures/learning_curves.png)', '']
    report = workdir / 'report.md'
    files.write_whole(report, '\n'.join(lines))
    return report
