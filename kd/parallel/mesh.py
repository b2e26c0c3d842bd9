"""The device mesh, and batches on it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kd.errors import UserError

AXES = ('data', 'fsdp', 'tensor')
# Examples are spread over both: an FSDP group holds one copy of the parameters between them.
BATCH_AXES = ('data', 'fsdp')


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
    return Mesh(np.asarray(used).reshape(shape), AXES)


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
    return {
        name: jax.make_array_from_process_local_data(sharding, np.asarray(value))
        for name, value in batch.items()
    }
