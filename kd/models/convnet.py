"""The ConvNet of dataset distillation, for images and for signals."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count

MNIST = (28, 28, 1)


class ConvBlock(nn.Module):
    """Convolution of size 3, norm, ReLU, average pooling by 2 (an odd rest is dropped)."""

    width: int
    padding: int
    norm: str
    conv: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        axes = x.ndim - 2
        x = nn.Conv(
            self.width,
            (3,) * axes,
            padding=self.padding,
            dtype=self.dtype,
            conv_general_dilated=layers.CONVS[self.conv],
            kernel_init=layers.torch_kernel_init,
            bias_init=layers.torch_bias_init(3**axes * x.shape[-1]),
            name='conv',
        )(x)
        x = nn.relu(layers.norm(self.norm, train=train, dtype=self.dtype, name='norm')(x))
        return nn.avg_pool(x, (2,) * axes, strides=(2,) * axes)


class ConvNet(nn.Module):
    """`depth` times [conv 3, norm, ReLU, average pool 2], flattened, and a linear head.

    The network of Zhao, Mopuri and Bilen, "Dataset Condensation with Gradient Matching"
    (arXiv:2006.05929), and of the trajectory-matching literature: depth 3, width 128 and instance
    norm at 32x32 pixels (320,010 parameters with 3 channels and 10 classes), depth 4 at 64x64,
    depth 5 at 128x128. Convolutions are padded by 1; as published, the first one by 3 where images
    are those of MNIST, 28x28 with one channel, which thus become 32x32 (317,706 parameters).
    Initialised as PyTorch does by default, uniform on +-1/sqrt(fan_in).

    Attributes:
      depth: number of blocks; each halves the resolution.
      width: channels of each block.
      num_classes: number of logits.
      norm: `instance`, `group`, `batch` or `none` (see `kd.models.layers.norm`).
      conv: `direct`, or `matmul` for training unrolled in a `lax.scan` on CPU (see
        `kd.models.layers.matmul_conv`); the parameters and the function are the same. `auto` is
        `direct`, and leaves the choice to a method that unrolls (see `in_loops`).
      dtype: compute type of the blocks.

    Features: `block0`, ..., and `features`, the flattened output of the last block.
    """

    depth: Count = 3
    width: Count = 128
    num_classes: Count = 10
    norm: str = 'instance'
    conv: str = 'auto'
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('norm', self.norm, layers.NORMS)
        layers.check_choice('conv', self.conv, ('auto', *layers.CONVS))
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] or signals [B, L, C] to float32 logits [B, num_classes].

        Raises:
          ValueError: an input of another rank, or too small to be halved `depth` times.
        """
        layers.check_rank('ConvNet', x, {4: 'images [B, H, W, C]', 3: 'signals [B, L, C]'})
        if min(x.shape[1:-1]) < 2**self.depth:
            raise ValueError(
                f'ConvNet of depth={self.depth} halves its input {self.depth} times and needs at '
                f'least {2**self.depth} pixels a side, got shape {x.shape}; lower depth'
            )
        padding = 3 if x.shape[1:] == MNIST else 1
        x = x.astype(self.dtype)
        conv = 'direct' if self.conv == 'auto' else self.conv
        for i in range(self.depth):
            options = dict(norm=self.norm, conv=conv, dtype=self.dtype, name=f'block{i}')
            x = ConvBlock(self.width, 1 if i else padding, **options)(x, train)
        return layers.classifier(x.reshape(x.shape[0], -1), self.num_classes)


def in_loops(module: nn.Module, platform: str) -> nn.Module:
    """A network as it is best run inside of a loop on a platform; others than ConvNets as they are.

    Args:
      module: a ConvNet whose `conv` is 'auto' gets `matmul` on CPU and `direct` elsewhere.
      platform: 'cpu', 'gpu' or 'tpu'.
    """
    if not isinstance(module, ConvNet) or module.conv != 'auto':
        return module
    return module.clone(conv='matmul' if platform == 'cpu' else 'direct')
