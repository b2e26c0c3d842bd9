"""Weights of PyTorch networks for Flax networks whose modules have the same names.

PyTorch files become safetensors, which can be read without PyTorch, where PyTorch is at hand:

    import safetensors.torch, torch
    tensors = torch.load('weights.pth', map_location='cpu')
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    safetensors.torch.save_file(tensors, 'weights.safetensors')
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd.errors import UserError, did_you_mean
from kd.io import safetensors

# Names of Flax's leaves in PyTorch.
_LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'embedding': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}
# Counters of PyTorch's batch normalisation, which Flax does without.
COUNTERS = r'num_batches_tracked$'


def load(
    file: str | Path,
    abstract: Any,
    *,
    dtype: Any = None,
    rename: Callable[[str], str] = str,
    ignore: str = COUNTERS,
) -> Any:
    """Variables of a Flax network from safetensors with PyTorch's names and layouts.

    `params/Mixed_5b/branch1x1/conv/kernel` [H, W, I, O] is `Mixed_5b.branch1x1.conv.weight`
    [O, I, H, W], and so for convolutions of one and three dimensions; a dense kernel [I, O] is
    `weight` [O, I]; statistics of batch normalisation are `running_mean` and `running_var`. Kernels
    of transposed convolutions, whose layout is another, are not told apart from these.

    Names, shapes and what is left over are checked before anything is read. Then leaf after leaf is
    read, each device's part alone, so that the host holds about one tensor at a time.

    Args:
      file: in the safetensors format, or the index of several (`*.index.json`) beside them.
      abstract: tree of the network's variables as shapes, with or without shardings.
      dtype: of floating-point leaves; None keeps the file's, float64 as far as JAX has it.
      rename: from the name that a leaf has by the rules above to the tensor's name in the file; two
        leaves may take one tensor.
      ignore: regular expression, found in the names of tensors that may be left over.

    Returns:
      The tree of `abstract`, on the devices of its shardings.

    Raises:
      UserError: a tensor that is missing, has another shape, or is left over; files that are not in
        the format or do not hold what the index says.
    """
    file = Path(file)
    tensors = _tensors(file)
    leaves, structure = jax.tree_util.tree_flatten_with_path(abstract)
    found = [_find(file, tensors, _keys(path), leaf, rename) for path, leaf in leaves]
    _check_left(file, tensors, set(found), ignore)
    read = [
        safetensors.place(_reader(tensor, _keys(path)[-1], dtype), leaf)
        for (path, leaf), tensor in zip(leaves, found, strict=True)
    ]
    return jax.tree.unflatten(structure, read)


def _tensors(file: Path) -> dict[str, safetensors.Tensor]:
    """All tensors of a file, or of the files of an index."""
    if not file.name.endswith('.json'):
        return safetensors.load(file)
    try:
        places = json.loads(file.read_text())['weight_map']
        parts = {name: file.with_name(name) for name in places.values()}
    except FileNotFoundError as error:
        raise UserError(f'{file} is not there.') from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} is no index of safetensors: it must be JSON with 'weight_map', "
            '{name of a tensor: file}.'
        ) from error
    files = {name: safetensors.load(part) for name, part in parts.items()}
    for name, place in places.items():
        if name not in files[place]:
            raise UserError(f"{file} says that '{name}' is in {place}, which does not have it.")
    # Names beside the index are further ones of shared tensors.
    beside = {name: x for tensors in files.values() for name, x in tensors.items()}
    return beside | {name: files[place][name] for name, place in places.items()}


def _find(
    file: Path,
    tensors: Mapping[str, safetensors.Tensor],
    keys: list[str],
    leaf: Any,
    rename: Callable[[str], str],
) -> safetensors.Tensor:
    """The tensor of a leaf; its shape is the leaf's in PyTorch's layout."""
    *modules, last = keys
    name = rename('.'.join([*modules, _LEAVES.get(last, last)]))
    if name not in tensors:
        raise UserError(f"{file} has no tensor '{name}'.{did_you_mean(name, list(tensors))}")
    shape = tensors[name].shape
    if (
        len(shape) != leaf.ndim
        or tuple(shape[axis] for axis in _axes(last, leaf.ndim)) != leaf.shape
    ):
        raise UserError(
            f"{file}: '{name}' has shape {list(shape)}, which does not fit the network "
            f'({list(leaf.shape)} in the layout of Flax).'
        )
    return tensors[name]


def _check_left(
    file: Path,
    tensors: Mapping[str, safetensors.Tensor],
    used: set[safetensors.Tensor],
    ignore: str,
) -> None:
    """Refuses tensors that no leaf takes, under none of their names."""
    left = [
        name
        for name, tensor in tensors.items()
        if tensor not in used and not re.search(ignore, name)
    ]
    if left:
        more = f' and {len(left) - 3} more' if len(left) > 3 else ''
        raise UserError(
            f'{file} has tensors that the network has no use for: '
            f'{", ".join(map(repr, left[:3]))}{more}. Is it the same network? '
            'If they may be left, let the expression `ignore` find their names.'
        )


def _reader(
    tensor: safetensors.Tensor, last: str, dtype: Any
) -> Callable[[safetensors.Index], np.ndarray]:
    """Reads the part of a leaf that an index in the layout of Flax names."""
    axes = _axes(last, len(tensor.shape))

    def read(index: safetensors.Index) -> np.ndarray:
        part = tensor.read(tuple(index[axes.index(axis)] for axis in range(len(axes))))
        if dtype is not None and jnp.issubdtype(part.dtype, jnp.floating):
            part = part.astype(dtype)
        return np.transpose(part, axes)

    return read


def _axes(last: str, rank: int) -> tuple[int, ...]:
    """PyTorch's axes in the order of Flax: [O, I, *space] as [*space, I, O] for kernels."""
    if last != 'kernel' or rank < 2:
        return tuple(range(rank))
    return (*range(2, rank), 1, 0)


def _keys(path: tuple) -> list[str]:
    """Names on the way to a leaf, less that of its collection."""
    return [key.key for key in path[1:]]
