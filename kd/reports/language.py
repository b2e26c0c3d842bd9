"""The report of a run of language models: perplexities, agreement, samples side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures, files
from kd.context import ReportContext
from kd.data import pipeline
from kd.errors import UserError
from kd.evaluators import language as metrics
from kd.io.progress import say
from kd.io.workdir import read_metrics
from kd.methods.lm import answering, common
from kd.network import Network, parameter_count
from kd.networks import trained_network
from kd.parallel import mesh as mesh_lib
from kd.ranges import Count, Size, SplitName
from kd.sampling.autoregressive import sampler
from kd.state import PyTree
from kd.text import packing, templates


class Sample(NamedTuple):
    """A prompt, and what each network says to it, by title."""

    prompt: str
    answers: dict[str, str]


class Restored(NamedTuple):
    """A trained network and its variables."""

    network: Network
    variables: PyTree


def language(
    context: ReportContext,
    *,
    rows: Sequence[tuple[str, str]],
    teacher: Literal[''] | str = 'teacher',
    split: SplitName = 'validation',
    batch_size: Count = 8,
    batches: Size = 0,
    prompts: Sequence[str] = (),
    max_new: Count = 48,
    chat: bool = False,
) -> Path:
    """Compares language models on a split, and by what they answer.

    Args:
      context: the run.
      rows: (title, stage or other reference to a trained network) in the order of the table.
      teacher: the reference that agreement and KL refer to, or '' for none.
      split: of the recipe's data.
      batch_size: rows per evaluation step.
      batches: at most so many of them; 0 for all.
      prompts: texts that each network goes on with, at temperature 0.
      max_new: tokens of each answer.
      chat: whether prompts are questions, rendered by the tokenizer's chat template.

    Returns:
      Path of `report.md`; learning curves lie in `figures/`, numbers in `report.json`.
    """
    source = context.source(split)
    tokenizer = getattr(source, 'tokenizer', None)
    if prompts and tokenizer is None:
        raise UserError('report.prompts are texts, and the data name no tokenizer; leave them out.')
    ids = [_prompt(tokenizer, prompt, chat) for prompt in prompts]
    reference = _restored(context, teacher, source) if teacher else None
    results: dict[str, Any] = {}
    answers: dict[str, list[str]] = {}
    for title, name in rows:
        say('report', f'{title}: {split}')
        # One network is held at a time, beside the teacher.
        one = reference if reference and name == teacher else _restored(context, name, source)
        results[title] = _measured(context, one, reference, source, batch_size, batches)
        answers[title] = _answers(one, tokenizer, ids, max_new)
    samples = [
        Sample(prompt, {title: said[i] for title, said in answers.items()})
        for i, prompt in enumerate(prompts)
    ]
    curves = {
        title: read_metrics(context.workdir / stage)
        for title, stage in rows
        if stage in context.recipe.stages
    }
    folder = context.workdir / 'figures'
    folder.mkdir(exist_ok=True)
    losses = dict.fromkeys(curves, 'loss')
    figures.learning_curves(curves, losses).savefig(folder / 'learning_curves.png')
    document = {'metrics': results, 'samples': [sample._asdict() for sample in samples]}
    files.write_json(context.workdir / 'report.json', document)
    report = context.workdir / 'report.md'
    files.write_whole(report, _markdown(context, split, results, samples))
    return report


def _restored(context: ReportContext, reference: str, source: Any) -> Restored:
    trained = trained_network(
        context.recipe, reference, context.workdir, context.mesh, source, where='report.rows'
    )
    return Restored(trained.network, trained.restore())


def _measured(
    context: ReportContext,
    one: Restored,
    teacher: Restored | None,
    source: Any,
    batch_size: int,
    batches: int,
) -> dict[str, float]:
    """Metrics of a network on a split, and its parameters."""

    @jax.jit
    def sums_of(variables, theirs, batch):
        batch = answering.as_text(batch)
        said = common.said_by(teacher.network, theirs, batch) if teacher else None
        return metrics.token_metrics(one.network, variables, batch, teacher=said)

    mesh = context.mesh
    part, parts = mesh_lib.batch_part(mesh)
    every = pipeline.eval_batches(source, batch_size, host_index=part, host_count=parts)
    theirs, total = teacher.variables if teacher else None, None
    for number in range(min(len(every), batches or len(every))):
        batch = mesh_lib.put_batch(every[number], mesh_lib.batch_sharding(mesh))
        sums = sums_of(one.variables, theirs, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    found = metrics.finish(jax.device_get(total))
    return {'parameters': parameter_count(one.variables), **found}


def _prompt(tokenizer: Any, prompt: str, chat: bool) -> np.ndarray:
    """Tokens of a prompt, int32 [n]."""
    if not chat:
        return np.asarray(tokenizer.encode(prompt), np.int32)
    message = {'role': 'user', 'content': prompt}
    return templates.render(tokenizer, [message], add_generation_prompt=True)[0]


def _answers(one: Restored, tokenizer: Any, ids: Sequence[np.ndarray], max_new: int) -> list[str]:
    """What a network says to each prompt at temperature 0."""
    decoder = common.decoder_of(one.network)
    if not ids or decoder is None:
        return [''] * len(ids)
    rows = packing.prompts(ids, max(map(len, ids)), pad=tokenizer.pad).arrays
    draw = sampler(decoder, max_new=max_new, temperature=0.0, stop=tokenizer.stop)
    said = jax.jit(draw)(one.variables, rows['input'], rows['prompt_mask'], jax.random.key(0))
    return [
        tokenizer.decode(np.asarray(tokens)[np.asarray(mask)])
        for tokens, mask in zip(said.tokens, said.mask, strict=True)
    ]


_COLUMNS = {
    'parameters': ('parameters', '{:,}'),
    'perplexity': ('perplexity', '{:.3f}'),
    'nll': ('nats a token', '{:.4f}'),
    'accuracy': ('next token right', '{:.4f}'),
    'top_1': ('agrees with the teacher', '{:.4f}'),
    'kl': ('KL from the teacher', '{:.4f}'),
    'entropy': ('entropy', '{:.4f}'),
}


def _markdown(
    context: ReportContext,
    split: str,
    results: Mapping[str, Mapping[str, float]],
    samples: Sequence[Sample],
) -> str:
    columns = [name for name in _COLUMNS if any(name in row for row in results.values())]
    lines = [f'# {", ".join(results)}', '']
    lines.append(f'On the split {split}, seed {context.recipe.seed}.')
    lines.append('The command and versions are in `manifest.json`.')
    lines += ['', '| network | ' + ' | '.join(_COLUMNS[name][0] for name in columns) + ' |']
    lines.append('|---|' + '---:|' * len(columns))
    for title, row in results.items():
        cells = [_COLUMNS[name][1].format(row[name]) if name in row else '' for name in columns]
        lines.append(f'| {title} | ' + ' | '.join(cells) + ' |')
    lines += ['', '## Learning curves', '', '![Learning curves](figures/learning_curves.png)']
    if samples:
        lines += ['', '## Samples', '', 'At temperature 0.']
    for sample in samples:
        lines += ['', f'> {_cell(sample.prompt)}', '', '| network | goes on |', '|---|---|']
        lines += [f'| {title} | {_cell(text)} |' for title, text in sample.answers.items()]
    return '\n'.join(lines) + '\n'


def _cell(text: str) -> str:
    return text.strip().replace('|', '\\|').replace('\n', '<br>')
