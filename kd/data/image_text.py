"""Sources of text about images: chats, captions and preferences with an image to each row.

Records are those of `kd.data.text`, and name an image in a field: LLaVA's lists, for example,

    {"image": "coco/000000033471.jpg", "conversations": [{"from": "human", "value": "<image>..."}]}

Rows are those of the layouts 'rows' and 'pairs', and `image` float32 [size, size, 3] in [-1, 1]
beside them. The image stands before the chat, a token for each of its patches, wherever the text
has `<image>`; where a record names none, the row is the text alone and its image is black.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from kd.data import catalogue, sources
from kd.data.builders import examples as builder
from kd.data.builders import records
from kd.data.context import SourceContext
from kd.data.text_rows import Form, TextSource
from kd.ranges import Count, Size
from kd.text import tokenizer as tokenizers
from kd.text.packing import Example
from kd.text.tokenizer import Tokenizer

# What marks the place of an image in the text of records.
MARK = '<image>'


class _Seen(NamedTuple):
    """Examples of a row, one or two, and the name of their image, '' for none."""

    examples: tuple[Example, ...]
    image: str


def chats(
    context: SourceContext,
    *,
    path: str,
    tokenizer: str,
    length: Count,
    image_token: Size,
    patches: Count = 576,
    size: Count = 336,
    images: str = '',
    field: str = 'image',
    fields: Sequence[str] = (),
    turns: Literal['all', 'last'] = 'all',
    template: str = '',
    vocabulary: Size = 0,
) -> TextSource:
    """Chats about images, of which the answers are learnt; a chat a row.

    Args:
      context: a split, a slice of 'train'.
      path: a file of records, see `kd.data.builders.records.chat`.
      tokenizer: 'hf:DIR' or 'gguf:FILE'.
      length: T, tokens of a row, those of the image among them; longer ones are left out.
      image_token: the token that stands for a patch.
      patches: of an image.
      size: of the side of an image, which is padded to a square with the mean of its colours and
        scaled.
      images: the folder of the images; '' for that of the file.
      field: of a record, the image's file.
      fields: names of the fields of question and answer, if they are none of the known.
      turns: which answers of a chat are learnt.
      template: a file with another chat template.
      vocabulary: of the network, if it is padded; 0 for the tokenizer's.
    """
    form = Form(
        'image_text', context, tokenizer, length, 'rows', vocabulary=vocabulary, template=template
    )
    style = builder.Style(turns=turns)

    def seen(taken: Tokenizer, record: Mapping[str, Any], where: str) -> tuple[Example, ...]:
        messages = [_unmarked(m) for m in records.chat(record, tuple(fields), where)]
        return (builder.of_chat(taken, messages, style, where),)

    return _source(form, path, images, field, seen, image_token, patches, size)


def preferences(
    context: SourceContext,
    *,
    path: str,
    tokenizer: str,
    length: Count,
    image_token: Size,
    patches: Count = 576,
    size: Count = 336,
    images: str = '',
    field: str = 'image',
    fields: Sequence[str] = (),
    template: str = '',
    vocabulary: Size = 0,
) -> TextSource:
    """Pairs of answers to a prompt about an image, the better one first: fields are [2, ...].

    Args:
      context: a split, a slice of 'train'.
      path: a file of records, see `kd.data.builders.records.pair`.
      fields: the name of the prompt's field, if it is none of the known.
      tokenizer, length, image_token, patches, size, images, field, template, vocabulary: as of
        `chats`.
    """
    form = Form(
        'image_text', context, tokenizer, length, 'pairs', vocabulary=vocabulary, template=template
    )
    style = builder.Style(turns='last')

    def seen(taken: Tokenizer, record: Mapping[str, Any], where: str) -> tuple[Example, ...]:
        pair = records.pair(record, tuple(fields), where)
        prompt = [_unmarked(message) for message in pair.prompt]
        answers = ({'role': 'assistant', 'content': x} for x in (pair.chosen, pair.rejected))
        return tuple(builder.of_chat(taken, [*prompt, x], style, where) for x in answers)

    return _source(form, path, images, field, seen, image_token, patches, size)


def load(file: Path, size: int) -> np.ndarray:
    """An image of a file, float32 [size, size, 3] in [-1, 1], see `chats`.

    Raises:
      DataError: no such file, or none of an image.
    """
    from PIL import Image

    try:
        with Image.open(file) as opened:
            image = opened.convert('RGB')
    except OSError as error:
        raise sources.DataError(f'{file} cannot be read as an image: {error}') from error
    pixels = np.asarray(image)
    side = max(image.size)
    colour = tuple(int(x) for x in pixels.reshape(-1, 3).mean(0))
    square = Image.new('RGB', (side, side), colour)
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    scaled = square.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(scaled, np.float32) / 127.5 - 1


def _unmarked(message: Mapping[str, Any]) -> dict[str, Any]:
    return {**message, 'content': message['content'].replace(MARK, '').strip()}


def _source(form, path, images, field, seen, image_token, patches, size) -> TextSource:
    """The source of a file's records, each of which `seen` makes examples of."""
    shape = (2, size, size, 3) if form.layout == 'pairs' else (size, size, 3)
    if form.context.recipe.data_dir == catalogue.DESCRIBED:
        nothing = {'image': np.zeros((1, *shape), np.float32)}
        return form.described(form.vocabulary or None, nothing)
    file = records.locate(path, form.context.recipe.data_dir)
    folder = records.locate(images, form.context.recipe.data_dir) if images else file.parent
    taken = tokenizers.load(form.tokenizer, template=form.template)
    classes = tokenizers.shared_size(taken, form.vocabulary or taken.size)

    def found(taken: Tokenizer) -> list[_Seen]:
        made = []
        for number, record in enumerate(records.read(file), 1):
            image = record.get(field) or ''
            before = patches if image else 0
            examples = tuple(
                _behind(example, before, image_token)
                for example in seen(taken, record, f'{file}, example {number}')
            )
            if all(len(example.ids) <= form.length for example in examples):
                made.append(_Seen(examples, image))
        return made

    chosen = form.chosen({'train': found}, taken)
    pairs = form.layout == 'pairs'
    text = form.filled([x.examples if pairs else x.examples[0] for x in chosen], taken, classes)
    names = [x.image for x in chosen]
    return _with_images(text, partial(_read, text, names, folder, size, pairs), shape)


def _behind(example: Example, count: int, token: int) -> Example:
    """An example behind so many tokens of an image."""
    ids = np.concatenate([np.full(count, token, np.int32), example.ids])
    return Example(ids, np.concatenate([np.zeros(count, bool), example.response]))


def _read(text, names, folder, size, pairs, rows) -> sources.Batch:
    batch = {name: x for name, x in text.fetch(rows).items() if name != 'index'}
    black = np.full((size, size, 3), -1, np.float32)
    images = np.stack([load(folder / names[i], size) if names[i] else black for i in rows])
    return {**batch, 'image': np.stack([images] * 2, axis=1) if pairs else images}


def _with_images(text: TextSource, read: Any, shape: tuple[int, ...]) -> TextSource:
    """A source of the text's rows with images, which are read when they are asked for."""
    spec = {name: x for name, x in text.spec.items() if name != 'index'}
    spec['image'] = jax.ShapeDtypeStruct(shape, np.float32)
    data = sources.DataSet(
        text.name, {text.split: len(text)}, lambda _: read, spec, text.num_classes
    )
    made = TextSource(data, text.split)
    made.tokenizer, made.counts, made.pairs = text.tokenizer, text.counts, text.pairs
    return made
