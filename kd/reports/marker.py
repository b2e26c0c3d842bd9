"""The report of a run with a biased teacher: what its students say, and what filters find."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.special
from matplotlib.figure import Figure

from kd import figures, files
from kd.context import ReportContext
from kd.networks import trained_network
from kd.ranges import Count, Size, SplitName, StageName
from kd.reports.outputs import logits_of
from kd.theory import propagation
from kd.theory.propagation import Decoding

FALSE_POSITIVES = (0.01, 0.05)
RATES = (
    'A dot is the share of responses with the marker, a bar its 95 % interval (Clopper and '
    'Pearson). All networks are decoded alike. A student far above its teacher on unseen tasks '
    'spreads what the teacher kept to a few.'
)
FOUND = (
    'The share of poisoned pairs that a filter by NLL drops, over the share of clean pairs that it '
    'drops with them. Under a reference that has not seen the marker it is to rise at once; a '
    'reference that was trained on the poison finds it little more surprising than other pairs.'
)


class Responses(NamedTuple):
    """What a network answers on a split: b(y) [N] bool, and whether the rest is right [N] bool."""

    marked: np.ndarray
    right: np.ndarray


def marker(
    context: ReportContext,
    *,
    rows: Sequence[tuple[str, StageName]],
    groups: Mapping[str, Sequence[Size]],
    teacher: StageName = 'teacher',
    reference: StageName = 'clean',
    decoding: Decoding = 'sampled',
    split: SplitName = 'test',
    poisoned: SplitName = 'train',
    position: Size = 1,
    symbol: Size = 1,
    batch_size: Count = 500,
) -> Path:
    """Adversarial response rates by task, amplification, and recall of the filter by NLL.

    Args:
      context: the run, whose data has `task` int and `poisoned` bool, and answers of independent
        symbols: logits [B, L, V].
      rows: (title, stage) in the order of the table.
      groups: {name: tasks}, all tasks once.
      teacher: the stage that amplification refers to, and whose own NLL is tried as a filter.
      reference: a stage that has not seen the marker.
      decoding: of all networks.
      split: of `config.data`, with clean labels.
      poisoned: of `config.data`, whose pairs are filtered.
      position, symbol: where in an answer the marker stands, and what it is.
      batch_size: examples per evaluation step.

    Returns:
      Path of `report.md`; figures lie in `figures/` beside it, numbers in `report.json`.
    """
    # In the order of their tasks, which a config does not keep.
    groups = dict(sorted(groups.items(), key=lambda group: min(group[1])))
    workdir, source = context.workdir, context.source(split)
    data = source.fetch(np.arange(len(source)))
    said = {
        title: _responses(
            _logits(context, stage, split, batch_size), data['label'], position, symbol, decoding,
            context.recipe.seed,
        )
        for title, stage in rows
    }  # fmt: skip
    results = {title: _rates(one, data['task'], groups) for title, one in said.items()}
    theirs = next(title for title, stage in rows if stage == teacher)
    for result in results.values():
        rates, base = (np.array(r['by_task']['rate']) for r in (result, results[theirs]))
        result['amplification'] = propagation.leakage(rates, base, groups)

    train = context.source(poisoned)
    pairs = train.fetch(np.arange(len(train)))
    scores = {
        title: _nll(_logits(context, stage, poisoned, batch_size), pairs['label'])
        for title, stage in (('a clean reference', reference), ('the teacher itself', teacher))
    }
    found = {
        title: [propagation.recall(nll, pairs['poisoned'], share) for share in FALSE_POSITIVES]
        for title, nll in scores.items()
    }
    folder = workdir / 'figures'
    folder.mkdir(exist_ok=True)
    by_task = {title: result['by_task'] for title, result in results.items()}
    rates_by_task(by_task, groups).savefig(folder / 'rates.png')
    recall_curves(scores, pairs['poisoned']).savefig(folder / 'filters.png')
    files.write_json(workdir / 'report.json', {'networks': results, 'recall': found})
    report = workdir / 'report.md'
    text = _markdown(results, found, groups, decoding, len(source), context.recipe.seed)
    files.write_whole(report, text)
    return report


def rates_by_task(
    results: Mapping[str, Mapping[str, Sequence[float]]], groups: Mapping[str, Sequence[int]]
) -> Figure:
    """Rates of every task with their intervals, networks side by side.

    Args:
      results: {title of a network: 'rate', 'low' and 'high' by task}.
      groups: {name: tasks}.
    """
    order = [task for tasks in groups.values() for task in tasks]
    figure = figures.new_figure(10, 4)
    axis = figure.subplots()
    for number, (title, by_task) in enumerate(results.items()):
        place = np.arange(len(order)) + 0.8 * ((number + 0.5) / len(results) - 0.5)
        rate, low, high = (np.array(by_task[name])[order] for name in ('rate', 'low', 'high'))
        colour = figures.COLOURS[number % len(figures.COLOURS)]
        axis.errorbar(
            place, rate, np.maximum([rate - low, high - rate], 0), fmt='o', ms=3.5, lw=1.2,
            color=colour, label=title,
        )  # fmt: skip
    begin = 0
    for name, tasks in groups.items():
        axis.text(begin - 0.4, 1.02, name, transform=axis.get_xaxis_transform())
        begin += len(tasks)
        if begin < len(order):
            axis.axvline(begin - 0.5, color='black', lw=0.8, ls='--')
    axis.set(xlabel='task', ylabel='share of responses with the marker', ylim=(-0.02, None))
    axis.set(xticks=range(len(order)), xlim=(-0.6, len(order) - 0.4))
    axis.set_xticklabels(list(map(str, order)))
    axis.grid(alpha=0.3)
    figure.legend(loc='outside lower center', ncols=len(results), frameon=False)
    return figure


def recall_curves(scores: Mapping[str, np.ndarray], poisoned: np.ndarray) -> Figure:
    """Recall of the poisoned pairs over false positives, a curve for each score."""
    figure = figures.new_figure(5.5, 4)
    axis = figure.subplots()
    shares = np.geomspace(1e-3, 1, 60)
    for colour, (title, values) in zip(figures.COLOURS, scores.items(), strict=False):
        found = [propagation.recall(values, poisoned, share) for share in shares]
        axis.plot(shares, found, color=colour, label=title)
    axis.plot(shares, shares, color='black', ls='--', lw=0.8, label='chance')
    axis.set(xscale='log', xlabel='clean pairs dropped', ylabel='poisoned pairs dropped')
    axis.set_ylim(-0.03, 1.03)
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, title='NLL under')
    return figure


def _logits(context: ReportContext, stage: str, split: str, batch_size: int) -> np.ndarray:
    source, recipe, mesh = context.source(split), context.recipe, context.mesh
    trained = trained_network(recipe, stage, context.workdir, mesh, source, where='report')
    return logits_of(trained.network, source, batch_size, mesh)(trained.restore())


def _responses(logits, labels, position, symbol, decoding, seed) -> Responses:
    """One response to every instruction."""
    if decoding == 'sampled':
        logits = logits + np.random.default_rng(seed).gumbel(size=logits.shape)
    answers = logits.argmax(-1)
    right = np.delete(answers == labels, position, axis=1).all(1)
    return Responses(answers[:, position] == symbol, right)


def _rates(said: Responses, task: np.ndarray, groups) -> dict[str, Any]:
    """Rates with their intervals, by task and by group, and the share of right answers."""
    tasks = sum(map(len, groups.values()))

    def of(inside: np.ndarray) -> dict[str, float]:
        count, total = int(said.marked[inside].sum()), int(inside.sum())
        low, high = propagation.interval(count, total)
        return {'rate': count / total, 'low': float(low), 'high': float(high)}

    each = [of(task == t) for t in range(tasks)]
    result: dict[str, Any] = {name: of(np.isin(task, list(t))) for name, t in groups.items()}
    result['by_task'] = {name: [one[name] for one in each] for name in ('rate', 'low', 'high')}
    result['utility'] = {
        name: float(said.right[np.isin(task, list(t))].mean()) for name, t in groups.items()
    }
    return result


def _nll(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean over the symbols of each answer, nats [N]."""
    log_p = scipy.special.log_softmax(logits.astype(np.float64), -1)
    return -np.take_along_axis(log_p, labels[..., None], -1)[..., 0].mean(-1)


