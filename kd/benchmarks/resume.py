"""How long a run that was cut off takes to be training again.

    python -m kd.benchmarks.resume

Seconds from the command to the end of its first step, on the digits recipe, of a process that
resumes (restores its checkpoint, finds its compiled programs in the cache) and, the baseline, of
the process before it, which began with an empty work directory and an empty cache. Imports,
checks of all stages and opening the data are part of both. Processor seconds stand beside: on a
machine that others use, they say more.

| start | target on two cores |
|---|---|
| resumed | at most 20 s |
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from kd import process
from kd.errors import UserError

TARGET_S = 20.0
RECIPE = 'configs/vision/logit_kd.py:cpu'
STAGE = 'teacher'
PATIENCE_S = 600.0


class Start(NamedTuple):
    """Of one process: wall and processor seconds to the end of its first step, and which it was."""

    wall: float
    cpu: float
    step: int


def measure(recipe: str, stage: str, folder: Path) -> tuple[Start, Start]:
    """A start from nothing in an empty folder, and the start that resumes it."""
    first = _start(recipe, stage, folder)
    return first, _start(recipe, stage, folder)


def _start(recipe: str, stage: str, folder: Path) -> Start:
    """Starts the recipe, waits for a step, and stops it by SIGTERM, which writes a checkpoint."""
    command = [
        *(sys.executable, '-m', 'kd.main', f'--config={recipe}', f'--workdir={folder / "run"}'),
        *(f'--data_dir={folder / "data"}', f'--config.{stage}.log_every=1'),
        f'--config.{stage}.steps=1000000',
    ]
    environment = os.environ | {'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache')}
    log = folder / 'run' / stage / 'metrics.jsonl'
    before = _last_step(log)
    with (
        (folder / 'said').open('w+') as said,
        subprocess.Popen(command, env=environment, stdout=said, stderr=said) as child,
    ):
        began = time.monotonic()
        try:
            while (step := _last_step(log)) <= before:
                wall = time.monotonic() - began
                if child.poll() is not None or wall > PATIENCE_S:
                    said.seek(0)
                    raise UserError(f'{recipe} made no step within {wall:.0f} s:\n{said.read()}')
                time.sleep(0.01)
        except BaseException:
            child.kill()
            raise
        wall, cpu = time.monotonic() - began, _cpu_seconds(child.pid)
        child.send_signal(signal.SIGTERM)
    return Start(wall, cpu, step)


def _last_step(log: Path) -> int:
    """The last step in a log that may be in the middle of being written."""
    lines = log.read_text().split('\n')[:-1] if log.exists() else []
    return json.loads(lines[-1])['step'] if lines else 0


def _cpu_seconds(process: int) -> float:
    """Processor seconds that a running process has used (Linux)."""
    fields = Path(f'/proc/{process}/stat').read_text().rpartition(')')[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf('SC_CLK_TCK')


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 if the target is missed, 2 for a recipe that does not run."""
    parser = argparse.ArgumentParser(prog='python -m kd.benchmarks.resume')
    parser.add_argument('--config', default=RECIPE)
    parser.add_argument('--stage', default=STAGE)
    parser.add_argument('--rounds', type=int, default=3)
    arguments = parser.parse_args(argv)
    pairs = []
    for _ in range(arguments.rounds):
        with tempfile.TemporaryDirectory() as folder:
            pairs.append(measure(arguments.config, arguments.stage, Path(folder)))
    print('| start | wall, s | processor, s | wall over that of the cold start | target, s |')
    print('|---|---:|---:|---:|---:|')
    cold, resumed = ([pair[i] for pair in pairs] for i in range(2))
    ratio = statistics.median(second.wall / first.wall for first, second in pairs)
    took = statistics.median(start.wall for start in resumed)
    print(f'| from nothing | {_medians(cold)} | 1 | |')
    print(f'| resumed | {_medians(resumed)} | {ratio:.2f} | {TARGET_S:g} |')
    return int(took > TARGET_S)


def _medians(starts: Sequence[Start]) -> str:
    return ' | '.join(
        f'{statistics.median(getattr(start, field) for start in starts):.1f}'
        for field in ('wall', 'cpu')
    )


if __name__ == '__main__':
    process.command(main)
