"""The command of `kd.benchmarks`: comparisons with peers, and the page of performance."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from kd import benchmarks, process
from kd.benchmarks import page, turns, weights
from kd.errors import UserError, did_you_mean

PAGE = Path('docs/performance.md')
# Module of kd.benchmarks: what it compares.
TITLES = {
    'quickstart': 'the quickstart, from the command to the report',
    'imports': 'importing the losses',
    'loop': 'the training loop over the bare step',
    'guard': 'the guard against non-finite steps',
    'flow_map': 'losses of flow maps',
    'condensation': 'steps of dataset condensation',
    'decode': 'decoding of language models',
    'distil_step': 'distillation step of a language model',
    'score_distillation': 'a cycle of distribution matching distillation',
    'kernel_path': 'paths of kernel self-distillation',
    'classical': 'value and gradient of the classical losses',
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit status 1 if a target is missed."""
    parser = turns.parser('kd.benchmarks', str(benchmarks.__doc__))
    weights.add_argument(parser)
    parser.add_argument('names', nargs='*', metavar='NAME', help=', '.join(TITLES))
    parser.add_argument('--page', action='store_true', help='write the tables there')
    parser.add_argument('--file', type=process.file_argument, default=PAGE, help=f'default: {PAGE}')
    parser.add_argument(
        '--device',
        type=process.path_argument,
        help='what launch/device_check.sh said, to put there',
    )
    options = parser.parse_args(argv)
    if options.rounds < 1:
        parser.error('--rounds must be at least 1')
    for name in options.names:
        if name not in TITLES:
            raise UserError(f"There is no comparison '{name}'.{did_you_mean(name, TITLES)}")
    # Before JAX counts the cores.
    os.sched_setaffinity(0, {options.core})
    names = options.names or ([] if options.device else list(TITLES))
    found, late = {}, False
    for name in names:
        rows = importlib.import_module(f'kd.benchmarks.{name}').rows(options)
        if not rows:
            print(f'{name}: left out, its peer is not there.', file=sys.stderr)
            continue
        print(f'{TITLES[name]}\n\n{page.table(rows)}\n', flush=True)
        found[name] = page.record(rows, _command(name, options.rounds))
        late |= any(row.missed() for row in rows)
        if options.page:
            page.write(options.file, found, TITLES)
    if options.device and options.page:
        page.write(options.file, {'device': {'text': options.device.read_text()}}, TITLES)
    return int(late)


def _command(name: str, rounds: int) -> str:
    return shlex.join(['python', '-m', 'kd.benchmarks', name, '--page', f'--rounds={rounds}'])


if __name__ == '__main__':
    process.command(main)
