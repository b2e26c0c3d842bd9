"""Sources of text: documents, chats, problems and preferences as rows of tokens.

A source is a block of a recipe's data:

    data = dict(
        source=dict(name='kd.data.text.stdlib_docs', tokenizer='gguf:FILE', length=512),
        train='train', validation='validation')

Splits are slices of examples, not of rows: 'train[:90%]' are nine of ten documents, packed by
themselves. Files named by a relative path lie below `--data_dir`, if that is given. Layouts:

  packed: input, positions, segments int32 [T] and response_mask bool [T]; several examples a row.
  rows: the same fields, one example a row.
  prompts: input int32 [P] and prompt_mask bool [P], padded on the left; with `response_length` also
    response int32 [R] and response_mask bool [R].

What a row predicts, `kd.text.packing.shifted` says. Rows are put together once, by the source's
own `seed`: outputs of teachers that are cached for a row stay its own whatever a recipe's seed is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from kd.data import catalogue, sources
from kd.data.builders import characters as letters
from kd.data.builders import examples as builder
from kd.data.builders import records
from kd.data.builders import sokoban as boards
from kd.data.builders import sokoban_words as game
from kd.data.builders import stdlib_docs as documentation
from kd.data.context import SourceContext
from kd.data.text_rows import Form, Layout, TextSource
from kd.errors import UserError
from kd.ranges import Count, Seed, Size
from kd.text import tokenizer as tokenizers
from kd.text.packing import Example, Long
from kd.text.tokenizer import Tokenizer


def documents(
    context: SourceContext,
    *,
    path: str | Mapping[str, str],
    tokenizer: str,
    length: Count,
    field: str = 'text',
    separator: str = '',
    end: str = '',
    layout: Layout = 'packed',
    long: Long = 'split',
    window: Count = 64,
    vocabulary: Size = 0,
    seed: Seed = 0,
) -> TextSource:
    """Text to go on with, all of which is learnt.

    Args:
      context: a split.
      path: a file or folder, see `kd.data.builders.records.documents`, whose split is 'train'; or
        {split: path}.
      tokenizer: 'hf:DIR' or 'gguf:FILE'.
      length: T, tokens of a row.
      field: of records in `.json` and `.jsonl` files.
      separator: what stands between the documents of a text file; '' for one document a file.
      end: the control token that ends a document; '' for the tokenizer's `eos`.
      layout: 'packed' or 'rows'.
      long: 'split' goes on with a document in further examples, which count as examples of their
        own in slices of the split; 'cut' and 'drop' see `kd.text.packing.fit`.
      window: rows that are open while packing.
      vocabulary: of the network, if it is padded; 0 for the tokenizer's.
      seed: of the order in which examples are packed.
    """
    form = Form(
        'documents', context, tokenizer, length, layout, long=long, window=window,
        vocabulary=vocabulary, seed=seed,
    )  # fmt: skip
    paths = _paths(path, context)

    cut = length if long == 'split' else 0

    def examples(file: Path, taken: Tokenizer) -> Sequence[Example]:
        return builder.documents(taken, file, builder.stamp(file), field, separator, end, cut)

    return form.source({split: partial(examples, file) for split, file in paths.items()})


def stdlib_docs(
    context: SourceContext,
    *,
    tokenizer: str,
    length: Count,
    end: str = '',
    layout: Layout = 'packed',
    long: Long = 'split',
    window: Count = 64,
    vocabulary: Size = 0,
    seed: Seed = 0,
) -> TextSource:
    """The documentation of Python's standard library, which is at hand everywhere; its splits are
    'train' and 'validation', and share no module. Arguments as of `documents`."""
    form = Form(
        'stdlib_docs', context, tokenizer, length, layout, long=long, window=window,
        vocabulary=vocabulary, seed=seed,
    )  # fmt: skip

    cut = length if long == 'split' else 0

    def examples(split: str, taken: Tokenizer) -> Sequence[Example]:
        return builder.stdlib(taken, split, end, cut)

    return form.source({split: partial(examples, split) for split in documentation.SPLITS})


def characters(context: SourceContext, *, path: str) -> sources.Source:
    """A file of text as windows of letters and spaces, as `stdlib_characters` has its own; its
    splits are 'train' and 'test', the last tenth. See `kd.data.builders.characters`.

    Args:
      context: a split.
      path: a file.
    """
    window = jax.ShapeDtypeStruct((letters.LENGTH,), np.int32)
    read: dict[str, sources.Batch] = {}
    sizes = dict.fromkeys(('train', 'test'), 10_000_000)
    if context.recipe.data_dir != catalogue.DESCRIBED:
        file = records.locate(path, context.recipe.data_dir)
        read = letters.windows(letters.encode(' '.join(records.documents(file))))
        sizes = {split: len(arrays['input']) for split, arrays in read.items()}
    data = sources.DataSet(
        name='characters',
        sizes=sizes,
        reader=lambda split: sources.in_memory(read[split]) if read else lambda rows: {},
        spec={'input': window, 'label': window},
        num_classes=len(letters.SYMBOLS),
        class_names=tuple(letters.SYMBOLS),
    )
    return sources.Source(data, context.split)


def chats(
    context: SourceContext,
    *,
    path: str | Mapping[str, str],
    tokenizer: str,
    length: Count,
    fields: Sequence[str] = (),
    chat: bool = True,
    form: str = '{prompt}',
    turns: Literal['all', 'last'] = 'all',
    edit: Mapping[str, Any] | None = None,
    template: str = '',
    template_arguments: Mapping[str, Any] | None = None,
    layout: Layout = 'packed',
    response_length: Size = 0,
    long: Literal['cut', 'drop'] = 'cut',
    window: Count = 64,
    vocabulary: Size = 0,
    seed: Seed = 0,
) -> TextSource:
    """Chats and instructions, of which the answers are learnt.

    Args:
      context: a split.
      path: a file, see `kd.data.builders.records.chat`, whose split is 'train'; or {split: file}.
      tokenizer: 'hf:DIR' or 'gguf:FILE'.
      length: T, tokens of a row; P, tokens of a prompt, in the layout 'prompts'.
      fields: names of the fields of question and answer, if they are none of the known.
      chat: render by the tokenizer's chat template; False puts answers after prompts, and `eos`
        after these.
      form: text around a prompt where there is no chat, such as 'Q: {prompt}\\nA: '.
      turns: which answers of a chat are learnt, see `kd.text.templates.render`.
      edit: what is done to the records of the file first, a block that names a function
        `f(records, **arguments) -> records`.
      template: a file with another chat template.
      template_arguments: variables of the template, such as dict(enable_thinking=False).
      layout: 'packed', 'rows' or 'prompts'.
      response_length: R, tokens of the answers in the layout 'prompts'; 0 leaves them out.
      long: 'cut' cuts answers and refuses prompts that are too long; 'drop' leaves examples out.
      window: rows that are open while packing.
      vocabulary: of the network, if it is padded; 0 for the tokenizer's.
      seed: of the order in which examples are packed.
    """
    rows = Form(
        'chats', context, tokenizer, length, layout, response_length, long, window, vocabulary,
        seed, template,
    )  # fmt: skip
    paths = _paths(path, context)
    style = builder.Style(
        chat, form, turns if layout != 'prompts' else 'last', _items(template_arguments),
        answers=_answers(layout, response_length), edit=edit,
    )  # fmt: skip

    def examples(file: Path, taken: Tokenizer) -> Sequence[Example]:
        return builder.chats(taken, file, builder.stamp(file), tuple(fields), style)

    return rows.source({split: partial(examples, file) for split, file in paths.items()})


def gsm8k(
    context: SourceContext,
    *,
    tokenizer: str,
    length: Count,
    calculator: bool = False,
    chat: bool = True,
    form: str = '{prompt}',
    template: str = '',
    template_arguments: Mapping[str, Any] | None = None,
    layout: Layout = 'packed',
    response_length: Size = 0,
    long: Literal['cut', 'drop'] = 'cut',
    window: Count = 64,
    vocabulary: Size = 0,
    seed: Seed = 0,
) -> TextSource:
    """Grade-school mathematics (Cobbe et al. 2021, arXiv:2110.14168) with worked solutions, which
    end in '#### number'.

    The files `gsm8k/train.jsonl` and `gsm8k/test.jsonl`, or these in `reasoning/`, lie below the
    recipe's `data_dir`.

    Args:
      context: a split of 'train' and 'test'.
      calculator: keep the notes `<<3*4=12>>` in solutions.
      tokenizer, length, chat, form, template, template_arguments, layout, response_length, long,
        window, vocabulary, seed: as of `chats`.
    """
    rows = Form(
        'gsm8k', context, tokenizer, length, layout, response_length, long, window, vocabulary,
        seed, template,
    )  # fmt: skip
    style = builder.Style(
        chat, form, 'last', _items(template_arguments), calculator,
        _answers(layout, response_length),
    )  # fmt: skip

    def examples(split: str, taken: Tokenizer) -> Sequence[Example]:
        folder = Path(sources.default_data_dir(context.recipe.data_dir))
        places = [folder / 'gsm8k', folder / 'reasoning' / 'gsm8k']
        place = next((each for each in places if each.is_dir()), None)
        if place is None:
            raise sources.DataError(
                f'there is no {places[0]} with train.jsonl and test.jsonl of GSM8K '
                '(github.com/openai/grade-school-math); name the folder above it by --data_dir'
            )
        file = place / f'{split}.jsonl'
        return builder.chats(taken, file, builder.stamp(file), ('question', 'answer'), style)

    return rows.source({split: partial(examples, split) for split in ('train', 'test')})


def preferences(
    context: SourceContext,
    *,
    path: str | Mapping[str, str],
    tokenizer: str,
    length: Count,
    fields: Sequence[str] = (),
    chat: bool = True,
    form: str = '{prompt}',
    template: str = '',
    template_arguments: Mapping[str, Any] | None = None,
    long: Literal['cut', 'drop'] = 'cut',
    vocabulary: Size = 0,
) -> TextSource:
    """Pairs of answers to a prompt, the better one first: every field of a row is [2, T].

    Args:
      context: a split.
      path: a file, see `kd.data.builders.records.pair`, whose split is 'train'; or {split: file}.
      fields: the name of the prompt's field, if it is none of the known.
      tokenizer, length, chat, form, template, template_arguments, long, vocabulary: as of `chats`.
    """
    rows = Form(
        'preferences', context, tokenizer, length, 'pairs', long=long, vocabulary=vocabulary,
        template=template,
    )  # fmt: skip
    paths = _paths(path, context)
    style = builder.Style(chat, form, 'last', _items(template_arguments))

    def examples(file: Path, taken: Tokenizer) -> Sequence[tuple[Example, Example]]:
        return builder.pairs(taken, file, builder.stamp(file), tuple(fields), style)

    return rows.source({split: partial(examples, file) for split, file in paths.items()})


def sokoban(
    context: SourceContext,
    *,
    tokenizer: str,
    length: Count,
    rules: str = game.RULES,
    told: Size = 0,
    vocabulary: Size = 0,
) -> TextSource:
    """Levels of Sokoban to play (`kd.data.builders.sokoban`), by `kd.rewards.sokoban.environment`.

    The prompt is what the system says, the same for all; boards are shown by the environment. Its
    fields are those of `kd.data.builders.sokoban.Levels`, without the plan; `level` int32, the
    number of the level in its split; and `told` int32 [L] and `told_mask` bool [L], the first
    actions of the plan in words, if they are asked for.

    Args:
      context: a split of 'train' (96 levels), 'validation' and 'test' (64).
      tokenizer, length, vocabulary: as of `chats`; layout 'prompts'.
      rules: control tokens in it are such.
      told: so many actions of the plan.
    """
    rows = Form('sokoban', context, tokenizer, length, 'prompts', 0, 'drop', 64, vocabulary, 0)
    if context.recipe.data_dir == catalogue.DESCRIBED:
        return rows.described(vocabulary or None, game.fields('train', [0], told, None))
    taken = tokenizers.load(tokenizer)
    sizes = {split: size for split, (size, _) in boards.SPLITS.items()}
    parts = sources.parse_split(context.split, sizes, name='sokoban')
    ids = np.asarray(taken.encode(rules, special=True), np.int32)
    if len(ids) > length:
        raise UserError(f'sokoban: the rules are {len(ids)} tokens, and length is {length}.')
    chosen = [Example(ids, np.zeros(len(ids), bool))] * sum(
        stop - start for _, start, stop in parts
    )
    found = [game.fields(split, range(a, b), told, taken) for split, a, b in parts]
    fields = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    return rows.filled(
        chosen, taken, tokenizers.shared_size(taken, vocabulary or taken.size), fields
    )


def _paths(path: str | Mapping[str, str], context: SourceContext) -> dict[str, Path]:
    """{split: file or folder}."""
    given = path if isinstance(path, Mapping) else {'train': path}
    return {split: records.locate(of, context.recipe.data_dir) for split, of in given.items()}


def _items(arguments: Mapping[str, Any] | None) -> tuple[tuple[str, Any], ...]:
    return tuple((arguments or {}).items())


def _answers(layout: str, response_length: int) -> bool:
    return layout != 'prompts' or response_length > 0
