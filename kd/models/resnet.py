"""Residual networks: those of He et al. for CIFAR and for ImageNet, and the wide ones for CIFAR."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count

CIFAR_WIDTHS = (16, 32, 64)
IMAGENET_WIDTHS = (64, 128, 256, 512)


class BasicBlock(nn.Module):
    """ReLU(shortcut(x) + norm(conv(ReLU(norm(conv(x)))))).

    The shortcut is the identity, or a strided 1x1 convolution and a norm where the shape changes.
    """

    width: int
    stride: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(name):
            return layers.norm(self.norm, train=train, dtype=self.dtype, name=name)

        y = layers.conv(self.width, 3, self.stride, dtype=self.dtype, name='conv1')(x)
        y = nn.relu(norm('norm1')(y))
        y = norm('norm2')(layers.conv(self.width, 3, dtype=self.dtype, name='conv2')(y))
        if x.shape != y.shape:
            x = layers.conv(self.width, 1, self.stride, dtype=self.dtype, name='shortcut')(x)
            x = norm('shortcut_norm')(x)
        return nn.relu(x + y)


class BottleneckBlock(nn.Module):
    """As `BasicBlock`, with 1x1, 3x3 (strided) and 1x1 convolutions; 4 `width` channels leave."""

    width: int
    stride: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(name):
            return layers.norm(self.norm, train=train, dtype=self.dtype, name=name)

        out = 4 * self.width
        y = layers.conv(self.width, 1, dtype=self.dtype, name='conv1')(x)
        y = nn.relu(norm('norm1')(y))
        y = layers.conv(self.width, 3, self.stride, dtype=self.dtype, name='conv2')(y)
        y = nn.relu(norm('norm2')(y))
        y = norm('norm3')(layers.conv(out, 1, dtype=self.dtype, name='conv3')(y))
        if x.shape != y.shape:
            x = layers.conv(out, 1, self.stride, dtype=self.dtype, name='shortcut')(x)
            x = norm('shortcut_norm')(x)
        return nn.relu(x + y)


class PreactBlock(nn.Module):
    """shortcut + conv(ReLU(norm(conv(a)))), with a = ReLU(norm(x)).

    The shortcut is x, or a strided 1x1 convolution of a where the shape changes.
    """

    width: int
    stride: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def norm(name):
            return layers.norm(self.norm, train=train, dtype=self.dtype, name=name)

        a = nn.relu(norm('norm1')(x))
        y = layers.conv(self.width, 3, self.stride, dtype=self.dtype, name='conv1')(a)
        y = nn.relu(norm('norm2')(y))
        y = layers.conv(self.width, 3, dtype=self.dtype, name='conv2')(y)
        if x.shape != y.shape:
            x = layers.conv(self.width, 1, self.stride, dtype=self.dtype, name='shortcut')(a)
        return x + y


class Stage(nn.Module):
    """Blocks of one width; the first has the stride."""

    block: type[nn.Module]
    blocks: int
    width: int
    stride: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.blocks):
            stride = self.stride if i == 0 else 1
            x = self.block(self.width, stride, self.norm, self.dtype, name=f'block{i}')(x, train)
        return x


def _stages(
    x: jax.Array,
    block: type[nn.Module],
    blocks: Sequence[int],
    widths: Sequence[int],
    norm: str,
    dtype: Any,
    train: bool,
) -> jax.Array:
    """`stage1`, `stage2`, ...; all but the first halve the resolution."""
    for i, (number, width) in enumerate(zip(blocks, widths, strict=True)):
        stride = 1 if i == 0 else 2
        x = Stage(block, number, width, stride, norm, dtype, name=f'stage{i + 1}')(x, train)
    return x


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n + 2 (He et al., "Deep Residual Learning", arXiv:1512.03385, 4.2).

    A 3x3 convolution, three stages of n basic blocks with 16, 32 and 64 channels (times `widen`)
    at full, half and quarter resolution, global average pooling, a linear head. Shortcuts that
    change the shape are projections (option B of the paper), as in most distillation code; the
    paper's CIFAR tables use zero padding, with 2,752 parameters less at `widen` 1.

    Attributes:
      depth: 8, 14, 20, 32, 44, 56, 110, ...: 6n + 2.
      num_classes: number of logits.
      widen: factor of the stages' channels.
      stem_width: channels of the stem; 32 in the ResNet-8x4 and -32x4 of distillation papers.
      blocks: of each stage, where they are not n each; then `depth` counts for nothing.
      norm: `batch` (with collection 'batch_stats'), `group`, `instance` or `none`.
      dtype: compute type, head excepted.

    Features: `stem`, `stage1`, `stage1/block0`, ..., `stage3`, `map`, the last one, and
      `features`, its mean.
    """

    depth: Count = 20
    num_classes: Count = 10
    widen: Count = 1
    stem_width: Count = CIFAR_WIDTHS[0]
    blocks: tuple[Count, Count, Count] | None = None
    norm: str = 'batch'
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('norm', self.norm, layers.NORMS)
        _check_depth('ResNet', self.depth, 2)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes]; ValueError for other ranks."""
        layers.check_rank('ResNet', x, {4: 'images [B, H, W, C]'})
        x = layers.conv(self.stem_width, 3, dtype=self.dtype, name='stem')(x.astype(self.dtype))
        x = layers.norm(self.norm, train=train, dtype=self.dtype, name='stem_norm')(x)
        x = nn.relu(x)
        blocks = self.blocks or ((self.depth - 2) // 6,) * 3
        widths = [width * self.widen for width in CIFAR_WIDTHS]
        x = _stages(x, BasicBlock, blocks, widths, self.norm, self.dtype, train)
        return layers.pooled_classifier(x, self.num_classes)


IMAGENET_BLOCKS: dict[int, tuple[type[nn.Module], tuple[int, ...]]] = {
    10: (BasicBlock, (1, 1, 1, 1)),
    18: (BasicBlock, (2, 2, 2, 2)),
    34: (BasicBlock, (3, 4, 6, 3)),
    50: (BottleneckBlock, (3, 4, 6, 3)),
    101: (BottleneckBlock, (3, 4, 23, 3)),
    152: (BottleneckBlock, (3, 8, 36, 3)),
}


class ImageNetResNet(nn.Module):
    """ResNet-18, -34, -50, -101 or -152 (arXiv:1512.03385, 4.1), or -10, also for small images.

    A stem, four stages of 64, 128, 256 and 512 channels (four times as many leave the bottlenecks
    of depth 50 and above) at 1, 1/2, 1/4 and 1/8 of the resolution after the stem, global average
    pooling, a linear head. The stride of a bottleneck is that of its 3x3 convolution, as in
    PyTorch. With 1000 classes 11,689,512 parameters at depth 18 and 25,557,032 at depth 50.

    Attributes:
      depth: one of the above.
      num_classes: number of logits.
      stem: `imagenet`, a 7x7 convolution and a maximum pooling, of stride 2 each; or `cifar`, a
        3x3 convolution at full resolution.
      norm: `batch` (with collection 'batch_stats'), `group`, `instance` or `none`.
      dtype: compute type, head excepted.

    Features: `stem`, `stage1`, `stage1/block0`, ..., `stage4`, `map`, the last one, and
      `features`, its mean.
    """

    depth: Count = 18
    num_classes: Count = 1000
    stem: str = 'imagenet'
    norm: str = 'batch'
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('norm', self.norm, layers.NORMS)
        layers.check_choice('stem', self.stem, layers.STEMS)
        if self.depth not in IMAGENET_BLOCKS:
            known = ', '.join(map(str, IMAGENET_BLOCKS))
            raise ValueError(f'ImageNetResNet depth={self.depth} must be one of {known}')
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes]; ValueError for other ranks."""
        layers.check_rank('ImageNetResNet', x, {4: 'images [B, H, W, C]'})
        large = self.stem == 'imagenet'
        size, stride = (7, 2) if large else (3, 1)
        x = x.astype(self.dtype)
        x = layers.conv(IMAGENET_WIDTHS[0], size, stride, dtype=self.dtype, name='stem')(x)
        x = nn.relu(layers.norm(self.norm, train=train, dtype=self.dtype, name='stem_norm')(x))
        x = layers.max_pool(x) if large else x
        block, blocks = IMAGENET_BLOCKS[self.depth]
        x = _stages(x, block, blocks, IMAGENET_WIDTHS, self.norm, self.dtype, train)
        return layers.pooled_classifier(x, self.num_classes)


