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
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from kd import config as config_lib
from kd.data import sources
from kd.errors import UserError
from kd.overrides import override
from kd.parallel import hlo, topology
from kd.parallel import mesh as mesh_lib

# Full-scale recipes (config, stage) of the table, and the slices they are compiled for.
TABLE = (
    ('configs/vision/logit_kd.py', 'student'),
    ('configs/lm/recursive_meta_distillation.py', 'teacher'),
    ('configs/lm/recursive_meta_distillation.py', 'generation_1'),
    ('configs/flow/cifar10.py', 'map'),
)
SLICES = ('v5e:4x4', 'v5e:16x16', 'v5p:8x8x8', 'v6e:16x16')
_PAGE = """# Training steps, compiled ahead of time

Written by `python -m kd.aot --table=docs/aot.md`. Bytes are of one chip. Times are those of one
step for each resource alone at the data sheet's rates; the longest is a lower bound. Batches are
those of the recipe, raised to an example a chip where chips are more.
"""
# Examples of every split where only shapes count.
_MANY = 10_000_000


@dataclasses.dataclass(frozen=True)
class Report:
    """What compiling a stage for a topology has told.

    Attributes:
      stage, target: names of the stage and of the topology.
      devices: how many.
      batch_size: of the whole step.
      chip: what each device can do, None for CPU.
      arguments, temporaries, peak: bytes on each device.
      flops: in matrix products and convolutions, on all devices together.
      traffic: bytes between each chip and its memory, by XLA's count.
      collectives: of one step on one device.
      refused: what the compiler said where the program does not fit, else ''.
    """

    stage: str
    target: str
    devices: int
    batch_size: int
    chip: topology.Chip | None
    arguments: int
    temporaries: int
    peak: int
    flops: int
    traffic: int
    collectives: list[hlo.Collective]
    refused: str = ''

    @property
    def fits(self) -> bool:
        """Whether the step fits in the chip's memory."""
        return not self.refused and (self.chip is None or self.peak <= self.chip.memory)

    def times(self) -> dict[str, float]:
        """Seconds of one step for each resource alone; {} for CPU."""
        if self.chip is None or self.refused:
            return {}
        return {
            'arithmetic': self.flops / self.devices / self.chip.flops,
            'memory': self.traffic / self.chip.bandwidth,
            'communication': hlo.wire_bytes(self.collectives) / self.chip.interconnect,
        }

    def verdict(self) -> str:
        """Whether it fits, what bounds it, and what to change if it does not."""
        if self.chip is None:
            return 'compiles'
        if not self.fits:
            advice = (
                '--config.mesh.fsdp=N with sharding rules such as (".*", "fsdp"), also as '
                'frozen_sharding for the teacher'
                if self.arguments > self.chip.memory / 2
                else f'a smaller {self.stage}.batch_size, micro_batches of the method, or '
                '--config.mesh.fsdp=N'
            )
            return f'does not fit {self.chip.name}; change: {advice}'
        bound = max(self.times(), key=self.times().__getitem__)
        return f'fits, {100 * self.peak / self.chip.memory:.0f} % of memory; bound by {bound}'


