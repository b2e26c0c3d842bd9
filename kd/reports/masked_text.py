"""The report of a run of masked diffusion models: samples by number of steps, and as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.figure import Figure

from kd import figures, files
from kd.context import ReportContext
from kd.evaluators.masked_text import written
from kd.io import finished
from kd.losses import masked_diffusion as losses
from kd.networks import trained_network
from kd.ranges import Count, StageName
from kd.sampling import masked

# Metrics of `kd.evaluators.masked_text.sample_metrics`, and what they are called.
_PANELS = {
    'impossible': 'impossible',
    'nll': 'nats a symbol, to the judge',
    'entropy': 'entropy',
    'bigram_entropy': 'entropy of pairs',
    'distinct': 'different runs of four',
}


def masked_text(
    context: ReportContext,
    *,
    rows: Sequence[tuple[str, StageName]],
    steps: Sequence[Count],
    evaluator: str = 'samples',
    texts: Sequence[Count] = (),
    notes: str = '',
) -> Path:
    """Likelihood and entropy of samples side by side, by number of steps.

    Args:
      context: the run.
      rows: (title, stage) in the order of the tables.
      steps: those of the probe.
      evaluator: the name that the stages give to the probe `kd.evaluators.masked_text.masked_text`.
      texts: numbers of steps of which a sample of each stage is shown, all of one path.
      notes: a sentence or two under the tables.

    Returns:
      Path of `report.md`; the figure lies in `figures/`, numbers in `report.json`.
    """
    workdir = context.workdir
    found = {
        title: dict((finished.read_done(workdir / stage) or {}).get('metrics', {}))
        for title, stage in rows
    }
    first = next(iter(found.values()))
    shown = {
        name: label
        for name, label in _PANELS.items()
        if name != 'impossible'
        or any(of[f'{evaluator}/{name}_{steps[0]}'] for of in found.values())
    }
    folder = workdir / 'figures'
    folder.mkdir(exist_ok=True)
    curves = {
        title: {name: [of[f'{evaluator}/{name}_{n}'] for n in steps] for name in shown}
        for title, of in found.items()
    }
    data = {name: first[f'{evaluator}/{name}_data'] for name in shown}
    by_steps(curves, steps, shown, data).savefig(folder / 'samples.png')
    said = {title: _texts(context, stage, texts) for title, stage in rows} if texts else {}
    files.write_json(workdir / 'report.json', {'metrics': found, 'texts': said})
    lines = [f'# {", ".join(found)}', '', f'Seed {context.recipe.seed}.']
    lines += ['The command and versions are in `manifest.json`.', '']
    for name, label in shown.items():
        lines += [f'## {label[0].upper()}{label[1:]}', '']
        lines += ['| calls | ' + ' | '.join(map(str, steps)) + ' | data |']
        lines += ['|---|' + '---:|' * (len(steps) + 1)]
        for title, of in curves.items():
            cells = [f'{value:.4f}' for value in (*of[name], data[name])]
            lines += [f'| {title} | ' + ' | '.join(cells) + ' |']
        lines += ['']
    lines += [notes, ''] if notes else []
    lines += ['![Samples](figures/samples.png)', '']
    for title, of in said.items():
        lines += [f'## {title}', '', '| calls | |', '|---:|---|']
        lines += [f'| {n} | {text} |' for n, text in of.items()] + ['']
    report = workdir / 'report.md'
    files.write_whole(report, '\n'.join(lines))
    return report


def by_steps(
    curves: Mapping[str, Mapping[str, Sequence[float]]],
    steps: Sequence[int],
    panels: Mapping[str, str],
    data: Mapping[str, float],
) -> Figure:
    """A panel for each metric, a curve over numbers of steps for each network, the data dashed."""
    figure = figures.new_figure(3.1 * len(panels), 3.2)
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    for axis, (name, label) in zip(axes, panels.items(), strict=True):
        for colour, (title, of) in zip(figures.COLOURS, curves.items(), strict=False):
            axis.plot(steps, of[name], 'o-', color=colour, ms=4, label=title)
        axis.axhline(data[name], color='black', lw=0.8, ls='--', label='data')
        axis.set_xscale('log', base=2)
        axis.set_xticks(steps, [str(n) for n in steps])
        axis.set_xticks([], minor=True)
        axis.set(xlabel='calls of the network')
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
    handles, titles = axes[0].get_legend_handles_labels()
    figure.legend(handles, titles, loc='outside lower center', ncols=len(titles), frameon=False)
    return figure


def _texts(context: ReportContext, stage: str, texts: Sequence[int]) -> dict[str, Any]:
    """A sample of a stage for each number of steps."""
    source = context.source('train')
    trained = trained_network(
        context.recipe, stage, context.workdir, context.mesh, source, where='report.rows'
    )
    block = context.recipe.stages[stage].method
    schedule = losses.schedule(block.get('schedule', 'log_linear'))
    draw = masked.sampler(trained.network, block.get('mask'), schedule, path=True)
    variables, key = trained.restore(), jax.random.key(context.recipe.seed)
    shape = (1, *source.spec['input'].shape)
    return {str(n): written(source, np.asarray(draw(variables, key, shape, n)))[0] for n in texts}
