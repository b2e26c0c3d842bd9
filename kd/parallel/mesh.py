"""The device mesh, and batches on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
# Examples are spread over both: an FSDP group holds one copy of the parameters between them.
BATCH_AXES = ('data', 'fsdp')
# Steps that may be on their way at once on several devices of a CPU.
AHEAD = 8


def make_mesh(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh with the axes data, fsdp and tensor.

    Args:
      sizes: devices along each axis; one may be -1 and takes all that are left. If none is -1 and
        the product is smaller than the number of devices, the first ones are used.
      devices: all of them by default.
    """
    devices = list(jax.devices() if devices is None else devices)
    unknown = set(sizes) - set(AXES)
    if unknown:
        raise UserError(f'mesh has axes {AXES}, not {sorted(unknown)}.')
    shape = [sizes.get(axis, 1) for axis in AXES]
    fixed = math.prod(size for size in shape if size != -1)
    if shape.count(-1) > 1 or any(size == 0 or size < -1 for size in shape):
        raise UserError(f'mesh sizes must be positive, at most one of them -1; got {dict(sizes)}.')
    if fixed > len(devices):
        raise UserError(
            f'mesh {dict(sizes)} needs {fixed} devices, there are {len(devices)}; '
            'change config.mesh.'
        )
    if -1 in shape:
        if len(devices) % fixed:
            raise UserError(f'{len(devices)} devices do not divide over mesh {dict(sizes)}.')
        shape[shape.index(-1)] = len(devices) // fixed
    used = devices[: math.prod(shape)]
    idle = {device.process_index for device in devices} - {d.process_index for d in used}
    if idle:
        raise UserError(
            f'mesh {dict(sizes)} leaves processes {sorted(idle)} without a device; change '
            'config.mesh to use all of them, or start fewer processes.'
        )
    return Mesh(np.asarray(used).reshape(shape), AXES)


def local_mesh(mesh: Mesh) -> Mesh:
    """`mesh` itself in a run of one process, else a mesh of this process's own devices.

    They lie along fsdp, so that what is sharded in the whole run need not fit on one device.
    """
    return mesh if jax.process_count() == 1 else make_mesh({'fsdp': -1}, jax.local_devices())


def batch_part(mesh: Mesh) -> tuple[int, int]:
    """(index, count): which of how many equal parts of a batch this process's devices take.

    Processes that lie along the tensor axis share a part.

    Raises:
      UserError: devices of one process that take more of a batch than those of another, or parts
        that overlap.
    """
    rows = mesh.devices.reshape(-1, mesh.shape['tensor'])
    parts: dict[int, tuple[int, ...]] = {}
    for row, devices in enumerate(rows):
        for process in {device.process_index for device in devices}:
            parts[process] = (*parts.get(process, ()), row)
    distinct = sorted(set(parts.values()))
    if len(distinct) * len(distinct[0]) != len(rows) or len({len(p) for p in distinct}) > 1:
        raise UserError(
            f'mesh {dict(mesh.shape)} gives processes unequal or overlapping parts of a batch: '
            f'{parts}; let config.mesh.tensor divide the devices of a process, or be a multiple.'
        )
    return distinct.index(parts[jax.process_index()]), len(distinct)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Examples spread over the data and fsdp axes."""
    return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def check_batch_size(batch_size: int, mesh: Mesh, *, where: str, micro_batches: int = 1) -> None:
    """Raises `UserError` unless the batch divides over the devices that share it."""
    ways = mesh.shape['data'] * mesh.shape['fsdp']
    if batch_size % (ways * micro_batches):
        parts = f' x {micro_batches} micro-batches' if micro_batches > 1 else ''
        raise UserError(
            f'{where}={batch_size} does not divide over {ways} devices{parts} '
            f'(mesh data={mesh.shape["data"]}, fsdp={mesh.shape["fsdp"]}); '
            f'change it or config.mesh.'
        )


def put_batch(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, jax.Array]:
    """Moves this host's part of a global batch to its devices."""
    arrays = {name: np.asarray(value) for name, value in batch.items()}
    if jax.process_count() == 1:
        # One call for all arrays: a third of the time of one call each.
        return jax.device_put(arrays, sharding)
    return {
        name: jax.make_array_from_process_local_data(sharding, value)
        for name, value in arrays.items()
    }


def fed(batch: Mapping[str, np.ndarray], sharding: NamedSharding) -> dict[str, Any]:
    """A batch as a program takes it that is compiled for arguments of `sharding`.

    On one device of a CPU the arrays as they are, which the program takes in a fraction of the time
    that `put_batch` needs; else what that returns.
    """
    if sharding.num_devices == 1 and sharding.mesh.devices.flat[0].platform == 'cpu':
        return dict(batch)
    return put_batch(batch, sharding)


class Pace:
    """Keeps the host from running far ahead of several devices of a CPU.

    XLA lets 32 programs at a time onto each of them. Programs of which some devices have begun more
    than others, and which wait for each other in a collective, can then wait for ever.
    """

    def __init__(self, mesh: Mesh) -> None:
        several_of_a_cpu = mesh.devices.flat[0].platform == 'cpu' and mesh.devices.size > 1
        self.every, self.steps = AHEAD if several_of_a_cpu else 0, 0

    def __call__(self, value: Any) -> None:
        """Call after every step, with something that it returned."""
        self.steps += 1
        if self.every and self.steps % self.every == 0:
            jax.block_until_ready(value)
