"""Tokenizers as GGUF files describe them: tokens, merges or scores, and a pre-tokenizer by name.

Metadata become the object that a `tokenizer.json` holds, so that there is one way from there on.
The pre-tokenizers are those of llama.cpp, in the form of the models' own `tokenizer.json`, which
for Qwen2 composes characters first (NFC) where llama.cpp takes them as they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from kd.errors import UserError

# Kinds of tokens, `tokenizer.ggml.token_type`.
UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 2, 3, 4, 5

# What a word is, as the families split their text before merging; see `_pre_tokenizer`.
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r'| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
_QWEN2 = _LLAMA3.replace(r'\p{N}{1,3}', r'\p{N}')
# Names in files to families.
PRE_TOKENIZERS = {
    'gpt-2': 'gpt-2',
    'smollm': 'smollm',
    'llama-bpe': 'llama-bpe',
    'llama3': 'llama-bpe',
    'llama-v3': 'llama-bpe',
    'qwen2': 'qwen2',
    'deepseek-r1-qwen': 'qwen2',
}


def tokenizer_json(fields: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The `tokenizer.json` of a GGUF file's metadata, without a post-processor.

    Args:
      fields: `kd.io.gguf.metadata` of the file.
      where: the file, for messages.

    Raises:
      UserError: a file without tokens, or a kind of tokenizer or pre-tokenizer that is not known.
    """
    kind = fields.get('tokenizer.ggml.model')
    tokens = fields.get('tokenizer.ggml.tokens') or ()
    if kind is None or not tokens:
        raise UserError(f'{where} has no tokenizer; take a file with tokenizer.ggml.tokens.')
    types = fields.get('tokenizer.ggml.token_type') or [1] * len(tokens)
    vocabulary = {
        token: index
        for index, (token, of) in enumerate(zip(tokens, types, strict=True))
        if of != UNUSED
    }
    builders = {'gpt2': _byte_level, 'llama': _sentence_piece}
    if kind not in builders:
        raise UserError(
            f"{where} has a tokenizer of the kind '{kind}', and those known are {list(builders)}."
        )
    parts = builders[kind](fields, vocabulary, where)
    strips = _strips(fields)
    parts['added_tokens'] = [
        {
            'id': index,
            'content': token,
            'single_word': False,
            'lstrip': False,
            'rstrip': strips(token),
            'normalized': False,
            'special': of != USER_DEFINED,
        }
        for index, (token, of) in enumerate(zip(tokens, types, strict=True))
        if of in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return {'version': '1.0', 'truncation': None, 'padding': None, 'post_processor': None, **parts}


def adds_bos(fields: Mapping[str, Any]) -> bool:
    """Whether a text begins with the token for it: what the file says, else as llama.cpp does."""
    family = PRE_TOKENIZERS.get(fields.get('tokenizer.ggml.pre', ''))
    usual = fields.get('tokenizer.ggml.model') == 'llama' or family == 'llama-bpe'
    return bool(fields.get('tokenizer.ggml.add_bos_token', usual))


def _byte_level(fields: Mapping[str, Any], vocabulary: dict[str, int], where: str) -> dict:
    """Merges of bytes, each written as a printable character (GPT-2 and all after it)."""
    name = fields.get('tokenizer.ggml.pre', '')
    if name not in PRE_TOKENIZERS:
        raise UserError(
            f"{where} names the pre-tokenizer '{name}', and those known are {list(PRE_TOKENIZERS)}."
        )
    family = PRE_TOKENIZERS[name]
    # A space may begin a token, and stands before the second one.
    merges = [
        (pair[:cut], pair[cut + 1 :])
        for pair in fields.get('tokenizer.ggml.merges') or ()
        if (cut := pair.find(' ', 1)) > 0
    ]
    return {
        'normalizer': {'type': 'NFC'} if family == 'qwen2' else None,
        'pre_tokenizer': _pre_tokenizer(family),
        'decoder': {
            'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': True, 'use_regex': True
        },
        'model': _pairs(vocabulary, merges, ignore_merges=family == 'llama-bpe'),
    }  # fmt: skip


def _pre_tokenizer(family: str) -> dict[str, Any]:
    own = family in ('gpt-2', 'smollm')
    level = {
        'type': 'ByteLevel', 'add_prefix_space': False, 'trim_offsets': True, 'use_regex': own
    }  # fmt: skip
    if family == 'gpt-2':
        return level
    first: dict[str, Any] = {'type': 'Digits', 'individual_digits': True}
    if family != 'smollm':
        pattern = {'Regex': _LLAMA3 if family == 'llama-bpe' else _QWEN2}
        first = {'type': 'Split', 'pattern': pattern, 'behavior': 'Isolated', 'invert': False}
    return {'type': 'Sequence', 'pretokenizers': [first, level]}


def _sentence_piece(fields: Mapping[str, Any], vocabulary: dict[str, int], where: str) -> dict:
    """Scored pieces with spaces written as U+2581 (Llama 2, TinyLlama, Phi-3)."""
    scores = fields.get('tokenizer.ggml.scores')
    if not scores:
        raise UserError(f'{where} has a tokenizer of the kind llama without scores.')
    prefix = bool(fields.get('tokenizer.ggml.add_space_prefix', True))
    space: list[dict[str, Any]] = [{'type': 'Prepend', 'prepend': '▁'}] if prefix else []
    space.append({'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'})
    decoders: list[dict[str, Any]] = [
        {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '},
        {'type': 'ByteFallback'},
        {'type': 'Fuse'},
    ]
    if prefix:
        decoders.append({'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0})
    unknown = fields.get('tokenizer.ggml.unknown_token_id', 0)
    merges = scored_merges(vocabulary, scores)
    return {
        'normalizer': {'type': 'Sequence', 'normalizers': space},
        'pre_tokenizer': None,
        'decoder': {'type': 'Sequence', 'decoders': decoders},
        'model': _pairs(vocabulary, merges, byte_fallback=True, fuse_unk=True)
        | {'unk_token': fields['tokenizer.ggml.tokens'][unknown]},
    }


def scored_merges(vocabulary: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """All ways to make a piece of two others, the best piece first.

    SentencePiece merges the neighbours whose union scores best; in this order of merges the same
    pieces come first. Ways to one piece are in the order of their parts' ids.
    """
    ways = []
    for piece, index in vocabulary.items():
        halves = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [(a, b) for a, b in halves if a in vocabulary and b in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        ways += [(scores[index], pair) for pair in known]
    return [pair for _, pair in sorted(ways, key=lambda way: -way[0])]


def _pairs(vocabulary: dict[str, int], merges: Sequence[tuple[str, str]], **options: bool) -> dict:
    """A model of merges of pairs."""
    return {
        'type': 'BPE',
        'dropout': None,
        'unk_token': None,
        'continuing_subword_prefix': None,
        'end_of_word_suffix': None,
        'fuse_unk': False,
        'byte_fallback': False,
        'ignore_merges': False,
        'vocab': vocabulary,
        'merges': [list(pair) for pair in merges],
        **options,
    }


def _strips(fields: Mapping[str, Any]):
    """Which added tokens take in the white space after them: Phi-3's, all but three."""
    named = str(fields.get('general.name', '')).lower()
    phi3 = fields.get('general.architecture') == 'phi3' or re.search(r'phi-?3', named)
    return lambda token: bool(phi3) and token not in ('<unk>', '<s>', '<|endoftext|>')


def roles(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What tokens are for, as `kd.text.tokenizer.build` takes it."""
    kinds = {'eos': 'eos', 'bos': 'bos', 'pad': 'padding'}
    ids = {role: fields.get(f'tokenizer.ggml.{kind}_token_id') for role, kind in kinds.items()}
    ends = [fields.get(f'tokenizer.ggml.{kind}_token_id') for kind in ('eot', 'eom')]
    return {
        **ids,
        'stop': [index for index in ends if index is not None],
        'begins': adds_bos(fields),
        'template': fields.get('tokenizer.chat_template'),
    }
