"""Networks of super-resolution to compare others with, and what helps where steps are few.

What a network takes and returns lies in [-1, 1], see `kd.models.imdn`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd import resample
from kd.models.imdn import Conv, Fusion, check_low, leaky, restored
from kd.models.layers import pixel_shuffle
from kd.ranges import Count, Positive


class PlainSR(nn.Module):
    """IMDN with residual pairs of convolutions for its blocks: what its split has to beat.

    Attributes:
      scale, channels, blocks, dtype: as of `kd.models.imdn.IMDN`.
      pairs: x + W2 leaky(W1 x) in a block.
    """

    scale: Count
    channels: Count = 52
    blocks: Count = 6
    pairs: Count = 2
    dtype: Any = jnp.float32
    fields: ClassVar[tuple[str, ...]] = ('low',)

    @nn.compact
    def __call__(self, low: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, h, w, 3] to [B, s h, s w, 3], float32, both in [-1, 1]."""
        del train
        check_low('PlainSR', low)
        first = Conv(self.channels, dtype=self.dtype, name='fea_conv')(0.5 * (low + 1))
        x, gathered = first, []
        for i in range(self.blocks):
            for j in range(self.pairs):
                x = self._pair(x, f'block{i + 1}_{j + 1}')
            gathered.append(x)
        x = leaky(Fusion(self.channels, dtype=self.dtype, name='fusion')(gathered))
        x = Conv(self.channels, dtype=self.dtype, name='last')(x) + first
        return restored(x, self.scale, self.dtype)

    def _pair(self, x: jax.Array, name: str) -> jax.Array:
        inside = leaky(Conv(self.channels, dtype=self.dtype, name=f'{name}_a')(x))
        return x + Conv(self.channels, dtype=self.dtype, name=f'{name}_b')(inside)


class EDSR(nn.Module):
    """EDSR's baseline: residual blocks, and twice the pixels as often as it takes.

    Source: Lim et al. 2017, arXiv 1707.02921. Without the shift by DIV2K's mean colour.

    Attributes:
      scale: 2, 3 or 4.
      channels, blocks, dtype: as of `kd.models.imdn.IMDN`.
      share: of a block's convolutions in what it returns; 0.1 in the largest networks.
    """

    scale: Count
    channels: Count = 64
    blocks: Count = 16
    share: Positive = 1.0
    dtype: Any = jnp.float32
    fields: ClassVar[tuple[str, ...]] = ('low',)

    @nn.compact
    def __call__(self, low: jax.Array, *, train: bool = False) -> jax.Array:
        """[B, h, w, 3] to [B, s h, s w, 3], float32, both in [-1, 1]."""
        del train
        check_low('EDSR', low)
        steps = {2: (2,), 3: (3,), 4: (2, 2)}
        if self.scale not in steps:
            raise ValueError(f'EDSR has scale=2, 3 or 4, got {self.scale}')

        def conv(width: int, name: str) -> Conv:
            return Conv(width, dtype=self.dtype, name=name)

        first = conv(self.channels, 'head')(0.5 * (low + 1))
        x = first
        for i in range(self.blocks):
            inside = nn.relu(conv(self.channels, f'block{i + 1}_a')(x))
            x = x + self.share * conv(self.channels, f'block{i + 1}_b')(inside)
        x = conv(self.channels, 'body')(x) + first
        for i, scale in enumerate(steps[self.scale]):
            x = pixel_shuffle(conv(self.channels * scale**2, f'up{i + 1}')(x), scale)
        return 2 * conv(3, 'tail')(x).astype(jnp.float32) - 1


class OverBicubic(nn.Module):
    """MATLAB's bicubic enlargement, and a share of what a network sees; see `over_bicubic`.

    Attributes:
      inner: the network, in whose parameters this is.
      share: of its picture.
    """

    inner: nn.Module
    share: Positive = 0.1
    fields: ClassVar[tuple[str, ...]] = ('low',)

    def setup(self) -> None:
        nn.share_scope(self, self.inner)

    @property
    def scale(self) -> int:
        """Of the network."""
        return self.inner.scale

    def __call__(self, low: jax.Array, *, train: bool = False) -> jax.Array:
        """As of the network; in pictures of [0, 1] this is bicubic(x) + share network(x)."""
        size = (low.shape[1] * self.scale, low.shape[2] * self.scale)
        large = resample.resize(jnp.asarray(low, jnp.float32), size, 'matlab')
        return large + self.share * (self.inner(low, train=train) + 1)


def over_bicubic(*, network: Mapping[str, Any], share: Positive = 0.1) -> OverBicubic:
    """A network that begins near bicubic enlargement, which it would take thousands of steps for.

    Args:
      network: block of one of `low` pictures.
      share: of what it returns.
    """
    return OverBicubic(config_lib.build(network, where='network'), share=share)
