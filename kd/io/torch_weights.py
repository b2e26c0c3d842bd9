"""Weights that other libraries wrote, for Flax networks: each leaf from its place in a file.

`restore` is the one way there: a function says where a leaf lies, as a `Part` of a tensor. `load`
is that with PyTorch's names and layouts, for networks whose modules have the same names.

PyTorch files become safetensors, which can be read without PyTorch, where PyTorch is at hand:

    import safetensors.torch, torch
    tensors = torch.load('weights.pth', map_location='cpu')
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    safetensors.torch.save_file(tensors, 'weights.safetensors')
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from kd import files
from kd.errors import UserError, did_you_mean
from kd.io import safetensors
from kd.io.safetensors import Index

# Names of Flax's leaves in PyTorch.
LEAVES = {
    'kernel': 'weight',
    'scale': 'weight',
    'embedding': 'weight',
    'bias': 'bias',
    'mean': 'running_mean',
    'var': 'running_var',
}
# Counters of PyTorch's batch normalisation, which Flax does without.
COUNTERS = r'num_batches_tracked$'


class Tensor(Protocol):
    """A tensor of a file that is open; nothing of it is in memory until it is read."""

    @property
    def name(self) -> str:
        """In the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As NumPy has it: the last axis is the one whose neighbours are neighbours in the file."""

    @property
    def dtype(self) -> np.dtype:
        """Of what is read."""

    def read(self, index: Index | None = None) -> np.ndarray:
        """The tensor, or the part that a slice per dimension names."""


@dataclasses.dataclass(frozen=True, eq=False)
class Part:
    """Where a leaf, or one layer of a stacked leaf, lies in a file.

    Attributes:
      name: of the tensor.
      axes: the tensor's axes in the order of the leaf; None for as they are.
      rows: for each place along the leaf's last axis the one in the tensor, where several leaves
        share a tensor or the order is another; None for as they are.
      size: of the tensor along that axis, where it has `rows`.
    """

    name: str
    axes: tuple[int, ...] | None = None
    rows: Sequence[int] | np.ndarray | None = None
    size: int | None = None

    def shape(self, leaf: Sequence[int]) -> tuple[int, ...]:
        """What the tensor's must be, for a leaf of a shape."""
        layout = list(leaf)
        if self.size is not None:
            layout[-1] = self.size
        axes = self.axes or range(len(layout))
        return tuple(layout[list(axes).index(axis)] for axis in range(len(layout)))

    def read(self, tensor: Tensor, index: Index, dtype: Any = None) -> np.ndarray:
        """The part of the leaf that a slice per dimension names, in a floating-point type."""
        places = None
        if self.rows is not None:
            places = np.asarray(self.rows[index[-1]])
            first, last = (int(places.min()), int(places.max())) if places.size else (0, -1)
            index = (*index[:-1], slice(first, last + 1))
        axes = self.axes or tuple(range(len(index)))
        x = tensor.read(tuple(index[axes.index(axis)] for axis in range(len(axes))))
        if dtype is not None and jnp.issubdtype(x.dtype, jnp.floating):
            x = x.astype(dtype, copy=False)
        x = np.transpose(x, axes)
        if places is None or np.array_equal(places, np.arange(first, last + 1)):
            return x
        return x[..., places - first]


# Keys on the way to a leaf, less that of its collection, and its shape -> where it lies: one part,
# or for a leaf that stacks layers, [layers, ...], one for each.
Find = Callable[[tuple[str, ...], tuple[int, ...]], Part | tuple[Part, ...]]


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

    Args:
      file: in the safetensors format, or the index of several (`*.index.json`) beside them.
      abstract: tree of the network's variables as shapes, with or without shardings.
      dtype: of floating-point leaves; None keeps the file's, float64 as far as JAX has it.
      rename: from the name that a leaf has by the rules above to the tensor's name in the file; two
        leaves may take one tensor.
      ignore: see `restore`.

    Returns, raises: as `restore`.
    """

    def find(keys: tuple[str, ...], shape: tuple[int, ...]) -> Part:
        *modules, last = keys
        name = rename('.'.join([*modules, LEAVES.get(last, last)]))
        return Part(name, kernel_axes(len(shape)) if last == 'kernel' else None)

    file = files.local(file, 'the weights')
    tensors = tensors_of(file)
    return restore(file, tensors, abstract, find, dtype=lambda leaf: dtype, ignore=ignore)


def kernel_axes(rank: int) -> tuple[int, ...] | None:
    """PyTorch's axes of a kernel in the order of Flax: [O, I, *space] as [*space, I, O]."""
    return (*range(2, rank), 1, 0) if rank > 1 else None


