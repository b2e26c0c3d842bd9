"""ShuffleNet (arXiv:1707.01083) and ShuffleNetV2 (arXiv:1807.11164), in the form for CIFAR."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count, Positive

# Channels of the first stage by groups (table 1 of the paper), doubled in each later one.
WIDTHS = {1: 144, 2: 200, 3: 240}
# By size: channels of the first stage (doubled in each later one), and of the last convolution.
WIDTHS_V2 = {0.5: (48, 1024), 1.0: (116, 1024), 1.5: (176, 1024), 2.0: (244, 2048)}
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

    Features: `stem`, `block0`, ..., `block15`, `map`, the last one, and `features`,
      its mean.
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
        x = _stem(x, self.stem, train, self.dtype)
        number = 0
        for stage, blocks in enumerate(BLOCKS):
            width = WIDTHS[self.groups] * 2**stage
            for i in range(blocks):
                stride = 2 if i == 0 else 1
                unit = ShuffleUnit(width, stride, self.groups, self.dtype, name=f'block{number}')
                x, number = unit(x, train), number + 1
        return layers.pooled_classifier(x, self.num_classes)


class ShuffleUnitV2(nn.Module):
    """1x1, depthwise 3x3 and 1x1 convolutions beside a half of the channels, shuffled with it.

    With stride 1 the first half of x stays as it is, and the second is convolved. With stride 2
    both halves of what leaves are convolved from all of x, one of them without the first 1x1.
    """

    width: int
    stride: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        options = dict(train=train, dtype=self.dtype)
        half = self.width // 2
        beside, y = (x, x) if self.stride == 2 else jnp.split(x, [half], axis=-1)
        if self.stride == 2:
            beside = layers.conv_norm(
                x, x.shape[-1], 3, 2, groups=x.shape[-1], name='beside_depthwise', **options
            )
            beside = nn.relu(layers.conv_norm(beside, half, 1, name='beside', **options))
        y = nn.relu(layers.conv_norm(y, half, 1, name='reduce', **options))
        y = layers.conv_norm(y, half, 3, self.stride, groups=half, name='depthwise', **options)
        y = nn.relu(layers.conv_norm(y, half, 1, name='restore', **options))
        return channel_shuffle(jnp.concatenate([beside, y], axis=-1), 2)


class ShuffleNetV2(nn.Module):
    """A stem, stages of 4, 8 and 4 units, a 1x1 convolution, average pooling, a linear head.

    1,355,528 parameters with 100 classes at size 1 and stem `cifar`, the ShuffleNetV2 of
    distillation papers; 2,278,604 with 1000 classes and stem `imagenet`.

    Attributes:
      num_classes: number of logits.
      size: 0.5, 1.0, 1.5 or 2.0, with 48, 116, 176 or 244 channels in the first stage.
      stem: `imagenet`, a 3x3 convolution and a maximum pooling, of stride 2 each: the resolution
        is reduced 32 times; `cifar`, a 1x1 convolution: 8 times.
      dtype: compute type, head excepted.

    Features: `stem`, `block0`, ..., `block15`, `last`, `map`, and `features`, its mean.
    """

    num_classes: Count = 1000
    size: Positive = 1.0
    stem: str = 'imagenet'
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('stem', self.stem, layers.STEMS)
        if self.size not in WIDTHS_V2:
            raise ValueError(
                f'ShuffleNetV2 size={self.size} must be one of {", ".join(map(str, WIDTHS_V2))}'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes]; ValueError for other ranks."""
        layers.check_rank('ShuffleNetV2', x, {4: 'images [B, H, W, C]'})
        first, last = WIDTHS_V2[self.size]
        x, options = _stem(x, self.stem, train, self.dtype), dict(train=train, dtype=self.dtype)
        number = 0
        for stage, blocks in enumerate(BLOCKS):
            for i in range(blocks):
                width, stride = first * 2**stage, 2 if i == 0 else 1
                unit = ShuffleUnitV2(width, stride, self.dtype, name=f'block{number}')
                x, number = unit(x, train), number + 1
        x = nn.relu(layers.conv_norm(x, last, 1, name='last', **options))
        return layers.pooled_classifier(x, self.num_classes)


def _stem(x: jax.Array, stem: str, train: bool, dtype: Any) -> jax.Array:
    size, stride = (3, 2) if stem == 'imagenet' else (1, 1)
    x = layers.conv_norm(
        x.astype(dtype), STEM_WIDTH, size, stride, train=train, dtype=dtype, name='stem'
    )
    x = nn.relu(x)
    return layers.max_pool(x) if stem == 'imagenet' else x
