"""Diffusion transformers of latents as released: DiT, told a class, and PixArt-alpha, told a text.

Modules have the names of `DiTTransformer2DModel` and `PixArtTransformer2DModel` of `diffusers`;
blocks are one module with a leading axis. `kd.models.dit` is the one of two times, for flow maps.

Sources: Peebles and Xie 2023, arXiv:2212.09748; Chen et al. 2024, arXiv:2310.00426.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models import latent_parts
from kd.models.dit import grid_embedding
from kd.models.latent_parts import (
    Attention,
    Embedder,
    FeedForward,
    Modulation,
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
from kd.ranges import Count, Positive, Size

__all__ = ['PRESETS', 'SHARDING', 'LatentDiT', 'preset']

SHARDING = latent_parts.SHARDING
# Height, width and their ratio, of PixArt at 1024 pixels.
SIZES = 3


class Block(nn.Module):
    """Attention, attention to a text where there is one, and a feed-forward layer; (x, None).

    Told a text, blocks share what modulates them, [B, 6 D], up to a table of their own.
    """

    heads: int
    epsilon: float
    fused: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, condition: jax.Array, text: jax.Array | None, mask: jax.Array | None
    ) -> tuple[jax.Array, None]:
        size = x.shape[-1]
        if text is None:
            parts = Modulation(6, size, self.dtype, name='norm1')(condition)
        else:
            table = self.param('scale_shift_table', nn.initializers.normal(size**-0.5), (6, size))
            own = table.astype(self.dtype) + condition.reshape(len(x), 6, size)
            parts = jnp.split(own, 6, axis=1)
        shift0, scale0, gate0, shift1, scale1, gate1 = parts

        def attention(name: str) -> Attention:
            return Attention(self.heads, True, fused=self.fused, dtype=self.dtype, name=name)

        first = 1e-6 if text is None else self.epsilon
        y = modulated(layer_norm(x, first, self.dtype), shift0, scale0)
        x = x + gate0 * attention('attn1')(y)
        if text is not None:
            x = x + attention('attn2')(x, text, mask)
        y = modulated(layer_norm(x, self.epsilon, self.dtype), shift1, scale1)
        return x + gate1 * FeedForward('gelu', self.dtype, name='ff')(y), None


class _Embeddings(nn.Module):
    """The condition [B, D] of times, classes and sizes."""

    size: int
    num_classes: int | None
    reached: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, t, label, size):
        def embedded(x, width, name):
            waves = timestep_features(x, 256, reached=self.reached).astype(self.dtype)
            return Embedder(width, self.dtype, name=name)(waves)

        total = embedded(t, self.size, 'timestep_embedder')
        if self.num_classes is not None:
            index = jnp.broadcast_to(self.num_classes if label is None else label, t.shape)
            known = (index >= 0) & (index <= self.num_classes)
            told = _Classes(self.num_classes + 1, self.size, self.dtype, name='class_embedder')(
                jnp.where(known, index, 0)
            )
            total = total + jnp.where(known[:, None], told, jnp.nan)
        if size is not None:
            each = self.size // 3
            sides = embedded(size[:, :2], each, 'resolution_embedder').reshape(len(t), -1)
            ratio = embedded(size[:, 2], each, 'aspect_ratio_embedder')
            total = total + jnp.concatenate([sides, ratio], axis=-1)
        return total


class _Classes(nn.Module):
    """A vector for each class and the null class."""

    count: int
    size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, label: jax.Array) -> jax.Array:
        return nn.Embed(self.count, self.size, dtype=self.dtype, name='embedding_table')(label)


class _Adaptive(nn.Module):
    """(what all blocks are modulated with [B, 6 D], condition [B, D])."""

    size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, t, size):
        told = _Embeddings(self.size, None, False, self.dtype, name='emb')(t, None, size)
        dense = nn.Dense(6 * self.size, dtype=self.dtype, name='linear')
        return dense(nn.silu(told)), told


class _Patches(nn.Module):
    """Tokens [B, N, D] of patches of x."""

    size: int
    patch: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sides = (self.patch, self.patch)
        y = nn.Conv(self.size, sides, sides, padding='VALID', dtype=self.dtype, name='proj')(x)
        return y.reshape(len(x), -1, self.size)


class LatentDiT(nn.Module):
    """F(t, x, ...) like x, for x [B, H, W, C]; defaults are those of DiT-XL/2 at 256 pixels.

    Attributes:
      width, depth, heads, patch: of the transformer.
      num_classes: None for a network that is told a text; the null class is this number.
      context: size of a token of the text; 0 for a network that is told a class.
      sized: it is told the height, the width and their ratio too.
      masked: the text comes with a mask of its tokens.
      variance: the last layer says twice the channels; the second half is about variances.
      grid: patches along a side of the images of its training; others lie on the same span.
      stretch: what places on this grid are divided by.
      epsilon: of norms, but the first of a block and the last where a class is told.
      reached: frequencies of times reach 1e-4, as diffusers has DiT's; as first released without.
      remat: blocks are computed again for the gradient.
      fused: attention by a fused kernel where there is one.
      dtype: compute type; parameters are float32, the output has the type of x.
    """

    width: Count = 1_152
    depth: Count = 28
    heads: Count = 16
    patch: Count = 2
    num_classes: Count | None = 1_000
    context: Size = 0
    sized: bool = False
    masked: bool = False
    variance: bool = True
    grid: Count = 16
    stretch: Positive = 1.0
    epsilon: Positive = 1e-5
    reached: bool = True
    remat: bool = False
    fused: bool = False
    dtype: Dtype = jnp.float32

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        if not self.context:
            return () if self.num_classes is None else ('label',)
        masked, sized = self.masked * ('mask',), self.sized * ('size',)
        return ('text', *masked, *sized)

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], x [1, ...])."""
        return image_inputs(spec)

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        *,
        label: jax.Array | None = None,
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
        size: jax.Array | None = None,
        train: bool = False,
        variances: bool = False,
    ) -> jax.Array:
        """F [B, H, W, C].

        Args:
          t: what it is told of the noise, [B], in 0 .. 999.
          x: noised latents.
          label: classes int [B]; None for the null class, NaN for what is no class.
          text: [B, M, context], as the text encoder says it.
          mask: bool [B, M], which of these tokens are seen; None for all.
          size: [B, 3], height and width in pixels, and their ratio.
          train: nothing here depends on it.
          variances: whether what is said about variances comes too, as further channels.

        Raises:
          ValueError: an input that is missing, or of another size.
        """
        del train
        shapes: dict[str, tuple[int, ...]] = {}
        if self.context:
            shapes = dict(text=(1, self.context)) | (dict(size=(SIZES,)) if self.sized else {})
        told = given(self, len(x), shapes, dict(text=text, size=size))
        if label is not None and self.num_classes is None:
            raise ValueError('a label was given to an unconditional network; set num_classes.')
        sides = sides_of(self, x, (self.patch, self.patch))
        y = _Patches(self.width, self.patch, self.dtype, name='pos_embed')(x.astype(self.dtype))
        place = grid_embedding(sides[0], sides[1], self.width, self.grid / self.stretch)
        y = y + place.astype(self.dtype)
        text, seen = told['text'], None if mask is None else mask[:, None, None]
        if self.context:
            shared, condition = _Adaptive(self.width, self.dtype, name='adaln_single')(
                t, told['size']
            )
            text = Embedder(self.width, self.dtype, 'gelu', name='caption_projection')(
                text.astype(self.dtype)
            )
        else:
            shared = condition = _Embeddings(
                self.width, self.num_classes, self.reached, self.dtype, name='emb'
            )(t, label, None)
        block = stacked(Block, self.depth, self.remat, 3, begins=self.is_initializing())(
            self.heads, self.epsilon, self.fused, self.dtype, name='transformer_blocks'
        )
        y = self._said(block(y, shared, text, seen)[0], condition, 2 * x.shape[-1])
        y = unpatched(y, sides, (self.patch, self.patch)).astype(x.dtype)
        return y if variances else y[..., : x.shape[-1]]

    def _said(self, y: jax.Array, condition: jax.Array, channels: int) -> jax.Array:
        size = self.patch**2 * (channels if self.variance else channels // 2)
        if self.context:
            start = nn.initializers.normal(self.width**-0.5)
            table = self.param('scale_shift_table', start, (2, self.width)).astype(self.dtype)
            shift, scale = jnp.split(table + condition[:, None], 2, axis=1)
        else:
            dense = nn.Dense(2 * self.width, dtype=self.dtype, name='proj_out_1')
            shift, scale = jnp.split(dense(nn.silu(condition))[:, None], 2, axis=-1)
        y = modulated(layer_norm(y, 1e-6, self.dtype), shift, scale)
        name = 'proj_out' if self.context else 'proj_out_2'
        return nn.Dense(size, dtype=self.dtype, name=name)(y)


_TEXT = dict(num_classes=None, context=4_096, epsilon=1e-6)
# By name, the arguments of `LatentDiT`: 675 million parameters, and 611.
PRESETS: dict[str, dict[str, Any]] = {
    'dit_xl2_256': {},
    'dit_xl2_512': dict(grid=32),
    'pixart_alpha_512': dict(grid=32, **_TEXT),
    'pixart_alpha_1024': dict(grid=64, stretch=2.0, sized=True, **_TEXT),
}


def preset(of: str, **changes: Any) -> LatentDiT:
    """The network that is known as `of`, with changes.

        network=dict(name='kd.models.latent_dit.preset', of='dit_xl2_256', dtype='bfloat16')

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `LatentDiT`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    return preset_of(LatentDiT, PRESETS, of, changes)
