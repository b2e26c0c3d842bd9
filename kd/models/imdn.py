"""IMDN: super-resolution by blocks that keep a quarter of their channels again and again.

Source: arXiv 1909.11856 (2019), and the authors' release (Zheng222/IMDN), whose checkpoints
load as they are once they are safetensors (names without `module.`), see `released_name`.

What a network takes and returns lies in [-1, 1]; inside it lies in [0, 1], where the zeros of
padding are black.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models.layers import (
    check_choice,
    pixel_shuffle,
    torch_bias_init,
    torch_kernel_init,
)
from kd.ranges import Count

Attention = Literal['contrast', 'mean', 'none']
ATTENTIONS = ('contrast', 'mean', 'none')
SLOPE = 0.05
# Channels of a block per channel of its attention's bottleneck.
REDUCTION = 16


def released_name(name: str) -> str:
    """The name of a tensor in a released checkpoint: modules of a list have a point, not a bar."""
    return re.sub(r'_(?=\d|sub_\d)', '.', name)


def leaky(x: jax.Array) -> jax.Array:
    """x, and 0.05 x below 0."""
    return nn.leaky_relu(x, SLOPE)


class Conv(nn.Module):
    """A convolution padded by size // 2 on every side, as PyTorch begins it.

    (With stride 2 on an even side, 'SAME' would pad only at the end.)
    """

    features: int
    size: int = 3
    stride: int = 1
    use_bias: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel_shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param('kernel', torch_kernel_init, kernel_shape)
        x = jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            [(self.size // 2, self.size // 2)] * 2,
            dimension_numbers=('NHWC', 'HWIO', 'NHWC'),
        )
        if not self.use_bias:
            return x
        begin = torch_bias_init(self.size**2 * kernel_shape[2])
        return x + self.param('bias', begin, (self.features,)).astype(self.dtype)


class Fusion(nn.Module):
    """A convolution of 1 x 1 pixels of several features, as the sum of one of each.

    In the parameters of a convolution of all, which are never put together.
    """

    features: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, parts: Sequence[jax.Array]) -> jax.Array:
        channels = sum(part.shape[-1] for part in parts)
        kernel = self.param('kernel', torch_kernel_init, (1, 1, channels, self.features))
        bias = self.param('bias', torch_bias_init(channels), (self.features,))
        kernel, found, first = kernel[0, 0].astype(self.dtype), bias.astype(self.dtype), 0
        for part in parts:
            last = first + part.shape[-1]
            found = found + part @ kernel[first:last]
            first = last
        return found


class ChannelAttention(nn.Module):
    """Channels weighed by what they are over the whole picture: x sigmoid(W2 relu(W1 z)).

    z is each channel's mean plus its (population) deviation, or for kind 'mean' the mean alone.
    """

    kind: Attention = 'contrast'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        z = statistic(x, self.kind)
        z = nn.relu(Conv(max(channels // REDUCTION, 1), 1, dtype=self.dtype, name='conv_du_0')(z))
        return x * nn.sigmoid(Conv(channels, 1, dtype=self.dtype, name='conv_du_2')(z))


def statistic(x: jax.Array, kind: Attention = 'contrast') -> jax.Array:
    """[B, H, W, C] to [B, 1, 1, C], float32; the deviation of a constant has the gradient 0."""
    x = x.astype(jnp.float32)
    mean = x.mean((1, 2), keepdims=True)
    if kind == 'mean':
        return mean
    variance = jnp.square(x - mean).mean((1, 2), keepdims=True)
    varies = variance > 0
    return mean + jnp.where(varies, jnp.sqrt(jnp.where(varies, variance, 1.0)), 0.0)


class Block(nn.Module):
    """x + W5 a(D1, D2, D3, D4): quarters D of what each of four convolutions returns.

    The other three quarters, or with `split` False everything, are what the next one takes. The
    last convolution has no activation.

    Attributes:
      attention: a, see `ChannelAttention`; 'none' for the identity.
      split: as above.
    """

    attention: Attention = 'contrast'
    split: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        check_choice('attention', self.attention, ATTENTIONS)
        channels = x.shape[-1]
        kept, rest, own = [], x, channels // 4
        for name in ('c1', 'c2', 'c3'):
            every = leaky(Conv(channels, dtype=self.dtype, name=name)(rest))
            kept.append(every[..., :own])
            rest = every[..., own:] if self.split else every
        kept.append(Conv(own, dtype=self.dtype, name='c4')(rest))
        if self.attention == 'none':
            return Fusion(channels, dtype=self.dtype, name='c5')(kept) + x
        gathered = jnp.concatenate(kept, axis=-1)
        gathered = ChannelAttention(self.attention, dtype=self.dtype, name='cca')(gathered)
        return Conv(channels, 1, dtype=self.dtype, name='c5')(gathered.astype(x.dtype)) + x


class IMDN(nn.Module):
    """Blocks of distilled channels, all of which are fused; then `scale` times the pixels.

    Attributes:
      scale: of the result.
      channels: of the features; a multiple of 4.
      blocks: how many.
      attention, split: of `Block`.
      dtype: of the computation; parameters are float32.
    """

    scale: Count
    channels: Count = 64
    blocks: Count = 6
    attention: Attention = 'contrast'
    split: bool = True
    dtype: Any = jnp.float32
    fields: ClassVar[tuple[str, ...]] = ('low',)
    released_name: ClassVar = staticmethod(released_name)

    @nn.compact
    def __call__(self, low: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, h, w, 3] to [B, s h, s w, 3], float32, both in [-1, 1]."""
        del train
        check_low(type(self).__name__, low)
        first = Conv(self.channels, dtype=self.dtype, name='fea_conv')(0.5 * (low + 1))
        return restored(self._body(first), self.scale, self.dtype)

    def _body(self, first: jax.Array) -> jax.Array:
        x, gathered = first, []
        for i in range(self.blocks):
            x = Block(self.attention, self.split, self.dtype, name=f'IMDB{i + 1}')(x)
            gathered.append(x)
        x = leaky(Fusion(self.channels, dtype=self.dtype, name='c_0')(gathered))
        return Conv(self.channels, dtype=self.dtype, name='LR_conv')(x) + first


