"""What the directory of a Hugging Face model says about its tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from kd import files
from kd.errors import UserError

ADVICE = 'fetch the directory again'
# What belongs to a tokenizer, or to how answers are drawn.
_FILES = (
    'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json', 'added_tokens.json',
    'vocab.json', 'merges.txt', 'tokenizer.model', 'chat_template.jinja', 'chat_template.json',
    'generation_config.json',
)  # fmt: skip


def read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The object of `tokenizer.json`, and the roles of tokens as `kd.text.tokenizer.build` takes
    them: `eos`, `bos`, `pad`, `stop`, `begins` and `template`.

    Raises:
      UserError: no directory, or none with a `tokenizer.json`; a file that is no JSON.
    """
    if not directory.is_dir():
        raise UserError(f'There is no directory {directory} of a model.')
    if not (directory / 'tokenizer.json').is_file():
        raise UserError(
            f'{directory} has no tokenizer.json; save it there with '
            "transformers' AutoTokenizer.from_pretrained(...).save_pretrained(...)."
        )
    description = _object(directory / 'tokenizer.json')
    if not isinstance(description.get('model'), dict) or 'vocab' not in description['model']:
        raise UserError(f'{directory}/tokenizer.json has no model with a vocabulary; {ADVICE}.')
    description['model'].setdefault('type', 'BPE')
    config = _object(directory / 'tokenizer_config.json')
    special = _object(directory / 'special_tokens_map.json')
    generation = _object(directory / 'generation_config.json')

    def token(role: str) -> str | None:
        for found in (config.get(f'{role}_token'), special.get(f'{role}_token')):
            if found is not None:
                return found['content'] if isinstance(found, dict) else found
        return None

    last = _object(directory / 'config.json').get('eos_token_id')
    stop = generation.get('eos_token_id')
    return description, {
        'eos': token('eos') or (last[0] if isinstance(last, list) else last),
        'bos': token('bos'),
        'pad': token('pad'),
        'stop': stop if isinstance(stop, list) else [] if stop is None else [stop],
        'begins': config.get('add_bos_token'),
        'template': _template(directory, config),
    }


def copy(source: Path, directory: Path) -> None:
    """Copies the files of a tokenizer."""
    if source.resolve() == directory.resolve():
        return
    for name in _FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def write(directory: Path, description: dict[str, Any], roles: dict[str, Any]) -> None:
    """Writes what `read` reads, with ids of tokens in `roles`."""
    tokens = {index: token for token, index in description['model']['vocab'].items()}
    tokens |= {token['id']: token['content'] for token in description['added_tokens']}
    first = roles['bos'] if roles['begins'] else None
    if first is not None:
        description = description | {'post_processor': _before(tokens[first], first)}
    named = {
        f'{role}_token': tokens[roles[role]]
        for role in ('bos', 'eos', 'pad')
        if roles[role] is not None
    }
    config = {
        'tokenizer_class': 'PreTrainedTokenizerFast',
        'add_bos_token': first is not None,
        'clean_up_tokenization_spaces': False,
        **named,
    }
    if roles['template']:
        config['chat_template'] = roles['template']
    files.write_json(directory / 'tokenizer.json', description)
    files.write_json(directory / 'tokenizer_config.json', config)
    files.write_json(
        directory / 'generation_config.json', {'eos_token_id': [roles['eos'], *roles['stop']]}
    )


def _before(token: str, index: int) -> dict[str, Any]:
    """A post-processor that puts a token before a text."""
    special = {'SpecialToken': {'id': token, 'type_id': 0}}
    text = {'Sequence': {'id': 'A', 'type_id': 0}}
    second = {'Sequence': {'id': 'B', 'type_id': 1}}
    return {
        'type': 'TemplateProcessing',
        'single': [special, text],
        'pair': [special, text, second],
        'special_tokens': {token: {'id': token, 'ids': [index], 'tokens': [token]}},
    }


def _template(directory: Path, config: dict[str, Any]) -> str:
    """The chat template: a file of its own, or the default one of the tokenizer's config."""
    file = directory / 'chat_template.jinja'
    if file.is_file():
        return file.read_text('utf-8')
    found = config.get('chat_template')
    if found is None:
        found = _object(directory / 'chat_template.json').get('chat_template')
    if isinstance(found, list):
        named = {one['name']: one['template'] for one in found}
        return named.get('default', '')
    return found or ''


def _object(file: Path) -> dict[str, Any]:
    """The object in a JSON file, {} where there is no file."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text('utf-8'))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise UserError(f'{file} is damaged: it is no JSON object; {ADVICE}.')
    return value
