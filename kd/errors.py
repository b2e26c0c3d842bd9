"""Errors meant for the person at the terminal.

Whatever can be wrong in a config, a data directory or a work directory ends in a `UserError`
whose text says what was wrong, what was expected and where to change it. `kd.main` prints the
text alone; a stack trace is kept for our own mistakes.
"""

from __future__ import annotations

import difflib
import signal
from collections.abc import Iterable


class UserError(ValueError):
    """Something a user can put right; the message says how."""


class NonFiniteError(RuntimeError):
    """A loss or gradient became infinite or NaN; the message says where the evidence lies."""


class Preempted(RuntimeError):
    """A signal asked the run to stop; it can be resumed, from a checkpoint if it had begun."""

    def __init__(self, message: str, number: int = signal.SIGTERM) -> None:
        super().__init__(message)
        self.number = number


def reason(error: BaseException) -> str:
    """The first line of what a library's error says, not too long; its name if it says nothing."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ''
