"""Networks of four bits as safetensors files (`kd.models.quantise`), in and out.

    python -m kd.io.quantised runs/mine/student student.nf4.safetensors

'params/mlp0/kernel' lies there as 'params/mlp0/kernel.codes' and '.scales'; shapes, blocks and
levels are in the metadata of the header.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors as package

from kd import process
from kd.errors import UserError
from kd.io import safetensors
from kd.models import quantise
from kd.models.quantise import Quantised
from kd.state import PyTree, path_name

_CODES, _SCALES, _KIND = '.codes', '.scales', 'quantised'


def save(file: Path, tree: PyTree) -> int:
    """Writes a tree of `kd.models.quantise.quantise_tree`; returns the bytes of the file.

    Raises:
      UserError: numbers that are not finite, as of weights that no float16 is as large as; and as
        of `kd.io.safetensors.save`.
    """
    arrays: dict[str, Any] = {}
    kinds: dict[str, Any] = {}
    leaves = jax.tree_util.tree_flatten_with_path(tree, is_leaf=quantise.is_packed)[0]
    for path, x in leaves:
        name = path_name(path)
        if quantise.is_packed(x):
            arrays |= {name + _CODES: x.codes, name + _SCALES: x.scales}
            kinds[name] = [list(x.shape), x.block, x.levels]
        else:
            arrays[name] = x
        held = x.scales if quantise.is_packed(x) else x
        if not np.isfinite(held).all():
            raise UserError(f"{file}: '{name}' has numbers that are not finite in float16.")
    safetensors.save(file, arrays, {_KIND: json.dumps(kinds)})
    return file.stat().st_size


def load(file: Path) -> PyTree:
    """The tree that `save` wrote.

    Raises:
      UserError: a file that is none of these.
    """
    tensors = safetensors.load(file)
    with package.safe_open(file, 'numpy') as opened:
        metadata = opened.metadata() or {}
    if _KIND not in metadata:
        raise UserError(f'{file} has no weights of four bits; kd.io.quantised writes them.')
    made: dict[str, Any] = {}
    kinds = json.loads(metadata[_KIND])
    for name in {name.removesuffix(_CODES).removesuffix(_SCALES) for name in tensors}:
        if name in kinds:
            shape, block, levels = kinds[name]
            codes, scales = (jnp.asarray(tensors[name + end].read()) for end in (_CODES, _SCALES))
            leaf: Any = Quantised(codes, scales, tuple(shape), block, levels)
        else:
            leaf = jnp.asarray(tensors[name].read())
        *above, last = name.split('/')
        place = made
        for part in above:
            place = place.setdefault(part, {})
        place[last] = leaf
    return made


def main() -> int:
    """Writes the network of a finished stage with weights of four bits."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    path = process.path_argument
    parser.add_argument('stage', type=path, help='directory of a stage, such as runs/mine/student')
    parser.add_argument('file', type=path)
    parser.add_argument('--weights', default='final', help="'final' or the name of an average")
    parser.add_argument('--rules', default=r'kernel$', help='expression of what has four bits')
    parser.add_argument('--levels', default='nf4', choices=list(quantise.LEVELS))
    arguments = parser.parse_args()
    variables = safetensors.stage_variables(arguments.stage, arguments.weights)
    packed = quantise.quantise_tree(variables, arguments.rules, levels=arguments.levels)
    size = save(arguments.file, packed)
    count = sum(int(np.prod(x.shape)) for x in jax.tree.leaves(variables))
    print(
        f'{arguments.file}: {count:,} parameters, {size:,} bytes, {8 * size / count:.2f} bits each'
    )
    return 0


if __name__ == '__main__':
    process.command(main)
