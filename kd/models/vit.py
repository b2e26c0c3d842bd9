"""Vision transformer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count, Positive

POOLS = ('gap', 'cls')


class MlpBlock(nn.Module):
    """Dense, GELU, dense."""

    hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        x = nn.Dense(self.hidden, dtype=self.dtype, kernel_init=_xavier, name='up')(x)
        x = nn.gelu(x, approximate=False)
        return nn.Dense(width, dtype=self.dtype, kernel_init=_xavier, name='down')(x)


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    mlp_hidden: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = _layer_norm(self.dtype, 'norm1')(x)
        y = nn.MultiHeadDotProductAttention(
            self.heads,
            dtype=self.dtype,
            kernel_init=_xavier,
            force_fp32_for_softmax=True,
            name='attention',
        )(y)
        x = x + y
        y = _layer_norm(self.dtype, 'norm2')(x)
        return x + MlpBlock(self.mlp_hidden, self.dtype, name='mlp')(y)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., arXiv:2010.11929), pre-norm, learned positions.

    The image is cut into `patch` x `patch` squares, each mapped linearly to a token; the norm of
    the last block's output is averaged over the tokens (`gap`) or read from an extra first token
    (`cls`). ViT-Ti/S/B have depth 12, width 192/384/768 and 3/6/12 heads.

    Attributes:
      patch: side of a patch; divides the image's height and width.
      width: size of a token.
      depth: number of blocks.
      heads: attention heads; divides `width`.
      num_classes: number of logits.
      mlp_ratio: hidden units of a block's MLP over `width`.
      pool: 'gap' or 'cls'.
      dtype: compute type, norms' statistics, softmax and head excepted.

    Features: `patch_embed`, `block0`, ..., `encoder_norm` (all [B, tokens, width] but the first,
    [B, H / patch, W / patch, width]), and `features`, the pooled [B, width].
    """

    patch: Count = 4
    width: Count = 192
    depth: Count = 12
    heads: Count = 3
    num_classes: Count = 10
    mlp_ratio: Positive = 4.0
    pool: str = 'gap'
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('pool', self.pool, POOLS)
        if self.width % self.heads:
            raise ValueError(f'ViT width={self.width} must be divisible by heads={self.heads}')
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes].

        Raises:
          ValueError: an input that is not a batch of images, or not divisible into patches.
        """
        del train  # The same in training and evaluation.
        layers.check_rank('ViT', x, {4: 'images [B, H, W, C]'})
        if x.shape[1] % self.patch or x.shape[2] % self.patch:
            raise ValueError(
                f'ViT cuts images into squares of patch={self.patch} pixels, which must divide '
                f'height and width, got shape {x.shape}'
            )
        x = nn.Conv(
            self.width,
            (self.patch, self.patch),
            strides=(self.patch, self.patch),
            padding='VALID',
            dtype=self.dtype,
            name='patch_embed',
        )(x.astype(self.dtype))
        x = x.reshape(x.shape[0], -1, self.width)
        if self.pool == 'cls':
            cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.tile(cls.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
        positions = self.param(
            'positions', nn.initializers.normal(0.02), (1, x.shape[1], self.width)
        )
        x = x + positions.astype(x.dtype)
        hidden = int(self.width * self.mlp_ratio)
        for i in range(self.depth):
            x = EncoderBlock(self.heads, hidden, self.dtype, name=f'block{i}')(x)
        x = _layer_norm(self.dtype, 'encoder_norm')(x)
        x = x.mean(axis=1) if self.pool == 'gap' else x[:, 0]
        return layers.classifier(x, self.num_classes)


_xavier = nn.initializers.xavier_uniform()


def _layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)
