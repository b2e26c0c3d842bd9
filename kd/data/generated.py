"""What a stage has answered (`kd.methods.generate.responses`), as sources for later stages.

    data = dict(
        source=dict(name='kd.data.generated.teacher_text', stage='answers', length=512),
        train='train[:95%]', validation='train[95%:]')

Splits are slices of the prompts that were answered, by the name of the writer's split. Tokens are
those that were drawn, from end to end.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from kd import config as config_lib
from kd.config import Recipe
from kd.data import sources
from kd.data.context import SourceContext, source_loader
from kd.data.text_rows import Form, TextSource
from kd.errors import UserError
from kd.io import answers, cache
from kd.losses import diversity
from kd.ranges import Count, Finite, Fraction, Seed, Size, StageName
from kd.references import split_reference
from kd.text.packing import Example
from kd.text.tokenizer import Tokenizer

WRITER = 'kd.methods.generate.responses'
PASS_RATE = 'pass_rate'


class Answered(NamedTuple):
    """Prompts [N] with their answers.

    Attributes:
      batch: fields of the prompts' source.
      answers: K to each.
      source: of one of the splits, for what it says of its data.
    """

    batch: sources.Batch
    answers: answers.Answers
    source: sources.Source

    def said(self, row: int, number: int) -> np.ndarray:
        """Tokens of one answer."""
        return self.answers.tokens[row, number, : self.answers.lengths[row, number]]

    def example(self, row: int, number: int | None) -> Example:
        """A prompt with one answer, of which the answer is learnt; None for that of the data."""
        prompt = self.batch['input'][row][self.batch['prompt_mask'][row]]
        if number is None:
            said = self.batch['response'][row][self.batch['response_mask'][row]]
        else:
            said = self.said(row, number)
        response = np.arange(len(prompt) + len(said)) >= len(prompt)
        return Example(np.concatenate([prompt, said]), response)

    def rates(self, least: float) -> np.ndarray:
        """Share of each prompt's answers with a score of at least so much, float32 [N]."""
        with np.errstate(invalid='ignore'):
            return (self.answers.scores >= least).mean(1, dtype=np.float32)


def teacher_text(
    context: SourceContext,
    *,
    stage: StageName,
    length: Count,
    layout: Literal['packed', 'rows'] = 'packed',
    samples: Size = 0,
    least: Finite | None = None,
    ended: bool = False,
    rates: Literal[''] | StageName = '',
    passing: Finite = 1.0,
    most: Fraction = 1.0,
    farthest: Size = 0,
    long: Literal['cut', 'drop'] = 'cut',
    window: Count = 64,
    seed: Seed = 0,
) -> TextSource:
    """Prompts with the answers of a stage, as text of which the answers are learnt.

    Args:
      context: a split.
      stage: that has answered.
      length: T, tokens of a row.
      layout: 'packed', or 'rows' with one answer each.
      samples: so many first answers to each prompt; 0 for all.
      least: leaves out answers with a score below it, or none.
      ended: leaves out answers that came to no stop token.
      rates: a stage that has answered the same prompts, whose pass rates rows bring as `pass_rate`
        float32 in the layout 'rows'.
      passing: the score with which an answer of `rates` has passed.
      most: with `rates`, leaves out prompts with a higher pass rate: what is solved already.
      farthest: of the answers to a prompt that are left, so many that lie farthest from one another
        (`kd.losses.diversity`, by tokens); 0 for all.
      long: what is longer than a row is 'cut' or 'drop'ped.
      window, seed: of packing, see `kd.data.text.documents`.

    Raises:
      UserError: no such stage, answers of other data or another network, none left.
    """
    if rates and layout != 'rows' and most == 1:
        raise UserError(f"pass rates are of rows of one answer: layout='rows', not {layout!r}.")
    if most < 1 and not rates:
        raise UserError(f'most={most} is a pass rate: name the stage that has `rates`.')

    def form(source: sources.Source) -> Form:
        # Of the name of its prompts, as it is of their data that a network knows.
        return Form(source.name, context, '', length, layout, window=window, seed=seed)

    if context.workdir is None:
        source = described(context, stage, scored=least is not None)
        if rates:
            described(context, rates, scored=True)
        further = {PASS_RATE: np.zeros(1, np.float32)} if rates and layout == 'rows' else None
        return of_prompts(source, form(source).described(source.num_classes, further))
    found = answered(context, stage, scored=least is not None)
    count = found.answers.scores.shape[1]
    passed = np.zeros(len(found.batch['input']), np.float32)
    if rates:
        others = answered(context, rates, scored=True)
        _check_prompts(found, others, stage, rates)
        passed = others.rates(passing)
    chosen = [
        (row, number)
        for row in np.flatnonzero(passed <= most).tolist()
        for number in range(min(samples or count, count))
        if (least is None or found.answers.scores[row, number] >= least)
        and not (ended and found.answers.truncated[row, number])
    ]
    if farthest:
        chosen = _farthest(found.answers, chosen, farthest)
    examples = [(row, found.example(row, number)) for row, number in chosen]
    if long == 'drop':
        examples = [(row, one) for row, one in examples if len(one.ids) <= length]
    if not examples:
        raise UserError(f"of the answers of '{stage}' to {context.split} none is left to learn.")
    further = None
    if layout == 'rows' and rates:
        further = {PASS_RATE: passed[[row for row, _ in examples]]}
    taken, classes = tokenizer_of(found.source), found.source.num_classes
    made = form(found.source).filled([one for _, one in examples], taken, classes, further)
    return of_prompts(found.source, made)


