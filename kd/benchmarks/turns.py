"""Measurements in which processes take turns on one core, so that a busy machine slows all alike.

A worker is a Python with a module whose `FUNCTIONS` it calls for us: each request is a line of
JSON on its input, each answer one on its output. It may be a Python with other packages than ours.
Seconds are those of its CPU, of all its threads, which other processes disturb less than a clock.
It needs Linux, to keep to the core and to tell the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from kd.errors import UserError

ROOT = Path(__file__).resolve().parent.parent.parent
VARIABLE = 'KD_PEERS'
_START = 'import sys; from kd.benchmarks import turns; turns.serve(sys.argv[1], int(sys.argv[2]))'
# Libraries for matrices ask these how many threads they may have.
_ONE_THREAD = ('OMP_NUM_THREADS', 'MKL_NUM_THREADS', 'OPENBLAS_NUM_THREADS')


class Worker:
    """A process that calls functions for us; see the module.

    Args:
      python: the interpreter.
      module: one with `FUNCTIONS`, {name: function of JSON values, whose result is one}.
      core: where it runs.
    """

    def __init__(self, python: str, module: str, core: int) -> None:
        self._python = python
        self._said = tempfile.TemporaryFile('w+')  # noqa: SIM115
        environment = os.environ | dict.fromkeys(_ONE_THREAD, '1')
        paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
        environment['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(
                [python, '-c', _START, module, str(core)],
                stdin=pipe, stdout=pipe, stderr=self._said, text=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            self._said.close()
            raise UserError(f'{python} cannot be started: {error.strerror}.') from error

    def ask(self, name: str, **arguments: Any) -> Any:
        """What a function of the worker returns.

        Raises:
          UserError: the worker ended; the message is its last line.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps([name, arguments]) + '\n')
            self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            self._process.wait()
            self._said.seek(0)
            last = (self._said.read().strip().splitlines() or ['it said nothing'])[-1]
            raise UserError(f'{self._python}: {last}')
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._said):
            if stream is not None:
                with contextlib.suppress(BrokenPipeError):
                    stream.close()


@contextlib.contextmanager
def sides(
    ours: str, theirs: str, options: argparse.Namespace
) -> Iterator[tuple[dict[str, Worker], str]]:
    """Workers 'kd' and, where `--peers` names a Python, 'peer', and what the peer calls itself.

    Args:
      ours, theirs: modules; `theirs` has a function `name`.
      options: of `parser`.
    """
    with contextlib.ExitStack() as stack:

        def start(python: str, module: str) -> Worker:
            made = Worker(python, module, options.core)
            stack.callback(made.close)
            return made

        workers, name = {'kd': start(sys.executable, ours)}, 'peer'
        if options.peers:
            workers['peer'] = start(options.peers, theirs)
            name = workers['peer'].ask('name')
        else:
            print(f'Ours alone: name a Python with the peers by --peers or {VARIABLE}.')
        yield workers, name


def serve(module: str, core: int) -> None:
    """What a worker does, until its input ends."""
    os.sched_setaffinity(0, {core})
    # What libraries print is no answer.
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    functions: Mapping[str, Callable[..., Any]] = importlib.import_module(module).FUNCTIONS
    for line in sys.stdin:
        name, arguments = json.loads(line)
        print(json.dumps(functions[name](**arguments)), file=answers, flush=True)


def cpu_seconds(work: Callable[[], Any], calls: int = 1) -> tuple[float, Any]:
    """How long the process computed for each of some calls, and what came of the last."""
    began = time.process_time()
    for _ in range(calls):
        found = work()
    return (time.process_time() - began) / calls, found


def process_seconds(command: Sequence[str], environment: Mapping[str, str] | None = None) -> float:
    """CPU seconds of a command with all its threads and children, started in the tree's root.

    Raises:
      UserError: it failed; the message is its last line.
    """
    paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
    own = {'PYTHONPATH': os.pathsep.join(filter(None, paths)), **(environment or {})}
    began = os.times()
    done = subprocess.run(
        command, env=os.environ | own, cwd=ROOT, capture_output=True, text=True, check=False
    )
    ended = os.times()
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ['it said nothing'])[-1]
        raise UserError(f'{" ".join(command)}: {last}')
    return ended.children_user + ended.children_system - began.children_user - began.children_system


