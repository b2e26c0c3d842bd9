"""What the compiler tells about the training step of a stage on a slice of accelerators."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from kd import config as config_lib
from kd.aot import hlo, hlo_traffic, topology
from kd.data import catalogue
from kd.errors import UserError, reason
from kd.io import manifest
from kd.parallel import mesh as mesh_lib

# Tokens that attention in blocks may add to a row, see `kd.models.causal_attention`.
_PADDING = 511


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
      traffic: bytes between each chip and its memory, see `kd.aot.hlo_traffic`.
      collectives: of one step on one device.
      refused: what the compiler said where the program does not fit, else ''.
      loops: whose length nothing tells. Each is counted once, so that operations, traffic and
        collectives are too small.
      effort: of the compiler, -1 to 1. Below 0 the program moves, and as a rule holds, more than
        need be.
      commit: of the code whose step it is, see `kd.io.manifest.commit`.
      tokens: of a row, T; 0 where rows are something else.
      square: bytes of the largest map of attention between all tokens of a row, over all devices,
        see `kd.aot.hlo.largest_square`.
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
    loops: int = 0
    effort: float = 0.0
    commit: str = ''
    tokens: int = 0
    square: int = 0

    @property
    def chips(self) -> int:
        """Devices of the target; the mesh may use fewer."""
        return math.prod(int(side) for side in self.target.partition(':')[2].split('x'))

    @property
    def fits(self) -> bool:
        """Whether all that the step holds fits in the chip's memory."""
        return not self.refused and (self.chip is None or self.peak <= self.chip.memory)

    def times(self) -> dict[str, float]:
        """Seconds of one step for each resource alone; {} for CPU, and where loops hide them."""
        if self.chip is None or self.refused or self.loops:
            return {}
        return {
            'arithmetic': self.flops / self.devices / self.chip.flops,
            'memory': self.traffic / self.chip.bandwidth,
            'communication': hlo.wire_bytes(self.collectives) / self.chip.interconnect,
        }

    def bound(self) -> tuple[str, float]:
        """The resource that the step waits for, and its seconds: a lower bound of the step's.

        Compiled with less effort, a program says only how long memory and communication take at
        most: where they may be longer than arithmetic they are named too, and the seconds are those
        of arithmetic.
        """
        times = self.times()
        if self.effort < 0:
            least = times['arithmetic']
            return ' or '.join(name for name, t in times.items() if t >= least), least
        name = max(times, key=times.__getitem__)
        return name, times[name]

    def verdict(self) -> str:
        """Whether it fits, what bounds it, and what to change if it does not."""
        if self.loops:
            return (
                f'loop of unknown length ({self.loops}, counted once): operations, traffic and '
                f'collectives are too small; change: a scan of blocks, each under lax.cond; '
                f'{self._memory()}'
            )
        bound = f'; bound by {self.bound()[0]}' if self.fits and self.times() else ''
        return self._memory() + bound

    def _memory(self) -> str:
        """Whether it fits, and what to change if it does not."""
        if self.chip is None:
            return 'compiles'
        if self.fits:
            return f'fits, {100 * self.peak / self.chip.memory:.0f} % of memory'
        advice = (
            '--config.mesh.fsdp=N with sharding rules such as (".*", "fsdp"), also as '
            'frozen_sharding for the teacher'
            if self.arguments > self.chip.memory / 2
            else f'a smaller {self.stage}.batch_size, micro_batches of the method, or '
            '--config.mesh.fsdp=N'
        )
        if self.refused or self.arguments > self.chip.memory:
            needed = re.search(r'\(([\d.]+[KMG])\) exceeds', self.refused)
            needs = f' (temporaries {needed[1]})' if needed else ''
            if self.effort < 0:
                return f'uncertain: does not fit with less effort{needs}; change: {advice}'
            return f'does not fit {self.chip.name}{needs}; change: {advice}'
        # The compiler looks at what lives at one time, and refuses what does not fit.
        share = 100 * self.peak / self.chip.memory
        return f'uncertain: compiles, with a sum of {share:.0f} % of memory; change: {advice}'