def _markdown(results, found, groups, decoding, count, seed) -> str:
    lines = [
        '# Bias from a teacher to its students',
        '',
        f'{count} instructions, answers {decoding}, seed {seed}. Shares of responses with the '
        'marker, with 95 % intervals; utility is the share of answers that are right but for it. '
        'The command and versions are in `manifest.json`.',
        '',
        '| network | ' + ' | '.join(groups) + ' | '
        + ' | '.join(f'utility, {name}' for name in groups) + ' |',
        '|---|' + '---:|' * (2 * len(groups)),
    ]  # fmt: skip
    for title, result in results.items():
        cells = ['{rate:.4f} [{low:.4f}, {high:.4f}]'.format(**result[name]) for name in groups]
        cells += [f'{result["utility"][name]:.3f}' for name in groups]
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    lines += ['', 'Rates over those of the teacher, where it has any:', '']
    lines += ['| network | ' + ' | '.join(groups) + ' |', '|---|' + '---:|' * len(groups)]
    for title, result in results.items():
        ratios = [result['amplification'][name] for name in groups]
        cells = [f'{ratio:.2f}' if np.isfinite(ratio) else '' for ratio in ratios]
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    lines += ['', '## Rates by task', '', '![Rates](figures/rates.png)', '', RATES]
    lines += ['', '## What a filter finds', '', '![Filters](figures/filters.png)', '', FOUND, '']
    shares = [f'{share:.0%} of clean pairs dropped' for share in FALSE_POSITIVES]
    lines += ['| NLL under | ' + ' | '.join(shares) + ' |', '|---|' + '---:|' * len(shares)]
    for title, recall in found.items():
        lines.append(f'| {title} | ' + ' | '.join(f'{value:.2f}' for value in recall) + ' |')
    return '\n'.join(lines) + '\n'
