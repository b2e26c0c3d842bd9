"""A run as a process: signals that ask it to end, and output that may be gone.

SIGTERM, SIGHUP and Ctrl-C ask a run to end. Where nothing would be lost it ends at once, by
`Stopped`, raised wherever the process is. Within `Signals.deferred` they are only noted, and the
training loop asks after every step. A process that sits in a call which Python cannot interrupt, a
compilation of minutes as a rule, is ended by a thread.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from kd import files
from kd.errors import UserError

EXIT_USER, EXIT_STOPPED, EXIT_INTERRUPTED = 2, 75, 130
_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
# How long a signal may wait for the interpreter before the thread acts.
_GRACE_S = 5.0
# Troubles of a machine, whether or not they come with the name of a file.
_TROUBLES = {
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EMFILE, errno.ENFILE),
    *(errno.ENOMEM, errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT),
}


class Stopped(BaseException):
    """A signal asks the process to end. Not an `Exception`, which libraries catch and pass over."""

    def __init__(self, number: int) -> None:
        super().__init__(f'stopped by {signal.Signals(number).name}')
        self.number = number


def exit_status(number: int) -> int:
    """The exit status of a process that a signal ended in an orderly way."""
    return EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_STOPPED


class Signals:
    """The signals that ask a process to end.

    Attributes:
      came: the first that came, 0 for none.
      forward: what a signal becomes in a run of several processes, which agree on a step to stop
        at; None in one process.
    """

    def __init__(self) -> None:
        self.came = 0
        self.forward: Callable[[], None] | None = None
        self._deferred = self._leaving = False
        self._rescue: Callable[[], None] | None = None

    def asked(self) -> bool:
        """Whether a signal has come."""
        return bool(self.came)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within, a signal is only noted; one that was noted before raises at once."""
        self._obey()
        before, self._deferred = self._deferred, True
        try:
            yield
        finally:
            self._deferred = before

    @contextlib.contextmanager
    def at_once(self, rescue: Callable[[], None] | None = None) -> Iterator[None]:
        """Within `deferred`: a signal raises again.

        Args:
          rescue: saves what would be lost, in a thread, if this one is out of reach.
        """
        self._obey()
        before, self._rescue, self._deferred = self._deferred, rescue, False
        try:
            yield
        finally:
            self._deferred, self._rescue = before, None

    def alone(self) -> None:
        """What follows concerns this process only: signals end it, whoever took them before."""
        self.forward = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.handle)

    def _obey(self) -> None:
        if self.came and self.forward is None:
            raise Stopped(self.came)

    def handle(self, number: int, _: Any = None) -> None:
        """The handler."""
        if self._leaving:
            time.sleep(3600)  # The thread is saving, and ends the process.
        if self.came and number == signal.SIGINT:
            raise KeyboardInterrupt
        again, self.came = self.came, self.came or number
        if self.forward is not None:
            if number != signal.SIGTERM:
                self.forward()
        elif not self._deferred and not again:
            raise Stopped(number)

    def watch(self, descriptor: int) -> None:
        """Ends the process if a signal finds it in a call that does not return.

        Args:
          descriptor: where the numbers of signals arrive, see `signal.set_wakeup_fd`.
        """
        while data := os.read(descriptor, 64):
            numbers = [number for number in data if number in _SIGNALS]
            time.sleep(_GRACE_S if numbers else 0)
            if not numbers or self.came or self._deferred or self.forward is not None:
                continue
            self._leaving = True
            if self._rescue is not None:
                self._rescue()
            told = f'kd: {Stopped(numbers[0])}; run the same command to go on.\n'
            with contextlib.suppress(OSError):
                os.write(2, told.encode())
            os._exit(exit_status(numbers[0]))
        os.close(descriptor)


_active: Signals | None = None


def active() -> Signals:
    """The signals that are handled now."""
    return _active or Signals()


@contextlib.contextmanager
def signals(*, own: bool = False) -> Iterator[Signals]:
    """Handles the signals within; those who already do are asked if there are any.

    Args:
      own: the whole process is the run's, and may be ended by a thread.
    """
    global _active
    # Python takes signal handlers in the main thread only.
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or Signals()
        return
    _active = handler = Signals()
    # What is ignored, by nohup for example, stays so.
    taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler.handle) for number in taken}
    try:
        with _watched(handler) if own else contextlib.nullcontext():
            yield handler
    finally:
        _active = None
        for number, old in previous.items():
            signal.signal(number, old)


@contextlib.contextmanager
def _watched(handler: Signals) -> Iterator[None]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    threading.Thread(target=handler.watch, args=(reader,), daemon=True).start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(writer)


class _Output:
    """A stream whose reader may be gone and whose disk may be full: what cannot be said is not."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # A closed stream raises ValueError.
        with contextlib.suppress(OSError, ValueError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def output() -> Iterator[None]:
    """Within, nothing that is printed can end the process."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (_Output(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in before:
            try:
                stream.flush()
            except (OSError, ValueError):
                # Python tries once more when it ends, and would end with another status.
                _discard(stream)


def _discard(stream: Any) -> None:
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def told(text: str, status: int) -> int:
    """Prints the line for the person; returns the exit status."""
    print(f'kd: {text}', file=sys.stderr)
    return status


def trouble(error: OSError) -> str | None:
    """An error of the file system in a line, None for one that is none of the machine's."""
    if error.errno is None or not (error.filename or error.errno in _TROUBLES):
        return None
    return f'{error.strerror}{f": {error.filename}" if error.filename else ""}.'


def entry(main: Callable[[], int]) -> int:
    """Runs the command of a module as a person starts it; errors for people become one line."""
    with output():
        try:
            return main()
        except UserError as error:
            return told(str(error), EXIT_USER)
        except KeyboardInterrupt:
            return told('interrupted.', EXIT_INTERRUPTED)
        except OSError as error:
            line = trouble(error)
            if line is None:
                raise
            return told(line, EXIT_USER)


def path_argument(text: str) -> Path:
    """For `type=` of argparse: a path on this machine."""
    try:
        return files.local(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
