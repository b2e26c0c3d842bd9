"""The report of a run: a table and figures that can be read without the code."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from kd import figures, files
from kd.config import Recipe
from kd.context import ReportContext
from kd.data import sources
from kd.evaluators import agreement, calibration
from kd.evaluators import classification as metrics
from kd.io import finished
from kd.io.progress import say
from kd.io.workdir import read_metrics
from kd.losses import divergence
from kd.losses.calibration import Bins, confidence_bins, expected_calibration_error
from kd.metrics import mean_interval
from kd.network import parameter_count
from kd.networks import trained_network
from kd.ranges import Count, SplitName, StageName
from kd.reports.outputs import logits_of
from kd.training.repeats import repeats
from kd.training.stage import prepare

# A page of disagreements shows at most this many images.
SHOWN = 24


# What to see, under the figures.
CURVES = (
    "Of the run's own seed. Losses of different methods are not to be compared and have axes of "
    'their own. Validation is to be compared: more accuracy and less NLL are better.'
)
RELIABILITY = (
    'Among predictions of one confidence, the share that is right. Bars on the dashed line: the '
    'network is as sure as it should be; below it: too sure; above it: not sure enough. ECE, the '
    'calibration error, is the mean distance from the line.'
)
DISAGREEMENTS = (
    'Images that the two classify differently, those first of which the student is surest. The '
    'label says which of them is right.'
)


class Page(NamedTuple):
    """A figure of the report: title, file, and what to see in it."""

    title: str
    file: str
    text: str


class Row(NamedTuple):
    """One network of the comparison.

    Attributes:
      title, stage: of the run.
      parameters: their number.
      steps_per_s: of its training; NaN if nobody measured it.
      logits: float32 [N, V] on the whole split, for every seed; the run's own network is the first.
    """

    title: str
    stage: str
    parameters: int
    steps_per_s: float
    logits: list[np.ndarray]


def classification(
    context: ReportContext,
    *,
    rows: Sequence[tuple[str, StageName]],
    student: Literal[''] | StageName = 'student',
    teacher: Literal[''] | StageName = 'teacher',
    split: SplitName = 'test',
    batch_size: Count = 256,
    seeds: Count = 1,
    notes: str = '',
) -> Path:
    """Compares classifiers on a split that no stage has trained or been chosen on.

    With `seeds` above 1 every row's stage is trained anew, see `kd.training.repeats.repeats`: means
    over seeds stand in the table, with half of their 95 % intervals, and are drawn. All students
    learn from the run's own teacher.

    Args:
      context: the run.
      rows: (title, stage) in the order of the table.
      student: the stage whose disagreements with the teacher are shown, or '' for none.
      teacher: the stage that agreement and KL refer to, or '' for none.
      split: which split of `config.data`.
      batch_size: examples per evaluation step.
      seeds: networks per row, the run's own among them.
      notes: a sentence for the head of the report.

    Returns:
      Path of `report.md`; figures lie in `figures/` beside it, numbers in `report.json`.
    """
    recipe, workdir = context.recipe, context.workdir
    source = context.source(split)
    data = source.fetch(np.arange(len(source)))
    labels = data['label']
    table = [_row(context, source, title, stage, batch_size, seeds) for title, stage in rows]
    reference = next((row for row in table if row.stage == teacher), None)
    results = {row.title: _measure(row, labels, reference) for row in table}

    folder = workdir / 'figures'
    folder.mkdir(exist_ok=True)
    pages = []
    if seeds > 1:
        figures.comparison(_spreads(results)).savefig(folder / 'comparison.png')
        pages.append(Page('Comparison', 'comparison.png', _told(results, table, student, teacher)))
    curves = {row.title: read_metrics(workdir / row.stage) for row in table}
    figures.learning_curves(curves, _losses(recipe, table)).savefig(folder / 'learning_curves.png')
    pages.append(Page('Learning curves', 'learning_curves.png', CURVES))
    rows_of_bins = {row.title: _bins(row, labels) for row in table}
    figures.reliability(rows_of_bins).savefig(folder / 'reliability.png')
    pages.append(Page('Reliability', 'reliability.png', RELIABILITY))
    shown = next((row for row in table if row.stage == student), None)
    if reference is not None and shown is not None and data['input'].ndim == 4:
        page = _disagreements(source, data, shown, reference)
        if page is not None:
            page.savefig(folder / 'disagreements.png')
            title = f'Where {shown.title} and teacher disagree'
            pages.append(Page(title, 'disagreements.png', DISAGREEMENTS))
    files.write_json(workdir / 'report.json', results)
    report = workdir / 'report.md'
    files.write_whole(report, _markdown(recipe, source, results, pages, seeds, notes))
    return report


def _row(
    context: ReportContext,
    source: sources.Source,
    title: str,
    stage: str,
    batch_size: int,
    seeds: int,
) -> Row:
    """The network of a stage, and further ones from other seeds."""
    recipe, workdir, mesh = context.recipe, context.workdir, context.mesh
    trained = trained_network(recipe, stage, workdir, mesh, source, where='report')
    variables = trained.restore()
    of = logits_of(trained.network, source, batch_size, mesh)
    logits = [of(variables)]
    if seeds > 1:
        say('report', f'training {title} from {seeds - 1} more seeds ...')
        others = range(recipe.seed + 1, recipe.seed + seeds)
        states = repeats(prepare(recipe, stage, mesh, workdir), others)
        logits += [of(state.variables()) for state in states]
    speed = (finished.read_done(workdir / stage) or {}).get('steps_per_s')
    speed = math.nan if speed is None else speed
    return Row(title, stage, parameter_count(variables), speed, logits)


def _measure(row: Row, labels: np.ndarray, teacher: Row | None) -> dict[str, Any]:
    """Metrics of the run's own network; under `seeds` those of all, where there are more."""
    reference = None if teacher is None else teacher.logits[0]
    every = [_scores(logits, labels, reference) for logits in row.logits]
    result: dict[str, Any] = every[0]
    result['parameters'] = float(row.parameters)
    if math.isfinite(row.steps_per_s):
        result['steps_per_s'] = float(row.steps_per_s)
    if len(every) > 1:
        # The teacher agrees with itself, whatever other teachers do.
        names = [m for m in every[1] if row is not teacher or m not in ('agreement', 'kl')]
        result['seeds'] = {name: [scores[name] for scores in every] for name in names}
    return result


