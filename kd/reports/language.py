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
from kd.evaluators import language as metrics
from kd.io.progress import say
from kd.io.workdir import read_metrics
from kd.network import parameter_count
from kd.networks import Trained, trained_network
from kd.parallel import mesh as mesh_lib
from kd.ranges import Count, Size, SplitName
from kd.sampling.autoregressive import sampler
from kd.text import packing, templates


class Sample(NamedTuple):
    """A prompt, and what each network says to it, by title."""

    prompt: str
    answers: dict[str, str]


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
    found = {title: _found(context, reference, source) for title, reference in rows}
    reference = _found(context, teacher, source) if teacher else None
    results: dict[str, Any] = {}
    for title, trained in found.items():
        say('report', f'{title}: perplexity on {split}')
        results[title] = _measured(context, trained, reference, source, batch_size, batches)
    samples = _samples(context, found, source, prompts, max_new, chat) if prompts else []
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


def _found(context: ReportContext, reference: str, source: Any) -> Trained:
    return trained_network(
        context.recipe, reference, context.workdir, context.mesh, source, where='report.rows'
    )


def _measured(context, trained, reference, source, batch_size, batches) -> dict[str, float]:
    """Metrics of a network on a split, its parameters, and how fast it was trained."""
    variables = trained.restore()
    others = reference.restore() if reference else None
    of_batch = metrics.compiled(trained.network, reference.network if reference else None)
    mesh = context.mesh
    part, parts = mesh_lib.batch_part(mesh)
    every = pipeline.eval_batches(source, batch_size, host_index=part, host_count=parts)
    total: Any = None
    for number in range(min(len(every), batches or len(every))):
        batch = mesh_lib.put_batch(every[number], mesh_lib.batch_sharding(mesh))
        sums = of_batch(variables, others, batch)
        total = sums if total is None else jax.tree.map(jnp.add, total, sums)
    found = metrics.finish(jax.device_get(total))
    return {'parameters': parameter_count(variables), **found}


def _samples(context, found, source, prompts, max_new, chat) -> list[Sample]:

    tokenizer = source.tokenizer
    ids = [
        templates.render(
            tokenizer, [{'role': 'user', 'content': prompt}], add_generation_prompt=True
        )[0]
        if chat
        else np.asarray(tokenizer.encode(prompt), np.int32)
        for prompt in prompts
    ]
    longest = max(map(len, ids))
    rows = packing.prompts(ids, longest, pad=tokenizer.pad).arrays
    answers: dict[str, list[str]] = {}
    for title, trained in found.items():
        say('report', f'{title}: samples')
        module = trained.network.module
        draw = sampler(module, max_new=max_new, temperature=0.0, stop=tokenizer.stop)
        said = jax.jit(draw)(
            trained.restore(), rows['input'], rows['prompt_mask'], jax.random.key(0)
        )
        answers[title] = [
            tokenizer.decode(np.asarray(tokens)[np.asarray(mask)])
            for tokens, mask in zip(said.tokens, said.mask, strict=True)
        ]
    return [
        Sample(prompt, {title: texts[i] for title, texts in answers.items()})
        for i, prompt in enumerate(prompts)
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
