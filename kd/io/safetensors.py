"""Networks as safetensors files, in and out.

    python -m kd.io.safetensors runs/mine/student student.safetensors

The format: the length of the header as uint64, little-endian; the header as JSON, {name: {'dtype',
'shape', 'data_offsets'}} and strings under '__metadata__'; then the tensors' bytes, without gaps,
row-major and little-endian. Names are the paths of Flax: 'params/Dense_0/kernel'.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from kd.errors import UserError
from kd.io import checkpoints
from kd.parallel.sharding import path_name

_DTYPES: dict[str, Any] = {
    'F64': np.float64,
    'F32': np.float32,
    'F16': np.float16,
    'BF16': jnp.bfloat16,
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
_NAMES = {np.dtype(dtype): name for name, dtype in _DTYPES.items()}
# A header longer than this is no header; safetensors itself draws the same line.
_HEADER_BYTES = 100_000_000


def save(file: Path, variables: Any, metadata: Mapping[str, str] | None = None) -> None:
    """Writes a tree of arrays, then reads it back and compares it bit for bit.

    Args:
      file: to write; replaced whole.
      variables: the tree, such as {'params': ..., 'batch_stats': ...}; arrays of any sharding
        whose parts all lie on this host.
      metadata: further strings for the header.

    Raises:
      UserError: an array of a type that the format does not have, or a file that does not read
        back as what was written.
    """
    arrays = flatten(variables)
    header: dict[str, Any] = {'__metadata__': {'format': 'flax', **(metadata or {})}}
    end = 0
    for name, array in arrays.items():
        if array.dtype not in _NAMES:
            raise UserError(
                f"'{name}' has type {array.dtype}; safetensors has: {', '.join(_DTYPES)}."
            )
        begin, end = end, end + array.nbytes
        header[name] = {
            'dtype': _NAMES[array.dtype],
            'shape': list(array.shape),
            'data_offsets': [begin, end],
        }
    text = json.dumps(header).encode()
    # Tensors begin at a multiple of eight, so that a reader may map them into memory.
    text += b' ' * (-len(text) % 8)
    partial = file.with_name(file.name + '.partial')
    with partial.open('wb') as stream:
        stream.write(len(text).to_bytes(8, 'little'))
        stream.write(text)
        for array in arrays.values():
            stream.write(array.tobytes())
    stored = load(partial)
    for name, array in arrays.items():
        if stored[name].dtype != array.dtype or stored[name].tobytes() != array.tobytes():
            raise UserError(f"{file}: '{name}' does not read back as it was written.")
    partial.rename(file)


def load(file: Path) -> dict[str, np.ndarray]:
    """All tensors of a file by name, read-only, mapped and not yet read.

    Raises:
      UserError: not a safetensors file, cut short, or with tensors of an unknown type.
    """
    size = file.stat().st_size if file.is_file() else -1
    if size < 8:
        raise UserError(f'{file} is not a safetensors file (it is missing or empty).')
    with file.open('rb') as stream:
        length = int.from_bytes(stream.read(8), 'little')
        if length > min(size - 8, _HEADER_BYTES):
            raise UserError(f'{file} is not a safetensors file, or is cut short.')
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise UserError(f'{file} is not a safetensors file: its header is no JSON.') from error
    header.pop('__metadata__', None)
    data = np.memmap(file, np.uint8, 'r', offset=8 + length) if size > 8 + length else np.empty(0)
    tensors = {}
    for name, entry in header.items():
        if entry['dtype'] not in _DTYPES:
            raise UserError(f"{file}: '{name}' has the unknown type {entry['dtype']}.")
        dtype, shape = np.dtype(_DTYPES[entry['dtype']]), tuple(entry['shape'])
        begin, end = entry['data_offsets']
        if end - begin != dtype.itemsize * math.prod(shape) or not 0 <= begin <= end <= len(data):
            raise UserError(
                f"{file}: '{name}' lies outside the file or has another size; cut short?"
            )
        tensors[name] = np.asarray(data[begin:end]).view(dtype).reshape(shape)
    return tensors


def restore(file: Path, abstract: Any) -> Any:
    """The tree of a file, checked against the network it is for.

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
    problems += [
        f"'{name}' is {_shown(tensors[name])} in the file, nothing in the network"
        for name in tensors
        if name not in wanted
    ]
    if problems:
        more = f' (and {len(problems) - 3} more)' if len(problems) > 3 else ''
        raise UserError(f'{file} does not fit the network: {"; ".join(problems[:3])}{more}.')
    return jax.tree_util.tree_map_with_path(
        lambda path, x: jax.device_put(tensors[path_name(path)], getattr(x, 'sharding', None)),
        abstract,
    )


def flatten(tree: Any) -> dict[str, np.ndarray]:
    """{'params/Dense_0/kernel': array, ...}, on the host, contiguous and little-endian."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {path_name(path): np.asarray(jax.device_get(x), order='C') for path, x in leaves}


def stage_variables(directory: Path, weights: str = 'final') -> dict[str, Any]:
    """{'params': ..., **mutables} of a finished stage, without its config.

    Args:
      directory: of the stage, such as runs/mine/student.
      weights: 'final', or the name of an average that the stage kept.
    """
    done = checkpoints.read_done(directory)
    if done is None:
        raise UserError(f'{directory} is not a finished stage (it has no done.json).')
    path = (directory / 'checkpoints' / str(done['step']) / 'variables').absolute()
    stored = ocp.PyTreeCheckpointHandler().metadata(ocp.path.step.epath.Path(path)).tree
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    abstract = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), dict(stored)
    )
    if weights != 'final' and weights not in abstract.get('ema', {}):
        have = ['final', *abstract.get('ema', {})]
        raise UserError(f"{directory} has no weights '{weights}', only: {have}.")
    values = checkpoints.restore_variables(directory, done['step'], abstract, str(directory))
    params = values['params'] if weights == 'final' else values['ema'][weights]
    return {'params': params, **(values.get('mutables') or {})}


def _shown(x: Any) -> str:
    return 'nothing' if x is None else f'{np.dtype(x.dtype)}{list(x.shape)}'


def main() -> int:
    """Writes the network of a finished stage as a safetensors file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument('stage', type=Path, help='directory of a stage, such as runs/mine/student')
    parser.add_argument('file', type=Path)
    parser.add_argument('--weights', default='final', help="'final' or the name of an average")
    arguments = parser.parse_args()
    try:
        variables = stage_variables(arguments.stage, arguments.weights)
        save(arguments.file, variables, {'stage': str(arguments.stage)})
    except UserError as error:
        print(f'kd: {error}', file=sys.stderr)
        return 2
    size = arguments.file.stat().st_size
    count = sum(x.size for x in jax.tree.leaves(variables['params']))
    print(f'{arguments.file}: {count:,} parameters, {size:,} bytes')
    return 0


if __name__ == '__main__':
    sys.exit(main())
