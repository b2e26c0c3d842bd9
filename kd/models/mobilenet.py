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
    shape changes, the expansion where its factor is 1.
    """

    expansion: int
    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        options = dict(train=train, dtype=self.dtype)
        y, inner = x, self.expansion * x.shape[-1]
        if self.expansion != 1:
            y = nn.relu6(layers.conv_norm(y, inner, 1, name='expand', **options))
        y = layers.conv_norm(y, inner, 3, self.stride, groups=inner, name='depthwise', **options)
        y = layers.conv_norm(nn.relu6(y), self.width, 1, name='project', **options)
        return x + y if x.shape == y.shape else y


class MobileNetV2(nn.Module):
    """A 3x3 convolution, 17 inverted residuals, a 1x1 convolution, average pooling, a linear head.

    3,504,872 parameters with 1000 classes.

    Attributes:
      num_classes: number of logits.
      width: factor of all channels, rounded to multiples of 8; the last layer has at least 1280.
      stem: `imagenet` reduces the resolution 32 times. `cifar`, for small images, leaves out the
        first two strides (of the stem and of the stage with 24 channels) and reduces it 8 times.
      dropout: of the pooled features; needs the 'dropout' key and acts only with train=True.
      dtype: compute type, head excepted.

    Features: `stem`, `block0`, ..., `block16`, `last`, and `features`, the pooled output.
    """

    num_classes: Count = 1000
    width: Positive = 1.0
    stem: str = 'imagenet'
    dropout: Decay = 0.2
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('stem', self.stem, layers.STEMS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes]; ValueError for other ranks."""
        layers.check_rank('MobileNetV2', x, {4: 'images [B, H, W, C]'})
        options = dict(train=train, dtype=self.dtype)
        spared = 0 if self.stem == 'imagenet' else 2  # Strides that are left out.
        first = layers.divisible(STEM_WIDTH * self.width)
        x = x.astype(self.dtype)
        x = nn.relu6(layers.conv_norm(x, first, 3, 1 if spared else 2, name='stem', **options))
        number = 0
        for stage, (expansion, width, blocks, stride) in enumerate(STAGES):
            width = layers.divisible(width * self.width)
            for i in range(blocks):
                step = stride if i == 0 and stage >= spared else 1
                block = InvertedResidual(expansion, width, step, self.dtype, name=f'block{number}')
                x, number = block(x, train), number + 1
        last = layers.divisible(LAST_WIDTH * max(1.0, self.width))
        x = nn.relu6(layers.conv_norm(x, last, 1, name='last', **options)).mean(axis=(1, 2))
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return layers.classifier(x, self.num_classes)
