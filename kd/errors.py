"""Errors meant for the person at the terminal.

Whatever can be wrong in a config, a data directory or a work directory ends in a `UserError`
whose text says what was wrong, what was expected and where to change it. `kd.main` prints the
text alone; a stack trace is kept for our own mistakes.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import signal
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path

# Code that is not a person's own: this package, the standard library, what is installed.
_PACKAGE, _STANDARD = Path(__file__).parent, Path(os.__file__).parent
_INSTALLED = ('site-packages', 'dist-packages')


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


@contextlib.contextmanager
def one_line(where: str) -> Iterator[None]:
    """Turns what goes wrong inside into a `UserError` 'WHERE: ...' of one line, if a person's.

    That is: whatever their own code raises, with the file and line of it; and a TypeError or
    ValueError of ours, which is how functions refuse their arguments. The rest passes with its
    stack trace, as a mistake of ours.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        place = own_line(error)
        if not place and not isinstance(error, TypeError | ValueError):
            raise
        lines = str(error).strip().splitlines()
        if isinstance(error, SyntaxError):
            lines = [str(error.msg)]
        # What these say is a sentence; of others, such as KeyError, it is none without the name.
        if not lines or not isinstance(error, TypeError | ValueError):
            lines = [': '.join([type(error).__name__, *lines[:1]])]
        raise UserError(': '.join(filter(None, (where, place, lines[0])))) from error


def own_line(error: BaseException) -> str:
    """'FILE, line N': the last line of a person's own code in the traceback; '' if none."""
    walk = traceback.walk_tb(error.__traceback__)
    frames = [(frame.f_code.co_filename, line) for frame, line in walk]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno or 0))
    for name, line in reversed(frames):
        file = Path(name)
        theirs = not (file.is_relative_to(_PACKAGE) or file.is_relative_to(_STANDARD))
        if theirs and file.is_file() and not set(_INSTALLED) & set(file.parts):
            shown = file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file
            return f'{shown}, line {line}'
    return ''


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Returns `" Did you mean 'x'?"` for the closest known word, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f" Did you mean '{close[0]}'?" if close else ''
