"""Networks as safetensors files, in and out; the format itself is the package safetensors.

    python -m kd.io.safetensors runs/mine/student student.safetensors

Names are the paths of Flax: 'params/Dense_0/kernel'.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy

from kd import process
from kd.errors import UserError
from kd.io import finished
from kd.state import NETWORK, path_name

# What arrays of the host can have; the format has types of less than 16 bits beside these.
_DTYPES: dict[str, Any] = {
    'F64': np.float64,
    'F32': np.float32,
    'F16': np.float16,
    'BF16': jnp.bfloat16,
    'C64': np.complex64,
    'I64': np.int64,
    'I32': np.int32,
    'I16': np.int16,
    'I8': np.int8,
    'U64': np.uint64,
    'U32': np.uint32,
    'U16': np.uint16,
    'U8': np.uint8,
    'BOOL': np.bool_,
}

Index = tuple[slice, ...]


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of an open file; it is read by `read`, or where NumPy asks for an array."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    opened: Any

    def read(self, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part that a slice per dimension names; only that part is read."""
        if index is None or 0 in self.shape:  # The package cannot slice empty tensors.
            return self.opened.get_tensor(self.name)[index or ...]
        return self.opened.get_slice(self.name)[index]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.asarray(self.read(), dtype)


def save(file: Path, variables: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a tree of arrays, then reads it back and compares it bit for bit.

    Args:
      file: to write; replaced whole.
      variables: the tree, such as {'params': ..., 'batch_stats': ...}; arrays of any sharding
        whose parts all lie on this host.
      metadata: further strings for the header.

    Raises:
      UserError: an array of a type that the format does not have, a folder that is not there or
        cannot be written, or a file that does not read back as what was written.
    """
    arrays = flatten(variables)
    for name, array in arrays.items():
        if array.dtype not in map(np.dtype, _DTYPES.values()):
            raise UserError(
                f"'{name}' has type {array.dtype}; safetensors has: {', '.join(_DTYPES)}."
            )
    partial = file.with_name(file.name + '.partial')
    try:
        partial.touch()
        rights = partial.stat().st_mode
        safetensors.numpy.save_file(arrays, partial, {'format': 'flax', **(metadata or {})})
        partial.chmod(rights)  # The package lets nobody but its writer read what it writes.
        stored = load(partial)
        for name, array in arrays.items():
            if (
                stored[name].dtype != array.dtype
                or stored[name].read().tobytes() != array.tobytes()
            ):
                raise UserError(f"{file}: '{name}' does not read back as it was written.")
        partial.replace(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f'{file} cannot be written ({error}); is its folder there, and is there room?'
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


def load(file: Path) -> dict[str, Tensor]:
    """All tensors of a file by name, none of them read yet.

    A tensor that several parts of a network share is stored once; where the metadata give its other
    names, as the package writes them ({other name: name}), it is there under these too.

    Raises:
      UserError: not a safetensors file, cut short, or with tensors of a type that NumPy lacks.
    """
    try:
        opened = safetensors.safe_open(file, 'numpy')
        named = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        metadata = opened.metadata() or {}
    except FileNotFoundError as error:
        raise UserError(f'{file} is not there.') from error
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f'{file} is not a safetensors file, or is cut short: {error}.') from error
    tensors = {}
    for name, part in named.items():
        if part.get_dtype() not in _DTYPES:
            raise UserError(f"{file}: '{name}' has type {part.get_dtype()}, which NumPy lacks.")
        dtype = np.dtype(_DTYPES[part.get_dtype()])
        tensors[name] = Tensor(name, tuple(part.get_shape()), dtype, opened)
    others = {other: name for other, name in metadata.items() if name in named}
    return {other: tensors[name] for other, name in others.items()} | tensors


def restore(file: Path, abstract: Any) -> Any:
    """The tree of a file, checked against the network it is for, read leaf by leaf.

    Args:
      file: written by `save`, or with the same names.
      abstract: tree of shapes and dtypes, with or without shardings, such as
        `jax.eval_shape(network.init, key)`.

    Returns:
      The tree of `abstract`, with the file's values, on the devices of its shardings.

    Raises:
      UserError: names, shapes or types that differ; the message names the first.
    """
    tensors = load(file)
    wanted = {path_name(p): x for p, x in jax.tree_util.tree_flatten_with_path(abstract)[0]}
    problems = [
        f"'{name}' is {_shown(tensors.get(name))} in the file, {_shown(x)} in the network"
        for name, x in wanted.items()
        if name not in tensors or _shown(tensors[name]) != _shown(x)
    ]
    used = {tensors[name].name for name in wanted if name in tensors}
    problems += [
        f"'{name}' is {_shown(tensor)} in the file, nothing in the network"
        for name, tensor in tensors.items()
        if tensor.name not in used
    ]
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise UserError(f'{file} does not fit the network: {"; ".join(problems[:3])}{more}.')
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: place(tensors[path_name(path)].read, leaf), abstract
    )


def place(read: Callable[[Index], np.ndarray], leaf: Any) -> jax.Array:
    """An array on its devices, each of which gets its part alone; on the host one at a time.

    Args:
      read: the part of the array that a slice per dimension names.
      leaf: its shape, and its sharding if it has one; else it goes to the default device.
    """
    sharding = getattr(leaf, 'sharding', None)
    if sharding is None:
        return jax.block_until_ready(jax.device_put(read((slice(None),) * leaf.ndim)))
    parts: dict[Any, np.ndarray] = {}

    def part(index: Index | None) -> np.ndarray:
        assert index is not None
        key = tuple((each.start, each.stop) for each in index)
        if key not in parts:  # Devices that hold copies of one part share the reading.
            parts[key] = read(index)
        return parts[key]

    # Transfers run on behind Python's back, and would hold the next leaves beside this one.
    return jax.block_until_ready(jax.make_array_from_callback(leaf.shape, sharding, part))


def place_layers(read: Callable[[int, Index], np.ndarray], leaf: Any, dtype: Any) -> jax.Array:
    """A leaf that stacks layers, [layers, ...], on its devices; the host holds a layer at a time.

    Args:
      read: (layer, a slice for each dimension of a layer) -> that part of the layer.
      leaf: its shape, and its sharding if it has one; else it goes to the default device.
      dtype: of what is read.
    """
    default = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    sharding = getattr(leaf, 'sharding', None) or default
    places: dict[Any, list[Any]] = {}
    for device, index in sharding.addressable_devices_indices_map(leaf.shape).items():
        ends = [x.indices(n)[:2] for x, n in zip(index or (), leaf.shape, strict=True)]
        places.setdefault(tuple(ends), []).append(device)
    arrays = {}
    for ((first, last), *rest), copies in places.items():
        shape = (last - first, *(end - begin for begin, end in rest))
        for device in copies:
            arrays[device] = _empty(shape, np.dtype(dtype), device)
        for layer in range(first, last):
            part = read(layer, tuple(slice(*each) for each in rest))
            for device in copies:
                x = jax.device_put(part, device)
                arrays[device] = _filled(arrays[device], x, layer - first)
                arrays[device].block_until_ready()
    return jax.make_array_from_single_device_arrays(leaf.shape, sharding, list(arrays.values()))


def _empty(shape: tuple[int, ...], dtype: np.dtype, device: Any) -> jax.Array:
    place = jax.sharding.SingleDeviceSharding(device)
    return jax.jit(lambda: jnp.zeros(shape, dtype), out_shardings=place)()


@functools.partial(jax.jit, donate_argnums=0)
def _filled(stack: jax.Array, layer: jax.Array, at: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(stack, layer, at, 0)


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """{'params/Dense_0/kernel': array, ...}, on the host, contiguous and little-endian."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): np.asarray(jax.device_get(x), order='C') for path, x in leaves}


def stage_variables(directory: Path, weights: str = 'final') -> dict[str, Any]:
    """{'params': ..., **mutables} of a finished stage's result, without its config.

    Args:
      directory: of the stage, such as runs/mine/student.
      weights: 'final', or the name of an average that the stage kept.
    """
    done = finished.read_done(directory)
    if done is None:
        raise UserError(f'{directory} is not a finished stage (it has no done.json).')
    path = (directory / 'checkpoints' / str(done['step']) / 'variables').absolute()
    stored = ocp.PyTreeCheckpointHandler().metadata(ocp.path.step.epath.Path(path)).tree
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), dict(stored)
    )
    part = done.get('result', NETWORK)
    averages = {name for name, parts in (abstract.get('ema') or {}).items() if part in parts}
    if weights != 'final' and weights not in averages:
        have = ['final', *sorted(averages)]
        raise UserError(f"{directory} has no weights '{weights}', only: {have}.")
    params = abstract['params'] if weights == 'final' else abstract['ema'][weights]
    mutables = (abstract.get('mutables') or {}).get(part, {})
    return finished.restore_part(
        directory,
        done['step'],
        {'params': params[part], **mutables},
        str(directory),
        part=part,
        weights=weights,
    )


def _shown(x: Any) -> str:
    return 'nothing' if x is None else f'{np.dtype(x.dtype)}{list(x.shape)}'


def main() -> int:
    """Writes the network of a finished stage as a safetensors file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    path = process.path_argument
    parser.add_argument('stage', type=path, help='directory of a stage, such as runs/mine/student')
    parser.add_argument('file', type=path)
    parser.add_argument('--weights', default='final', help="'final' or the name of an average")
    arguments = parser.parse_args()
    variables = stage_variables(arguments.stage, arguments.weights)
    save(arguments.file, variables, {'stage': str(arguments.stage)})
    size = arguments.file.stat().st_size
    count = sum(x.size for x in jax.tree.leaves(variables['params']))
    print(f'{arguments.file}: {count:,} parameters, {size:,} bytes')
    return 0


if __name__ == '__main__':
    process.command(main)
