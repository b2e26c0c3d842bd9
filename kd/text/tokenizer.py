"""A tokenizer as every other part sees it, from a directory of a model or a GGUF file."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kd.errors import UserError
from kd.io import gguf as gguf_files
from kd.text import gguf, hugging_face
from kd.text.words import Place, Words

# Control tokens that end a turn or a text, in the families that are known here.
ENDS = (
    '<|im_end|>', '<|eot_id|>', '<|eom_id|>', '<|end|>', '<end_of_turn>', '<|endoftext|>',
    '<|end_of_text|>', '</s>', '<｜end▁of▁sentence｜>',
)  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Tokenizer:
    """Text to ids and back.

    Attributes:
      name: what it was loaded from, for messages.
      size: number of ids, 0 .. size - 1; a network's vocabulary may be padded beyond.
      eos: the id that ends an answer.
      pad: the id of padding; `eos` where there is none. Masks, never ids, tell what counts.
      bos: the id that begins a text, None for none.
      stop: ids at which decoding stops, `eos` among them.
      fingerprint: digest of what it computes; equal for the same tokenizer from another file.
      control: ids of control tokens by their text. `encode` takes them for ordinary text.
      template: the chat template, in jinja; '' for none.
      begins: whether a text that is trained on begins with `bos`.
      words: (texts, place) -> ids of each, no control tokens among them.
      text: (ids, special) -> text.
      strips: control tokens that take in the white space (before, after) them.
    """

    name: str
    size: int
    eos: int
    pad: int
    bos: int | None
    stop: tuple[int, ...]
    fingerprint: str
    words: Callable[[Sequence[str], Place], list[list[int]]]
    text: Callable[..., str]
    control: Mapping[str, int] = dataclasses.field(default_factory=dict)
    template: str = ''
    begins: bool = False
    strips: Mapping[str, tuple[bool, bool]] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f'Tokenizer({self.name!r}, {self.size:,} tokens, fingerprint {self.fingerprint})'

    def encode(self, text: str, *, special: bool = False, begin: bool = True) -> list[int]:
        """Ids of a text; no token is added before or after it.

        Args:
          text: any.
          special: parse control tokens, such as `<|im_end|>`, that the text spells out. Not for
            text of others. Tokens that the vocabulary adds as words, such as `<think>`, always are.
          begin: False where the text goes on from other text, so that no space is put before it.
        """
        place: Place = 'start' if begin else 'middle'
        if not special:
            return self.words([text], place)[0]
        ids: list[int] = []
        for part in self.split(text):
            if part in self.control:
                ids.append(self.control[part])
            elif part:
                ids += self.words([part], place)[0]
            place = 'after'
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[np.ndarray]:
        """`encode` of each text, on all cores: int32 [n_i]."""
        return [np.asarray(ids, np.int32) for ids in self.words(list(texts), 'start')]

    def decode(self, ids: Sequence[int] | np.ndarray, *, special: bool = False) -> str:
        """Text of ids [n], without the control tokens among them unless `special`."""
        return self.text([int(i) for i in ids], special=special)

    def split(self, text: str) -> list[str]:
        """A text cut at control tokens: text, token, text, ..., token, text.

        White space that a token takes in is left out of the text beside it.
        """
        parts = self.control_pattern.split(text)
        for at in range(1, len(parts), 2):
            before, after = self.strips.get(parts[at], (False, False))
            parts[at - 1] = parts[at - 1].rstrip() if before else parts[at - 1]
            parts[at + 1] = parts[at + 1].lstrip() if after else parts[at + 1]
        return parts

    @functools.cached_property
    def control_pattern(self) -> re.Pattern:
        """Finds control tokens, the longest where one begins with another."""
        longest_first = sorted(self.control, key=len, reverse=True)
        return re.compile(f'({"|".join(map(re.escape, longest_first)) or "(?!)"})')


def load(reference: str, *, template: str = '') -> Tokenizer:
    """The tokenizer of a model.

    Args:
      reference: 'hf:DIR', a directory with `tokenizer.json`, or 'gguf:FILE'.
      template: a file with a chat template, for a model without one or instead of its own.

    Raises:
      UserError: another kind of reference, a missing or damaged file, a tokenizer that is not
        known, or a special token outside the vocabulary.
    """
    kind, _, path = reference.partition(':')
    if kind not in ('hf', 'gguf') or not path:
        raise UserError(f"A tokenizer is 'hf:DIR' or 'gguf:FILE', got '{reference}'.")
    if template and not Path(template).is_file():
        raise UserError(f'There is no chat template {template}.')
    place = Path(path).expanduser()
    stamp = tuple(_stamp(file) for file in (place, place / 'tokenizer.json', Path(template)))
    return _load(kind, place, template, stamp)


def _stamp(file: Path) -> tuple[int, int]:
    """What changes with a file."""
    if not file.is_file():
        return 0, 0
    found = file.stat()
    return found.st_mtime_ns, found.st_size


def save(reference: str, directory: Path) -> None:
    """Writes the tokenizer of a model into a directory that 'hf:DIR' and `transformers` read.

    Args:
      reference: as of `load`. The files of a directory are copied; of a GGUF file
        `tokenizer.json` and `tokenizer_config.json` are made.
      directory: is there.

    Raises:
      UserError: as of `load`.
    """
    load(reference)
    kind, _, path = reference.partition(':')
    place = Path(path).expanduser()
    if kind == 'hf':
        hugging_face.copy(place, directory)
        return
    fields = gguf_files.metadata(place)
    description = gguf.tokenizer_json(fields, where=path)
    hugging_face.write(directory, description, gguf.roles(fields))


@functools.lru_cache(maxsize=8)
def _load(kind: str, path: Path, template: str, stamp: tuple) -> Tokenizer:
    reference = f'{kind}:{path}'
    if kind == 'hf':
        description, roles = hugging_face.read(path)
    else:
        fields = gguf_files.metadata(path)
        description, roles = gguf.tokenizer_json(fields, where=str(path)), gguf.roles(fields)
    if template:
        roles['template'] = Path(template).read_text('utf-8')
    return build(description, roles, name=reference)


def build(description: Mapping[str, Any], roles: Mapping[str, Any], *, name: str) -> Tokenizer:
    """A tokenizer from the object of a `tokenizer.json` and the roles of its tokens.

    Args:
      description: as in `tokenizer.json`.
      roles: `eos`, and where there are any `pad`, `bos` and a list `stop`, as ids or texts of
        tokens; `begins`, None to go by the post-processor; `template`.
      name: for messages.

    Raises:
      UserError: no `eos`, or a token outside the vocabulary.
    """
    added = [
        {**token, 'special': token['special'] or _looks_special(token['content'])}
        for token in description.get('added_tokens') or ()
    ]
    words = Words({**description, 'added_tokens': added}, where=name)
    vocabulary = words.vocabulary
    size = max(vocabulary.values()) + 1

    def role(token: Any, of: str) -> int:
        index = vocabulary.get(token, -1) if isinstance(token, str) else int(token)
        if not 0 <= index < size:
            raise UserError(f'{name}: the token for {of}, {token!r}, is none of its {size:,}.')
        return index

    if roles.get('eos') is None:
        raise UserError(f'{name} names no token for the end (eos); add eos_token to its config.')
    eos = role(roles['eos'], 'the end (eos)')
    bos = None if roles.get('bos') is None else role(roles['bos'], 'the start (bos)')
    pad = eos if roles.get('pad') is None else role(roles['pad'], 'padding')
    control = {
        token['content']: vocabulary[token['content']] for token in added if token['special']
    }
    named = [role(token, 'a stop') for token in roles.get('stop') or ()]
    ends = [control[token] for token in ENDS if token in control]
    begins = roles.get('begins')
    return Tokenizer(
        name=name,
        size=size,
        eos=eos,
        pad=pad,
        bos=bos,
        stop=tuple(dict.fromkeys([eos, *named, *ends])),
        fingerprint=words.fingerprint(),
        words=words,
        text=words.text,
        control=control,
        template=roles.get('template') or '',
        begins=bos is not None and (words.adds_first() == bos if begins is None else bool(begins)),
        strips={token['content']: (token['lstrip'], token['rstrip']) for token in added},
    )


def _looks_special(token: str) -> bool:
    """Control tokens that a `tokenizer.json` may forget to call so."""
    return (token[:2], token[-2:]) in (('<|', '|>'), ('<｜', '｜>'))


def check_same(a: Tokenizer, b: Tokenizer, *, where: str = '') -> None:
    """Refuses to compare what two networks say about tokens that are not the same.

    Raises:
      UserError: `a` and `b` have other fingerprints.
    """
    if a.fingerprint != b.fingerprint:
        raise UserError(
            f'{where}{": " if where else ""}the tokenizers of {a.name} ({a.size:,} tokens, '
            f'{a.fingerprint}) and {b.name} ({b.size:,} tokens, {b.fingerprint}) are not the same, '
            'and distillation compares token by token; take models of one family.'
        )


def shared_size(tokenizer: Tokenizer, *widths: int) -> int:
    """How many of the first tokens all vocabularies of the widths have: heads are cut to it.

    The width of a network's vocabulary is that of its tokenizer padded to a convenient number:
    151,936 and 152,064 for one tokenizer of 151,665 share 151,936.

    Raises:
      UserError: a width that lacks tokens of the tokenizer.
    """
    if min(widths) < tokenizer.size:
        raise UserError(
            f'A vocabulary of {min(widths):,} lacks tokens of {tokenizer.name}, which has '
            f'{tokenizer.size:,}.'
        )
    return min(widths)
