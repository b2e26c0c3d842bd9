"""Checksums of what a run keeps: of the arrays of a tree, and of the files of a checkpoint."""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd.state import path_name

_CHUNK = 1 << 24
# Of each file in a sample.
_BLOCK, _BLOCKS = 4096, 64


def of_tree(tree: Any) -> dict[str, str]:
    """{path: 'float32 [3, 4] 0123456789abcdef'}: types, shapes and bits of a tree of arrays.

    The bits enter through sums of integers modulo 2^32, which do not depend on how the arrays are
    cut into shards, so a tree has the same checksums on every mesh.
    """
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    arrays = [leaf for _, leaf in leaves]
    if all(_in_memory(array) for array in arrays):
        # Compiling takes longer than summing what is in this memory anyway.
        with np.errstate(over='ignore'):
            sums = [_checksum(np.asarray(array), np) for array in arrays]
    else:
        sums = jax.device_get(_on_devices(arrays))
    return {
        path_name(path): f'{leaf.dtype} {list(leaf.shape)} {int(first):08x}{int(second):08x}'
        for (path, leaf), (first, second) in zip(leaves, sums, strict=True)
    }


def fingerprint(tree: Any) -> str:
    """A digest of the names, types, shapes and bits of a tree of arrays."""
    text = '\n'.join(f'{name} {found}' for name, found in of_tree(tree).items())
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def of_files(folder: Path) -> dict[str, str]:
    """{path within the folder: 'size crc'}; what is read is also brought onto the disk."""
    return {
        str(path.relative_to(folder)): _of_file(path, sync=True)
        for path in sorted(folder.rglob('*'))
        if path.is_file()
    }


def damage(
    folder: Path,
    expected: Mapping[str, str],
    part: tuple[int, int] = (0, 1),
    *,
    contents: bool = True,
) -> str:
    """What differs in a folder from the checksums that its files had, in words; '' if nothing.

    Args:
      folder: of the files.
      expected: as of `of_files`.
      part: (i, n): only every n-th file from the i-th on.
      contents: also read them, not their sizes alone.

    Raises:
      OSError: a file that is there and cannot be read, which says nothing about what is in it.
    """
    for name, found in sorted(expected.items())[part[0] :: part[1]]:
        path = folder / name
        if not path.exists():
            return f'{name} is missing'
        if path.stat().st_size != int(found.split()[0]):
            return f'{name} has {path.stat().st_size} bytes instead of {found.split()[0]}'
        if contents and _of_file(path) != found:
            return f'{name} is not what was written'
    return ''


def sample(place: Path) -> str:
    """A digest of a file of weights, or of those in a folder, that reads little of large ones.

    It goes by names, sizes, and blocks spread evenly over each file; '' where there are none.
    """
    inside = [place / 'config.json', *place.glob('*.safetensors'), *place.glob('*.index.json')]
    found = [path for path in sorted(inside) if path.is_file()] or [place]
    if not found[0].is_file():
        return ''
    digest = hashlib.sha256()
    for path in found:
        size = path.stat().st_size
        digest.update(f'{path.name} {size}'.encode())
        with path.open('rb') as stream:
            for part in range(_BLOCKS):
                stream.seek(max(0, size - _BLOCK) * part // (_BLOCKS - 1))
                digest.update(stream.read(_BLOCK))
    return digest.hexdigest()[:16]


def _of_file(path: Path, *, sync: bool = False) -> str:
    size = crc = 0
    with path.open('rb') as stream:
        while chunk := stream.read(_CHUNK):
            size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        if sync:
            os.fsync(stream.fileno())
    return f'{size} {crc:08x}'


def _in_memory(array: Any) -> bool:
    if not isinstance(array, jax.Array):
        return True
    devices: Any = array.sharding.device_set
    on_cpu = all(device.platform == 'cpu' for device in devices)
    return on_cpu and (array.is_fully_addressable or array.is_fully_replicated)


def _checksum(x: Any, xp: ModuleType) -> tuple[Any, Any]:
    """Two sums modulo 2^32 over the words of `x`, each weighted by its place."""
    unsigned: Any = {1: xp.uint8, 2: xp.uint16, 4: xp.uint32, 8: xp.uint32}
    if x.dtype == bool:
        bits = x.astype(xp.uint32)
    elif xp is np:
        words = np.ascontiguousarray(x).reshape(-1).view(unsigned[x.dtype.itemsize])
        bits = words.astype(np.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, unsigned[x.dtype.itemsize]).astype(jnp.uint32)
    place = xp.arange(bits.size, dtype=xp.uint32).reshape(bits.shape)
    # Odd factors lose no bit; two of them, so that chance agreement takes 64 bits.
    mixed = (bits ^ (bits >> 16)) * (place ^ xp.uint32(0x9E3779B1))
    return (bits * (2 * place + 1)).sum(dtype=xp.uint32), mixed.sum(dtype=xp.uint32)


@jax.jit
def _on_devices(arrays: list[jax.Array]) -> list[tuple[jax.Array, jax.Array]]:
    return [_checksum(x, jnp) for x in arrays]
