"""Text files, and files of chats in the forms in which they are found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from kd import files
from kd.data.sources import DataError
from kd.ranges import Finite

Message = dict[str, str]
# Fields of a question and its answer, the first of which a record has counts.
FORMS = (
    ('prompt', 'response'),
    ('prompt', 'completion'),
    ('instruction', 'output'),
    ('question', 'answer'),
    ('problem', 'solution'),
)
# ShareGPT's names of roles.
_ROLES = {'human': 'user', 'gpt': 'assistant'}
_TEXT = ('.txt', '.md')


class Tried(NamedTuple):
    """The first right and the first wrong of several answers, '' where there is none."""

    right: str
    wrong: str


class Pair(NamedTuple):
    """A prompt, and a better and a worse answer to it."""

    prompt: list[Message]
    chosen: str
    rejected: str


def locate(path: str, data_dir: str) -> Path:
    """A file or folder that a config names: below the data directory, where one is given."""
    found = files.local(path, 'data.source.path').expanduser()
    return found if found.is_absolute() or not data_dir else Path(data_dir).expanduser() / found


def documents(path: Path, *, field: str = 'text', separator: str = '') -> list[str]:
    """The documents of a file, or of all files below a folder in the order of their names.

    Args:
      path: `.txt` and `.md` files are text, `.json` and `.jsonl` files records with a text each.
      field: of records.
      separator: what stands between documents of a text file; '' for one document a file.

    Raises:
      DataError: nothing there, or a record without the field.
    """
    if path.is_dir():
        inside = [file for file in sorted(path.rglob('*')) if file.suffix in (*_TEXT, *_RECORDS)]
    else:
        inside = [path]
    found: list[str] = []
    for file in inside:
        if file.suffix in _RECORDS:
            for number, record in enumerate(read(file), 1):
                found.append(_string(record, field, f'{file}, record {number}'))
        else:
            text = _read(file)
            found += text.split(separator) if separator else [text]
    found = [text for text in found if text.strip()]
    if not found:
        raise DataError(f'{path} has no text; name a file, or a folder with .txt or .jsonl files')
    return found


_RECORDS = ('.json', '.jsonl')


def read(file: Path) -> list[dict[str, Any]]:
    """The records of a file: a JSON list of objects, or an object a line.

    Raises:
      DataError: no such file, a line that is no object, or none.
    """
    text = _read(file)
    if file.suffix == '.jsonl':
        lines = [(f'line {n}', line) for n, line in enumerate(text.split('\n'), 1) if line.strip()]
        records = [(where, _parse(line, f'{file}, {where}')) for where, line in lines]
    else:
        whole = _parse(text, str(file))
        if not isinstance(whole, list):
            raise DataError(
                f'{file} is no list of records; write one, or an object a line (.jsonl)'
            )
        records = [(f'record {number}', record) for number, record in enumerate(whole, 1)]
    for where, record in records:
        if not isinstance(record, dict):
            raise DataError(f'{file}, {where}: {str(record)[:40]!r} is no object with fields')
    if not records:
        raise DataError(f'{file} has no records')
    return [record for _, record in records]


def at_most(
    records: Sequence[Mapping[str, Any]], *, field: str, most: Finite
) -> list[Mapping[str, Any]]:
    """Records whose number `field` is at most so much, such as how hard a problem is: an `edit` of
    `kd.data.text.chats`.

    Raises:
      DataError: a record without that number, or none left.
    """
    for number, record in enumerate(records, 1):
        value = record.get(field)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f'record {number} has {field}={value!r}, which is no number')
    kept = [record for record in records if record[field] <= most]
    if not kept:
        raise DataError(f'no record has {field} of at most {most}')
    return kept


def tried(record: Mapping[str, Any], where: str) -> Tried | None:
    """What a record of several answers has: `responses`, texts, and `verified`, which are right.

    None for a record of another form.

    Raises:
      DataError: lists of other lengths or kinds.
    """
    if not {'responses', 'verified'} <= set(record):
        return None
    responses, verified = record['responses'], record['verified']
    texts = isinstance(responses, list) and all(isinstance(x, str) for x in responses)
    truths = isinstance(verified, list) and all(isinstance(x, bool) for x in verified)
    if not texts or not truths or len(responses) != len(verified):
        raise DataError(
            f'{where} needs `responses`, a list of texts, and `verified`, true or false for each '
            'of them'
        )
    of = {
        right: [x for x, v in zip(responses, verified, strict=True) if v is right and x.strip()]
        for right in (True, False)
    }
    return Tried(*(next(iter(of[right]), '') for right in (True, False)))


def chat(
    record: Mapping[str, Any], fields: Sequence[str], where: str, *, answers: bool = True
) -> list[Message]:
    """The messages of a record, the last of which is the answer, unless `answers` are left out.

    Known are `messages` (role, content), `conversations` (from, value), and a question with its
    answer in fields of `FORMS`; Alpaca's `input` is put below its instruction, and `instances` are
    taken for the first of them. `system` comes before. Of several `responses` the first that is
    `verified` is the answer, see `tried`.

    Args:
      record: of a file.
      fields: names of the fields of question and answer, instead of those of `FORMS`.
      where: for messages.
      answers: False for messages up to the last answer, whether there is one or not.

    Raises:
      DataError: none of these forms, no answer or an empty one.
    """
    several = tried(record, where) if answers else None
    if several:
        record = {**record, 'response': several.right}
    if not fields:
        for name in ('messages', 'conversations'):
            if name in record:
                return _asked(_messages(record[name], where), answers, where)
    if isinstance(record.get('instances'), list) and record['instances']:
        record = {**record, **record['instances'][0]}
    for form in (fields,) if fields else FORMS:
        if all(name in record for name in form[: None if answers else 1]):
            break
    else:
        wanted = ' or '.join(map(str, [tuple(fields)] if fields else [*FORMS, 'messages']))
        raise DataError(
            f'{where} has the fields {sorted(record)}, and none of {wanted}; name those of '
            'question and answer (data.source.fields)'
        )
    if isinstance(record[form[0]], list):
        messages = _messages(record[form[0]], where)
    else:
        question = _string(record, form[0], where)
        if form[0] == 'instruction' and record.get('input'):
            question = f'{question}\n\n{_string(record, "input", where)}'
        messages = [{'role': 'user', 'content': question}]
    if record.get('system'):
        messages = [{'role': 'system', 'content': _string(record, 'system', where)}, *messages]
    if answers and len(form) > 1:
        messages.append({'role': 'assistant', 'content': _answer(record, form[1], where)})
    return _asked(messages, answers, where)


def pair(record: Mapping[str, Any], fields: Sequence[str], where: str) -> Pair:
    """The prompt of a record as of `chat`, and its answers `chosen` and `rejected`.

    An answer is a text, a message, or the whole chat with it at the end; or the first right and the
    first wrong of several, see `tried`. `fields` may name the prompt's.

    Raises:
      DataError: a field is missing or empty.
    """
    several = tried(record, where)
    if several:
        record = {**record, 'chosen': several.right, 'rejected': several.wrong}
    if 'prompt' in record and not fields:
        fields = ('prompt',)
    elif 'instruction' in record and not fields:
        fields = ('instruction',)
    if isinstance(record.get('chosen'), list) and not fields and 'conversations' not in record:
        prompt = _messages(record['chosen'][:-1], where)
    else:
        prompt = chat(record, tuple(fields)[:1], where, answers=False)
    return Pair(prompt, _answer(record, 'chosen', where), _answer(record, 'rejected', where))


def _messages(given: Any, where: str) -> list[Message]:
    """Messages with `role` and `content`, from any names of these."""
    result = []
    for message in given if isinstance(given, list) else [None]:
        if not isinstance(message, dict) or not {'role', 'from'} & set(message):
            raise DataError(f'{where}: a message has role and content, and {message!r} has not')
        role = str(message.get('role') or message.get('from'))
        content = message.get('content', message.get('value'))
        extra = {k: v for k, v in message.items() if k not in ('role', 'content', 'from', 'value')}
        result.append({**extra, 'role': _ROLES.get(role, role), 'content': content})
    return result


def _asked(messages: list[Message], answers: bool, where: str) -> list[Message]:
    """Messages that end with an answer, or without it."""
    answered = bool(messages) and messages[-1]['role'] == 'assistant'
    if answers and not answered:
        raise DataError(f'{where} does not end with an answer of the assistant; leave it out')
    if answers and not str(messages[-1]['content'] or '').strip():
        raise DataError(f'{where} has an empty response; leave it out')
    asked = messages if answers or not answered else messages[:-1]
    if not asked:
        raise DataError(f'{where} has no messages')
    return asked


def _answer(record: Mapping[str, Any], name: str, where: str) -> str:
    """The text of an answer: a text, a message, or the last of messages."""
    value = record.get(name)
    value = value[-1] if isinstance(value, list) and value else value
    if isinstance(value, dict):
        value = value.get('content', value.get('value'))
    value = '' if value is None else value
    text = _string({**record, name: value}, name, where)
    if not text.strip():
        raise DataError(f'{where} has an empty response; leave it out')
    return text


def _string(record: Mapping[str, Any], name: str, where: str) -> str:
    value = record.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        raise DataError(f"{where} has no text in the field '{name}', only in {sorted(record)}")
    return value


def _read(file: Path) -> str:
    if not file.is_file():
        raise DataError(f'there is no file {file}; name another (data.source.path), or --data_dir')
    try:
        return file.read_text('utf-8')
    except UnicodeDecodeError as error:
        raise DataError(f'{file} is no text in UTF-8; convert it') from error


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise DataError(f'{where} is no JSON; correct it or leave it out') from error
