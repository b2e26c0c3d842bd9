"""Verifiers that `kd.rewards.host` runs in processes of their own; they import no JAX."""

from __future__ import annotations

import re

from kd import packages


def same_result(answer: str, result: str) -> float:
    """1 if the result that an answer comes to is `result`, else 0, by `math-verify`.

    Both are read as numbers, expressions or LaTeX; 1/2, 0.5 and \\frac{1}{2} are the same. Plain
    expressions are made of digits and operators alone before anything computes them.

    Args:
      answer: of a model, in words.
      result: the right one.

    Raises:
      ValueError: the right result cannot be read.
      UserError: `math-verify` is not installed.
    """
    package = packages.need('math_verify', extra='math')
    # No time limits of its own, which would be the process's alarm.
    right = package.parse(result, parsing_timeout=None)
    if not right:
        raise ValueError(f'{result!r} is no result.')
    found = package.parse(answer, parsing_timeout=None)
    return float(package.verify(right, found, timeout_seconds=None))


def same_choice(answer: str, letter: str) -> float:
    """1 if the last `<answer>` of an answer is this letter, as the questions of SciKnowEval ask.

    Args:
      answer: of a model, in words.
      letter: the right one.

    Raises:
      ValueError: the right one is no letter.
    """
    if not re.fullmatch('[A-Za-z]', letter):
        raise ValueError(f'{letter!r} is no letter of an option.')
    chosen = re.findall(r'<answer>\s*([A-Za-z])\s*</answer>', answer)
    return float(bool(chosen) and chosen[-1].upper() == letter.upper())