def restore(
    where: str | Path,
    tensors: Mapping[str, Any],
    abstract: Any,
    find: Find,
    *,
    dtype: Callable[[Any], Any] = lambda leaf: None,
    ignore: str = '',
) -> Any:
    """Variables of a network from the tensors of a file.

    Names, shapes and what is left over are checked before anything is read. Then leaf after leaf is
    read, each device's part alone, so that the host holds about one tensor at a time; leaves that
    stack layers layer by layer.

    Args:
      where: the file, for messages.
      tensors: by name, each a `Tensor`.
      abstract: tree of the network's variables as shapes, with or without shardings.
      find: where each leaf lies.
      dtype: from a leaf to the type in which it is read if it is floating-point; None keeps the
        file's.
      ignore: see `check`.

    Returns:
      The tree of `abstract`, on the devices of its shardings.

    Raises:
      UserError: as `check`, or a file that cannot be read.
    """
    check(where, tensors, abstract, find, ignore=ignore)

    def read(path: tuple, leaf: Any) -> jax.Array:
        parts, kind = find(_keys(path), leaf.shape), dtype(leaf)
        if isinstance(parts, Part):
            tensor = tensors[parts.name]
            return safetensors.place(lambda index: parts.read(tensor, index, kind), leaf)
        layers = [(part, tensors[part.name]) for part in parts]
        return safetensors.place_layers(
            lambda layer, index: layers[layer][0].read(layers[layer][1], index, kind),
            leaf,
            kind or layers[0][1].dtype,
        )

    return jax.tree_util.tree_map_with_path(read, abstract)


def check(
    where: str | Path, tensors: Mapping[str, Any], abstract: Any, find: Find, *, ignore: str = ''
) -> None:
    """Holds the tensors of a file to a network, none of them read.

    Args:
      where, tensors, abstract, find: as of `restore`.
      ignore: regular expression, found in the names of tensors that may be left over; '' for none.

    Raises:
      UserError: a tensor that is missing, has another shape, or is left over.
    """
    used = set()
    for path, leaf in jax.tree_util.tree_flatten_with_path(abstract)[0]:
        for part, shape in _parts(where, find(_keys(path), leaf.shape), leaf):
            if part.name not in tensors:
                near = did_you_mean(part.name, list(tensors))
                raise UserError(f"{where} has no tensor '{part.name}'.{near}")
            tensor = tensors[part.name]
            if len(tensor.shape) != len(shape) or tensor.shape != part.shape(shape):
                raise UserError(
                    f"{where}: '{part.name}' has shape {list(tensor.shape)}, which does not fit "
                    f'the network ({list(shape)} in the layout of Flax).'
                )
            used.add(tensor)
    left = [
        name
        for name, tensor in tensors.items()
        if tensor not in used and not (ignore and re.search(ignore, name))
    ]
    if left:
        more = f' and {len(left) - 3} more' if len(left) > 3 else ''
        raise UserError(
            f'{where} has tensors that the network has no use for: '
            f'{", ".join(map(repr, left[:3]))}{more}. Is it the same network?'
        )


def _parts(
    where: str | Path, found: Part | tuple[Part, ...], leaf: Any
) -> Iterator[tuple[Part, tuple[int, ...]]]:
    """(part, shape in the layout of Flax) of a leaf, or of each of its layers."""
    if isinstance(found, Part):
        yield found, leaf.shape
        return
    if len(found) != leaf.shape[0]:
        raise UserError(f'{where} has {len(found)} layers, and the network stacks {leaf.shape[0]}.')
    for part in found:
        yield part, leaf.shape[1:]


def tensors_of(file: Path) -> dict[str, safetensors.Tensor]:
    """All tensors of a file, or of the files of an index, by name; none is read yet."""
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


def _keys(path: tuple) -> tuple[str, ...]:
    """Names on the way to a leaf, less that of its collection."""
    return tuple(key.key for key in path[1:])
