"""A stage in which a teacher or a student answers prompts, for later stages to learn from.

    config.answers = stage(
        teacher='teacher', steps=1, batch_size=64, method=dict(name='kd.methods.cache.nothing'),
        data=dict(source=dict(name='kd.data.text.gsm8k', layout='prompts', ...), train='train'),
        writers={'answers': dict(
            name='kd.methods.generate.responses', samples=8, max_new=512,
            reward=dict(name=...))})

`kd.data.generated` reads them: as text to learn, as pairs of better and worse answers, as pass
rates; `kd.data.revisions` as answers to be revised.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kd import config as config_lib
from kd.config import Block
from kd.context import Context
from kd.context import Writer as StageWriter
from kd.data import generated
from kd.data.sources import Source
from kd.errors import UserError
from kd.io import answers, checksums
from kd.io.progress import say
from kd.method import Batch
from kd.methods import batches
from kd.methods.lm import answering
from kd.models.decoder import Decoder
from kd.parallel import distributed
from kd.ranges import Count, NonNegative, Positive, Size
from kd.state import PyTree, State


def responses(
    context: Context,
    *,
    max_new: Count,
    split: str = 'train',
    who: str = 'teacher',
    samples: Count = 1,
    temperature: NonNegative = 1.0,
    top_p: Positive = 1.0,
    top_k: Size = 0,
    stop: tuple[Size, ...] = (),
    forbidden: tuple[Size, ...] = (),
    reward: Block | None = None,
    per_file: Count = 1024,
    block: Count = 16,
) -> StageWriter:
    """Writes answers to every prompt of a split to `DIRECTORY/SPLIT_answers/`.

    Answers that were cut off go on with the first file that is missing; complete ones are left
    alone. An answer depends on the recipe's seed, the stage, the prompt's place in the split and
    the answer's number alone, not on batches or files.

    Args:
      context: the stage; data in the layout 'prompts', with `input` and `prompt_mask`.
      max_new: tokens of the longest answer.
      split: of the stage's data, all of which is answered in its order.
      who: answers: 'teacher', one of the stage's `references`, or 'network', which it trains.
      samples: answers to each prompt.
      temperature, top_p, top_k, block: see `kd.sampling.autoregressive.sampler`.
      stop: tokens that end an answer; () for those of the data's tokenizer, if there is one.
      forbidden: tokens that are never said; nor is what pads a vocabulary beyond that of the data.
      reward: block of `f(context, **arguments)`, whose `(tokens int [B, R], mask bool [B, R],
        batch) -> float [B]` judges answers; NaN for no verdict. None for no judgement.
      per_file: prompts of a file; rounded up to whole batches.

    Raises:
      UserError: nobody of that name, one that is no decoder, or data without prompts.
    """
    decoder = _answerer(context, who)
    source = context.source(split)
    if 'prompt_mask' not in source.spec:
        raise UserError(
            f"{context.stage}: answers are sampled to prompts, and the data has no 'prompt_mask'; "
            "a source of text has them with layout='prompts'."
        )
    outcomes = source.num_classes or decoder.num_classes
    draw = answering.drawing(
        decoder, lambda: source, outcomes, max_new=max_new, temperature=temperature, top_p=top_p,
        top_k=top_k, stop=stop, forbidden=forbidden, block=block,
    )  # fmt: skip
    form = answers.Form(
        samples=samples,
        max_new=max_new,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        stop=draw.stop,
        forbidden=draw.forbidden,
        reward=dict(reward or {}),
        outcomes=outcomes,
    )
    judge = None
    if reward:
        judge = config_lib.build(reward, context, where=f'{context.stage}.writers.reward')

    def answer(variables: PyTree, batch: Batch, key: jax.Array) -> answers.Answers:
        tiled = jax.tree.map(lambda x: jnp.repeat(x, samples, axis=0), batch)
        number = jnp.tile(jnp.arange(samples), batch['index'].shape[0])
        said = draw(
            context.rollout(variables), tiled['input'], tiled['prompt_mask'], key,
            rows=tiled['index'] * samples + number,
        )  # fmt: skip
        scores = jnp.full(said.truncated.shape, jnp.nan)
        if judge is not None:
            scores = judge(said.tokens, said.mask, tiled).astype(jnp.float32)
        found = (said.tokens, said.mask.sum(1), said.log_probs, said.truncated, scores)
        split_up = jax.tree.map(lambda x: x.reshape(-1, samples, *x.shape[1:]), found)
        return answers.Answers(*split_up)

    size = -(-per_file // context.batch_size) * context.batch_size

    def write(state: State, step: int, directory: Path) -> None:
        del step
        variables = state.variables() if who == 'network' else state.frozen[who]
        source = context.source(split)
        made_of = {
            **generated.fingerprints(context.recipe, context.stage, who, source, context.locate),
            'weights': checksums.fingerprint(variables),
        }
        place = answers.folder(directory, split)
        writer = answers.Writer(place, form, len(source), size, made_of)
        rows_of = _rows(context, answer, source, variables, split)
        for file in distributed.from_first(writer.files.begin):
            found = rows_of(file * size, min((file + 1) * size, len(source)))
            if file % jax.process_count() == jax.process_index():
                writer.write(file, found)
        distributed.agree(lambda: None)
        if distributed.is_first() and not writer.files.complete:
            sizes = writer.files.finish()
            say(
                context.stage,
                f'{samples} answers to each of {len(source):,} prompts, '
                f'{sizes["bytes_per_example"]:.0f} bytes a prompt',
            )

    return write


def _answerer(context: Context, who: str) -> Decoder:
    """The decoder that answers."""
    known = {'network': context.optional_network, 'teacher': context.optional_teacher}
    found = {**known, **context.references}.get(who)
    if found is None:
        there = [name for name, one in known.items() if one is not None]
        raise UserError(
            f"{context.stage}: there is no '{who}' to answer; the stage has "
            f'{", ".join([*there, *context.references]) or "no network at all"}.'
        )
    return answering.needed_decoder(context, found, who)


def _rows(
    context: Context,
    answer: Callable[..., answers.Answers],
    source: Source,
    variables: PyTree,
    split: str,
) -> Callable[[int, int], answers.Answers]:
    """(first, last + 1) of prompts, the first of a batch -> answers to them."""
    size, key = context.batch_size, batches.key_of(context, split)
    ask = batches.asking(answer, variables, source, size)

    def rows_of(first: int, end: int) -> answers.Answers:
        found = [ask(number, key) for number in range(first // size, -(-end // size))]
        return jax.tree.map(lambda *x: np.concatenate(x)[: end - first], *found)

    return rows_of
