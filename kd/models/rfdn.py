"""RFDN: IMDN's splits as convolutions of one pixel beside residual ones, and attention in space.

Source: arXiv 2009.11551 (2020), and the authors' release (njulj/RFDN), with whose names it loads;
what a network takes and returns lies in [-1, 1], see `kd.models.imdn`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models.imdn import Conv, Fusion, check_low, leaky, released_name, restored
from kd.ranges import Count

# Least side of a picture whose attention has a window of 7 pixels behind a stride of 2.
LEAST = 15


class SpatialAttention(nn.Module):
    """x sigmoid(W (u(c) + f)): c of windows of 7 pixels at a stride of 6, enlarged again by u.

    The release's ESA: a quarter of the channels, largest values, linear enlargement.
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def conv(size: int, name: str) -> Conv:
            return Conv(x.shape[-1] // 4, size, dtype=self.dtype, name=name)

        first = conv(1, 'conv1')(x)
        # A stride of 2 without padding: what Conv pads is cut off.
        c = conv(3, 'conv2')(first)[:, 1:-1:2, 1:-1:2]
        c = nn.max_pool(c, (7, 7), (3, 3))
        c = nn.relu(conv(3, 'conv_max')(c))
        c = conv(3, 'conv3_')(nn.relu(conv(3, 'conv3')(c)))
        c = jax.image.resize(c, first.shape, 'linear', antialias=False)
        c = c + conv(1, 'conv_f')(first)
        return x * nn.sigmoid(Conv(x.shape[-1], 1, dtype=self.dtype, name='conv4')(c))


class ResidualBlock(nn.Module):
    """Three times half of the channels beside x <- leaky(x + conv x); all fused, then attention."""

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        channels, kept = x.shape[-1], []
        for i in (1, 2, 3):
            half = Conv(channels // 2, 1, dtype=self.dtype, name=f'c{i}_d')
            kept.append(leaky(half(x)))
            x = leaky(x + Conv(channels, dtype=self.dtype, name=f'c{i}_r')(x))
        kept.append(leaky(Conv(channels // 2, dtype=self.dtype, name='c4')(x)))
        fused = Fusion(channels, dtype=self.dtype, name='c5')(kept)
        return SpatialAttention(self.dtype, name='esa')(fused)


class RFDN(nn.Module):
    """Residual blocks whose features are fused; then `scale` times the pixels.

    433,448 parameters at x4 with the defaults. Sides are `LEAST` pixels at least.

    Attributes:
      scale, channels, blocks, dtype: as of `kd.models.imdn.IMDN`.
    """

    scale: Count
    channels: Count = 50
    blocks: Count = 4
    dtype: Any = jnp.float32
    fields: ClassVar[tuple[str, ...]] = ('low',)
    released_name: ClassVar = staticmethod(released_name)

    @nn.compact
    def __call__(self, low: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, h, w, 3] to [B, s h, s w, 3], float32, both in [-1, 1]."""
        del train
        check_low('RFDN', low)
        if min(low.shape[1:3]) < LEAST:
            raise ValueError(f'RFDN takes sides of {LEAST} pixels at least, got {low.shape}')
        first = Conv(self.channels, dtype=self.dtype, name='fea_conv')(0.5 * (low + 1))
        x, gathered = first, []
        for i in range(self.blocks):
            x = ResidualBlock(self.dtype, name=f'B{i + 1}')(x)
            gathered.append(x)
        x = leaky(Fusion(self.channels, dtype=self.dtype, name='c_0')(gathered))
        x = Conv(self.channels, dtype=self.dtype, name='LR_conv')(x) + first
        return restored(x, self.scale, self.dtype)
