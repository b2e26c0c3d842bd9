"""Chats as token ids: a model's own template, and which of the tokens are the assistant's."""

from __future__ import annotations

import datetime
import functools
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from kd import packages
from kd.errors import UserError, reason
from kd.text.tokenizer import Tokenizer
from kd.text.words import Place

Message = Mapping[str, Any]
# What `strftime_now` of a template tells: one day for ever, so that a chat is the same tokens
# tomorrow. A template that asks takes another from its argument (`date_string` in Llama 3's).
TODAY = datetime.datetime(2024, 7, 26)
# Where the first character stands of those that stand for control tokens spelled out in messages:
# private ones, planes 15 and 16.
_PRIVATE = (0xF0000, 0x10FFFD)


def render(
    tokenizer: Tokenizer,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool = False,
    turns: Literal['all', 'last'] = 'all',
    **template_arguments: Any,
) -> tuple[np.ndarray, np.ndarray]:
    """A chat as the tokens that the model is given and answers with.

    A turn of the assistant begins where the prompt for it ends: the messages before it, rendered
    with the generation prompt. That prompt must be the beginning of the whole chat, and its tokens
    are the first of the chat's, for the text is cut there before it is encoded: what is trained on
    is what will be sampled, where encoding the whole could merge the last character of the prompt
    with the first of the answer. A turn ends with the first of `tokenizer.stop`, which counts; a
    line break that the template puts after it does not.

    Messages are text. A control token that one spells out, `<|im_start|>` say, is encoded as the
    characters it is made of, whoever wrote the message; only the template writes control tokens.
    Tokens that the vocabulary adds as words, `<think>` for example, are parsed.

    Args:
      tokenizer: with a template.
      messages: [{'role': 'system' | 'user' | 'assistant' | ..., 'content': text}, ...].
      add_generation_prompt: end with the beginning of the assistant's next turn.
      turns: which turns of the assistant's to mark: 'all' of them, or the 'last', for templates
        that show an earlier turn otherwise than when it was the last (Qwen3 drops its thoughts).
      **template_arguments: variables of the template: `enable_thinking=False`, `tools=[...]`.

    Returns:
      ids int32 [n], and assistant_mask bool [n], True on the assistant's words and on the token
      that ends each of its turns.

    Raises:
      UserError: no template, one that refuses the messages, or one by which a turn of the
        assistant's cannot be told: its prompt is no beginning of the chat, the turn is shown
        otherwise in the end, lacks some of the answer, or ends with no stop token.
    """
    chat = _Chat(tokenizer, messages, template_arguments)
    whole = chat.text(len(messages), prompt=add_generation_prompt)
    spoken = [at for at, message in enumerate(messages) if message.get('role') == 'assistant']
    begins, ends = [], []
    for at in spoken if turns == 'all' else spoken[-1:]:
        prompt = chat.text(at, prompt=True)
        if not whole.startswith(prompt):
            raise UserError(
                f'{chat.where} does not begin a chat with the prompt for message {at + 1}, so what '
                "is the assistant's cannot be told; count the last turn alone (turns='last') or "
                'take another template.'
            )
        shown = chat.text(at + 1, prompt=False)
        ends.append(chat.end(whole, len(prompt), shown, at))
        begins.append(len(prompt))
    return chat.encode(whole, begins, ends)


