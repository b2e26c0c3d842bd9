"""What the directory of a Hugging Face model says about its tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from kd.errors import UserError

ADVICE = 'fetch the directory again'


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
