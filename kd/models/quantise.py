"""Weights in four bits: codes of levels, and a scale for each block of weights.

    packed = quantise_tree(params, r'kernel$')
    network.apply({'params': dequantised(packed)}, ...)

`kd.io.quantised` has them in files.

Codes lie two in a byte, scales are float16: 4 + 16 / 64 = 4.25 bits a weight with blocks of 64,
where bitsandbytes, whose NF4 this is, has scales of float32 and 4.5. Activations stay as they are.

Source: Dettmers et al. 2023 (QLoRA), arXiv:2305.14314.
"""

from __future__ import annotations

import re
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from kd.errors import UserError, one_line
from kd.state import PyTree, path_name

__all__ = [
    *('LEVELS', 'Quantised', 'bits_per_weight', 'dequantise', 'dequantised', 'is_packed'),
    *('quantise', 'quantise_tree'),
]

Levels = Literal['nf4', 'int4']
# In [-1, 1], 16 of them. NF4 are quantiles of a normal law; of INT4 the least one is never used.
LEVELS: dict[str, tuple[float, ...]] = {
    'nf4': (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    'int4': tuple((code - 8) / 7 for code in range(16)),
}  # fmt: skip


@flax.struct.dataclass
class Quantised:
    """A weight in four bits.

    Attributes:
      codes: uint8 [ceil(n / 2)], two codes in each, the first in the low bits.
      scales: float16 [ceil(n / block)], the largest magnitude of each block.
      shape: of the weight, of n numbers.
      block: weights that share a scale.
      levels: which ones, of `LEVELS`.
    """

    codes: jax.Array
    scales: jax.Array
    shape: tuple[int, ...] = flax.struct.field(pytree_node=False)
    block: int = flax.struct.field(pytree_node=False, default=64)
    levels: Levels = flax.struct.field(pytree_node=False, default='nf4')


def quantise(w: jax.Array, *, block: int = 64, levels: Levels = 'nf4') -> Quantised:
    """Each weight as the nearest level times the largest magnitude of its block.

    |w - dequantise(quantise(w))| is at most half the largest gap between levels, .152 for NF4,
    times that magnitude, and what its rounding to float16 adds; 0 stays 0.

    Args:
      w: of any shape, blocks along its rows, the last one padded.
      block: weights that share a scale, an even number.
      levels: which ones, of `LEVELS`.

    Raises:
      ValueError: other levels, an odd block; weights that no float16 is as large as. Inside of a
        compiled function these have scales that are not finite, which no file takes.
    """
    if levels not in LEVELS or block < 2 or block % 2:
        raise ValueError(
            f'quantise: levels are one of {list(LEVELS)} and a block is even, got {levels!r} and '
            f'{block}.'
        )
    rows = jnp.asarray(w, jnp.float32).reshape(-1)
    size = rows.size
    rows = jnp.pad(rows, (0, -size % block)).reshape(-1, block)
    scales = _halved(jnp.max(jnp.abs(rows), axis=1))
    wide = scales.astype(jnp.float32)[:, None]
    at = jnp.asarray(LEVELS[levels], jnp.float32)
    relative = rows / jnp.where(wide > 0, wide, 1.0)
    codes = jnp.searchsorted((at[1:] + at[:-1]) / 2, relative.reshape(-1)).astype(jnp.uint8)
    codes = jnp.pad(codes[:size], (0, size % 2))
    packed = codes[::2] | (codes[1::2] << 4)
    return Quantised(packed, scales, tuple(np.shape(w)), block, levels)


def dequantise(q: Quantised, dtype: Any = jnp.float32) -> jax.Array:
    """The weight of its shape."""
    size = int(np.prod(q.shape))
    codes = jnp.stack([q.codes & 15, q.codes >> 4], axis=1).reshape(-1)[:size]
    values = jnp.asarray(LEVELS[q.levels], jnp.float32)[codes]
    scales = jnp.repeat(q.scales.astype(jnp.float32), q.block)[:size]
    return (values * scales).reshape(q.shape).astype(dtype)


def quantise_tree(
    params: PyTree, rules: str = r'kernel$', *, block: int = 64, levels: Levels = 'nf4'
) -> PyTree:
    """A tree whose leaves that a rule finds are `Quantised`; other floats are float16.

    Args:
      params: the tree.
      rules: regular expression to be found in the path of a leaf, 'block0/mlp0/kernel'; leaves of
        fewer than two dimensions never are.
      block, levels: as of `quantise`.

    Raises:
      UserError: no leaf is found, or one has numbers that no float16 is as large as.
    """

    def leaf(path: tuple, x: Any) -> Any:
        name = path_name(path)
        with one_line(f'quantise: {name}'):
            if x.ndim > 1 and re.search(rules, name):
                return quantise(x, block=block, levels=levels)
            return _halved(x) if jnp.issubdtype(x.dtype, jnp.floating) else x

    made = jax.tree_util.tree_map_with_path(leaf, params)
    if not any(is_packed(x) for x in jax.tree.leaves(made, is_leaf=is_packed)):
        raise UserError(f"quantise: '{rules}' finds no matrix.")
    return made


def dequantised(tree: PyTree, dtype: Any = jnp.float32) -> PyTree:
    """A tree of weights, those of four bits and those of sixteen as `dtype`.

    Of one block's tree it makes that block's weights alone: folding a stack needs no more at once
    (`kd.models.stack`).
    """

    def leaf(x: Any) -> Any:
        if is_packed(x):
            return dequantise(x, dtype)
        return x.astype(dtype) if x.dtype == jnp.float16 else x

    return jax.tree.map(leaf, tree, is_leaf=is_packed)


def bits_per_weight(tree: PyTree) -> float:
    """Bits that the leaves of four bits hold, over the weights that they are."""
    found = [x for x in jax.tree.leaves(tree, is_leaf=is_packed) if is_packed(x)]
    held = sum(x.codes.nbytes + x.scales.nbytes for x in found)
    return 8 * held / sum(int(np.prod(x.shape)) for x in found)


def is_packed(x: Any) -> bool:
    """Whether a leaf is `Quantised`."""
    return isinstance(x, Quantised)


def _halved(x: Any) -> jax.Array:
    half = jnp.asarray(x).astype(jnp.float16)
    if not isinstance(half, jax.core.Tracer) and not np.isfinite(half).all():
        greatest = float(jnp.max(jnp.abs(x)))
        raise ValueError(f'float16 goes to 65,504, and the greatest number here is {greatest:,g}.')
    return half