def compile_stage(config: config_lib.ConfigDict, name: str, target: str) -> Report:
    """Compiles the training step of a stage for a topology.

    Args:
      config: the recipe.
      name: of the stage.
      target: see `kd.parallel.topology.devices`.

    Raises:
      UserError: an unknown topology, libtpu missing, a mesh or batch that does not fit, a config
        that needs a correction.
    """
    from kd import train
    from kd.stage import prepare

    config_lib.validate(config)
    if name not in config.stages:
        raise UserError(f"There is no stage '{name}'; stages: {', '.join(config.stages)}.")
    devices, chip = topology.devices(target)
    mesh = mesh_lib.make_mesh(config_lib.to_plain(config.mesh), devices)
    stage = prepare(without_data(config), name, mesh)
    arguments = train.abstract_arguments(stage)
    step: Any = train.make_train_step(stage)
    report = Report(
        stage=name,
        target=target,
        devices=mesh.size,
        batch_size=stage.config.batch_size,
        chip=chip,
        arguments=bytes_per_device(arguments),
        temporaries=0,
        peak=0,
        flops=hlo.flops(step, *arguments),
        traffic=0,
        collectives=[],
    )
    try:
        compiled = step.lower(*arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return dataclasses.replace(report, refused=str(error).strip().splitlines()[0])
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return dataclasses.replace(
        report,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        traffic=int(cost.get('bytes accessed', 0)),
        collectives=hlo.collectives(compiled.as_text()),
    )


def without_data(config: config_lib.ConfigDict) -> config_lib.ConfigDict:
    """The recipe with data of the same shapes and nothing to read, where its data is tfds's."""
    config = config.copy_and_resolve_references()
    name = config.data.get('name', '')
    if name and name not in ('mnist1d', 'stdlib_characters') and not _is_toy(name):
        splits = {key: value for key, value in config.data.items() if key != 'name'}
        with config.unlocked():
            config.data = {'source': {'name': 'kd.aot.stand_in', 'of': name}, **splits}
    return config


def stand_in(
    split: str, config: config_lib.ConfigDict, workdir: Path | None, *, of: str
) -> sources.Source:
    """A source of the shapes of a data set, of any length, that cannot be read."""
    del config, workdir
    spec, classes = _shapes(of)
    names = re.findall(r'[A-Za-z_]\w*', split)
    return sources.Source(
        sources.DataSet(of, dict.fromkeys(names, _MANY), lambda _: dict, spec, classes), split
    )


def _is_toy(name: str) -> bool:
    from kd.data.builders import toys

    return name in toys.TOYS


def _shapes(name: str) -> tuple[dict[str, jax.ShapeDtypeStruct], int | None]:
    """Shapes of one example and the number of classes, from the data set's description alone."""
    if name == 'digits':
        return sources.example_spec((8, 8, 1)), 10
    import tensorflow_datasets as tfds

    try:
        features = dict(tfds.builder(name, data_dir='/nonexistent').info.features)
    except (tfds.core.DatasetNotFoundError, ValueError) as error:
        raise UserError(f"tfds knows no data set '{name}'.") from error
    image, label = features.get('image'), features.get('label')
    if image is None or None in image.shape:
        raise UserError(f"data set '{name}' has no images of one shape.")
    classes = getattr(label, 'num_classes', None)
    return sources.example_spec(image.shape, labelled=classes is not None), classes


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of abstract arrays on one of the devices of their shardings."""

    def size(x: jax.ShapeDtypeStruct) -> int:
        shape = x.sharding.shard_shape(x.shape) if x.sharding else x.shape
        itemsize = 8 if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x.dtype.itemsize
        return int(np.prod(shape, dtype=np.int64)) * itemsize

    return sum(size(x) for x in jax.tree.leaves(tree))


def text(report: Report) -> str:
    """A report as lines for people."""
    lines = [
        f'{report.stage} on {report.target}: {report.devices} devices, batch {report.batch_size:,}',
        f'  memory a chip   arguments {_mib(report.arguments)}, temporaries '
        f'{_mib(report.temporaries)}, peak {_mib(report.peak)}'
        + (f' of {_mib(report.chip.memory)}' if report.chip else ''),
        f'  operations      {report.flops:.3g} a step, {report.flops / report.devices:.3g} a chip',
    ]
    if report.traffic:
        intensity = report.flops / report.devices / report.traffic
        lines.append(
            f'  memory traffic  {_mib(report.traffic)} a chip: {intensity:.1f} operations a byte'
            + (
                f', balanced at {report.chip.flops / report.chip.bandwidth:.0f}'
                if report.chip
                else ''
            )
        )
    for kind, (count, size) in hlo.totals(report.collectives).items():
        lines.append(f'  {kind:<15} {count} a step, {_mib(size)}')
    if report.times():
        each = ', '.join(f'{name} {1e3 * t:.3g} ms' for name, t in report.times().items())
        lines.append(f'  roofline        {each}')
    if report.refused:
        lines.append(f'  compiler        {report.refused}')
    return '\n'.join([*lines, f'  verdict         {report.verdict()}'])


def table(reports: Sequence[tuple[str, Report]]) -> str:
    """Reports of (config, report) as a Markdown table."""
    head = (
        '| recipe, stage | slice | batch | arguments | temporaries | peak | operations a chip | '
        'collectives | arithmetic, memory, communication | verdict |\n'
        '|---|---|---:|---:|---:|---:|---:|---|---|---|'
    )
    rows = []
    for config, report in reports:
        moved = ', '.join(
            f'{count} {kind} {_mib(size)}'
            for kind, (count, size) in hlo.totals(report.collectives).items()
        )
        times = ', '.join(f'{1e3 * t:.3g} ms' for t in report.times().values())
        cells = [
            f'{config} {report.stage}', report.target, f'{report.batch_size:,}',
            _mib(report.arguments), _mib(report.temporaries), _mib(report.peak),
            f'{report.flops / report.devices:.3g}', moved or 'none', times, report.verdict(),
        ]  # fmt: skip
        rows.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join([head, *rows])


def _mib(size: float) -> str:
    return f'{size / 2**30:.2f} GiB' if size >= 2**30 else f'{size / 2**20:.3g} MiB'


def write_table(file: Path) -> None:
    """Compiles `TABLE` for `SLICES`; the page of Markdown is written anew after each."""
    reports = []
    file.parent.mkdir(parents=True, exist_ok=True)
    for path, name in TABLE:
        for target in SLICES:
            config = config_lib.load(path)
            chips = len(topology.devices(target)[0])
            # At least an example a chip; otherwise the recipe's own batch.
            config[name].batch_size = -(-config[name].batch_size // chips) * chips
            reports.append((path.removeprefix('configs/'), compile_stage(config, name, target)))
            print(text(reports[-1][1]), flush=True)
            file.write_text(f'{_PAGE}\n{table(reports)}\n')


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    from kd.main import EXIT_USER, overrides

    parser = argparse.ArgumentParser(
        prog='python -m kd.aot', description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument('--config', metavar='FILE[:ARGUMENT]')
    parser.add_argument('--topology', default='cpu:8', help='v5e:16x16, v5p:8x8x8, cpu:8, ...')
    parser.add_argument('--stage', default='', help='the last one by default')
    parser.add_argument('--table', type=Path, help='compile the table of full-scale recipes')
    known, rest = parser.parse_known_args(argv)
    os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
    try:
        _virtual_devices(known.topology)
        if known.table:
            write_table(known.table)
            return 0
        if not known.config:
            raise UserError(
                'Name a recipe with --config=FILE, or write the table with --table=FILE.'
            )
        config = config_lib.load(known.config)
        override(config, overrides(rest))
        name = known.stage or config.stages[-1]
        print(text(compile_stage(config, name, known.topology)))
    except UserError as error:
        print(f'kd: {error}', file=sys.stderr)
        return EXIT_USER
    return 0


def _virtual_devices(target: str) -> None:
    """As many CPU devices as asked for; on a machine with a TPU it is left alone."""
    jax.config.update('jax_platforms', 'cpu')
    count = target.removeprefix('cpu:')
    if target.startswith('cpu:') and count.isdigit() and int(count) > 0:
        jax.config.update('jax_num_cpu_devices', int(count))


if __name__ == '__main__':
    sys.exit(main())
