"""Vision transformer."""

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from kd.models import layers
from kd.models.attention import attend
from kd.models.dit import grid_embedding
from kd.ranges import Count, Decay, Finite, Positive

POOLS = ('gap', 'cls', 'patches')
PLACES = ('learned', 'grid', 'fixed')


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


class Attention(nn.Module):
    """Self-attention of heads, [B, N, D] to the same; every projection has a bias."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(y: jax.Array, name: str) -> jax.Array:
            return nn.Dense(x.shape[-1], dtype=self.dtype, kernel_init=_xavier, name=name)(y)

        apart = (
            rearrange(dense(x, name), 'b n (h d) -> b n h d', h=self.heads)
            for name in ('query', 'key', 'value')
        )
        return dense(rearrange(attend(*apart), 'b n h d -> b n (h d)'), 'out')


class EncoderBlock(nn.Module):
    """Pre-norm transformer block: x + attention(norm(x)), then x + mlp(norm(x)).

    In training each of the two is left out of an example with probability `drop_path`, and scaled
    up where it is not (arXiv:1603.09382); this needs the 'dropout' key.
    """

    heads: int
    mlp_hidden: int
    dtype: Any
    drop_path: float = 0.0

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        def kept(y: jax.Array, name: str) -> jax.Array:
            if not self.drop_path:
                return y
            return nn.Dropout(self.drop_path, (1, 2), deterministic=not train, name=name)(y)

        y = _layer_norm(self.dtype, 'norm1')(x)
        x = x + kept(Attention(self.heads, self.dtype, name='attention')(y), 'drop1')
        y = _layer_norm(self.dtype, 'norm2')(x)
        return x + kept(MlpBlock(self.mlp_hidden, self.dtype, name='mlp')(y), 'drop2')


def patch_tokens(
    x: jax.Array, patch: int, width: int, dtype: Any, initial: nn.initializers.Initializer
) -> jax.Array:
    """Images [B, H, W, C] to tokens [B, H W / patch^2, width], row by row; in a compact method.

    Raises:
      ValueError: an input that is not a batch of images, or not divisible into patches.
    """
    layers.check_rank('ViT', x, {4: 'images [B, H, W, C]'})
    if x.shape[1] % patch or x.shape[2] % patch:
        raise ValueError(
            f'ViT cuts images into squares of patch={patch} pixels, which must divide '
            f'height and width, got shape {x.shape}'
        )
    x = nn.Conv(
        width,
        (patch, patch),
        strides=(patch, patch),
        padding='VALID',
        dtype=dtype,
        kernel_init=initial,
        name='patch_embed',
    )(x.astype(dtype))
    return x.reshape(x.shape[0], -1, width)


class ViT(nn.Module):
    """Vision transformer (Dosovitskiy et al., arXiv:2010.11929), pre-norm.

    The image is cut into `patch` x `patch` squares, each mapped linearly to a token; the norm of
    the last block's output is averaged over the tokens (`gap`) or read from an extra first token
    (`cls`); with `patches` there is that token too, the others are averaged, and the norm is that
    of the average (arXiv:2111.06377). ViT-Ti/S/B have depth 12, width 192/384/768 and 3/6/12 heads.

    Attributes:
      patch: side of a patch; divides the image's height and width.
      width: size of a token.
      depth: number of blocks.
      heads: attention heads; divides `width`.
      num_classes: number of logits.
      mlp_ratio: hidden units of a block's MLP over `width`.
      pool: 'gap', 'cls' or 'patches'.
      places: where patches lie: 'learned'; 'grid', learned from the sines and cosines of
        `grid_embedding` on; or 'fixed', those as they are. The extra token's begins at 0.
      drop_path: of the last block, see `EncoderBlock`; that of block i of n is i / (n - 1) of it.
      pixel_mean, pixel_std: see `kd.models.layers.standardised`.
      dtype: compute type, norms' statistics, softmax and head excepted.

    Features: `patch_embed`, `block0`, ..., `encoder_norm` (all [B, tokens, width] but the first,
    [B, H / patch, W / patch, width], and with `patches` the last, [B, width]), and `features`, the
    pooled [B, width].
    """

    patch: Count = 4
    width: Count = 192
    depth: Count = 12
    heads: Count = 3
    num_classes: Count = 10
    mlp_ratio: Positive = 4.0
    pool: str = 'gap'
    places: Literal['learned', 'grid', 'fixed'] = 'learned'
    drop_path: Decay = 0.0
    pixel_mean: tuple[Finite, ...] = (0.5,)
    pixel_std: tuple[Positive, ...] = (0.5,)
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('pool', self.pool, POOLS)
        layers.check_choice('places', self.places, PLACES)
        check_heads('ViT', self.width, self.heads)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] to float32 logits [B, num_classes].

        Raises:
          ValueError: an input that is not a batch of images, or not divisible into patches.
        """
        space = x.shape[1:3]
        x = layers.standardised(x, self.pixel_mean, self.pixel_std)
        initial = nn.initializers.lecun_normal()
        x = patch_tokens(x, self.patch, self.width, self.dtype, initial)
        extra = self.pool != 'gap'
        if extra:
            cls = self.param('cls', nn.initializers.zeros, (1, 1, self.width))
            x = jnp.concatenate([jnp.tile(cls.astype(x.dtype), (x.shape[0], 1, 1)), x], axis=1)
        rows, columns = (side // self.patch for side in space)
        x = x + self._positions(rows, columns, extra).astype(x.dtype)
        hidden = int(self.width * self.mlp_ratio)
        for i in range(self.depth):
            drop = self.drop_path * i / max(self.depth - 1, 1)
            x = EncoderBlock(self.heads, hidden, self.dtype, drop, name=f'block{i}')(x, train=train)
        if self.pool == 'patches':
            x = x[:, 1:].mean(axis=1)
        x = _layer_norm(self.dtype, 'encoder_norm')(x)
        if self.pool != 'patches':
            x = x.mean(axis=1) if self.pool == 'gap' else x[:, 0]
        return layers.classifier(x, self.num_classes)

    def _positions(self, rows: int, columns: int, extra: bool) -> jax.Array:
        """[1, tokens, width]."""
        shape = (1, extra + rows * columns, self.width)

        def grid(*_: Any) -> jax.Array:
            table = grid_embedding(rows, columns, self.width)
            return jnp.pad(table, ((int(extra), 0), (0, 0)))[None]

        if self.places == 'fixed':
            return grid()
        initial = nn.initializers.normal(0.02) if self.places == 'learned' else grid
        return self.param('positions', initial, shape)


def check_heads(network: str, width: int, heads: int) -> None:
    """Raises ValueError for heads that do not divide the width."""
    if width % heads:
        raise ValueError(f'{network} width={width} must be divisible by heads={heads}')


_xavier = nn.initializers.xavier_uniform()


def _layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    return nn.LayerNorm(epsilon=1e-6, dtype=dtype, name=name)
