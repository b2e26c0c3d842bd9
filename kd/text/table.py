"""Tokenizers of toys: a table of symbols, whose ids are their places in it.

tokens = table(('PAD', 'BOS', 'EOS', '=', *'0123456789'))
tokens.encode('BOS 3 = EOS')        # [1, 7, 3, 2]
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from kd.errors import UserError, did_you_mean
from kd.text.tokenizer import Tokenizer
from kd.text.words import Place


def table(
    symbols: Sequence[str],
    *,
    eos: str = 'EOS',
    pad: str = 'PAD',
    bos: str = 'BOS',
    name: str = 'table',
) -> Tokenizer:
    """The tokenizer of a table; its text is symbols with spaces between.

    Args:
      symbols: V different words without white space; the id of a symbol is its place.
      eos: that ends an answer; one of the symbols.
      pad: of padding; `eos` if the table has no such symbol.
      bos: that begins a text, if the table has such a symbol.
      name: for messages.

    Raises:
      UserError: a symbol that stands twice or is no word, no `eos`; in `encode`, a word that is no
        symbol.
    """
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    wrong = [s for s in symbols if s.split() != [s]]
    if wrong or len(ids) != len(symbols):
        twice = wrong or sorted({s for s in symbols if list(symbols).count(s) > 1})
        raise UserError(f'{name}: symbols are different words, and {twice} are not.')
    if eos not in ids:
        raise UserError(f"{name} has no symbol '{eos}' for the end (eos).")

    def words(texts: Sequence[str], place: Place) -> list[list[int]]:
        return [[index(word) for word in text.split()] for text in texts]

    def index(word: str) -> int:
        if word not in ids:
            raise UserError(f"{name} has no symbol '{word}'.{did_you_mean(word, ids)}")
        return ids[word]

    def text(given: Sequence[int], *, special: bool) -> str:
        hidden = () if special else (eos, pad, bos)
        return ' '.join(symbols[i] for i in given if symbols[i] not in hidden)

    digest = hashlib.sha256('\n'.join(symbols).encode()).hexdigest()[:16]
    return Tokenizer(
        name=name,
        size=len(symbols),
        eos=ids[eos],
        pad=ids.get(pad, ids[eos]),
        bos=ids.get(bos),
        stop=(ids[eos],),
        fingerprint=digest,
        words=words,
        text=text,
    )