def compile_stage(
    config: config_lib.ConfigDict, name: str, target: str, effort: float = 0.0
) -> Report:
    """Compiles the training step of a stage for a topology.

    Args:
      config: the recipe.
      name: of the stage.
      target: see `kd.aot.topology.devices`.
      effort: XLA's `exec_time_optimization_effort`, -1 to 1; 0 is its usual one.

    Raises:
      UserError: an unknown topology, libtpu missing, a mesh or batch that does not fit, a config
        that needs a correction, an effort outside its range.
    """
    from kd.training import step as step_lib
    from kd.training.stage import prepare

    if not -1.0 <= effort <= 1.0:
        raise UserError(f'--effort must lie in [-1, 1], got {effort}.')
    recipe = config_lib.parse(config)
    recipe = dataclasses.replace(recipe, data_dir=catalogue.DESCRIBED)
    _check_stage(recipe, name)
    devices, chip = topology.devices(target)
    mesh = mesh_lib.make_mesh(recipe.mesh, devices)
    stage = prepare(recipe, name, mesh)
    arguments = step_lib.abstract_arguments(stage)
    step: Any = step_lib.make_train_step(stage)
    traced = step.trace(*arguments)
    tokens, platform = tokens_of_row(stage), devices[0].platform
    report = Report(
        stage=name,
        target=target,
        devices=mesh.size,
        batch_size=stage.config.batch_size,
        chip=chip,
        arguments=bytes_per_device(arguments),
        temporaries=0,
        peak=0,
        flops=hlo.jaxpr_flops(traced.jaxpr.jaxpr),
        loops=hlo.while_loops(traced.jaxpr.jaxpr),
        traffic=0,
        collectives=[],
        effort=effort,
        commit=manifest.commit('kd', 'configs'),
        tokens=tokens,
        square=hlo.largest_square(traced.jaxpr.jaxpr, tokens, _PADDING, platform) if tokens else 0,
    )
    try:
        compiled = traced.lower().compile(
            compiler_options={'exec_time_optimization_effort': effort} if effort else None
        )
    except jax.errors.JaxRuntimeError as error:
        if 'RESOURCE_EXHAUSTED' not in str(error):
            raise
        return dataclasses.replace(report, refused=reason(error))
    memory, program = compiled.memory_analysis(), compiled.as_text()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return dataclasses.replace(
        report,
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        peak=held + memory.temp_size_in_bytes + memory.generated_code_size_in_bytes,
        traffic=hlo_traffic.traffic(program),
        loops=max(report.loops, hlo.parse(program).loops_of_unknown_length()),
        collectives=hlo.collectives(program),
    )


def _check_stage(recipe: config_lib.Recipe, name: str) -> None:
    if name not in recipe.stages:
        raise UserError(f"There is no stage '{name}'; stages: {', '.join(recipe.stages)}.")


def tokens_of_row(stage: Any) -> int:
    """Of the text that a stage's network reads, with the answers that it samples; 0 for no text."""
    spec, method = stage.context.spec, stage.config.method
    asked = spec.get('input')
    if asked is None or not asked.shape or not np.issubdtype(asked.dtype, np.integer):
        return 0
    said = [block['max_new'] for name in ('sampling', 'rollout') if (block := method.get(name))]
    if not said and 'response' in spec:
        said = [spec['response'].shape[-1]]
    return asked.shape[-1] + sum(said[:1])


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
        f'  memory a chip   arguments {mib(report.arguments)}, temporaries '
        f'{mib(report.temporaries)}, peak {mib(report.peak)}'
        + (f' of {mib(report.chip.memory)}' if report.chip else ''),
        f'  operations      {report.flops:.3g} a step, {report.flops / report.devices:.3g} a chip',
    ]
    if report.traffic:
        intensity = report.flops / report.devices / report.traffic
        lines.append(
            f'  memory traffic  {mib(report.traffic)} a chip: {intensity:.1f} operations a byte'
            + (
                f', balanced at {report.chip.flops / report.chip.bandwidth:.0f}'
                if report.chip
                else ''
            )
        )
    for kind, (count, size) in hlo.totals(report.collectives).items():
        lines.append(f'  {kind:<15} {count} a step, {mib(size)}')
    if report.times():
        each = ', '.join(f'{name} {t}' for name, t in times(report).items())
        lines.append(f'  roofline        {each}')
    if report.tokens:
        lines.append(f'  rows            {rows(report)}')
    if report.refused:
        lines.append(f'  compiler        {report.refused}')
    return '\n'.join([*lines, f'  verdict         {report.verdict()}'])


def times(report: Report) -> dict[str, str]:
    """Times as text; with less effort those of memory and communication are the most it takes."""
    most = {'memory', 'communication'} if report.effort < 0 else set()
    return {
        name: ('≤ ' if name in most and t else '') + f'{1e3 * t:.3g} ms'
        for name, t in report.times().items()
    }


def rows(report: Report) -> str:
    """The length T of rows of tokens, and the maps of attention of [T, T]; '' for no such rows."""
    if not report.tokens:
        return ''
    found = f'[T, T] in {mib(report.square)}' if report.square else 'no [T, T]'
    return f'{report.tokens:,} tokens, {found}'


def as_json(report: Report) -> dict[str, Any]:
    """A report as plain values, collectives of one kind and shape together."""
    plain = {field.name: getattr(report, field.name) for field in dataclasses.fields(report)}
    del plain['chip']  # Follows from the target.
    times: Counter[tuple[str, int, str]] = Counter()
    for found in report.collectives:
        times[found.kind, found.bytes, found.shape] += found.times
    plain['collectives'] = [[kind, size, n, shape] for (kind, size, shape), n in times.items()]
    return plain


def from_json(plain: Mapping[str, Any]) -> Report:
    """The inverse of `as_json`."""
    collectives = [hlo.Collective(*found) for found in plain['collectives']]
    chip = topology.CHIPS.get(plain['target'].partition(':')[0])
    return Report(**{**plain, 'collectives': collectives, 'chip': chip})


def raise_batch(config: config_lib.ConfigDict, name: str, target: str) -> None:
    """Raises a stage's batch to the next multiple of the devices that share it."""
    recipe = config_lib.parse(config)
    _check_stage(recipe, name)
    mesh = mesh_lib.make_mesh(recipe.mesh, topology.devices(target)[0])
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    config[name].batch_size = -(-config[name].batch_size // ways) * ways


def mib(size: float) -> str:
    """Bytes as mebibytes or gibibytes."""
    return f'{size / 2**30:.2f} GiB' if size >= 2**30 else f'{size / 2**20:.3g} MiB'