def seconds(
    functions: Mapping[str, Callable[[], Any]], rounds: int, calls: int = 1
) -> dict[str, list[float]]:
    """CPU seconds of a call in each round, of functions of this process that take turns."""
    askers = {name: partial(cpu_seconds, work, calls) for name, work in functions.items()}
    answers = take_turns(askers, rounds)
    return {name: [took for took, _ in of[1:]] for name, of in answers.items()}


def over(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs in each round."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def peak_mib() -> float:
    """The most memory that this process has held; that of its parent does not count."""
    return _status_mib('VmHWM')


def held_mib(work: Callable[[], Any]) -> tuple[float, Any]:
    """How much more memory a piece of work held at most than before it, and what came of it."""
    ctypes.CDLL(None).malloc_trim(0)  # What glibc has of memory that is free.
    Path('/proc/self/clear_refs').write_text('5')  # The peak begins anew.
    before = _status_mib('VmRSS')
    found = work()
    return _status_mib('VmHWM') - before, found


def _status_mib(name: str) -> float:
    told = re.search(rf'{name}:\s+(\d+) kB', Path('/proc/self/status').read_text())
    assert told is not None
    return int(told[1]) / 1024


class Row(NamedTuple):
    """A ratio to a peer, as `kd.benchmarks.page` tells it.

    Attributes:
      work: what both sides do.
      peer: whom it is compared with, and the version.
      ratios: ours over the peer's, one for each round.
      target: of their median; NaN where there is none.
      of: what the ratio is of: 'CPU time', 'memory', 'speed', ...
      least: whether the ratio is to be at least the target, and not at most.
      reason: why it misses, if it does; told only then.
    """

    work: str
    peer: str
    ratios: list[float]
    target: float
    of: str = 'CPU time'
    least: bool = False
    reason: str = ''

    def missed(self) -> bool:
        """Whether the median is on the wrong side of the target."""
        ratio = statistics.median(self.ratios)
        return ratio < self.target if self.least else ratio > self.target


class Comparison(NamedTuple):
    """Rates of a piece of work, round by round.

    Attributes:
      work: what it is.
      ours, theirs: per CPU second, in the same rounds; `theirs` may be empty.
      target: of `ratio`, at least.
    """

    work: str
    ours: list[float]
    theirs: list[float]
    target: float

    def ratios(self) -> list[float]:
        """Ours over theirs, in each round."""
        return [a / b for a, b in zip(self.ours, self.theirs, strict=False)]

    def row(self, peer: str, of: str = 'tokens per CPU second') -> Row:
        """The ratios alone."""
        return Row(self.work, peer, self.ratios(), self.target, of, least=True)

    def missed(self) -> bool:
        """Whether there is a ratio, and it is below its target."""
        return bool(self.theirs) and statistics.median(self.ratios()) < self.target


def take_turns(askers: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[Any]]:
    """Answers by name: one that warms up, and those of `rounds` rounds."""
    found: dict[str, list[Any]] = {name: [] for name in askers}
    for _ in range(rounds + 1):
        for name, ask in askers.items():
            found[name].append(ask())
    return found


def rates(answers: Mapping[str, list[Any]], tokens: int) -> dict[str, list[float]]:
    """Tokens per CPU second in each round, the one that warmed up left out."""
    found = {name: [tokens / each['cpu_s'] for each in of[1:]] for name, of in answers.items()}
    return {'peer': [], **found}


def middle(values: Sequence[float], digits: int = 1) -> str:
    """Median and range: '10.9 (10.3-11.2)'."""
    if not values:
        return ''
    low, high = min(values), max(values)
    return f'{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})'


def table(found: Sequence[Comparison], peer: str) -> str:
    """One row for each piece of work: medians and ranges over rounds."""
    lines = [
        f'| tokens per CPU second | kd | {peer} | ratio | target |',
        '|---|---:|---:|---:|---:|',
    ]
    for each in found:
        cells = [each.work, middle(each.ours), middle(each.theirs), middle(each.ratios(), 2)]
        lines.append(f'| {" | ".join(cells)} | {each.target} |')
    return '\n'.join(lines)


def parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with what these benchmarks have in common."""
    made = argparse.ArgumentParser(
        prog=f'python -m {module}', description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    made.add_argument(
        '--peers', default=os.environ.get(VARIABLE, ''), metavar='PYTHON',
        help=f'interpreter with the extra `peers`; default: ${VARIABLE}',
    )  # fmt: skip
    made.add_argument('--rounds', type=int, default=5)
    made.add_argument('--core', type=int, default=max(os.sched_getaffinity(0)))
    return made
