"""The report of a run: a table and figures that can be read without the code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from kd import figures, files
from kd.config import Recipe
from kd.context import ReportContext
from kd.data import pipeline, sources
from kd.evaluators import agreement, calibration
from kd.evaluators import classification as metrics
from kd.io import checkpoints
from kd.io.workdir import read_metrics
from kd.losses import divergence
from kd.network import Network, parameter_count
from kd.networks import trained_network
from kd.parallel import mesh as mesh_lib
from kd.ranges import Count

# A page of disagreements shows at most this many images.
SHOWN = 24


class Row(NamedTuple):
    """One network of the comparison, with its logits on the whole split."""

    title: str
    stage: str
    parameters: int
    steps_per_s: float
    logits: np.ndarray


def classification(
    context: ReportContext,
    *,
    rows: Sequence[tuple[str, str]],
    student: str = 'student',
    teacher: str = 'teacher',
    split: str = 'test',
    batch_size: Count = 256,
) -> Path:
    """Compares classifiers on a split that no stage has trained or been chosen on.

    Args:
      context: the run.
      rows: (title, stage) in the order of the table.
      student: the stage whose disagreements with the teacher are shown.
      teacher: the stage that agreement and KL refer to.
      split: which split of `config.data`.
      batch_size: examples per evaluation step.

    Returns:
      Path of `report.md`; figures lie in `figures/` beside it, numbers in `report.json`.
    """
    recipe, workdir, mesh = context.recipe, context.workdir, context.mesh
    source = context.source(split)
    data = source.fetch(np.arange(len(source)))
    labels = data['label']
    table = []
    for title, stage in rows:
        trained = trained_network(recipe, stage, workdir, mesh, source, where='report')
        variables = trained.restore()
        logits = _logits(trained.network, variables, source, batch_size, mesh)
        done = checkpoints.read_done(workdir / stage) or {}
        count = parameter_count(variables)
        table.append(Row(title, stage, count, done.get('steps_per_s', 0.0), logits))
    reference = next((row for row in table if row.stage == teacher), None)
    results = {row.title: _measure(row, labels, reference) for row in table}

    folder = workdir / 'figures'
    folder.mkdir(exist_ok=True)
    curves = {row.title: read_metrics(workdir / row.stage) for row in table}
    figures.learning_curves(curves).savefig(folder / 'learning_curves.png')
    rows_of_bins = {row.title: _bins(row, labels) for row in table}
    figures.reliability(rows_of_bins).savefig(folder / 'reliability.png')
    shown = next((row for row in table if row.stage == student), None)
    pages = [('Learning curves', 'learning_curves.png'), ('Reliability', 'reliability.png')]
    if reference is not None and shown is not None and data['input'].ndim == 4:
        page = _disagreements(source, data, shown, reference)
        if page is not None:
            page.savefig(folder / 'disagreements.png')
            pages.append(
                (f'Where {shown.title} and teacher disagree, surest first', 'disagreements.png')
            )
    files.write_json(workdir / 'report.json', results)
    report = workdir / 'report.md'
    files.write_whole(report, _markdown(recipe, source, results, pages))
    return report


def _logits(
    network: Network, variables: Any, source: sources.Source, batch_size: int, mesh: Mesh
) -> np.ndarray:
    """float32 [N, V] over the whole split, in its order."""
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    size = -(-min(batch_size, len(source)) // ways) * ways
    apply = jax.jit(lambda variables, *inputs: network.apply(variables, *inputs).logits)
    outputs = []
    for batch in pipeline.eval_batches(source, size):
        inputs = {name: batch[name] for name in network.fields}
        inputs = mesh_lib.put_batch(inputs, mesh_lib.batch_sharding(mesh))
        outputs.append(np.asarray(apply(variables, *network.of(inputs)))[batch['mask']])
    return np.concatenate(outputs)


def _measure(row: Row, labels: np.ndarray, teacher: Row | None) -> dict[str, float]:
    logits = jnp.asarray(row.logits)
    values: dict[str, Any] = {
        'accuracy': metrics.top_k_correct(logits, labels).mean(),
        'nll': metrics.negative_log_likelihood(logits, labels).mean(),
        'ece': calibration.expected_calibration_error(calibration.confidence_bins(logits, labels)),
        'brier': calibration.brier_score(logits, labels).mean(),
    }
    if teacher is not None:
        teacher_logits = jnp.asarray(teacher.logits)
        values |= {
            'agreement': agreement.top_1_agreement(logits, teacher_logits).mean(),
            'kl': divergence.forward_kl(logits, teacher_logits).mean(),
        }
    values |= {'parameters': row.parameters, 'steps_per_s': row.steps_per_s}
    return {name: float(value) for name, value in values.items()}


def _bins(row: Row, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    bins = calibration.confidence_bins(row.logits, labels)
    error = calibration.expected_calibration_error(bins)
    return np.asarray(bins.examples), np.asarray(bins.correct), error


def _disagreements(source: sources.Source, data: dict, student: Row, teacher: Row):
    ours, theirs = student.logits.argmax(-1), teacher.logits.argmax(-1)
    where = np.flatnonzero(ours != theirs)
    if not len(where):
        return None
    # Where the student is surest first: these are the ones worth looking at.
    confidence = np.asarray(jax.nn.softmax(student.logits)).max(-1)
    where = where[np.argsort(-confidence[where])][:SHOWN]
    names = source.class_names or [str(k) for k in range(student.logits.shape[-1])]
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
    results: Mapping[str, Mapping[str, float]],
    pages: list[tuple[str, str]],
) -> str:
    columns = [c for c in _COLUMNS if any(c in row for row in results.values())]
    lines = [
        f'# {source.name}: {", ".join(results)}',
        '',
        f'{len(source)} examples of `{source.split}`, seed {recipe.seed}. '
        'The command and versions are in `manifest.json`.',
        '',
        '| network | ' + ' | '.join(_COLUMNS[c][0] for c in columns) + ' |',
        '|---|' + '---:|' * len(columns),
    ]
    for title, row in results.items():
        cells = [_COLUMNS[c][1].format(row[c]) if c in row else '' for c in columns]
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    for title, file in pages:
        lines += ['', f'## {title}', '', f'![{title}](figures/{file})']
    return '\n'.join(lines) + '\n'