class _Chat:
    """Texts of a chat in which single private characters stand for what must not be parsed."""

    def __init__(self, tokenizer: Tokenizer, messages: Sequence[Message], arguments: dict) -> None:
        self.tokenizer = tokenizer
        self.where = f'The chat template of {tokenizer.name}'
        if not tokenizer.template:
            raise UserError(
                f'{tokenizer.name} has no chat template; name a file with one (template=FILE), or '
                'use prompts and responses without a chat (chat=False).'
            )
        self.template = _compiled(tokenizer.template, self.where)
        spelled = list(_strings([*messages, arguments]))
        found = sorted({t for text in spelled for t in tokenizer.control_pattern.findall(text)})
        first = _unused(spelled, len(found))
        self.hidden = {token: chr(first + i) for i, token in enumerate(found)}
        self.shown = str.maketrans({mark: token for token, mark in self.hidden.items()})
        contents = [message.get('content') for message in messages]
        self.answers = [text if isinstance(text, str) else '' for text in contents]
        self.messages = [self._hide(dict(message)) for message in messages]
        self.arguments = self._hide(arguments)

    def _hide(self, value: Any) -> Any:
        """A value in which the control tokens of all strings are hidden."""
        if isinstance(value, str) and self.hidden:
            return self.tokenizer.control_pattern.sub(lambda found: self.hidden[found[0]], value)
        if isinstance(value, Mapping):
            return {self._hide(key): self._hide(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._hide(item) for item in value]
        return value

    def text(self, count: int, *, prompt: bool) -> str:
        """The first `count` messages, and the beginning of an answer if `prompt`."""
        by_role = {'bos': self.tokenizer.bos, 'eos': self.tokenizer.eos, 'pad': self.tokenizer.pad}
        names = {index: token for token, index in self.tokenizer.control.items()}
        special = {f'{role}_token': names[i] for role, i in by_role.items() if i in names}
        try:
            return self.template.render(
                {
                    **special,
                    'messages': self.messages[:count],
                    'add_generation_prompt': prompt,
                    **self.arguments,
                }
            )
        # What a template meets in messages can be any error.
        except Exception as error:
            raise UserError(
                f'{self.where} refuses the first {count} messages: {reason(error)}.'
            ) from error

    def end(self, whole: str, begin: int, shown: str, at: int) -> int:
        """Where the turn of message `at` ends in the text `whole`, its stop token included.

        Args:
          whole: the chat.
          begin: where the turn begins in it.
          shown: the chat up to this message.
          at: the message.
        """
        stop = set(self.tokenizer.stop)
        end = begin
        for part in self.tokenizer.control_pattern.split(whole[begin:]):
            end += len(part)
            if self.tokenizer.control.get(part) in stop:
                break
        else:
            raise UserError(
                f'{self.where} ends message {at + 1}, an answer, with none of the stop tokens '
                f'{[self.tokenizer.decode([i], special=True) for i in sorted(stop)]}.'
            )
        if self.tokenizer.strips.get(part, (False, False))[1]:
            end = len(whole) - len(whole[end:].lstrip())
        if shown[:end] != whole[:end]:
            raise UserError(
                f'{self.where} shows message {at + 1} otherwise once others follow it; count the '
                "last turn alone (turns='last'), which wants a chat for every turn."
            )
        turn = whole[begin:end].translate(self.shown)
        if ''.join(self.answers[at].split()) not in ''.join(turn.split()):
            raise UserError(
                f'{self.where} leaves out some of message {at + 1}, an answer of the assistant '
                '(its thoughts, perhaps); take a template that keeps it (template=FILE).'
            )
        return end

    def encode(self, whole: str, begins: list[int], ends: list[int]) -> tuple:
        """Tokens of a text, and which of them lie in the spans from `begins` to `ends`."""
        cuts = [0, *(cut for span in zip(begins, ends, strict=True) for cut in span), len(whole)]
        ids: list[int] = []
        mask: list[bool] = []
        place: Place = 'start'
        for number, (begin, end) in enumerate(itertools.pairwise(cuts)):
            for part in self.tokenizer.split(whole[begin:end]):
                if not part:
                    continue
                if part in self.tokenizer.control:
                    found, place = [self.tokenizer.control[part]], 'after'
                else:
                    found = self.tokenizer.words([part.translate(self.shown)], place)[0]
                    place = 'middle'
                ids += found
                mask += [number % 2 == 1] * len(found)
        return np.asarray(ids, np.int32), np.asarray(mask, bool)


def _strings(value: Any) -> Iterator[str]:
    """All strings in a value, keys among them."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _strings([*value.keys(), *value.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)


def _unused(texts: Sequence[str], count: int) -> int:
    """The first of `count` private characters that no text has."""
    first, last = _PRIVATE
    used = sorted({ord(c) for text in texts for c in text if ord(c) >= first})
    for code in used:
        if code >= first + count:
            break
        first = code + 1
    if first + count - 1 <= last:
        return first
    raise UserError('The messages of a chat use all private characters; leave these out of them.')


@functools.lru_cache(maxsize=32)
def _compiled(template: str, where: str) -> Any:
    """A template in a sandbox, with the functions that templates expect."""
    packages.need('jinja2')
    import jinja2
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}`, which marks the assistant's text in some templates, marks nothing."""

        tags = {'generation'}  # noqa: RUF012

        def parse(self, parser):
            next(parser.stream)
            return parser.parse_statements(('name:endgeneration',), drop_needle=True)

    def raise_exception(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(value: Any, ensure_ascii: bool = False, indent: Any = None, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, 'jinja2.ext.loopcontrols']
    )
    environment.filters['tojson'] = tojson
    environment.globals['raise_exception'] = raise_exception
    environment.globals['strftime_now'] = TODAY.strftime
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise UserError(f'{where} cannot be read: {reason(error)}.') from error
