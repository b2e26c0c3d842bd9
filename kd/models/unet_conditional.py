"""The UNet of Stable Diffusion 1.5, 2.1 and XL: images, or their latents, told a text.

Modules have the names of `UNet2DConditionModel` of `diffusers`, with `down_blocks_0` for
`down_blocks.0`; the transformer blocks of one attention are one module with a leading axis.

Sources: Rombach et al. 2022, arXiv:2112.10752; Podell et al. 2023, arXiv:2307.01952.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.attention import attend
from kd.models.unet import resample
from kd.ranges import Count, Decay, Positive, Size

__all__ = ['PRESETS', 'SHARDING', 'UNetConditional', 'preset', 'timestep_features']

# For `sharding` of a recipe: 'tensor' cuts heads and hidden units, 'fsdp' the rest.
SHARDING = (
    (r'transformer_blocks/.*(to_q|to_k|to_v|proj)/kernel$', (None, 'fsdp', 'tensor')),
    (r'transformer_blocks/.*(to_out_0|net_2)/kernel$', (None, 'tensor', 'fsdp')),
    (r'kernel$', 'fsdp'),
)
# Numbers that tell SDXL of the size: original, corner of the crop, target; (height, width) each.
SIZES = 6


def timestep_features(t: jax.Array, size: int, *, max_period: float = 1e4) -> jax.Array:
    """[cos(w_k t), sin(w_k t)], w_k = max_period^(-2k / size), [...] -> [..., size] float32."""
    if size % 2:
        raise ValueError(f'timestep_features: size={size}, expected an even number.')
    frequency = max_period ** (-jnp.arange(size // 2, dtype=jnp.float32) / (size // 2))
    angles = t.astype(jnp.float32)[..., None] * frequency
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class TimestepEmbedding(nn.Module):
    """Two layers, [B, any] -> [B, size]."""

    size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.silu(nn.Dense(self.size, dtype=self.dtype, name='linear_1')(x))
        return nn.Dense(self.size, dtype=self.dtype, name='linear_2')(x)


class ResnetBlock(nn.Module):
    """Residual block to whose middle the embedding [B, E] is added; None for none."""

    features: int
    groups: int
    epsilon: float
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array | None, train: bool) -> jax.Array:
        y = nn.silu(_group_norm(x, self.groups, self.epsilon, self.dtype, 'norm1'))
        y = _conv(y, self.features, 3, self.dtype, 'conv1')
        if embedding is not None:
            told = nn.Dense(self.features, dtype=self.dtype, name='time_emb_proj')
            y = y + told(nn.silu(embedding))[:, None, None]
        y = nn.silu(_group_norm(y, self.groups, self.epsilon, self.dtype, 'norm2'))
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = _conv(y, self.features, 3, self.dtype, 'conv2')
        if x.shape[-1] != self.features:
            x = _conv(x, self.features, 1, self.dtype, 'conv_shortcut')
        return x + y


class Attention(nn.Module):
    """Attention of x [B, N, D] to itself, or to a text [B, M, C] where its mask [B, M] is True."""

    heads: int
    fused: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, text: jax.Array, mask: jax.Array | None) -> jax.Array:
        size = x.shape[-1]

        def projected(y: jax.Array, name: str) -> jax.Array:
            y = nn.Dense(size, use_bias=False, dtype=self.dtype, name=name)(y)
            return y.reshape(*y.shape[:2], self.heads, size // self.heads)

        q, k, v = projected(x, 'to_q'), projected(text, 'to_k'), projected(text, 'to_v')
        seen = None if mask is None else mask[:, None, None]
        y = attend(q, k, v, mask=seen, fused=self.fused).reshape(x.shape)
        return nn.Dense(size, dtype=self.dtype, name='to_out_0')(y)


class _FeedForward(nn.Module):
    """Four times the width, gated by a GELU."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1]
        hidden = _Projection(8 * size, self.dtype, name='net_0')(x)
        hidden, gate = jnp.split(hidden, 2, axis=-1)
        hidden = hidden * nn.gelu(gate, approximate=False)
        return nn.Dense(size, dtype=self.dtype, name='net_2')(hidden)


