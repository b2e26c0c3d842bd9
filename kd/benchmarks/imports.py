"""What importing the losses costs, against importing optax.

    python -m kd.benchmarks imports

CPU seconds of whole processes that import one or the other, in turns.
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from importlib import metadata

from kd.benchmarks import turns

TARGET = 1.2


def rows(options: argparse.Namespace) -> list[turns.Row]:
    """Its ratio: see `kd.benchmarks`."""
    commands = {name: [sys.executable, '-c', f'import {name}'] for name in ('kd.losses', 'optax')}
    askers = {name: partial(turns.process_seconds, of) for name, of in commands.items()}
    took = turns.take_turns(askers, options.rounds)
    ratios = turns.over(took['kd.losses'][1:], took['optax'][1:])
    return [turns.Row('import kd.losses', f'optax {metadata.version("optax")}', ratios, TARGET)]
