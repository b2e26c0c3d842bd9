"""Residual networks for CIFAR: the original of He et al., and the wide ones of Zagoruyko et al."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers

STAGE_WIDTHS = (16, 32, 64)
# He et al. (arXiv:1502.01852), in its backward form.
kernel_init = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


def _conv(width: int, size: int, stride: int, dtype: Any, name: str) -> nn.Conv:
    """A convolution without bias, padded by size // 2 on every side, as in PyTorch.

    (With stride 2 on an even side, 'SAME' would pad only at the end.)
    """
    return nn.Conv(
        width,
        (size, size),
        strides=(stride, stride),
        padding=size // 2,
        use_bias=False,
        dtype=dtype,
        kernel_init=kernel_init,
        name=name,
    )


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

        y = _conv(self.width, 3, self.stride, self.dtype, 'conv1')(x)
        y = nn.relu(norm('norm1')(y))
        y = norm('norm2')(_conv(self.width, 3, 1, self.dtype, 'conv2')(y))
        if x.shape != y.shape:
            x = _conv(self.width, 1, self.stride, self.dtype, 'shortcut')(x)
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
        y = _conv(self.width, 3, self.stride, self.dtype, 'conv1')(a)
        y = nn.relu(norm('norm2')(y))
        y = _conv(self.width, 3, 1, self.dtype, 'conv2')(y)
        if x.shape != y.shape:
            x = _conv(self.width, 1, self.stride, self.dtype, 'shortcut')(a)
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
      norm: `batch` (with collection 'batch_stats'), `group`, `instance` or `none`.
      dtype: compute type, head excepted.

    Features: `stem`, `stage1`, `stage1/block0`, ..., `stage3`, and `features`, the pooled output.
    """

    depth: int = 20
    num_classes: int = 10
    widen: int = 1
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
        x = _conv(STAGE_WIDTHS[0], 3, 1, self.dtype, 'stem')(x.astype(self.dtype))
        x = layers.norm(self.norm, train=train, dtype=self.dtype, name='stem_norm')(x)
        x = nn.relu(x)
        blocks = (self.depth - 2) // 6
        for i, width in enumerate(STAGE_WIDTHS):
            x = Stage(
                BasicBlock,
                blocks,
                width * self.widen,
                1 if i == 0 else 2,
                self.norm,
                self.dtype,
                name=f'stage{i + 1}',
            )(x, train)
        return layers.classifier(x.mean(axis=(1, 2)), self.num_classes)


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

    Features: `stem`, `stage1`, `stage1/block0`, ..., `stage3`, and `features`, the pooled output.
    """

    depth: int = 16
    num_classes: int = 10
    widen: int = 2
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
        x = _conv(STAGE_WIDTHS[0], 3, 1, self.dtype, 'stem')(x.astype(self.dtype))
        blocks = (self.depth - 4) // 6
        for i, width in enumerate(STAGE_WIDTHS):
            x = Stage(
                PreactBlock,
                blocks,
                width * self.widen,
                1 if i == 0 else 2,
                self.norm,
                self.dtype,
                name=f'stage{i + 1}',
            )(x, train)
        x = layers.norm(self.norm, train=train, dtype=self.dtype, name='final_norm')(x)
        return layers.classifier(nn.relu(x).mean(axis=(1, 2)), self.num_classes)


def _check_depth(network: str, depth: int, rest: int) -> None:
    if depth < 6 + rest or (depth - rest) % 6:
        near = max(6 + rest, round((depth - rest) / 6) * 6 + rest)
        raise ValueError(
            f'{network} depth={depth} must be 6n + {rest} with n >= 1; the nearest is {near}'
        )