class _Projection(nn.Module):
    """A layer named 'proj'."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.features, dtype=self.dtype, name='proj')(x)


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

        y = normed('norm1')
        x = x + Attention(self.heads, self.fused, self.dtype, name='attn1')(y, y, None)
        y = normed('norm2')
        x = x + Attention(self.heads, self.fused, self.dtype, name='attn2')(y, text, mask)
        return x + _FeedForward(self.dtype, name='ff')(normed('norm3')), None


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
        y = _group_norm(x, self.groups, 1e-6, self.dtype, 'norm')
        y = self._project(y, size, 'proj_in').reshape(x.shape[0], -1, size)
        kind = nn.remat(TransformerBlock, prevent_cse=False) if self.remat else TransformerBlock
        blocks = nn.scan(
            kind,
            variable_axes={'params': 0, 'intermediates': 0},
            split_rngs={'params': True},
            in_axes=(nn.broadcast, nn.broadcast),
            length=self.depth,
        )(self.heads, self.fused, self.dtype, name='transformer_blocks')
        y = blocks(y, text, mask)[0].reshape(x.shape)
        return x + self._project(y, size, 'proj_out')

    def _project(self, x: jax.Array, size: int, name: str) -> jax.Array:
        if self.linear:
            return nn.Dense(size, dtype=self.dtype, name=name)(x)
        return _conv(x, size, 1, self.dtype, name)


class Resampler(nn.Module):
    """A convolution named 'conv', on a map of twice the side ('up') or to one of half ('down')."""

    how: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.how == 'up':
            return _conv(resample(x, 'up'), x.shape[-1], 3, self.dtype, 'conv')
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
            'text',
            *(('mask',) if self.masked else ()),
            *(('pooled', 'size') if self.pooled else ()),
        )

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], x [1, ...])."""
        x = spec['input']
        time = jax.ShapeDtypeStruct((1,), x.dtype)
        return time, jax.ShapeDtypeStruct((1, *x.shape), x.dtype)

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

        Raises:
          ValueError: an input that is missing, or of another size.
        """
        text, pooled, size = self._told(x, text, pooled, size)
        width = 4 * self.channels[0]
        waves = timestep_features(t, self.channels[0]).astype(self.dtype)
        embedding = TimestepEmbedding(width, self.dtype, name='time_embedding')(waves)
        if self.pooled:
            waves = timestep_features(size, self.size_features).reshape(len(size), -1)
            waves = jnp.concatenate([pooled, waves], axis=-1).astype(self.dtype)
            added = TimestepEmbedding(width, self.dtype, name='add_embedding')
            embedding = embedding + added(waves)
        told = embedding, text.astype(self.dtype), mask, train
        y = (x / self.data_scale).astype(self.dtype)
        y = _conv(y, self.channels[0], 3, self.dtype, 'conv_in')
        y = self._levels(y, told)
        y = nn.silu(_group_norm(y, self.groups, 1e-5, self.dtype, 'conv_norm_out'))
        y = _conv(y, x.shape[-1], 3, self.dtype, 'conv_out')
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
        given = dict(text=text, pooled=pooled, size=size)
        for name, value in given.items():
            if name in shapes and value is None and self.is_initializing():
                given[name] = jnp.zeros((x.shape[0], *shapes[name]), self.dtype)
            elif (value is None) != (name not in shapes):
                raise ValueError(
                    f'UNetConditional is told {self.conditions}, and '
                    f"'{name}' was {'missing' if value is None else 'given'}."
                )
            elif value is not None and value.shape[-1] != shapes[name][-1]:
                raise ValueError(
                    f"UNetConditional: '{name}' has {value.shape[-1]} features, expected "
                    f'{shapes[name][-1]}; is it of another encoder?'
                )
        return given['text'], given['pooled'], given['size']


def _conv(x: jax.Array, features: int, size: int, dtype: Dtype, name: str) -> jax.Array:
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)(x)


def _group_norm(x: jax.Array, groups: int, epsilon: float, dtype: Dtype, name: str) -> jax.Array:
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, name=name)(x)


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
    if of not in PRESETS:
        raise ValueError(f"there is no conditional UNet '{of}'; known are: {', '.join(PRESETS)}.")
    names = [field.name for field in dataclasses.fields(UNetConditional) if field.init]
    if unknown := [name for name in changes if name not in names]:
        raise ValueError(f"UNetConditional has no '{unknown[0]}'; it has: {', '.join(names)}.")
    return UNetConditional(**{**PRESETS[of], **changes})