class WideResNet(nn.Module):
    """Wide ResNet WRN-depth-widen of depth 6n + 4 (arXiv:1605.07146), without dropout.

    As `ResNet`, but norm and ReLU come before each convolution (and once more before pooling), and
    projections have no norm. WRN-16-2 and WRN-40-2 are the usual pair of distillation.

    Attributes:
      depth: 10, 16, 22, 28, 40, ...: 6n + 4 (the projections count).
      num_classes: number of logits.
      widen: factor of the stages' channels.
      norm: `batch` (with collection 'batch_stats'), `group`, `instance` or `none`.
      dtype: compute type, head excepted.

    Features: `stem`, `stage1`, `stage1/block0`, ..., `stage3`, `map`, the last one, and
      `features`, its mean.
    """

    depth: Count = 16
    num_classes: Count = 10
    widen: Count = 2
    norm: str = 'batch'
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('norm', self.norm, layers.NORMS)
        _check_depth('WideResNet', self.depth, 4)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes]; ValueError for other ranks."""
        layers.check_rank('WideResNet', x, {4: 'images [B, H, W, C]'})
        x = layers.conv(CIFAR_WIDTHS[0], 3, dtype=self.dtype, name='stem')(x.astype(self.dtype))
        blocks = (self.depth - 4) // 6
        widths = [width * self.widen for width in CIFAR_WIDTHS]
        x = _stages(x, PreactBlock, [blocks] * 3, widths, self.norm, self.dtype, train)
        x = layers.norm(self.norm, train=train, dtype=self.dtype, name='final_norm')(x)
        return layers.pooled_classifier(nn.relu(x), self.num_classes)


def _check_depth(network: str, depth: int, rest: int) -> None:
    if depth < 6 + rest or (depth - rest) % 6:
        near = max(6 + rest, round((depth - rest) / 6) * 6 + rest)
        raise ValueError(
            f'{network} depth={depth} must be 6n + {rest} with n >= 1; the nearest is {near}'
        )
