"""ShuffleNet (Zhang et al. 2017, arXiv:1707.01083), in the form used for CIFAR."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count

# Channels of the first stage by groups (table 1 of the paper), doubled in each later one.
WIDTHS = {1: 144, 2: 200, 3: 240}
BLOCKS = (4, 8, 4)
STEM_WIDTH = 24


def channel_shuffle(x: jax.Array, groups: int) -> jax.Array:
    """[..., groups, C / groups] transposed: channel i of group g moves to i groups + g.

    Shuffling with C / groups groups undoes it. x is [..., C], C a multiple of `groups`.
    """
    *space, channels = x.shape
    grouped = x.reshape(*space, groups, channels // groups)
    return jnp.swapaxes(grouped, -1, -2).reshape(x.shape)


class ShuffleUnit(nn.Module):
    """Grouped 1x1, shuffle, depthwise 3x3 and grouped 1x1 convolutions beside a shortcut.

    ReLU(x + y); with stride 2 ReLU(concat(y, average pool(x))), which has `width` channels in all.
    A quarter of the channels of y are computed with.
    """

    width: int
    stride: int
    groups: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        options = dict(train=train, dtype=self.dtype)
        out = self.width - x.shape[-1] if self.stride == 2 else self.width
        inner = out // 4
        # Few channels come from the stem: they are not divided.
        groups = 1 if x.shape[-1] == STEM_WIDTH else self.groups
        y = nn.relu(layers.conv_norm(x, inner, 1, groups=groups, name='reduce', **options))
        y = channel_shuffle(y, groups)
        y = layers.conv_norm(y, inner, 3, self.stride, groups=inner, name='depthwise', **options)
        y = layers.conv_norm(nn.relu(y), out, 1, groups=self.groups, name='restore', **options)
        if self.stride == 1:
            return nn.relu(x + y)
        pooled = nn.avg_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))  # Counts the padding.
        return nn.relu(jnp.concatenate([y, pooled], axis=-1))


class ShuffleNet(nn.Module):
    """A stem, stages of 4, 8 and 4 units, average pooling, a linear head.

    In two details it follows the CIFAR networks that distillation papers use, not the paper: ReLU
    also after the depthwise convolution, and bottlenecks a quarter of what the convolutions of a
    strided unit put out, not of all its channels. `ShuffleNet(num_classes=10, stem='cifar')` is
    their ShuffleNet-G2.

    Attributes:
      num_classes: number of logits.
      groups: 1, 2 or 3, with 144, 200 or 240 channels in the first stage.
      stem: `imagenet`, a 3x3 convolution and a maximum pooling, of stride 2 each: the resolution
        is reduced 32 times; `cifar`, a 1x1 convolution: 8 times.
      dtype: compute type, head excepted.

    Features: `stem`, `block0`, ..., `block15`, and `features`, the pooled output.
    """

    num_classes: Count = 1000
    groups: Count = 2
    stem: str = 'imagenet'
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('stem', self.stem, layers.STEMS)
        if self.groups not in WIDTHS:
            raise ValueError(
                f'ShuffleNet groups={self.groups} must be one of {", ".join(map(str, WIDTHS))}'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes]; ValueError for other ranks."""
        layers.check_rank('ShuffleNet', x, {4: 'images [B, H, W, C]'})
        size, stride = (3, 2) if self.stem == 'imagenet' else (1, 1)
        x = layers.conv_norm(
            x.astype(self.dtype), STEM_WIDTH, size, stride,
            train=train, dtype=self.dtype, name='stem',
        )  # fmt: skip
        x = nn.relu(x)
        x = layers.max_pool(x) if self.stem == 'imagenet' else x
        number = 0
        for stage, blocks in enumerate(BLOCKS):
            width = WIDTHS[self.groups] * 2**stage
            for i in range(blocks):
                stride = 2 if i == 0 else 1
                unit = ShuffleUnit(width, stride, self.groups, self.dtype, name=f'block{number}')
                x, number = unit(x, train), number + 1
        return layers.classifier(x.mean(axis=(1, 2)), self.num_classes)
