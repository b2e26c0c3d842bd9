"""What watches the training loop: a clock, the profiler, and the signals that ask it to stop."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax

from kd import process
from kd.errors import Preempted
from kd.parallel import distributed


class Clock:
    """Training speed by seconds of `now`, evaluation, checkpoints and compilation left out."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now, self.steps, self.seconds = now, 0, 0.0
        self.began: float | None = None

    def start(self) -> None:
        self.began = self.now()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        if self.began is None:
            yield
            return
        self.seconds += self.now() - self.began
        yield
        self.began = self.now()

    def speed(self) -> float:
        """Steps per second; NaN before there are any."""
        if self.began is None or not self.steps:
            return math.nan
        return self.steps / (self.seconds + self.now() - self.began)


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


@contextlib.contextmanager
def stoppable() -> Iterator[None]:
    """Within, a signal ends in `Preempted`."""
    with process.signals():
        try:
            yield
        except process.Stopped as stop:
            text = f'{stop}; run the same command to go on.'
            raise Preempted(text[0].upper() + text[1:], stop.number) from stop


def asking() -> Callable[[], bool]:
    """A question to ask after every step: is the run to stop here?

    In a run of several processes, a signal to one of them stops all, at one step.
    """
    signals = process.active()
    if jax.process_count() == 1:
        return signals.asked
    # Of SIGTERM JAX's preemption service knows by itself.
    signals.forward = lambda: os.kill(os.getpid(), signal.SIGTERM)
    return distributed.preemption()


def obey(stop: Callable[[], bool]) -> None:
    """Raises `Stopped` if the run is to stop here."""
    if stop():
        raise process.Stopped(process.active().came or signal.SIGTERM)
