"""What watches the training loop: a clock, the profiler, and the signal that asks it to stop."""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from kd.parallel import distributed


class Clock:
    """Training speed, with evaluation, checkpoints and compilation left out."""

    def __init__(self) -> None:
        self.steps, self.seconds = 0, 0.0
        self.began: float | None = None

    def start(self) -> None:
        self.began = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self.began is None:
            yield
            return
        self.seconds += time.monotonic() - self.began
        yield
        self.began = time.monotonic()

    def speed(self) -> float:
        """Steps per second."""
        running = time.monotonic() - self.began if self.began is not None else 0.0
        total = self.seconds + running
        return self.steps / total if total else 0.0


class Profile:
    """Writes a profiler trace of the steps from `begin` to before `end`; none if they are equal."""

    def __init__(self, directory: Path, begin: int, end: int) -> None:
        self.directory, self.begin, self.end = directory, begin, end

    @contextlib.contextmanager
    def __call__(self, step: int, wait: Callable[[], Any]) -> Iterator[None]:
        if step == self.begin < self.end:
            jax.profiler.start_trace(str(self.directory))
        yield
        if self.begin < self.end == step + 1:
            wait()
            jax.profiler.stop_trace()


class Sigterm:
    """Turns SIGTERM into a question the loop asks after every step."""

    def __init__(self) -> None:
        self.came = False

    def __enter__(self) -> Callable[[], bool]:
        if jax.process_count() > 1:
            self.handles = False
            return distributed.preemption()
        # Python takes signal handlers in the main thread only.
        self.handles = threading.current_thread() is threading.main_thread()
        if self.handles:
            self.previous = signal.signal(signal.SIGTERM, self._note)
        return lambda: self.came

    def __exit__(self, *_: Any) -> None:
        if self.handles:
            signal.signal(signal.SIGTERM, self.previous)

    def _note(self, *_: Any) -> None:
        self.came = True
