"""MobileNetV2 (Sandler et al. 2018, arXiv:1801.04381)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count, Decay, Positive

# Expansion, channels, blocks, and stride of the first block: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)
STEM_WIDTH, LAST_WIDTH = 32, 1280


class InvertedResidual(nn.Module):
    """x + norm(project(a(norm(depthwise(a(norm(expand(x)))))))), with a = ReLU6.

    1x1, depthwise 3x3 and 1x1 convolutions; no activation at the end. The sum is left out where the
    shape changes, the expansion where its factor is 1; `benchmark` is that of `MobileNetV2`.
    """

    expansion: int
    width: int
    stride: int
    dtype: Any
    benchmark: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        options = dict(train=train, dtype=self.dtype)
        relu = nn.relu if self.benchmark else nn.relu6
        y, inner = x, self.expansion * x.shape[-1]
        if self.expansion != 1 or self.benchmark:
            y = relu(layers.conv_norm(y, inner, 1, name='expand', **options))
        y = layers.conv_norm(y, inner, 3, self.stride, groups=inner, name='depthwise', **options)
        y = layers.conv_norm(relu(y), self.width, 1, name='project', **options)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """A 3x3 convolution, 17 inverted residuals, a 1x1 convolution, average pooling, a linear head.

    3,504,872 parameters with 1000 classes; 812,836 with 100 at half width and stem `benchmark`.

    Attributes:
      num_classes: number of logits.
      width: factor of all channels, rounded to multiples of 8; the last layer has at least 1280.
      stem: `imagenet` reduces the resolution 32 times. `cifar`, for small images, leaves out the
        first two strides (of the stem and of the stage with 24 channels) and reduces it 8 times.
        `benchmark` is the network of the benchmark of Tian et al. (arXiv:1910.10699) and of
        mdistiller, for 32 pixels: only the stage with 24 channels has no stride, which reduces it
        16 times; channels are cut to integers and not rounded to multiples of 8; the first block
        has its 1x1 convolution in spite of a factor of 1; ReLU stands for ReLU6.
      dropout: of the pooled features; needs the 'dropout' key and acts only with train=True.
      dtype: compute type, head excepted.

    Features: `stem`, `block0`, ..., `block16`, `last`, `map`, and `features`, its mean.
    """

    num_classes: Count = 1000
    width: Positive = 1.0
    stem: str = 'imagenet'
    dropout: Decay = 0.2
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('stem', self.stem, (*layers.STEMS, 'benchmark'))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes]; ValueError for other ranks."""
        layers.check_rank('MobileNetV2', x, {4: 'images [B, H, W, C]'})
        options = dict(train=train, dtype=self.dtype)
        benchmark = self.stem == 'benchmark'
        relu, rounded = (nn.relu, int) if benchmark else (nn.relu6, layers.divisible)
        spared = {'imagenet': (), 'cifar': ('stem', 1), 'benchmark': (1,)}[self.stem]  # Strides.
        x, stride = x.astype(self.dtype), 1 if 'stem' in spared else 2
        first = rounded(STEM_WIDTH * self.width)
        x = relu(layers.conv_norm(x, first, 3, stride, name='stem', **options))
        number = 0
        for stage, (expansion, width, blocks, stride) in enumerate(STAGES):
            width = rounded(width * self.width)
            for i in range(blocks):
                step = stride if i == 0 and stage not in spared else 1
                block = InvertedResidual(
                    expansion, width, step, self.dtype, benchmark, name=f'block{number}'
                )
                x, number = block(x, train), number + 1
        last = rounded(LAST_WIDTH * max(1.0, self.width))
        x = relu(layers.conv_norm(x, last, 1, name='last', **options))
        x = layers.Features(name='map')(x).mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return layers.classifier(x, self.num_classes)