class IMDNAnyScale(IMDN):
    """IMDN from and to the same size: a picture that was enlarged by other means is restored.

    Its first convolutions leave every fourth pixel of a side, so that sides are multiples of 4; see
    `kd.sampling.tiles.adaptive_crop` for others. Its `scale` is 4, of what is inside.
    """

    scale: Count = 4
    multiple = 4
    enlarges = False

    @nn.compact
    def __call__(self, low: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, H, W, 3] to [B, H, W, 3], float32, both in [-1, 1]."""
        del train
        check_low('IMDNAnyScale', low)
        if low.shape[1] % 4 or low.shape[2] % 4:
            raise ValueError(f'IMDNAnyScale takes sides that are multiples of 4, got {low.shape}')
        x = Conv(self.channels, stride=2, dtype=self.dtype, name='fea_conv_0')(0.5 * (low + 1))
        first = Conv(self.channels, stride=2, dtype=self.dtype, name='fea_conv_2')(leaky(x))
        return restored(self._body(first), self.scale, self.dtype)


class IMDNSmall(nn.Module):
    """IMDN without attention and without fusion, for calls in real time: the release's IMDN_RTC.

    Attributes:
      scale, channels, blocks, dtype: as of `IMDN`.
    """

    scale: Count = 2
    channels: Count = 12
    blocks: Count = 5
    dtype: Any = jnp.float32
    fields: ClassVar[tuple[str, ...]] = ('low',)
    released_name: ClassVar = staticmethod(released_name)

    @nn.compact
    def __call__(self, low: jax.Array, *, train: bool = False) -> jax.Array:
        """As of `IMDN`."""
        del train
        check_low('IMDNSmall', low)
        first = Conv(self.channels, dtype=self.dtype, name='model_0')(0.5 * (low + 1))
        x = first
        for i in range(self.blocks):
            x = Block('none', dtype=self.dtype, name=f'model_1_sub_{i}')(x)
        last = f'model_1_sub_{self.blocks}'
        x = Conv(self.channels, 1, dtype=self.dtype, name=last)(x) + first
        return restored(x, self.scale, self.dtype, name='model_2')


class Refined(nn.Module):
    """The block of `IMDNEnhance`: six convolutions without biases, a quarter of each kept.

    The fourth takes and returns the three quarters, the fifth two, the sixth one.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels = x.shape[-1]
        own, rest, kept = channels // 4, x, []
        rest_of = channels - own
        widths = (channels, channels, channels, rest_of, rest_of - own, own)
        for i, width in enumerate(widths, 1):
            conv = Conv(width, use_bias=False, dtype=self.dtype, name=f'c{i}')
            every = nn.relu(conv(rest))
            kept.append(every[..., :own])
            rest = every[..., own:]
        gathered = jnp.concatenate(kept, axis=-1)
        return Conv(channels, 1, use_bias=False, dtype=self.dtype, name='c7')(gathered) + x


class IMDNEnhance(nn.Module):
    """IMDN at half of the resolution, the release's IMDN_RTE; sides are multiples of 2.

    Attributes:
      scale, channels, blocks, dtype: as of `IMDN`.
    """

    scale: Count = 2
    channels: Count = 20
    blocks: Count = 6
    dtype: Any = jnp.float32
    fields: ClassVar[tuple[str, ...]] = ('low',)
    multiple = 2
    released_name: ClassVar = staticmethod(released_name)

    @nn.compact
    def __call__(self, low: jax.Array, *, train: bool = False) -> jax.Array:
        """As of `IMDN`."""
        del train
        check_low('IMDNEnhance', low)
        if low.shape[1] % 2 or low.shape[2] % 2:
            raise ValueError(f'IMDNEnhance takes sides that are multiples of 2, got {low.shape}')
        x = nn.relu(Conv(self.channels, dtype=self.dtype, name='fea_conv_0')(0.5 * (low + 1)))
        halved = Conv(self.channels, stride=2, use_bias=False, dtype=self.dtype, name='fea_conv_2')(
            x
        )
        x = halved
        for i in range(self.blocks):
            x = Refined(self.dtype, name=f'block{i + 1}')(x)
        x = Conv(self.channels, 1, use_bias=False, dtype=self.dtype, name='LR_conv')(x) + halved
        return restored(x, self.scale**2, self.dtype)


def restored(
    x: jax.Array, scale: int, dtype: Any = jnp.float32, name: str = 'upsampler_0'
) -> jax.Array:
    """A picture in [-1, 1], float32, of features; from a compact method, with one convolution."""
    x = pixel_shuffle(Conv(3 * scale**2, dtype=dtype, name=name)(x), scale)
    return 2 * x.astype(jnp.float32) - 1


def check_low(network: str, low: jax.Array) -> None:
    """Raises ValueError unless `low` is [B, h, w, 3]."""
    if low.ndim != 4 or low.shape[-1] != 3:
        raise ValueError(f'{network} takes pictures [B, h, w, 3], got shape {low.shape}')
