"""EfficientNet (Tan and Le 2019, arXiv:1905.11946)."""

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count, Decay, Positive

# Expansion, kernel, channels, blocks, and stride of the first block: table 1 of the paper.
STAGES = (
    (1, 3, 16, 1, 1),
    (6, 3, 24, 2, 2),
    (6, 5, 40, 2, 2),
    (6, 3, 80, 3, 2),
    (6, 5, 112, 3, 1),
    (6, 5, 192, 4, 2),
    (6, 3, 320, 1, 1),
)
STEM_WIDTH = 32


class SqueezeExcitation(nn.Module):
    """x sigmoid(up(SiLU(down(mean over pixels of x)))), a factor per channel (arXiv:1709.01507)."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = nn.silu(nn.Dense(self.width, dtype=self.dtype, name='down')(x.mean(axis=(1, 2))))
        y = nn.sigmoid(nn.Dense(x.shape[-1], dtype=self.dtype, name='up')(y))
        return x * y[:, None, None]


class MBConv(nn.Module):
    """An inverted residual with SiLU, and squeeze and excitation after the depthwise convolution.

    The squeezed width is a quarter of the block's input. In training the branch of whole images is
    dropped at rate `drop_path` (arXiv:1603.09382).
    """

    expansion: int
    size: int
    width: int
    stride: int
    drop_path: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        options = dict(train=train, dtype=self.dtype)
        y, inner = x, self.expansion * x.shape[-1]
        if self.expansion != 1:
            y = nn.silu(layers.conv_norm(y, inner, 1, name='expand', **options))
        y = layers.conv_norm(
            y, inner, self.size, self.stride, groups=inner, name='depthwise', **options
        )
        y = SqueezeExcitation(max(x.shape[-1] // 4, 1), self.dtype, name='excitation')(nn.silu(y))
        y = layers.conv_norm(y, self.width, 1, name='project', **options)
        if x.shape != y.shape:
            return y
        return x + nn.Dropout(self.drop_path, (1, 2, 3), deterministic=not train)(y)


class EfficientNet(nn.Module):
    """A 3x3 convolution, blocks `MBConv`, a 1x1 convolution, average pooling, a linear head.

    B0 as it stands, 5,288,548 parameters with 1000 classes; B1 has depth 1.1, B2 width 1.1 and
    depth 1.2. The papers use larger images for these.

    Attributes:
      num_classes: number of logits.
      width: factor of all channels, rounded to multiples of 8.
      depth: factor of the blocks per stage, rounded up.
      stem: `imagenet` reduces the resolution 32 times; `cifar`, for small images, has no stride in
        the stem and reduces it 16 times.
      dropout: of the pooled features.
      drop_path: block i of n drops its branch at the rate drop_path i / n. Both need the 'dropout'
        key and act only with train=True.
      dtype: compute type, head excepted.

    Features: `stem`, `block0`, ..., `block15`, `last`, and `features`, the pooled output.
    """

    num_classes: Count = 1000
    width: Positive = 1.0
    depth: Positive = 1.0
    stem: str = 'imagenet'
    dropout: Decay = 0.2
    drop_path: Decay = 0.2
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('stem', self.stem, layers.STEMS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes]; ValueError for other ranks."""
        layers.check_rank('EfficientNet', x, {4: 'images [B, H, W, C]'})
        options = dict(train=train, dtype=self.dtype)
        first, stride = layers.divisible(STEM_WIDTH * self.width), 1 + (self.stem == 'imagenet')
        x = x.astype(self.dtype)
        x = nn.silu(layers.conv_norm(x, first, 3, stride, name='stem', **options))
        blocks = self._blocks()
        for i, arguments in enumerate(blocks):
            drop = self.drop_path * i / len(blocks)
            x = MBConv(*arguments, drop, self.dtype, name=f'block{i}')(x, train)
        x = nn.silu(layers.conv_norm(x, 4 * x.shape[-1], 1, name='last', **options))
        x = nn.Dropout(self.dropout, deterministic=not train)(x.mean(axis=(1, 2)))
        return layers.classifier(x, self.num_classes)

    def _blocks(self) -> list[tuple[int, int, int, int]]:
        """Expansion, kernel, width and stride of every block."""
        found = []
        for expansion, size, width, blocks, stride in STAGES:
            width = layers.divisible(width * self.width)
            found.append((expansion, size, width, stride))
            found += [(expansion, size, width, 1)] * (math.ceil(blocks * self.depth) - 1)
        return found
