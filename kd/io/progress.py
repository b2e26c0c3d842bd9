"""What the run is doing now, for the person watching."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator

import jax
from tqdm import tqdm


class Progress:
    """A bar on a terminal, a line now and then in a log file.

    Rates count from `begin`, which comes after the first step, mostly compilation.
    """

    def __init__(self, stage: str, *, start: int, total: int, every: float = 5.0) -> None:
        self._stage, self._total, self._every = stage, total, every
        self._first = self._step = start
        self._began = self._said = time.monotonic()
        self._bar: tqdm | None = None

    def begin(self, step: int) -> None:
        """The first step is over."""
        self._first = self._step = step
        self._began = self._said = time.monotonic()
        if sys.stderr.isatty() and not jax.process_index():
            self._bar = tqdm(
                initial=step, total=self._total, desc=self._stage, unit='step', dynamic_ncols=True
            )

    def update(self, step: int, **shown: float) -> None:
        """Tells of a finished step and the latest metrics."""
        text = '  '.join(f'{name} {value:.4g}' for name, value in shown.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._step)
        now = time.monotonic()
        self._step = step
        if self._bar is None and (now - self._said > self._every or step == self._total):
            line = f'{step}/{self._total}  {text}'
            if step > self._first:
                rate = (step - self._first) / max(now - self._began, 1e-9)
                line += f'  {rate:.1f} steps/s  ETA {(self._total - step) / rate:.0f} s'
            say(self._stage, line)
            self._said = now

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def say(stage: str, text: str) -> None:
    """One line about a stage, from the first process."""
    if jax.process_index():
        return
    # A reader that is gone or a full disk is no reason to stop training.
    with contextlib.suppress(OSError, ValueError):
        tqdm.write(f'[{stage}] {text}', file=sys.stderr)


@contextlib.contextmanager
def doing(stage: str, what: str) -> Iterator[None]:
    """Says what is being done, and how long it took if that was long."""
    say(stage, f'{what} ...')
    began = time.monotonic()
    yield
    took = time.monotonic() - began
    if took > 1.0:
        say(stage, f'{what}: {took:.1f} s')
