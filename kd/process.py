"""A run as a process: signals that ask it to end, and output that may be gone.

SIGTERM, SIGHUP and Ctrl-C ask a run to end. Where nothing would be lost it ends at once, by
`Stopped`, raised wherever the process is. Within `Signals.deferred` they are only noted, and the
training loop asks after every step. A process that sits in a call which Python cannot interrupt, a
compilation of minutes as a rule, is ended by a thread.
"""

from __future__ import annotations

import _thread
import argparse
import contextlib
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from kd import files
from kd.errors import NonFiniteError, Preempted, UserError, reason

EXIT_USER, EXIT_NONFINITE, EXIT_STOPPED, EXIT_INTERRUPTED = 2, 3, 75, 130
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
      own: see `signals`.
      came: the first that came, 0 for none.
      forward: what a signal becomes in a run of several processes, which agree on a step to stop
        at; None in one process.
    """

    def __init__(self, *, own: bool = False) -> None:
        self.own, self.came = own, 0
        self.forward: Callable[[], None] | None = None
        self._deferred = self._leaving = False
        self._idle = own  # Until it is set up, and after.
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

    @contextlib.contextmanager
    def nothing_to_lose(self) -> Iterator[None]:
        """Within, a signal ends a process of its own at once: for imports, which would lose it."""
        before, self._idle = self._idle, self.own and self.forward is None
        try:
            yield
        finally:
            self._idle = before

    def repeat(self) -> None:
        """Lets a signal come again whose `Stopped` was lost."""
        number, self.came = self.came, 0
        threading.Timer(0.05, _thread.interrupt_main, (number,)).start()

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
        if self._idle:
            _leave(number)
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
            if self._rescue is None:
                _leave(numbers[0])
            self._rescue()
            _leave(numbers[0], '; run the same command to go on')
        os.close(descriptor)


def _leave(number: int, more: str = '') -> NoReturn:
    with contextlib.suppress(OSError):
        os.write(2, f'kd: {Stopped(number)}{more}.\n'.encode())
    os._exit(exit_status(number))


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
    _active = handler = Signals(own=own)
    # What is ignored, by nohup for example, stays so.
    taken = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler.handle) for number in taken}
    try:
        with _watched(handler) if own else contextlib.nullcontext():
            handler._idle = False
            try:
                yield handler
            finally:
                handler._idle = own
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


def cause(error: BaseException) -> str:
    """What a library's error says of a write: the trouble of the machine, if it names one."""
    said = str(error)
    words = [os.strerror(number) for number in sorted(_TROUBLES)]
    return next((word for word in words if word in said), reason(error))


def entry(main: Callable[[], int], *, own: bool = False) -> int:
    """The exit status of `main`, as a person starts it; errors for people become one line.

    Args:
      main: returns an exit status.
      own: see `signals`.
    """
    with output(), signals(own=own) as handler:
        try:
            return main()
        except UserError as error:
            return told(str(error), EXIT_USER)
        except NonFiniteError as error:
            return told(str(error), EXIT_NONFINITE)
        except Preempted as error:
            return told(str(error), exit_status(error.number))
        except Stopped as stop:
            return told(f'{stop}.', exit_status(stop.number))
        except KeyboardInterrupt:
            return told('interrupted.', EXIT_INTERRUPTED)
        except Exception as error:
            if handler.came:  # A library has made another error of it.
                return told(f'{Stopped(handler.came)}.', exit_status(handler.came))
            line = trouble(error) if isinstance(error, OSError) else None
            if line is None:
                raise
            return told(line, EXIT_USER)


def command(main: Callable[[], int]) -> NoReturn:
    """Runs `main` as `entry` does and ends the process, which is there for nothing else."""
    sys.unraisablehook = partial(_unraisable, sys.unraisablehook)
    status = entry(main, own=True)
    if status in (EXIT_STOPPED, EXIT_INTERRUPTED):
        # JAX may be in the middle of something, waits for it, and crashes now and then.
        os._exit(status)
    sys.exit(status)


def _unraisable(before: Callable[[Any], None], what: Any) -> None:
    """What is raised in destructors: a signal comes again, TensorStore is not heard."""
    if isinstance(what.exc_value, Stopped):
        active().repeat()
    elif str(what.exc_value) != 'Event loop is closed':
        before(what)


def path_argument(text: str) -> Path:
    """For `type=` of argparse: a path on this machine."""
    try:
        return files.local(text)
    except UserError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def file_argument(text: str) -> Path:
    """For `type=` of argparse: a file to be written, in a folder that is there."""
    file = path_argument(text)
    if not file.parent.is_dir():
        raise argparse.ArgumentTypeError(f'there is no folder {file.parent}')
    return file