def _farthest(
    said: answers.Answers, chosen: Sequence[tuple[int, int]], count: int
) -> list[tuple[int, int]]:
    """Of the (prompt, answer) that are chosen, for each prompt so many far ones."""

    @jax.jit
    def of_prompt(tokens, lengths, valid):
        apart = diversity.levenshtein(tokens[:, None], tokens, lengths[:, None], lengths)
        return diversity.farthest_subset(apart, valid, count)

    kept = []
    for row, group in itertools.groupby(chosen, lambda one: one[0]):
        valid = np.isin(np.arange(said.lengths.shape[1]), [number for _, number in group])
        numbers = np.asarray(of_prompt(said.tokens[row], said.lengths[row], valid))
        kept += [(row, number) for number in sorted(numbers[numbers >= 0].tolist())]
    return kept


def pairs(
    context: SourceContext,
    *,
    length: Count,
    chosen: Literal[''] | StageName = '',
    rejected: Literal[''] | StageName = '',
    ended: bool = False,
    long: Literal['cut', 'drop'] = 'cut',
) -> TextSource:
    """Pairs of answers to a prompt, the better one first: every field of a row is [2, T].

    Of one stage the answers of the highest and of the lowest score; of two, the k-th answers of
    each, as many as both have; where `rejected` alone is named, the answer that the data have to a
    prompt and the first of the stage. Pairs of equal scores, or of the same answer twice, are left
    out.

    Args:
      context: a split.
      length: T.
      chosen: the stage whose answers are the better ones; '' for those of the prompts' data, which
        then have a `response_length`.
      rejected: the stage of the others; '' for the same.
      ended: leaves out pairs with an answer of a stage that came to no stop token.
      long: what is longer than a row is 'cut' or 'drop'ped.

    Raises:
      UserError: as of `teacher_text`, no stage at all, data without answers.
    """
    first = chosen or rejected
    if not first:
        raise UserError('pairs are of answers of a stage: name it as `chosen` or `rejected`.')
    options: dict[str, Any] = dict(context=context, tokenizer='', length=length, long=long)
    if context.workdir is None:
        source = described(context, first, scored=not rejected)
        if chosen and rejected:
            described(context, rejected)
        if not chosen and 'response' not in source.spec:
            raise UserError(
                f"the prompts of '{rejected}' have no answers of their own to prefer; give their "
                'data a response_length, or name the stage of the better ones (chosen).'
            )
        form = Form(source.name, layout='pairs', **options)
        return of_prompts(source, form.described(source.num_classes))
    better = answered(context, first, scored=not rejected)
    worse = better
    if chosen and rejected:
        worse = answered(context, rejected)
        _check_prompts(better, worse, chosen, rejected)
    found = []
    for row in range(len(better.batch['input'])):
        numbers: list[tuple[int | None, int]]
        if not chosen:
            numbers = [(None, 0)]
        elif rejected:
            count = min(x.answers.scores.shape[1] for x in (better, worse))
            numbers = [(k, k) for k in range(count)]
        else:
            scores = np.nan_to_num(better.answers.scores[row], nan=-np.inf)
            most, least = int(scores.argmax()), int(scores.argmin())
            numbers = [(most, least)] if scores[most] > scores[least] else []
        for a, b in numbers:
            one, other = better.example(row, a), worse.example(row, b)
            cut = worse.answers.truncated[row, b]
            cut |= a is not None and better.answers.truncated[row, a]
            if not np.array_equal(one.ids, other.ids) and not (ended and cut):
                found.append((one, other))
    if not found:
        raise UserError(f"of the answers of '{first}' to {context.split} no two are a pair.")
    form = Form(better.source.name, layout='pairs', **options)
    taken, classes = tokenizer_of(better.source), better.source.num_classes
    return of_prompts(better.source, form.filled(found, taken, classes))


