"""VGG (Simonyan and Zisserman 2014, arXiv:1409.1556), in the form used for CIFAR."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count

WIDTHS = (64, 128, 256, 512, 512)
# Convolutions of each stage. VGG-8 is of distillation papers, the others are A, B, D and E.
CONVOLUTIONS = {
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class Stage(nn.Module):
    """3x3 convolutions, with bias, norm and ReLU each."""

    convolutions: int
    width: int
    norm: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for i in range(self.convolutions):
            x = nn.Conv(
                self.width, (3, 3), padding=1, dtype=self.dtype, kernel_init=layers.he_init,
                name=f'conv{i}',
            )(x)  # fmt: skip
            norm = layers.norm(self.norm, train=train, dtype=self.dtype, name=f'norm{i}')
            x = nn.relu(norm(x))
        return x


class VGG(nn.Module):
    """Five stages of 3x3 convolutions with maximum pooling between, average pooling, linear head.

    Of the paper are the convolutions; batch norms, and one linear layer after average pooling in
    place of three, are of its CIFAR form. With 100 classes 3,965,028 parameters at depth 8 and
    9,462,180 at depth 13.

    Attributes:
      depth: 8, 11, 13, 16 or 19.
      num_classes: number of logits.
      norm: `batch` (with collection 'batch_stats'), `group`, `instance` or `none`.
      dtype: compute type, head excepted.

    Three poolings come after the first three stages; the fourth stage is pooled too where images
    have at least 64 pixels a side.

    Features: `stage1`, ..., `stage5`, `map`, the last one, and `features`, its mean.
    """

    depth: Count = 13
    num_classes: Count = 10
    norm: str = 'batch'
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('norm', self.norm, layers.NORMS)
        if self.depth not in CONVOLUTIONS:
            raise ValueError(
                f'VGG depth={self.depth} must be one of {", ".join(map(str, CONVOLUTIONS))}'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes]; ValueError for other ranks."""
        layers.check_rank('VGG', x, {4: 'images [B, H, W, C]'})
        poolings = 3 if min(x.shape[1:3]) < 64 else 4
        x = x.astype(self.dtype)
        for i, (count, width) in enumerate(zip(CONVOLUTIONS[self.depth], WIDTHS, strict=True)):
            x = Stage(count, width, self.norm, self.dtype, name=f'stage{i + 1}')(x, train)
            x = nn.max_pool(x, (2, 2), (2, 2)) if i < poolings else x
        return layers.pooled_classifier(x, self.num_classes)
