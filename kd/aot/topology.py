"""Slices of TPUs, and virtual CPU devices, to compile for on a machine that has none."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from kd.errors import UserError, did_you_mean


@dataclasses.dataclass(frozen=True)
class Chip:
    """What a chip can do at most, by its maker's data sheet (cloud.google.com/tpu/docs).

    Attributes:
      name: for people.
      memory: bytes of HBM.
      flops: bfloat16 operations a second.
      bandwidth: bytes a second between HBM and the chip.
      interconnect: bytes a second that a chip exchanges with its neighbours, over all links.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    interconnect: float


_GIB = 2.0**30
CHIPS = {
    'v5e': Chip('TPU v5e', 16 * _GIB, 197e12, 819e9, 200e9),
    'v5p': Chip('TPU v5p', 95 * _GIB, 459e12, 2765e9, 600e9),
    'v6e': Chip('TPU v6e', 32 * _GIB, 918e12, 1640e9, 448e9),
}
_FLAT = ('2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_CUBES = ('2x2x1', '2x2x2', '2x2x4', '2x4x4', '4x4x4', '4x4x8', '4x8x8', '8x8x8', '8x8x16')
KNOWN = {'v5e': _FLAT, 'v6e': _FLAT, 'v5p': _CUBES}


def devices(topology: str) -> tuple[Sequence[jax.Device], Chip | None]:
    """The devices of a topology, and what each can do (None for CPU).

    Args:
      topology: 'v5e:16x16', one of `KNOWN`, for which the package libtpu compiles; or 'cpu:8', for
        as many virtual CPU devices of this process.

    Raises:
      UserError: an unknown topology, or libtpu is not installed.
    """
    kind, _, layout = topology.partition(':')
    if kind == 'cpu' and re.fullmatch(r'[1-9]\d*', layout):
        return _cpu_devices(int(layout)), None
    if layout not in KNOWN.get(kind, ()):
        every = [f'{chip}:{slice_}' for chip, slices in KNOWN.items() for slice_ in slices]
        listed = '; '.join(f'{chip}: {", ".join(slices)}' for chip, slices in KNOWN.items())
        raise UserError(
            f"There is no topology '{topology}'.{did_you_mean(topology, every)} "
            f'Known are cpu:N and {listed}.'
        )
    if importlib.util.find_spec('libtpu') is None:
        raise UserError(
            f"Compiling for {topology} takes the package libtpu: pip install -e '.[tpu]'. Without "
            'it, --topology=cpu:8 works.'
        )
    _quiet(kind, layout)
    found = topologies.get_topology_desc(platform='tpu', topology_name=topology)
    return found.devices, CHIPS[kind]


def _cpu_devices(count: int) -> Sequence[jax.Device]:
    found = jax.devices('cpu')
    if len(found) < count:
        raise UserError(
            f'cpu:{count} needs {count} devices and this process has {len(found)}; start it with '
            f'JAX_NUM_CPU_DEVICES={count}.'
        )
    return found[:count]


def _quiet(kind: str, layout: str) -> None:
    """Tells libtpu that there is no TPU to look for, before it is loaded."""
    chips = math.prod(int(side) for side in layout.split('x'))
    for name, value in {
        'TPU_SKIP_MDS_QUERY': '1',
        'TPU_ACCELERATOR_TYPE': f'{kind}-{chips}',
        'TPU_WORKER_HOSTNAMES': 'localhost',
        'TPU_WORKER_ID': '0',
        'TPU_MIN_LOG_LEVEL': '3',
        'TPU_STDERR_LOG_LEVEL': '3',
        'TPU_LOG_DIR': 'disabled',
        # Several processes may compile at once: there is no chip for them to fight over.
        'ALLOW_MULTIPLE_LIBTPU_LOAD': '1',
    }.items():
        os.environ.setdefault(name, value)
