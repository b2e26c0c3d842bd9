"""Masked autoencoders (He et al. 2021, arXiv:2111.06377): an encoder of the patches that are seen.

The encoder is the network of a stage; the decoder stands beside it as a part of its own, and is
dropped with it. The encoder's parameters are those of `kd.models.vit.ViT` of pool 'patches' by name
and shape, without head and learned positions.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.errors import UserError
from kd.models import layers
from kd.models.dit import grid_embedding
from kd.models.vit import EncoderBlock, check_heads, patch_tokens
from kd.ranges import Count, Finite, Positive

__all__ = ['PRESETS', 'Decoder', 'Encoder', 'Mask', 'preset', 'random_mask', 'visible_patches']

_NORMALISED = dict(pixel_mean=(0.485, 0.456, 0.406), pixel_std=(0.229, 0.224, 0.225))
# By name, the arguments of `Encoder`; patches of 16 pixels.
PRESETS: dict[str, dict[str, Any]] = {
    'vit_s': dict(_NORMALISED, width=384, depth=12, heads=6),
    'vit_b': dict(_NORMALISED, width=768, depth=12, heads=12),
    'vit_l': dict(_NORMALISED, width=1_024, depth=24, heads=16),
    'vit_h': dict(_NORMALISED, width=1_280, depth=32, heads=16, patch=14),
}


class Mask(NamedTuple):
    """Which patches are seen.

    Attributes:
      keep: int32 [B, V], those that are, in the order of their tokens.
      restore: int32 [B, L], the place of each patch among first the seen and then the hidden ones.
      hidden: float32 [B, L], 1 for patches that are not seen.
    """

    keep: jax.Array
    restore: jax.Array
    hidden: jax.Array


def visible_patches(patches: int, ratio: float) -> int:
    """V = floor(L (1 - ratio)), of which there must be one.

    At 224 pixels 49 of 196 are seen at 75 %, 9 at 95 % and 3 at 98 %; DMAE, which says 10 and 4,
    counts the class token.

    Raises:
      UserError: none would be seen.
    """
    # 10 (1 - .9) is a little below 1.
    visible = math.floor(patches * (1.0 - ratio) + 1e-6)
    if visible < 1:
        raise UserError(f'mask_ratio={ratio} leaves none of {patches} patches to be seen.')
    return visible


def random_mask(key: jax.Array, batch: int, patches: int, visible: int) -> Mask:
    """`visible` of `patches` patches of every image, each set as likely as another."""
    order = jnp.argsort(jax.random.uniform(key, (batch, patches)), axis=1)
    restore = jnp.argsort(order, axis=1)
    return Mask(order[:, :visible], restore, (restore >= visible).astype(jnp.float32))


class Encoder(nn.Module):
    """Pre-norm blocks over a class token and the patches that are seen, at fixed places.

    Attributes:
      patch: side of a patch; divides the image's height and width.
      width: size of a token.
      depth: number of blocks.
      heads: attention heads; divides `width`.
      mlp_ratio: hidden units of a block's MLP over `width`.
      pixel_mean, pixel_std: see `kd.models.layers.standardised`.
      dtype: compute type, norms' statistics and softmax excepted.

    Features: `patch_embed`, `block0`, ..., `encoder_norm`, each [B, 1 + V, width] but the first.

    Kernels are Xavier-uniform, that of the patches as the matrix it is; queries, keys and values
    are drawn apart.
    """

    patch: Count = 16
    width: Count = 768
    depth: Count = 12
    heads: Count = 12
    mlp_ratio: Positive = 4.0
    pixel_mean: tuple[Finite, ...] = (0.5,)
    pixel_std: tuple[Positive, ...] = (0.5,)
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_heads('Encoder', self.width, self.heads)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        images: jax.Array,
        *,
        train: bool = False,
        keep: jax.Array | None = None,
        stop: int | None = None,
    ) -> jax.Array:
        """Images [B, H, W, C] to tokens [B, 1 + V, width], that of the class first.

        Args:
          images: in [-1, 1].
          train: the same in training and evaluation.
          keep: int [B, V], see `Mask`; None for all patches.
          stop: leave after so many blocks, without the last norm; None for all and the norm.

        Raises:
          ValueError: an input that is not a batch of images, or not divisible into patches.
        """
        del train
        space = images.shape[1:3]
        x = layers.standardised(images, self.pixel_mean, self.pixel_std)
        x = patch_tokens(x, self.patch, self.width, self.dtype, _as_matrix)
        rows, columns = (side // self.patch for side in space)
        x = x + grid_embedding(rows, columns, self.width).astype(x.dtype)
        if keep is not None:
            x = jnp.take_along_axis(x, keep[..., None], axis=1)
        first = self.param('cls', nn.initializers.normal(0.02), (1, 1, self.width))
        first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, self.width))
        x = jnp.concatenate([first, x], axis=1)
        hidden = int(self.width * self.mlp_ratio)
        for i in range(self.depth if stop is None else stop):
            x = EncoderBlock(self.heads, hidden, self.dtype, name=f'block{i}')(x)
        return x if stop is not None else _norm(self.dtype, 'encoder_norm')(x)


class Decoder(nn.Module):
    """Tokens of the patches that are seen, and one for all others, to the pixels of every patch.

    Attributes:
      grid: patches along height and width.
      outputs: numbers of a patch, patch^2 channels.
      width, depth, heads, mlp_ratio, dtype: as of `Encoder`.
    """

    grid: tuple[Count, Count]
    outputs: Count
    width: Count = 512
    depth: Count = 8
    heads: Count = 16
    mlp_ratio: Positive = 4.0
    dtype: Any = jnp.float32

    def __post_init__(self):
        check_heads('Decoder', self.width, self.heads)
        super().__post_init__()

    @nn.compact
    def __call__(self, tokens: jax.Array, restore: jax.Array, *, train: bool = False) -> jax.Array:
        """Tokens [B, 1 + V, D] and `Mask.restore` [B, L] to float32 [B, L, outputs]."""
        del train
        x = _dense(self.width, self.dtype, 'embed')(tokens)
        hidden = self.param('mask_token', nn.initializers.normal(0.02), (1, 1, self.width))
        count = restore.shape[1] + 1 - x.shape[1]
        hidden = jnp.broadcast_to(hidden.astype(x.dtype), (x.shape[0], count, self.width))
        patches = jnp.concatenate([x[:, 1:], hidden], axis=1)
        patches = jnp.take_along_axis(patches, restore[..., None], axis=1)
        patches = patches + grid_embedding(*self.grid, self.width).astype(x.dtype)
        x = jnp.concatenate([x[:, :1], patches], axis=1)
        inner = int(self.width * self.mlp_ratio)
        for i in range(self.depth):
            x = EncoderBlock(self.heads, inner, self.dtype, name=f'block{i}')(x)
        x = _norm(self.dtype, 'decoder_norm')(x)
        return _dense(self.outputs, self.dtype, 'pixels')(x)[:, 1:].astype(jnp.float32)


def preset(of: str, **changes: Any) -> Encoder:
    """The encoder that is known as `of`, of standardised pixels, with changes of its attributes.

    Raises:
      ValueError: a name that is not there.
    """
    if of not in PRESETS:
        raise ValueError(f"there is no encoder '{of}'; known are: {', '.join(PRESETS)}.")
    return Encoder(**{**PRESETS[of], **changes})


_xavier = nn.initializers.xavier_uniform()


def _as_matrix(key: jax.Array, shape: Any, dtype: Any = jnp.float32) -> jax.Array:
    """Of a kernel [h, w, C, D] as the matrix [h w C, D]."""
    return _xavier(key, (math.prod(shape[:-1]), shape[-1]), dtype).reshape(shape)


def _dense(width: int, dtype: Any, name: str) -> nn.Dense:
    return nn.Dense(width, dtype=dtype, kernel_init=_xavier, name=name)


def _norm(dtype: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)