def pass_rates(
    context: SourceContext, *, stage: StageName, passing: Finite = 1.0, most: Fraction = 1.0
) -> sources.Source:
    """The prompts of a stage with `pass_rate` float32, the share of its answers that have passed.

    Args:
      context: a split.
      stage: that has answered, by a writer with a `reward`.
      passing: the score with which an answer has passed; one without a verdict has not.
      most: leaves out prompts with a higher pass rate, what is solved already. What is never solved
        stays.

    Raises:
      UserError: as of `teacher_text`, answers without scores, no prompt left.
    """
    if context.workdir is None:
        source = described(context, stage, scored=True)
        empty = {
            name: np.zeros((1, *x.shape), x.dtype)
            for name, x in source.spec.items()
            if name != 'index'
        }
        arrays, size = {**empty, PASS_RATE: np.zeros(1, np.float32)}, len(source)
    else:
        found = answered(context, stage, scored=True)
        rates = found.rates(passing)
        kept = rates <= most
        if not kept.any():
            raise UserError(f"of the prompts of '{stage}' none has a pass rate of at most {most}.")
        batch = {name: x[kept] for name, x in found.batch.items() if name != 'index'}
        arrays, source = {**batch, PASS_RATE: rates[kept]}, found.source
        size = int(kept.sum())
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in arrays.items()}
    data = sources.DataSet(
        source.name, {context.split: size}, lambda _: sources.in_memory(arrays), spec,
        source.num_classes,
    )  # fmt: skip
    made = TextSource(data, context.split)
    made.tokenizer = tokenizer_of(source)
    return of_prompts(source, made)


def of_prompts(prompts: sources.Source, made: TextSource) -> TextSource:
    """A source of answers, with what it says of its prompts."""
    made.prompts = prompts
    return made


def tokenizer_of(source: sources.Source) -> Tokenizer | None:
    """The tokenizer of a source of text, None where it has none."""
    return getattr(source, 'tokenizer', None)


def fingerprints(
    recipe: Recipe,
    stage: str,
    who: str,
    source: sources.Source,
    locate: Callable[[str], Path] | None,
) -> dict[str, str]:
    """What answers were made of, as far as a reader can tell: tokenizer, network and prompts."""
    found = dict(sources.tokenizer_fingerprint(source))
    config = recipe.stages[stage]
    reference = config.teacher if who == 'teacher' else config.references.get(who, '')
    if reference and locate is not None:
        place = locate(split_reference(reference)[0])
        found[f'training of {who}'] = cache.training_fingerprint(place)
    return {**found, 'data': sources.fingerprint(source)}


def _writers(recipe: Recipe, stage: str) -> dict[str, Mapping[str, Any]]:
    """{split: writer's block} of the splits that a stage answers."""
    if stage not in recipe.stages:
        raise UserError(f"data.source names the stage '{stage}', of {tuple(recipe.stages)}.")
    blocks = [b for b in recipe.stages[stage].writers.values() if b['name'] == WRITER]
    if not blocks:
        raise UserError(f"stage '{stage}' has no writer {WRITER}.")
    return {block.get('split', 'train'): block for block in blocks}


def _prompts(context: SourceContext, stage: str, split: str) -> sources.Source:
    """The source of the prompts that a stage answers."""
    recipe = context.recipe
    data = config_lib.data_of(recipe.data, recipe.stages[stage].data)
    return source_loader(data, recipe, context.workdir)(split)


def described(context: SourceContext, stage: str, *, scored: bool = False) -> sources.Source:
    """The prompts of a stage that is yet to answer."""
    writers = _writers(context.recipe, stage)
    for block in writers.values():
        _check_scored(stage, bool(block.get('reward')), scored)
    return _prompts(context, stage, next(iter(writers)))


def answered(context: SourceContext, stage: str, *, scored: bool = False) -> Answered:
    """The answers of a stage to the prompts of the split."""
    writers = _writers(context.recipe, stage)
    named = [split for split in writers if split in context.split] or list(writers)
    kept, asked = {}, {}
    for split in named:
        asked[split] = source = _prompts(context, stage, split)
        who = writers[split].get('who', 'teacher')
        made_of = fingerprints(context.recipe, stage, who, source, context.locate)
        kept[split] = answers.Reader(answers.folder(context.locate(stage), split), made_of)
        _check_scored(stage, bool(kept[split].form.reward), scored)
    sizes = {split: len(one) for split, one in kept.items()}
    parts = sources.parse_split(context.split, sizes, name=f"answers of '{stage}'")
    found = [
        (asked[split].fetch(at), kept[split].fetch(at))
        for split, start, stop in parts
        if len(at := np.arange(start, stop))
    ]
    if not found:
        raise sources.DataError(f"the answers of '{stage}' have nothing in {context.split!r}")
    batches, said = zip(*found, strict=True)
    batch = {name: np.concatenate([one[name] for one in batches]) for name in batches[0]}
    joined = answers.Answers(*(np.concatenate(x) for x in zip(*said, strict=True)))
    return Answered(batch, joined, asked[named[0]])


def _check_scored(stage: str, has: bool, wanted: bool) -> None:
    if wanted and not has:
        raise UserError(
            f"the answers of '{stage}' have no scores; give its writer a `reward`, which judges "
            'them.'
        )


def _check_prompts(first: Answered, second: Answered, one: str, other: str) -> None:
    for name in ('input', 'prompt_mask'):
        if not np.array_equal(first.batch[name], second.batch[name]):
            raise UserError(f"'{one}' and '{other}' have not answered the same prompts.")
