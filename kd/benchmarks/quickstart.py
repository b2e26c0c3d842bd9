"""The quickstart from the command to the report, against the same experiment written plainly.

    python -m kd.benchmarks quickstart

CPU seconds of whole processes, which take turns: `kd.main` on configs/vision/logit_kd.py:cpu, and
`kd.benchmarks.plain.quickstart`, flax and optax with nothing around them. Both find their compiled
programs in a cache and the data on the disk; the turn that fills them does not count.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

from kd.benchmarks import turns

TARGET = 1.6
RECIPE = 'configs/vision/logit_kd.py:cpu'


def commands(folder: Path, options: Sequence[str] = ()) -> dict[str, list[str]]:
    """What both sides run, before the directory that they write to; `options` are for `kd.main`."""
    kd = ('kd.main', f'--config={RECIPE}', f'--data_dir={folder / "data"}', *options, '--workdir')
    plain = ('kd.benchmarks.plain.quickstart',)
    return {name: [sys.executable, '-m', *of] for name, of in dict(kd=kd, plain=plain).items()}


def run(command: Sequence[str], folder: Path) -> float:
    """CPU seconds of a command that writes to a new directory."""
    environment = {
        'JAX_COMPILATION_CACHE_DIR': str(folder / 'cache'),
        'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
    }
    directory = Path(tempfile.mkdtemp(dir=folder)) / 'run'
    return turns.process_seconds([*command, str(directory)], environment)


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratio: see `kd.benchmarks`."""
    with tempfile.TemporaryDirectory() as folder:
        askers = {
            name: partial(run, command, Path(folder))
            for name, command in commands(Path(folder)).items()
        }
        took = turns.take_turns(askers, options.rounds)
    ratios = turns.over(took['kd'][1:], took['plain'][1:])
    peer = f'written plainly, flax {metadata.version("flax")}, optax {metadata.version("optax")}'
    return [turns.Row('the quickstart, command to report', peer, ratios, TARGET)]
