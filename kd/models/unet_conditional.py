"""The UNet of Stable Diffusion 1.5, 2.1 and XL: images, or their latents, told a text.

Modules have the names of `UNet2DConditionModel` of `diffusers`, with `down_blocks_0` for
`down_blocks.0`; the transformer blocks of one attention are one module with a leading axis.

Sources: Rombach et al. 2022, arXiv:2112.10752; Podell et al. 2023, arXiv:2307.01952.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models import latent_parts
from kd.models.conditioning import with_fields
from kd.models.latent_parts import (
    Attention,
    Embedder,
    FeedForward,
    ResnetBlock,
    conv,
    given,
    group_norm,
    image_inputs,
    preset_of,
    stacked,
    timestep_features,
)
from kd.models.unet import resample
from kd.ranges import Count, Decay, Positive, Size

__all__ = ['PRESETS', 'SHARDING', 'UNetConditional', 'preset']

SHARDING = latent_parts.SHARDING
# Numbers that tell SDXL of the size: original, corner of the crop, target; (height, width) each.
SIZES = 6


class TransformerBlock(nn.Module):
    """Attention to itself and to the text, and a feed-forward layer; (x, None), for `nn.scan`."""

    heads: int
    fused: bool
    dtype: Dtype

    @nn.compact
    def __call__(
        self, x: jax.Array, text: jax.Array, mask: jax.Array | None
    ) -> tuple[jax.Array, None]:
        def normed(name: str) -> jax.Array:
            return nn.LayerNorm(epsilon=1e-5, dtype=self.dtype, name=name)(x)

        seen = None if mask is None else mask[:, None, None]
        attention = partial(Attention, self.heads, fused=self.fused, dtype=self.dtype)
        x = x + attention(name='attn1')(normed('norm1'))
        x = x + attention(name='attn2')(normed('norm2'), text, seen)
        return x + FeedForward('geglu', self.dtype, name='ff')(normed('norm3')), None


class Transformer(nn.Module):
    """Transformer blocks over the pixels of a map [B, H, W, D], stacked; see `UNetConditional`."""

    depth: int
    heads: int
    groups: int
    linear: bool
    remat: bool
    fused: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, mask: jax.Array | None) -> jax.Array:
        size = x.shape[-1]
        y = group_norm(x, self.groups, 1e-6, self.dtype, 'norm')
        y = self._project(y, size, 'proj_in').reshape(x.shape[0], -1, size)
        blocks = stacked(
            TransformerBlock, self.depth, self.remat, 2, begins=self.is_initializing()
        )(self.heads, self.fused, self.dtype, name='transformer_blocks')
        y = blocks(y, text, mask)[0].reshape(x.shape)
        return x + self._project(y, size, 'proj_out')

    def _project(self, x: jax.Array, size: int, name: str) -> jax.Array:
        if self.linear:
            return nn.Dense(size, dtype=self.dtype, name=name)(x)
        return conv(x, size, 1, self.dtype, name)


class Resampler(nn.Module):
    """A convolution named 'conv', on a map of twice the side ('up') or to one of half ('down')."""

    how: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.how == 'up':
            return conv(resample(x, 'up'), x.shape[-1], 3, self.dtype, 'conv')
        return nn.Conv(
            x.shape[-1], (3, 3), 2, padding=1, dtype=self.dtype, name='conv'
        )(x)  # fmt: skip


class Level(nn.Module):
    """Blocks of one side, [B, H, W, C] and skips -> the same; see `UNetConditional`.

    Attributes:
      network: whose settings these are.
      features: channels.
      depth: transformer blocks of an attention; 0 for no attention.
      heads: of it.
      kind: 'down' gives a skip after each block and halves the side, 'up' takes one before each and
        doubles it, 'mid' has two blocks with an attention in between.
      resampled: whether the side changes.
    """

    network: UNetConditional
    features: int
    depth: int
    heads: int
    kind: str
    resampled: bool

    @nn.compact
    def __call__(self, x, skips, embedding, text, mask, train):
        of, skips = self.network, list(skips)
        blocks = {'down': of.blocks, 'up': of.blocks + 1, 'mid': 2}[self.kind]
        # Arrays and no module are what is computed again.
        resnet = nn.remat(ResnetBlock, static_argnums=(3,)) if of.remat else ResnetBlock
        for i in range(blocks):
            if self.kind == 'up':
                x = jnp.concatenate([x, skips.pop()], axis=-1)
            x = resnet(
                self.features, of.groups, 1e-5, of.dropout, of.dtype, name=f'resnets_{i}'
            )(x, embedding, train)  # fmt: skip
            if self.depth and not (self.kind == 'mid' and i):
                x = Transformer(
                    self.depth, self.heads, of.groups, of.linear, of.remat, of.fused, of.dtype,
                    name=f'attentions_{i}',
                )(x, text, mask)  # fmt: skip
            if self.kind == 'down':
                skips.append(x)
        if self.resampled:
            x = Resampler(self.kind, of.dtype, name=f'{self.kind}samplers_0')(x)
            if self.kind == 'down':
                skips.append(x)
        return x, skips


class UNetConditional(nn.Module):
    """F(t, x, text) like x, for x [B, H, W, C]; defaults are those of Stable Diffusion 1.5.

    Attributes:
      channels: of each level, each of half the side of the one before.
      blocks: of a level; one more on the way up.
      depths: transformer blocks of each attention of a level; 0 for a level without.
      middle: the same of the lowest attention.
      heads: of each level.
      linear: attentions begin and end with dense layers; else with convolutions of one pixel.
      context: size of a token of the text.
      pooled: size of the text as one vector; 0 for networks that are told neither it nor sizes.
      size_features: features of each of the six numbers of `size`.
      masked: the text comes with a mask of its tokens.
      beside: fields of a batch, like x, that are further channels of the input.
      groups: of the normalisation.
      dropout: rate in the residual blocks.
      data_scale: what x is divided by and the output multiplied with: 1 for latents of unit
        variance.
      remat: residual and transformer blocks are computed again for the gradient.
      fused: attention by a fused kernel where there is one.
      dtype: compute type; parameters are float32, the output has the type of x.
    """

    channels: tuple[Count, ...] = (320, 640, 1280, 1280)
    blocks: Count = 2
    depths: tuple[Size, ...] = (1, 1, 1, 0)
    middle: Count = 1
    heads: tuple[Count, ...] = (8, 8, 8, 8)
    linear: bool = False
    context: Count = 768
    pooled: Size = 0
    size_features: Count = 256
    masked: bool = False
    beside: tuple[str, ...] = ()
    groups: Count = 32
    dropout: Decay = 0.0
    data_scale: Positive = 1.0
    remat: bool = False
    fused: bool = False
    dtype: Dtype = jnp.float32

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        return (
            *('text', *self.beside),
            *(('mask',) if self.masked else ()),
            *(('pooled', 'size') if self.pooled else ()),
        )

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], x [1, ...])."""
        return image_inputs(spec)

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        *,
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
        pooled: jax.Array | None = None,
        size: jax.Array | None = None,
        train: bool = False,
        **fields: jax.Array,
    ) -> jax.Array:
        """F [B, H, W, C].

        Args:
          t: what it is told of the noise, [B], for Stable Diffusion in 0 .. 999.
          x: noised images or latents.
          text: [B, M, context], as the text encoder says it.
          mask: bool [B, M], which of these tokens are seen; None for all.
          pooled: [B, pooled], the text as one vector.
          size: [B, 6], in pixels (height, width): of the original, of the corner of what was cut
            out, and of the target.
          train: whether dropout acts.
          **fields: what is `beside` x.

        Raises:
          ValueError: an input that is missing, or of another size.
        """
        text, pooled, size = self._told(x, text, pooled, size)
        width = 4 * self.channels[0]
        waves = timestep_features(t, self.channels[0]).astype(self.dtype)
        embedding = Embedder(width, self.dtype, name='time_embedding')(waves)
        if self.pooled:
            waves = timestep_features(size, self.size_features).reshape(len(size), -1)
            waves = jnp.concatenate([pooled, waves], axis=-1).astype(self.dtype)
            added = Embedder(width, self.dtype, name='add_embedding')
            embedding = embedding + added(waves)
        told = embedding, text.astype(self.dtype), mask, train
        seen = with_fields(self, x, self.beside, fields)
        y = (seen / self.data_scale).astype(self.dtype)
        y = conv(y, self.channels[0], 3, self.dtype, 'conv_in')
        y = self._levels(y, told)
        y = nn.silu(group_norm(y, self.groups, 1e-5, self.dtype, 'conv_norm_out'))
        y = conv(y, x.shape[-1], 3, self.dtype, 'conv_out')
        return y.astype(x.dtype) * self.data_scale

    def _levels(self, y, told):
        plain, last = self.clone(parent=None, name=None), len(self.channels) - 1
        skips = [y]

        def level(i, kind, depth, resampled, name, y, skips):
            return Level(
                plain, self.channels[i], depth, self.heads[i], kind, resampled, name=name
            )(y, skips, *told)  # fmt: skip

        for i, depth in enumerate(self.depths):
            y, skips = level(i, 'down', depth, i < last, f'down_blocks_{i}', y, skips)
        y, _ = level(last, 'mid', self.middle, False, 'mid_block', y, ())
        for i, depth in reversed(list(enumerate(self.depths))):
            y, skips = level(i, 'up', depth, i > 0, f'up_blocks_{last - i}', y, skips)
        return y

    def _told(self, x, text, pooled, size):
        """What it is told, zeros where only shapes matter."""
        if not len(self.channels) == len(self.depths) == len(self.heads):
            raise ValueError('UNetConditional: channels, depths and heads must be of one length.')
        factor = 2 ** (len(self.channels) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f'UNetConditional with {len(self.channels)} levels needs sides divisible by '
                f'{factor}, got {x.shape[1]}x{x.shape[2]}.'
            )
        shapes: dict[str, tuple[int, ...]] = dict(text=(1, self.context))
        if self.pooled:
            shapes |= dict(pooled=(self.pooled,), size=(SIZES,))
        told = given(self, x.shape[0], shapes, dict(text=text, pooled=pooled, size=size))
        return told['text'], told['pooled'], told['size']


_WIDE = dict(heads=(5, 10, 20, 20), linear=True, context=1_024)
# By name, the arguments of `UNetConditional`: .860 and .866 billion parameters, and 2.567.
PRESETS: dict[str, dict[str, Any]] = {
    'sd15': {},
    'sd21': _WIDE,
    'sdxl': dict(
        channels=(320, 640, 1280),
        depths=(0, 2, 10),
        middle=10,
        heads=(5, 10, 20),
        linear=True,
        context=2_048,
        pooled=1_280,
    ),
}


def preset(of: str, **changes: Any) -> UNetConditional:
    """The network that is known as `of`, with changes.

        network=dict(name='kd.models.unet_conditional.preset', of='sdxl', dtype='bfloat16')

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `UNetConditional`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    return preset_of(UNetConditional, PRESETS, of, changes)
