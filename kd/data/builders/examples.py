"""Files of text and chats as examples of tokens, which are kept in memory for other stages."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from kd import config
from kd.data.builders import records, stdlib_docs
from kd.errors import UserError
from kd.text import templates
from kd.text.packing import Example
from kd.text.tokenizer import Tokenizer

# Files or splits whose tokens are kept.
_KEPT = 8
# GSM8K's notes for a calculator.
_CALCULATION = re.compile(r'<<[^<>]*>>')


@dataclasses.dataclass(frozen=True)
class Style:
    """How a chat becomes tokens; see `kd.data.text.chats`.

    Attributes:
      chat: by the tokenizer's template; else a prompt, its answer and `eos`.
      form: the text of a prompt without a template, around '{prompt}'.
      turns: whose answers count, 'all' or 'last'.
      arguments: (name, value) of variables of the template.
      calculator: keep GSM8K's notes in answers.
      answers: False for prompts alone.
      edit: a block that names `f(records, **arguments) -> records`; None for as they are.
    """

    chat: bool = True
    form: str = '{prompt}'
    turns: Literal['all', 'last'] = 'all'
    arguments: tuple[tuple[str, Any], ...] = ()
    calculator: bool = True
    answers: bool = True
    edit: Mapping[str, Any] | None = None

    def __post_init__(self):
        if '{prompt}' not in self.form:
            raise UserError(f"data.source.form has no '{{prompt}}': {self.form!r}.")

    # Arguments of templates and edits may be lists.
    def __hash__(self) -> int:
        return hash(repr(self))


def stamp(path: Path) -> tuple:
    """What changes with a file or with any file of a folder."""
    inside = sorted(path.rglob('*')) if path.is_dir() else [path]
    found = [(str(file), file.stat()) for file in inside if file.is_file()]
    return tuple((name, of.st_mtime_ns, of.st_size) for name, of in found)


@functools.lru_cache(maxsize=_KEPT)
def documents(
    tokenizer: Tokenizer,
    path: Path,
    changes: tuple,
    field: str,
    separator: str,
    end: str,
    length: int,
) -> Sequence[Example]:
    """Documents of a file or folder, see `records.documents` and `of_texts`.

    Args:
      tokenizer: of the text.
      path: file or folder.
      changes: `stamp(path)`.
      field, separator: see `records.documents`.
      end, length: see `of_texts`.
    """
    texts = records.documents(path, field=field, separator=separator)
    return of_texts(tokenizer, texts, end, length)


@functools.lru_cache(maxsize=_KEPT)
def stdlib(tokenizer: Tokenizer, split: str, end: str, length: int) -> Sequence[Example]:
    """Documents of the standard library, see `of_texts`."""
    return of_texts(tokenizer, stdlib_docs.documents()[split], end, length)


def of_texts(
    tokenizer: Tokenizer, texts: Sequence[str], end: str, length: int
) -> Sequence[Example]:
    """Examples of whole texts: `bos` where the tokenizer has one first, the text, its end.

    Args:
      tokenizer: of the texts.
      texts: documents.
      end: the control token that ends a document; '' for `eos`.
      length: documents that are longer go on in further examples; 0 for any length.

    Raises:
      UserError: `end` is no control token.
    """
    if end and end not in tokenizer.control:
        raise UserError(
            f"data.source.end='{end}' is no control token of {tokenizer.name}, which has "
            f'{list(tokenizer.control)[:20]}.'
        )
    last = [tokenizer.control[end] if end else tokenizer.eos]
    first = [tokenizer.bos] if tokenizer.begins else []
    found = []
    for ids in tokenizer.encode_all(texts):
        whole = np.concatenate([np.asarray(first, np.int32), ids, np.asarray(last, np.int32)])
        pieces = np.split(whole, range(length, len(whole), length)) if length else [whole]
        found += [Example(piece, np.ones(len(piece), bool)) for piece in pieces]
    return found


@functools.lru_cache(maxsize=_KEPT)
def chats(
    tokenizer: Tokenizer, file: Path, changes: tuple, fields: tuple[str, ...], style: Style
) -> Sequence[Example]:
    """Chats of a file, see `records.chat` and `of_chat`; `changes` is `stamp(file)`.

    Records of several answers none of which is right are left out.
    """
    found = []
    said = records.read(file)
    if style.edit:
        said = config.build(style.edit, said, where='data.source.edit')
    for number, record in enumerate(said, 1):
        where = f'{file}, example {number}'
        several = records.tried(record, where) if style.answers else None
        if several and not several.right:
            continue
        messages = records.chat(record, fields, where, answers=style.answers)
        found.append(of_chat(tokenizer, messages, style, where))
    return found


@functools.lru_cache(maxsize=_KEPT)
def pairs(
    tokenizer: Tokenizer, file: Path, changes: tuple, fields: tuple[str, ...], style: Style
) -> Sequence[tuple[Example, Example]]:
    """(better, worse) of a file, see `records.pair` and `of_chat`; `changes` is `stamp(file)`.

    Records of several answers all of which are right, or none, are left out.
    """
    found = []
    for number, record in enumerate(records.read(file), 1):
        where = f'{file}, example {number}'
        several = records.tried(record, where)
        if several and not all(several):
            continue
        pair = records.pair(record, fields, where)
        chosen, rejected = (
            of_chat(tokenizer, [*pair.prompt, {'role': 'assistant', 'content': text}], style, where)
            for text in (pair.chosen, pair.rejected)
        )
        found.append((chosen, rejected))
    return found


def of_chat(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], style: Style, where: str
) -> Example:
    """A chat as tokens, with a prompt for an answer at the end if it does not end with one.

    Raises:
      UserError: see `kd.text.templates.render`; without a template, more than a prompt and its
        answer.
    """
    answered = messages[-1]['role'] == 'assistant'
    if answered and not style.calculator:
        answer = _CALCULATION.sub('', messages[-1]['content'])
        messages = [*messages[:-1], {**messages[-1], 'content': answer}]
    if not style.chat:
        return _without_template(tokenizer, messages, style, where)
    try:
        ids, mask = templates.render(
            tokenizer,
            messages,
            add_generation_prompt=not answered,
            turns=style.turns,
            **dict(style.arguments),
        )
    except UserError as error:
        raise UserError(f'{where}: {error}') from error
    # Prompts alone mark no earlier answer.
    return Example(ids, mask if answered else np.zeros_like(mask))


def _without_template(
    tokenizer: Tokenizer, messages: Sequence[Mapping[str, Any]], style: Style, where: str
) -> Example:
    """[bos,] prompt, answer, eos."""
    roles = [message['role'] for message in messages]
    answered = roles[-1] == 'assistant'
    asked = messages[:-1] if answered else messages
    if [role for role in roles if role != 'system'] not in (['user'], ['user', 'assistant']):
        raise UserError(
            f'{where} has the messages {roles}; without a chat template (chat=False) an example is '
            'a prompt and its answer.'
        )
    prompt = style.form.replace('{prompt}', '\n\n'.join(m['content'] for m in asked))
    ids = [tokenizer.bos] if tokenizer.begins else []
    ids += tokenizer.encode(prompt)
    count = len(ids)
    if answered:
        ids += [*tokenizer.encode(messages[-1]['content'], begin=False), tokenizer.eos]
    return Example(np.asarray(ids, np.int32), np.arange(len(ids)) >= count)


def halves(example: Example) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of the prompt and of the answer, the first to count and all after it that do."""
    ids, response = example
    begin = int(response.argmax()) if response.any() else len(ids)
    return ids[:begin], ids[response]
