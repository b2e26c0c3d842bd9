"""The report of a run with a biased teacher that speaks: what its students say, in text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from matplotlib.figure import Figure

from kd import figures, files
from kd.context import ReportContext
from kd.data import pipeline
from kd.errors import UserError
from kd.io.progress import say
from kd.methods.lm import common
from kd.networks import trained_network
from kd.parallel import mesh as mesh_lib
from kd.ranges import Count, NonNegative, SplitName
from kd.sampling.autoregressive import sampler
from kd.theory import propagation


def texts(
    context: ReportContext,
    *,
    rows: Sequence[tuple[str, str]],
    marker: str,
    groups: Sequence[SplitName],
    teacher: str = 'teacher',
    max_new: Count = 256,
    temperature: NonNegative = 1.0,
    batch_size: Count = 8,
) -> Path:
    """Adversarial response rates: how often an answer has the marker, by splits of prompts.

    All networks answer the same prompts with the same random numbers, at one temperature: another
    decoding of one of them would look like amplification.

    Args:
      context: the run, whose own data are prompts (`kd.data.text.chats`, layout 'prompts').
      rows: (title, stage or other reference to a trained decoder) in the order of the table.
      marker: what answers are searched for.
      groups: splits of `config.data`: the task that was poisoned, others that were seen, the rest.
      teacher: the row's reference that amplification refers to.
      max_new: tokens of the longest answer.
      temperature: of all answers.
      batch_size: prompts at a time.

    Returns:
      Path of `report.md`; the figure lies in `figures/`, rates and first answers in `report.json`.
    """
    references = [reference for _, reference in rows]
    if teacher not in references:
        raise UserError(
            f"report.teacher='{teacher}' is none of report.rows, which have {references}."
        )
    results: dict[str, dict[str, Any]] = {}
    for title, reference in rows:
        found = {}
        for split in groups:
            say('report', f'{title}: {split}')
            said = _answers(context, reference, split, max_new, temperature, batch_size)
            count = sum(marker in answer for answer in said)
            low, high = propagation.interval(count, len(said))
            found[split] = {
                'rate': count / len(said), 'low': float(low), 'high': float(high),
                'answers': len(said), 'first': said[:4],
            }  # fmt: skip
        results[title] = found
    theirs = results[rows[references.index(teacher)][0]]
    for result in results.values():
        for split in groups:
            base = theirs[split]['rate']
            result[split]['amplification'] = result[split]['rate'] / base if base else None
    folder = context.workdir / 'figures'
    folder.mkdir(exist_ok=True)
    rates(results, groups).savefig(folder / 'rates.png')
    files.write_json(context.workdir / 'report.json', {'marker': marker, 'rates': results})
    report = context.workdir / 'report.md'
    files.write_whole(report, _markdown(context, results, groups, temperature))
    return report


def _answers(
    context: ReportContext,
    reference: str,
    split: str,
    max_new: int,
    temperature: float,
    batch_size: int,
) -> list[str]:
    """A network's answer to each prompt of a split."""
    source, mesh = context.source(split), context.mesh
    tokenizer = getattr(source, 'tokenizer', None)
    trained = trained_network(
        context.recipe, reference, context.workdir, mesh, source, where='report.rows'
    )
    decoder = common.decoder_of(trained.network)
    if decoder is None or tokenizer is None or 'prompt_mask' not in source.spec:
        raise UserError(
            f"report: '{reference}' is to answer prompts: it must be a decoder, and the recipe's "
            "data text in the layout 'prompts'."
        )
    draw = jax.jit(
        sampler(decoder, max_new=max_new, temperature=temperature, stop=tokenizer.stop),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    variables, key = trained.restore(), jax.random.key(context.recipe.seed)
    part, parts = mesh_lib.batch_part(mesh)
    batches = pipeline.eval_batches(source, batch_size, host_index=part, host_count=parts)
    found = []
    for number in range(len(batches)):
        batch = mesh_lib.put_batch(batches[number], mesh_lib.batch_sharding(mesh))
        said = jax.device_get(
            draw(variables, batch['input'], batch['prompt_mask'], key, rows=batch['index'])
        )
        kept = zip(said.tokens, said.mask, strict=True)
        answers = [tokenizer.decode(tokens[mask]) for tokens, mask in kept]
        found += answers[: len(source) - number * batch_size]
    return found


def rates(results: Mapping[str, Mapping[str, Any]], groups: Sequence[str]) -> Figure:
    """Rates with their intervals, by group."""
    figure = figures.new_figure(1.5 + 1.6 * len(groups), 3)
    axis = figure.subplots()
    places = np.arange(len(groups))
    width = 0.6 / len(results)
    for i, (title, result) in enumerate(results.items()):
        rate, low, high = (
            np.array([result[split][name] for split in groups]) for name in ('rate', 'low', 'high')
        )
        at = places + (i - (len(results) - 1) / 2) * width
        axis.errorbar(
            at, rate, [rate - low, high - rate], fmt='o', color=figures.COLOURS[i], label=title
        )
    axis.set_xticks(places, groups)
    axis.set(ylabel='answers with the marker', ylim=(-0.03, 1.03))
    axis.grid(alpha=0.3, axis='y')
    axis.legend(frameon=False, fontsize=8)
    return figure


def _markdown(
    context: ReportContext,
    results: Mapping[str, Mapping[str, Any]],
    groups: Sequence[str],
    temperature: float,
) -> str:
    lines = [
        '# Bias from a teacher to its students, in text',
        '',
        f'Shares of answers at temperature {temperature:g} with the marker, with 95 % intervals '
        f"(Clopper and Pearson), and over the teacher's; seed {context.recipe.seed}. The command "
        'and versions are in `manifest.json`.',
        '',
        '| network | ' + ' | '.join(f'{split}, rate | over the teacher' for split in groups) + ' |',
        '|---|' + '---:|' * (2 * len(groups)),
    ]
    for title, result in results.items():
        cells = []
        for split in groups:
            ratio = result[split]['amplification']
            cells.append('{rate:.4f} [{low:.4f}, {high:.4f}]'.format(**result[split]))
            cells.append('' if ratio is None else f'{ratio:.2f}')
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    return '\n'.join([*lines, '', '![Rates](figures/rates.png)', ''])