def _scores(
    logits: np.ndarray, labels: np.ndarray, reference: np.ndarray | None
) -> dict[str, float]:
    values, bins = _of_labels(logits, labels)
    values['ece'] = expected_calibration_error(bins)
    if reference is not None:
        values |= _of_teacher(logits, reference)
    return {name: float(value) for name, value in values.items()}


# One program each: operation by operation every one would be compiled.
@jax.jit
def _of_labels(logits: jax.Array, labels: jax.Array) -> tuple[dict[str, Any], Bins]:
    values = {
        'accuracy': metrics.top_k_correct(logits, labels).mean(),
        'nll': metrics.negative_log_likelihood(logits, labels).mean(),
        'brier': calibration.brier_score(logits, labels).mean(),
    }
    return values, confidence_bins(logits, labels)


@jax.jit
def _of_teacher(logits: jax.Array, reference: jax.Array) -> dict[str, Any]:
    return {
        'agreement': agreement.top_1_agreement(logits, reference).mean(),
        'kl': divergence.forward_kl(logits, reference).mean(),
    }


def _bins(row: Row, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Counts over all seeds, and the mean of their calibration errors."""
    every = [_of_labels(logits, labels)[1] for logits in row.logits]
    examples, correct = (
        np.sum([np.asarray(part) for part in parts], axis=0)
        for parts in zip(*((bins.examples, bins.correct) for bins in every), strict=True)
    )
    error = np.mean([expected_calibration_error(bins) for bins in every])
    return examples, correct, float(error)


def _spreads(results: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, figures.Spread]]:
    """What `figures.comparison` draws."""
    panels = {}
    for metric, label in (
        ('accuracy', 'accuracy'),
        ('nll', 'NLL (nats)'),
        ('ece', 'calibration error (ECE)'),
    ):
        panels[label] = {
            title: (result['seeds'][metric], *mean_interval(result['seeds'][metric]))
            for title, result in results.items()
        }
    return panels


def _told(
    results: Mapping[str, Mapping[str, Any]], table: Sequence[Row], student: str, teacher: str
) -> str:
    """What to see in the comparison: by how much the student is better than other students."""
    text = (
        'A dot is a network of one seed, a bar the 95 % interval of their mean. Further right is '
        'better for accuracy, further left for NLL and ECE.'
    )
    accuracy = {row.stage: np.asarray(results[row.title]['seeds']['accuracy']) for row in table}
    titles = {row.stage: row.title for row in table}
    for other in accuracy if student in accuracy else ():
        if other not in (student, teacher):
            mean, half = mean_interval(accuracy[student] - accuracy[other])
            text += (
                f' {titles[student]} against {titles[other]}: accuracy {mean:+.3f} '
                f'[{mean - half:+.3f}, {mean + half:+.3f}], paired by seed.'
            )
    return text


def _losses(recipe: Recipe, table: Sequence[Row]) -> dict[str, str]:
    """{title: what it minimises}: the method's name, with the title where its arguments differ."""
    kinds: dict[str, tuple[str, str]] = {}
    for row in table:
        method = recipe.stages[row.stage].method
        arguments = {k: v for k, v in method.items() if k not in ('augmentation', 'micro_batches')}
        kinds[row.title] = method['name'].rpartition('.')[2], repr(sorted(arguments.items()))
    first = {kind: title for title, kind in reversed(kinds.items())}
    names = [name for name, _ in first]
    return {
        title: kind[0] if names.count(kind[0]) == 1 else f'{kind[0]} ({first[kind]})'
        for title, kind in kinds.items()
    }


def _disagreements(source: sources.Source, data: dict, student: Row, teacher: Row):
    ours, theirs = student.logits[0].argmax(-1), teacher.logits[0].argmax(-1)
    where = np.flatnonzero(ours != theirs)
    if not len(where):
        return None
    # Where the student is surest first: these are the ones worth looking at.
    confidence = np.asarray(jax.nn.softmax(student.logits[0])).max(-1)
    where = where[np.argsort(-confidence[where])][:SHOWN]
    names = source.class_names or [str(k) for k in range(student.logits[0].shape[-1])]
    captions = [
        f'label {names[data["label"][i]]}\nstudent {names[ours[i]]}\nteacher {names[theirs[i]]}'
        for i in where
    ]
    return figures.image_page(data['input'][where], captions)


_COLUMNS = {
    'accuracy': ('accuracy', '{:.4f}'),
    'nll': ('NLL (nats)', '{:.4f}'),
    'ece': ('ECE', '{:.4f}'),
    'brier': ('Brier', '{:.4f}'),
    'agreement': ('agreement with teacher', '{:.4f}'),
    'kl': ('KL to teacher, T=1 (nats)', '{:.4f}'),
    'parameters': ('parameters', '{:,.0f}'),
    'steps_per_s': ('steps/s', '{:.1f}'),
}


def _markdown(
    recipe: Recipe,
    source: sources.Source,
    results: Mapping[str, Mapping[str, Any]],
    pages: Sequence[Page],
    seeds: int,
    notes: str,
) -> str:
    columns = [c for c in _COLUMNS if any(c in row for row in results.values())]
    which = f'seed {recipe.seed}. '
    if seeds > 1:
        which = (
            f'means over seeds {recipe.seed} to {recipe.seed + seeds - 1} ± half of their 95 % '
            f'intervals; all students have the teacher of seed {recipe.seed}. '
        )
    lines = [
        f'# {source.name}: {", ".join(results)}',
        '',
        f'{len(source)} examples of `{source.split}`, {which}'
        'The command and versions are in `manifest.json`.',
        *(['', notes] if notes else []),
        '',
        '| network | ' + ' | '.join(_COLUMNS[c][0] for c in columns) + ' |',
        '|---|' + '---:|' * len(columns),
    ]
    for title, row in results.items():
        lines.append(f'| {title} | ' + ' | '.join(_cell(row, c) for c in columns) + ' |')
    for page in pages:
        lines += ['', f'## {page.title}', '', f'![{page.title}](figures/{page.file})']
        lines += ['', page.text]
    return '\n'.join(lines) + '\n'


def _cell(row: Mapping[str, Any], column: str) -> str:
    """A number of the table, a mean with its interval, or nothing."""
    shape = _COLUMNS[column][1]
    if column in row.get('seeds', {}):
        mean, half = mean_interval(row['seeds'][column])
        return f'{shape.format(mean)} ± {shape.format(half)}'
    return shape.format(row[column]) if column in row else ''
