"""Compiles the training step of a stage for a TPU slice, on a machine that has none.

    python -m kd.aot --config=configs/vision/logit_kd.py --topology=v5e:16x16 --stage=student
    python -m kd.aot --config=configs/vision/logit_kd.py:cpu --topology=cpu:8
    python -m kd.aot --table=docs/aot.md

It is the step that `kd.main` runs, sharded over the slice's mesh, with the teacher in it. Nothing
is executed and no data is read. Fields of the config are changed as in `kd.main`:
`--config.mesh.fsdp=16 --config.student.batch_size=1024`.

Told are bytes per chip, operations, collectives, and a roofline: the time that the chip would take
for each of arithmetic, memory traffic and communication at its data sheet's rates, the longest of
which is a lower bound of the step's time.

A UNet takes XLA for TPUs more than half an hour; `--effort=-1` makes it minutes. Operations stay,
but less is fused and kept on the chip: the program moves more than it would, as a rule holds more,
and may exchange more. Then only the time of arithmetic is a lower bound.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
from collections.abc import Sequence

import jax

from kd import config as config_lib
from kd import files, process
from kd.aot import topology
from kd.aot.compile import as_json, compile_stage, raise_batch, text
from kd.errors import UserError
from kd.main import overrides
from kd.overrides import override


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog='python -m kd.aot', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('--config', metavar='FILE[:ARGUMENT]')
    parser.add_argument('--topology', default='cpu:8', help='v5e:16x16, v5p:8x8x8, cpu:8, ...')
    parser.add_argument('--stage', default='', help='the last one by default')
    parser.add_argument('--json', type=process.file_argument, help='write the report there too')
    parser.add_argument(
        '--raise_batch', action='store_true', help='to a multiple of the devices that share it'
    )
    parser.add_argument(
        '--table', type=process.path_argument, help='compile the table of full-scale recipes'
    )
    parser.add_argument('--jobs', type=int, default=2, help='rows of the table at a time')
    parser.add_argument(
        '--effort',
        type=float,
        default=0.0,
        help="the compiler's, -1 to 1; with less, programs compile sooner, hold and move more",
    )
    parser.add_argument(
        '--cpu_minutes', type=float, default=0.0, help='end a compilation that takes longer'
    )
    known, rest = parser.parse_known_args(argv)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    _virtual_devices(known.topology)
    if known.table:
        from kd.aot import table

        if known.effort:
            raise UserError('Every row of the table has its own effort: leave --effort out.')
        # Without the compiler every row would fail, and be kept as one that does.
        topology.devices(table.SLICES[0])
        table.write(known.table, jobs=known.jobs, cpu_minutes=known.cpu_minutes)
        return 0
    if not known.config:
        raise UserError('Name a recipe with --config=FILE, or write the table with --table=FILE.')
    config = config_lib.load(known.config)
    override(config, overrides(rest))
    name = known.stage or config.stages[-1]
    if known.cpu_minutes:
        # Past the soft limit comes SIGXCPU, which ends the process wherever it is.
        hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
        resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(60 * known.cpu_minutes), hard))
    if known.raise_batch:
        raise_batch(config, name, known.topology)
    report = compile_stage(config, name, known.topology, known.effort)
    print(text(report))
    if known.json:
        files.write_json(known.json, as_json(report))
    return 0


def _virtual_devices(target: str) -> None:
    """As many CPU devices as asked for; on a machine with a TPU it is left alone."""
    jax.config.update('jax_platforms', 'cpu')
    count = target.removeprefix('cpu:')
    if target.startswith('cpu:') and count.isdigit() and int(count) > 0:
        jax.config.update('jax_num_cpu_devices', int(count))


if __name__ == '__main__':
    process.command(main)
