"""What stands around an answer that is to be revised, and tells whether it was right.

    cues = Cues(right=('', '\\n\\nThis is right. Once more, in other words:\\n\\n'),
                wrong=('', '\\n\\nWait, this is wrong. From the start:\\n\\n'))

A prompt x, an answer y to it without the token that ends it, and a verdict make the prompt

    x[:after] opening y closing x[after:]

to which a revised answer is given.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kd.ranges import Size
from kd.text.tokenizer import Tokenizer

# Text, or tokens.
Words = str | Sequence[int]


class Around(NamedTuple):
    """Tokens before and behind an answer, int32 [n] each."""

    opening: np.ndarray
    closing: np.ndarray


@dataclasses.dataclass(frozen=True)
class Cues:
    """Words around an answer.

    Attributes:
      right: what opens and what closes an answer that was right.
      wrong: the same of one that was wrong.
      after: tokens of the prompt that stand before the block; None for all of them, so that an
        answer is revised in the turn that it was given in.
    """

    right: tuple[Words, Words]
    wrong: tuple[Words, Words]
    after: Size | None = None

    def around(self, tokenizer: Tokenizer | None) -> tuple[Around, Around]:
        """The tokens around a wrong and around a right answer."""
        wrong, right = (
            Around(*(encoded(words, tokenizer) for words in both))
            for both in (self.wrong, self.right)
        )
        return wrong, right


def encoded(words: Words, tokenizer: Tokenizer | None) -> np.ndarray:
    """The tokens of words inside a text, int32 [n].

    Without a tokenizer, where only shapes count, a text has as many tokens as characters.
    """
    if not isinstance(words, str):
        return np.asarray(words, np.int32).reshape(-1)
    if tokenizer is None:
        return np.zeros(len(words), np.int32)
    return np.asarray(tokenizer.encode(words, begin=False) if words else [], np.int32)


def revised(
    prompt: np.ndarray, answer: np.ndarray, around: Around, after: int | None
) -> np.ndarray:
    """The prompt of a revision, int32 [n], from that of the answer and the answer without its end.

    Args:
      prompt, answer: int [p] and int [a].
      around: what the verdict on the answer puts around it.
      after: as of `Cues`.
    """
    at = len(prompt) if after is None else after
    parts = [prompt[:at], around.opening, answer, around.closing, prompt[at:]]
    return np.concatenate(parts).astype(np.int32)
