"""Diffusion transformers of shapes in 3-D: latents of a grid, and of voxels, as in TRELLIS.

Modules have the names of `SparseStructureFlowModel` and `SLatFlowModel` of TRELLIS; blocks are one
module with a leading axis. What is of voxels alone is in `kd.models.sparse`.

Source: Xiang et al. 2024, arXiv:2412.01506.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kd.models import sparse
from kd.models.attention import attend
from kd.models.latent_parts import (
    given,
    image_inputs,
    layer_norm,
    modulated,
    preset_of,
    sides_of,
    stacked,
    timestep_features,
    unpatched,
)
from kd.ranges import Count, Size

__all__ = ['PRESETS', 'SHARDING', 'ShapeDiT', 'VoxelDiT', 'place_features', 'preset']

# For `sharding` of a recipe: 'tensor' cuts hidden units, 'fsdp' the rest.
SHARDING = (
    (r'^(.*/)?blocks/.*(to_qkv|to_q|to_kv|mlp_0|adaLN_modulation_1)/kernel$',
     (None, 'fsdp', 'tensor')),
    (r'^(.*/)?blocks/.*(to_out|mlp_2)/kernel$', (None, 'tensor', 'fsdp')),
    (r'conv\d/kernel$', (None, None, None, 'fsdp', 'tensor')),
    (r'kernel$', 'fsdp'),
)  # fmt: skip
EPSILON = 1e-6


def place_features(places: jax.Array, size: int) -> jax.Array:
    """Sines and then cosines of each coordinate, [..., d] -> [..., size]; what is left is 0."""
    axes = places.shape[-1]
    count = size // axes // 2
    frequency = 1e4 ** (-np.arange(count, dtype=np.float32) / count)
    angle = places.astype(jnp.float32)[..., None] * frequency
    features = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)
    features = features.reshape(*places.shape[:-1], axes * 2 * count)
    rest = size - features.shape[-1]
    return jnp.pad(features, [(0, 0)] * (features.ndim - 1) + [(0, rest)])


class _Attention(nn.Module):
    """Of tokens [B, N, D] to themselves, or to a text [B, M, C]; heads have gains of their own."""

    heads: int
    normed: bool
    fused: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array | None, mask: jax.Array | None) -> jax.Array:
        def projected(of: jax.Array, count: int, name: str) -> list[jax.Array]:
            y = nn.Dense(count * x.shape[-1], dtype=self.dtype, name=name)(of)
            y = y.reshape(*of.shape[:2], count, self.heads, -1)
            return [y[:, :, i] for i in range(count)]

        if text is None:
            q, k, v = projected(x, 3, 'to_qkv')
        else:
            (q,), (k, v) = projected(x, 1, 'to_q'), projected(text, 2, 'to_kv')
        if self.normed:
            q = _HeadNorm(self.dtype, name='q_rms_norm')(q)
            k = _HeadNorm(self.dtype, name='k_rms_norm')(k)
        found = attend(q, k, v, mask=mask, fused=self.fused)
        return nn.Dense(x.shape[-1], dtype=self.dtype, name='to_out')(found.reshape(x.shape))


class _HeadNorm(nn.Module):
    """x over its root mean square of each head [..., H, d], times gains [H, d]."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gamma = self.param('gamma', nn.initializers.ones, x.shape[-2:])
        wide = x.astype(jnp.float32)
        mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        return (wide * jax.lax.rsqrt(jnp.maximum(mean, 1e-24)) * gamma).astype(self.dtype)


class _Layers(nn.Module):
    """Two dense layers `mlp_0` and `mlp_2`."""

    hidden: int
    size: int
    activation: Any
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = self.activation(nn.Dense(self.hidden, dtype=self.dtype, name='mlp_0')(x))
        return nn.Dense(self.size, dtype=self.dtype, name='mlp_2')(x)


