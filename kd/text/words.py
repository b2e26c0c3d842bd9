"""From text without control tokens to ids and back, as a `tokenizer.json` describes it."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from kd import packages
from kd.errors import UserError, reason

# Where a piece of text stands: at the start, after a control token, or in the middle of text. A
# tokenizer may put a space before the first two.
Place = Literal['start', 'after', 'middle']
# What two tokenizers must take apart alike to be the same; see `fingerprint`.
PROBE = (
    "Hello, world! It's what we'll do; I'M SURE they'd've said so.",
    '  two  spaces,\ttabs\t\tand\n\nlines \n of text\r\n   ',
    '3.14159 1,000,000 12345678 0x1F ½ Ⅷ ٣٤٥ 1st',
    'naïve café\u0301 A\u030a ﬁ ｆｕｌｌ Straße İ ǆ',
    'русский текст, ελληνικά, עברית, العربية, हिन्दी, ไทย, 中文。日本語のテキスト！한국어',
    'def f(x_1: int) -> str:\n    return f"{x!r}"  # …\n',
    '👩‍👩‍👧 🇫🇷 \u200b\u00a0\u3000▁ ￼ \u0000',
    '<|endoftext|> </s> <s>[INST] <|im_start|>user\n<think>',
    '-_=+[]{}()~^%$#@&*/\\|"`',
    '',
)


class Words:
    """`words(texts, place)` are the ids of texts in which control tokens are ordinary text.

    Args:
      description: the object of a `tokenizer.json`. Truncation, padding and dropout are left out.
      where: the file, for messages.

    Raises:
      UserError: what the package `tokenizers` does not take.
    """

    def __init__(self, description: Mapping[str, Any], *, where: str):
        self._description = {**description, 'truncation': None, 'padding': None}
        model = {**description.get('model', {}), 'dropout': None}
        if 'dropout' in description.get('model', {}):
            self._description['model'] = model
        self._where = where
        self._made: dict[str, Any] = {}

    def __call__(self, texts: Sequence[str], place: Place = 'start') -> list[list[int]]:
        taken = self.placed(place)
        # Half of a surrogate pair, which JSON can spell, is no character.
        texts = [text.encode('utf-8', 'replace').decode('utf-8') for text in texts]
        if len(texts) == 1:
            return [taken.encode(texts[0], add_special_tokens=False).ids]
        return [found.ids for found in taken.encode_batch(texts, add_special_tokens=False)]

    def text(self, ids: Sequence[int], *, special: bool) -> str:
        """The text of ids, with the control tokens among them if `special`."""
        return self.placed('start').decode([int(i) for i in ids], skip_special_tokens=not special)

    def adds_first(self) -> int | None:
        """The id that the post-processor puts before a text, None for none."""
        with_it = self.placed('start').encode('a', add_special_tokens=True).ids
        without = self.placed('start').encode('a', add_special_tokens=False).ids
        return with_it[0] if with_it[:1] != without[:1] else None

    @functools.cached_property
    def vocabulary(self) -> dict[str, int]:
        """All tokens, those added among them."""
        return self.placed('start').get_vocab(with_added_tokens=True)

    def placed(self, place: Place) -> Any:
        """The `tokenizers.Tokenizer` for texts at a place."""
        edited = {
            part: _placed(self._description.get(part), place)
            for part in ('normalizer', 'pre_tokenizer')
        }
        key = json.dumps(edited)
        if key not in self._made:
            tokenizers = packages.need('tokenizers')
            try:
                made = tokenizers.Tokenizer.from_str(json.dumps({**self._description, **edited}))
            # The package raises plain exceptions.
            except Exception as error:
                raise UserError(f'{self._where}: no tokenizer ({reason(error)}).') from error
            made.encode_special_tokens = True
            self._made[key] = made
        return self._made[key]

    def fingerprint(self) -> str:
        """A digest of what is computed: two descriptions of one tokenizer have the same.

        Hashed are the tokens by their ids, the merges, the added tokens, and how `PROBE` is
        normalised and split. Merges that lead to the same token are hashed in any order, which
        tells versions of converters apart and little else. Not hashed are names of files, what
        tokens are for (end, padding, template), and decoders.
        """
        model = dict(self._description['model'])
        merges = model.get('merges', [])
        pairs = [tuple(pair.split(' ') if isinstance(pair, str) else pair) for pair in merges]
        facts = {
            'vocabulary': sorted((index, token) for token, index in self.vocabulary.items()),
            'merges': _in_any_order(pairs),
            'added': sorted(
                (token['id'], token['content'], token['lstrip'], token['rstrip'])
                for token in self._description.get('added_tokens') or ()
            ),
            'probe': [self._split(text) for text in PROBE],
            'model': {
                name: model.get(name) or None
                for name in (
                    'type', 'byte_fallback', 'ignore_merges', 'continuing_subword_prefix',
                    'end_of_word_suffix',
                )
            },
        }  # fmt: skip
        if model['type'] != 'BPE':
            facts['model'] = model
        text = json.dumps(facts, sort_keys=True)
        return hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()[:16]

    def _split(self, text: str) -> list[str]:
        taken = self.placed('start')
        text = taken.normalizer.normalize_str(text) if taken.normalizer else text
        if not taken.pre_tokenizer:
            return [text]
        return [piece for piece, _ in taken.pre_tokenizer.pre_tokenize_str(text)]


def _placed(part: Any, place: Place) -> Any:
    """A normaliser or pre-tokenizer for texts at `place`: without the space that it puts first."""
    if isinstance(part, list):
        return [edited for one in part if (edited := _placed(one, place)) is not None]
    if not isinstance(part, dict):
        return part
    kind = part.get('type')
    if kind == 'Prepend' and place == 'middle':
        return None
    if kind == 'Metaspace':
        usual = 'always' if part.get('add_prefix_space', True) else 'never'
        scheme = part.get('prepend_scheme', usual)
        if place == 'middle' or (place == 'after' and scheme == 'first'):
            scheme = 'never'
        fields = {name: value for name, value in part.items() if name != 'add_prefix_space'}
        return {**fields, 'prepend_scheme': scheme}
    if kind == 'ByteLevel' and place == 'middle':
        return {**part, 'add_prefix_space': False}
    return {name: _placed(value, place) for name, value in part.items()}


def _in_any_order(pairs: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """Merges with those of one token that follow each other sorted."""
    result: list[tuple[str, ...]] = []
    group: list[tuple[str, ...]] = []
    for pair in pairs:
        if group and ''.join(pair) != ''.join(group[0]):
            result += sorted(group)
            group = []
        group.append(pair)
    return result + sorted(group)
