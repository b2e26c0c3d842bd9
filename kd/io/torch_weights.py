"""Weights of PyTorch networks for Flax networks whose modules have the same names.

PyTorch files become safetensors, which can be read without PyTorch, where PyTorch is at hand:

    import safetensors.torch, torch
    tensors = torch.load('weights.pth', map_location='cpu')
    tensors = {name: x.contiguous() for name, x in tensors.items()}
    safetensors.torch.save_file(tensors, 'weights.safetensors')
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
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


def load(file: Path, abstract: Any) -> Any:
    """Variables of a Flax network from a safetensors file with PyTorch's names and layouts.

    `params/Mixed_5b/branch1x1/conv/kernel` [H, W, I, O] is `Mixed_5b.branch1x1.conv.weight`
    [O, I, H, W]; a dense kernel [I, O] is `weight` [O, I]; statistics of batch normalisation are
    `running_mean` and `running_var`. Tensors of the file that the network has no use for are left.

    Args:
      file: in the safetensors format.
      abstract: tree of the network's variables as shapes and dtypes.

    Returns:
      The tree of `abstract` as float32 arrays on the host.

    Raises:
      UserError: a tensor that is missing or has another shape.
    """
    tensors = safetensors.load(file)

    def one(path, leaf):
        return _leaf(file, tensors, [key.key for key in path[1:]], leaf)

    return jax.tree_util.tree_map_with_path(one, abstract)


def _leaf(file: Path, tensors: Mapping[str, np.ndarray], path: list[str], leaf: Any) -> np.ndarray:
    *modules, last = path
    name = '.'.join([*modules, _LEAVES.get(last, last)])
    if name not in tensors:
        raise UserError(f"{file} has no tensor '{name}'.{did_you_mean(name, list(tensors))}")
    value = np.asarray(tensors[name])
    if last == 'kernel':
        value = value.T if value.ndim == 2 else np.moveaxis(value, (0, 1), (-1, -2))
    if value.shape != leaf.shape:
        raise UserError(
            f"{file}: '{name}' has shape {list(tensors[name].shape)}, which does not fit the "
            f'network ({list(leaf.shape)} in the layout of Flax).'
        )
    return np.asarray(value, np.float32)
