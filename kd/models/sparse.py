"""Voxels in arrays of one length: their neighbours, the cells that they lie in, convolutions.

Nothing here is ragged: of N rows of an example some are no voxels, and these are read by nobody.
"""

from __future__ import annotations

import itertools
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.latent_parts import layer_norm

__all__ = ['Level', 'Pyramid', 'Residual', 'Way', 'pyramid']

Way = Literal['stay', 'down', 'up']
# Offsets of a cube of 3^3, in the order of a kernel [3, 3, 3, I, O].
OFFSETS = tuple(itertools.product((-1, 0, 1), repeat=3))


class Level(NamedTuple):
    """Voxels of one size.

    Attributes:
      places: int32 [B, N, 3].
      there: bool [B, N], which of the rows are voxels.
      near: int32 [B, N, 27], the rows of the neighbours; N for what is not there.
    """

    places: jax.Array
    there: jax.Array
    near: jax.Array


class Pyramid(NamedTuple):
    """Voxels, and cells of 2^3 of them.

    Attributes:
      fine, coarse: both; cells in the order of their places.
      cell: int32 [B, N], the row of the cell of each voxel; the number of rows for no voxel.
      fits: bool [B], whether there are rows for all cells.
    """

    fine: Level
    coarse: Level
    cell: jax.Array
    fits: jax.Array


def pyramid(places: jax.Array, there: jax.Array, side: int, cells: int) -> Pyramid:
    """Both levels of voxels int32 [B, N, 3] on a grid of `side`, with rows for so many cells.

    Raises:
      ValueError: an odd side.
    """
    if side % 2:
        raise ValueError(f'pyramid: cells of 2^3 voxels do not divide a grid of side {side}.')
    half = side // 2

    def one(places: jax.Array, there: jax.Array) -> Pyramid:
        number = _flat(places // 2, half)
        number = jnp.where(there, number, half**3)
        full = jnp.zeros(half**3, bool).at[number].set(True, mode='drop')
        found = jnp.nonzero(full, size=cells, fill_value=half**3)[0]
        rows = jnp.append(jnp.cumsum(full) - 1, cells).astype(jnp.int32)
        cell = jnp.minimum(rows[number], cells)
        at = jnp.stack(jnp.unravel_index(found, (half,) * 3), axis=-1).astype(jnp.int32)
        occupied = found < half**3
        coarse = Level(at, occupied, _near(at, occupied, half))
        fine = Level(places, there, _near(places, there, side))
        return Pyramid(fine, coarse, cell, full.sum() <= cells)

    return jax.vmap(one)(places, there)


def _flat(places: jax.Array, side: int) -> jax.Array:
    return (places[:, 0] * side + places[:, 1]) * side + places[:, 2]


def _near(places: jax.Array, there: jax.Array, side: int) -> jax.Array:
    """Rows of the 27 neighbours, [N, 27], by a table of the grid with an empty border."""
    wide, count = side + 2, len(places)
    own = jnp.where(there, _flat(places + 1, wide), wide**3)
    table = jnp.full(wide**3, count, jnp.int32)
    table = table.at[own].set(jnp.arange(count, dtype=jnp.int32), mode='drop')
    around = jnp.stack([_flat(places + 1 + jnp.array(o), wide) for o in OFFSETS], axis=-1)
    return table.at[around].get(mode='fill', fill_value=count)


class _Conv(nn.Module):
    """Submanifold convolution of 3^3: [B, N, I] to [B, N, O] of the voxels that there are."""

    features: int
    dtype: Dtype
    zero: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, near: jax.Array) -> jax.Array:
        start = nn.initializers.zeros if self.zero else nn.initializers.lecun_normal()
        shape = (3, 3, 3, x.shape[-1], self.features)
        kernel = self.param('kernel', start, shape).astype(self.dtype)
        kernel = kernel.reshape(len(OFFSETS), *shape[3:])
        bias = self.param('bias', nn.initializers.zeros, (self.features,)).astype(self.dtype)
        return sum((_rows(x, near[..., i]) @ kernel[i] for i in range(len(OFFSETS))), start=bias)


def _rows(x: jax.Array, index: jax.Array) -> jax.Array:
    """Rows of x [B, N, C] by index [B, M], zeros for N."""
    take = jax.vmap(lambda x, i: x.at[i].get(mode='fill', fill_value=0))
    return take(x, index)


def mean_of_cells(x: jax.Array, grid: Pyramid) -> jax.Array:
    """Means over the voxels of each cell, [B, N, C] -> [B, cells, C]; 0 for no cell."""
    rows = grid.coarse.there.shape[1]

    def one(x: jax.Array, cell: jax.Array) -> jax.Array:
        total = jnp.zeros((rows, x.shape[-1]), x.dtype).at[cell].add(x, mode='drop')
        count = jnp.zeros(rows, x.dtype).at[cell].add(1, mode='drop')
        return total / jnp.maximum(count, 1)[:, None]

    return jax.vmap(one)(x, grid.cell)


class Residual(nn.Module):
    """Residual block of voxels, modulated by the condition [B, E], on its way to another level.

    Attributes:
      features: that it ends with.
      way: 'down' to means of cells, 'up' from cells to their voxels, or 'stay' with the voxels.
      dtype: compute type.
    """

    features: int
    way: Way
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, condition: jax.Array, grid: Pyramid) -> jax.Array:
        told = nn.Dense(2 * self.features, dtype=self.dtype, name='emb_layers_1')
        scale, shift = jnp.split(told(nn.silu(condition))[:, None], 2, axis=-1)
        if self.way == 'down':
            x = mean_of_cells(x, grid)
        elif self.way == 'up':
            x = _rows(x, grid.cell)
        level = grid.coarse if self.way == 'down' else grid.fine
        y = nn.silu(nn.LayerNorm(epsilon=1e-6, dtype=self.dtype, name='norm1')(x))
        y = _Conv(self.features, self.dtype, name='conv1')(y, level.near)
        y = nn.silu(layer_norm(y, 1e-6, self.dtype) * (1 + scale) + shift)
        y = _Conv(self.features, self.dtype, zero=True, name='conv2')(y, level.near)
        if x.shape[-1] != self.features:
            x = nn.Dense(self.features, dtype=self.dtype, name='skip_connection')(x)
        return x + y