class Block(nn.Module):
    """Attention, attention to a text where there is one, and a feed-forward layer; (x, None)."""

    heads: int
    fused: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, condition: jax.Array, text: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array, None]:
        size, dtype = x.shape[-1], self.dtype
        told = nn.Dense(6 * size, dtype=dtype, name='adaLN_modulation_1')(nn.silu(condition))
        shift0, scale0, gate0, shift1, scale1, gate1 = jnp.split(told[:, None], 6, axis=-1)

        def attention(name: str, normed: bool) -> _Attention:
            return _Attention(self.heads, normed, self.fused, dtype, name=name)

        y = modulated(layer_norm(x, EPSILON, dtype), shift0, scale0)
        x = x + gate0 * attention('self_attn', True)(y, None, mask)
        if text is not None:
            y = nn.LayerNorm(epsilon=EPSILON, dtype=dtype, name='norm2')(x)
            x = x + attention('cross_attn', False)(y, text, None)
        y = modulated(layer_norm(x, EPSILON, dtype), shift1, scale1)
        return x + gate1 * _Layers(4 * size, size, nn.gelu, dtype, name='mlp')(y), None


class _Trunk(nn.Module):
    """What both networks have: the blocks and what they are told."""

    width: Count = 1_024
    depth: Count = 24
    heads: Count = 16
    context: Size = 1_024
    remat: bool = False
    fused: bool = False
    dtype: Dtype = jnp.float32

    def example_inputs(self, spec: Any) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], x [1, ...])."""
        return image_inputs(spec)

    @nn.nowrap
    def _dense(self, size: int, name: str, zero: bool = False) -> nn.Dense:
        start = nn.initializers.zeros if zero else nn.initializers.lecun_normal()
        return nn.Dense(size, dtype=self.dtype, kernel_init=start, name=name)

    @nn.nowrap
    def _condition(self, t: jax.Array) -> jax.Array:
        waves = timestep_features(t, 256).astype(self.dtype)
        return _Layers(self.width, self.width, nn.silu, self.dtype, name='t_embedder')(waves)

    @nn.nowrap
    def _text(self, rows: int, text: jax.Array | None) -> jax.Array | None:
        if not self.context:
            return None
        told = given(self, rows, dict(text=(1, self.context)), dict(text=text))['text']
        return told.astype(self.dtype)

    @nn.nowrap
    def _blocks(self, y, condition, text, mask):
        blocks = stacked(Block, self.depth, self.remat, 3, begins=self.is_initializing())(
            self.heads, self.fused, self.dtype, name='blocks'
        )
        return blocks(y, condition, text, mask)[0]


class ShapeDiT(_Trunk):
    """F(t, x, text) like x, for latents of a grid x [B, R, R, R, C]; defaults: TRELLIS's structure.

    Attributes:
      width, depth, heads: of the transformer.
      context: size of a token of what it is told, an image's features or a text's; 0 for nothing.
      remat: blocks are computed again for the gradient.
      fused: attention by a fused kernel where there is one.
      dtype: compute type; parameters are float32, the output has the type of x.
      patch: side of the cubes that are tokens.
    """

    patch: Count = 1

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        return ('text',) * bool(self.context)

    @nn.compact
    def __call__(
        self, t: jax.Array, x: jax.Array, *, text: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """F [B, R, R, R, C].

        Args:
          t: what it is told of the noise, [B], 1000 times a time in [0, 1].
          x: noised latents.
          text: [B, M, context].
          train: nothing here depends on it.

        Raises:
          ValueError: an input that is missing or of another size, sides that no patch divides.
        """
        del train
        patch = (self.patch,) * 3
        text, sides = self._text(len(x), text), sides_of(self, x, patch)
        cut = x.reshape(len(x), *(n for side in sides for n in (side, self.patch)), -1)
        tokens = cut.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(len(x), int(np.prod(sides)), -1)
        places = jnp.asarray(np.indices(sides).reshape(3, -1).T)
        y = self._dense(self.width, 'input_layer')(tokens.astype(self.dtype))
        y = y + place_features(places, self.width).astype(self.dtype)
        y = self._blocks(y, self._condition(t), text, None)
        y = layer_norm(y.astype(x.dtype), 1e-5, x.dtype)
        out = self._dense(self.patch**3 * x.shape[-1], 'out_layer', zero=True)(y)
        return unpatched(out, sides, patch).astype(x.dtype)


class VoxelDiT(_Trunk):
    """F(t, x, ...) like x, for latents of voxels x [B, N, C]; defaults: TRELLIS's latents.

    Tokens are cells of 2^3 voxels, between residual blocks of convolutions over voxels that are
    there. Rows beyond a shape's own, where `voxel_mask` is False, are read by nobody and said 0.

    Attributes:
      width, depth, heads, context, remat, fused, dtype: as of `ShapeDiT`.
      features: of voxels, before and after.
      side: of the grid that voxels are on.
      tokens: the most cells of a shape, whose output is NaN if it has more; 0 for as many as
        voxels.
    """

    features: Count = 128
    side: Count = 64
    tokens: Size = 0

    # Which rows of an example there are, the field of a batch.
    valid = 'voxel_mask'

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        return ('coordinates', self.valid, *('text',) * bool(self.context))

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        *,
        coordinates: jax.Array | None = None,
        voxel_mask: jax.Array | None = None,
        text: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """F [B, N, C].

        Args:
          t: what it is told of the noise, [B], 1000 times a time in [0, 1].
          x: noised latents.
          coordinates: of the voxels, whole numbers [B, N, 3] in 0 .. side - 1, each once.
          voxel_mask: bool [B, N], which of them there are.
          text: [B, M, context].
          train: nothing here depends on it.

        Raises:
          ValueError: an input that is missing or of another size.
        """
        del train
        text, rows = self._text(len(x), text), x.shape[:2]
        if self.is_initializing() and coordinates is None:
            coordinates, voxel_mask = jnp.zeros((*rows, 3)), jnp.zeros(rows, bool)
        if coordinates is None or voxel_mask is None:
            raise ValueError(f'VoxelDiT is told {self.conditions}; one of them was not given.')
        grid = sparse.pyramid(
            coordinates.astype(jnp.int32), voxel_mask, self.side, self.tokens or rows[1]
        )
        condition, dtype = self._condition(t), self.dtype

        def block(number: int, side: str, size: int, way: sparse.Way) -> sparse.Residual:
            return sparse.Residual(size, way, dtype, name=f'{side}_blocks_{number}')

        x_in = jnp.where(voxel_mask[..., None], x, 0).astype(dtype)
        fine = block(0, 'input', self.features, 'stay')(
            self._dense(self.features, 'input_layer')(x_in), condition, grid
        )
        coarse = block(1, 'input', self.width, 'down')(fine, condition, grid)
        y = coarse + place_features(grid.coarse.places, self.width).astype(dtype)
        y = self._blocks(y, condition, text, grid.coarse.there[:, None, None])
        y = jnp.concatenate([y, coarse], axis=-1)
        y = block(0, 'out', self.features, 'up')(y, condition, grid)
        y = jnp.concatenate([y, fine], axis=-1)
        y = block(1, 'out', self.features, 'stay')(y, condition, grid)
        y = layer_norm(y.astype(x.dtype), 1e-5, x.dtype)
        out = self._dense(x.shape[-1], 'out_layer', zero=True)(y).astype(x.dtype)
        out = jnp.where(grid.fits[:, None, None], out, jnp.nan)
        return jnp.where(voxel_mask[..., None], out, 0)


# By name, (class, arguments): million parameters 556 and 601 as told an image's features, which
# have 1,024 numbers, and as told a text's, 768, 543 and 588.
PRESETS: dict[str, tuple[Any, dict[str, Any]]] = {
    'trellis_structure_large': (ShapeDiT, {}),
    'trellis_latents_large': (VoxelDiT, {}),
}


def preset(of: str, **changes: Any) -> ShapeDiT | VoxelDiT:
    """The network that is known as `of`, with changes.

        network=dict(name='kd.models.shape_dit.preset', of='trellis_structure_large')

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `ShapeDiT` or `VoxelDiT`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    kind = PRESETS[of][0] if of in PRESETS else ShapeDiT
    return preset_of(kind, {name: own for name, (_, own) in PRESETS.items()}, of, changes)
