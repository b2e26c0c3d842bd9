"""Answers of a stage as prompts to revise them, and what became of that as text to learn.

    first:    kd.methods.generate.responses to prompts x               y, a verdict
    revised:  the same, to `prompts` of the stage `first`              y', a verdict
    srt:      kd.methods.rl.sd_zero.srt on `records` of `revised`      (x, y, verdict, y'), y' right

as of Self-Distillation Zero (arXiv:2604.12002), phase 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import jax
import numpy as np

from kd.data import generated, sources
from kd.data.context import SourceContext
from kd.data.text_rows import Form, TextSource
from kd.errors import UserError
from kd.ranges import Count, Finite, Keywords, Size, StageName
from kd.text import packing, revision
from kd.text.packing import Example
from kd.text.revision import Cues

# The prompt of the answer that is revised, int32 [P] padded on the left, and its mask.
PLAIN, PLAIN_MASK = 'plain', 'plain_mask'
# Examples where only shapes count.
_DESCRIBED = 10_000_000


def prompts(
    context: SourceContext,
    *,
    stage: StageName,
    length: Count,
    cues: Annotated[Mapping[str, Any], Keywords(Cues)],
    revise: Literal['wrong', 'all'] = 'wrong',
    passing: Finite = 1.0,
    samples: Size = 0,
) -> TextSource:
    """Prompts that show an answer of a stage and a verdict, and ask for another.

    The fields of the stage's prompts, with `input` and `prompt_mask` of the longer prompt and those
    of the original one as `plain` and `plain_mask`. Answers without a verdict, and prompts that
    become longer than P, are left out.

    Args:
      context: a split.
      stage: that has answered, by a writer with a `reward`.
      length: P.
      cues: keywords of `kd.text.revision.Cues`.
      revise: which answers.
      passing: the score from which on an answer is right.
      samples: so many first answers to each prompt; 0 for all.

    Raises:
      UserError: as of `kd.data.generated.teacher_text`; no answer to revise.
    """
    said, shaped = Cues(**cues), context.workdir is None
    if shaped:
        source = generated.described(context, stage, scored=True)
        size = _DESCRIBED
        arrays = {
            name: np.zeros((1, *x.shape), x.dtype)
            for name, x in source.spec.items()
            if name != 'index'
        }
        asked = {
            'input': np.zeros((1, length), np.int32), 'prompt_mask': np.zeros((1, length), bool)
        }  # fmt: skip
    else:
        found = generated.answered(context, stage, scored=True)
        source = found.source
        arrays = {name: x for name, x in found.batch.items() if name != 'index'}
        at, asked = _asked(found, said, length, revise, passing, samples)
        if not len(at):
            raise UserError(
                f"of the answers of '{stage}' to {context.split} none is to be revised in a prompt "
                f'of {length:,} tokens.'
            )
        arrays, size = {name: x[at] for name, x in arrays.items()}, len(at)
    plain = {PLAIN: arrays['input'], PLAIN_MASK: arrays['prompt_mask']}
    arrays = {**arrays, **plain, **asked}
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in arrays.items()}
    data = sources.DataSet(
        source.name, {context.split: size}, lambda _: sources.in_memory(arrays), spec,
        source.num_classes,
    )  # fmt: skip
    made = TextSource(data, context.split)
    made.tokenizer = generated.tokenizer_of(source)
    return generated.of_prompts(source, made)


def _asked(
    found: generated.Answered, cues: Cues, length: int, revise: str, passing: float, samples: int
) -> tuple[np.ndarray, sources.Batch]:
    """Rows of prompts whose answers are revised, int [N], and the prompts of the revisions."""
    taken = generated.tokenizer_of(found.source)
    around, scores = cues.around(taken), found.answers.scores
    at, texts = [], []
    for row, number in np.ndindex(len(scores), min(samples or scores.shape[1], scores.shape[1])):
        score = scores[row, number]
        right = bool(score >= passing)
        if np.isnan(score) or (right and revise == 'wrong'):
            continue
        answer = found.said(row, number)
        answer = answer if found.answers.truncated[row, number] else answer[:-1]
        prompt = found.batch['input'][row][found.batch['prompt_mask'][row]]
        text = revision.revised(prompt, answer, around[right], cues.after)
        if len(text) <= length:
            at.append(row)
            texts.append(text)
    if not texts:
        return np.zeros(0, int), {}
    made = packing.prompts(texts, length, pad=taken.pad if taken else 0).arrays
    return np.asarray(at), made


def records(
    context: SourceContext,
    *,
    stage: StageName,
    length: Count,
    generation: Literal['whole', 'revised'] = 'whole',
    least: Finite = 1.0,
    ended: bool = True,
    size: Size = 0,
) -> TextSource:
    """Revisions that were right, twice each: every field of a row is [2, T], as of pairs.

    First the revision after its own prompt, of which the revised answer is learnt; then what a
    generator is to say to the original prompt: 'whole', all that stands behind it, the wrong answer
    and the cue included, or the 'revised' answer alone. What is longer than T is left out.

    Args:
      context: a split.
      stage: that has answered `prompts`, by a writer with a `reward`.
      length: T.
      generation: see above; 'whole' where revisions go on from the prompt (`Cues.after` is None).
      least: leaves out revisions with a score below it, or none.
      ended: leaves out those that came to no stop token.
      size: at most so many, the first; 0 for all.

    Raises:
      UserError: as of `kd.data.generated.teacher_text`; other prompts, no revision left.
    """
    options: dict[str, Any] = dict(context=context, tokenizer='', length=length, long='drop')
    if context.workdir is None:
        source = generated.described(context, stage, scored=True)
        _check(source.spec, stage)
        form = Form(source.name, layout='pairs', **options)
        return generated.of_prompts(source, form.described(source.num_classes))
    found = generated.answered(context, stage, scored=True)
    _check(found.batch, stage)
    scores, cut = found.answers.scores, found.answers.truncated
    chosen = [
        (row, number)
        for row, number in np.ndindex(*scores.shape)
        if scores[row, number] >= least and not (ended and cut[row, number])
    ]
    if not chosen:
        raise UserError(f"of the revisions of '{stage}' to {context.split} none is right.")
    revising = [found.example(*one) for one in chosen[: size or None]]
    generating = [
        _generating(found, one, row, number, generation, stage)
        for one, (row, number) in zip(revising, chosen, strict=False)
    ]
    form = Form(found.source.name, layout='pairs', **options)
    taken, classes = generated.tokenizer_of(found.source), found.source.num_classes
    made = form.filled(list(zip(revising, generating, strict=True)), taken, classes)
    return generated.of_prompts(found.source, made)


def _generating(
    found: generated.Answered, revising: Example, row: int, number: int, generation: str, stage: str
) -> Example:
    """What is learnt after the original prompt."""
    plain = found.batch[PLAIN][row][found.batch[PLAIN_MASK][row]]
    ids = revising.ids
    if generation == 'revised':
        ids = np.concatenate([plain, found.said(row, number)])
    elif not np.array_equal(ids[: len(plain)], plain):
        raise UserError(
            f"the revisions of '{stage}' do not go on from their prompts, whose cues stand before "
            "them: generation='revised'."
        )
    return Example(ids, np.arange(len(ids)) >= len(plain))


def _check(fields: Mapping[str, Any], stage: str) -> None:
    if PLAIN not in fields:
        raise UserError(
            f"'{stage}' has revised nothing: its prompts are to be those of "
            'kd.data.revisions.prompts.'
        )
