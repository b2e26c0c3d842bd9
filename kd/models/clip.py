"""Vision towers of CLIP (Radford et al. 2021, arXiv:2103.00020), as feature extractors."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

from kd.models import layers
from kd.models.attention import attend
from kd.parallel import layout
from kd.ranges import Count, Finite, Positive, Whole

__all__ = ['PRESETS', 'ClipVision', 'preset']

_OPENAI = dict(
    patch=14,
    pixel_mean=(0.48145466, 0.4578275, 0.40821073),
    pixel_std=(0.26862954, 0.26130258, 0.27577711),
)
# By name, the arguments of `ClipVision`.
PRESETS: dict[str, dict[str, Any]] = {
    'vit_b_32': dict(_OPENAI, patch=32, width=768, depth=12, heads=12, mlp_hidden=3_072),
    'vit_l_14': dict(_OPENAI, width=1_024, depth=24, heads=16, mlp_hidden=4_096),
    'vit_l_14_336': dict(_OPENAI, width=1_024, depth=24, heads=16, mlp_hidden=4_096, image=336),
    'toy': dict(image=8, patch=4, width=16, depth=2, heads=2, mlp_hidden=32),
}


@dataclasses.dataclass(unsafe_hash=True)
class Tower:
    """What a tower computes.

    Attributes:
      image: side of the images, in pixels.
      patch: side of a square.
      width, depth, heads, mlp_hidden: of the blocks; `depth` is that of the released tower.
      mlp: 'quick_gelu', x sigmoid(1.702 x), or 'gelu'.
      layer: of the hidden states, counted as transformers does: 0 before the first block, -1 behind
        the last, -2 behind the one before, which LLaVA takes.
      epsilon: of the norms.
      pixel_mean, pixel_std: by which pixels in [0, 1] are standardised, a number for each channel
        or one for all.
      stacked: whether the blocks' parameters are stacked, [blocks, ...], and run by one scan, which
        compiles faster.
      dtype, param_dtype: compute type and that of the parameters.
    """

    image: Count = 224
    patch: Count = 14
    width: Count = 1_024
    depth: Count = 24
    heads: Count = 16
    mlp_hidden: Count = 4_096
    mlp: Literal['quick_gelu', 'gelu'] = 'quick_gelu'
    layer: Whole = -2
    epsilon: Positive = 1e-5
    pixel_mean: tuple[Finite, ...] = (0.5,)
    pixel_std: tuple[Positive, ...] = (0.5,)
    stacked: bool = False
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @property
    def blocks(self) -> int:
        """That are computed."""
        return self.layer if self.layer >= 0 else self.depth + 1 + self.layer

    @property
    def patches(self) -> int:
        """N, of an image."""
        return (self.image // self.patch) ** 2

    def dense(self, features: int, product: layout.Product) -> nn.Dense:
        """A projection."""
        return nn.Dense(
            features, dtype=self.dtype, param_dtype=self.param_dtype, dot_general=product
        )

    def norm(self, name: str | None = None) -> nn.LayerNorm:
        """A norm over the last axis."""
        return nn.LayerNorm(
            epsilon=self.epsilon, dtype=self.dtype, param_dtype=self.param_dtype, name=name
        )


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); every layer has a bias."""

    of: Tower

    def setup(self):
        of = self.of
        self.norm1, self.norm2 = of.norm(), of.norm()
        wide, back = layout.WIDENING, layout.NARROWING
        self.query, self.key, self.value = (of.dense(of.width, wide) for _ in range(3))
        self.output = of.dense(of.width, back)
        self.up, self.down = of.dense(of.mlp_hidden, wide), of.dense(of.width, back)

    def __call__(self, x: jax.Array) -> jax.Array:
        y = self.norm1(x)
        heads = (
            rearrange(f(y), 'b n (h d) -> b n h d', h=self.of.heads)
            for f in (self.query, self.key, self.value)
        )
        x = x + self.output(rearrange(attend(*heads, fused=True), 'b n h d -> b n (h d)'))
        y = self.up(self.norm2(x))
        quick = self.of.mlp == 'quick_gelu'
        y = y * nn.sigmoid(1.702 * y) if quick else nn.gelu(y, approximate=False)
        return x + self.down(y)


class _Scanned(Block):
    """A block as the body of a scan."""

    def __call__(self, x):
        return super().__call__(x), None


class ClipVision(Tower, nn.Module):
    """Images to features of their patches.

    The image is cut into squares, each mapped linearly to a token, behind a class token that is
    learnt; pre-norm blocks with learned positions follow. What comes out are the hidden states of
    one layer without the class token; of later layers there are no parameters.

    Attributes: as of `Tower`.

    Features: `block0`, ..., with the class token (unless stacked).
    """

    # Of a batch, what it takes.
    fields = ('image',)

    def __post_init__(self):
        layers.check_choice('mlp', self.mlp, ('quick_gelu', 'gelu'))
        if self.image % self.patch or self.width % self.heads:
            raise ValueError(
                f'ClipVision: patch={self.patch} must divide image={self.image}, and '
                f'heads={self.heads} width={self.width}.'
            )
        if not -self.depth - 1 <= self.layer <= self.depth:
            raise ValueError(f'ClipVision has {self.depth} layers, and none {self.layer}.')
        super().__post_init__()

    @nn.compact
    def __call__(self, images: jax.Array, *, train: bool = False) -> jax.Array:
        """Images [B, H, W, C] in [-1, 1] to [B, N, width] in `dtype`, patches row by row.

        Raises:
          ValueError: images of another size.
        """
        del train
        layers.check_rank('ClipVision', images, {4: 'images [B, H, W, C]'})
        if images.shape[1:3] != (self.image, self.image):
            raise ValueError(
                f'ClipVision takes images of {self.image} x {self.image} pixels, got shape '
                f'{images.shape}.'
            )
        x = layers.standardised(images, self.pixel_mean, self.pixel_std)
        x = nn.Conv(
            self.width, (self.patch, self.patch), strides=self.patch, padding='VALID',
            use_bias=False, dtype=self.dtype, param_dtype=self.param_dtype, name='patch_embed',
        )(x.astype(self.dtype))  # fmt: skip
        x = rearrange(x, 'b h w d -> b (h w) d')
        initial = nn.initializers.normal(0.02)
        first = self.param('class_embed', initial, (self.width,), self.param_dtype)
        first = jnp.broadcast_to(first.astype(x.dtype), (x.shape[0], 1, self.width))
        shape = (1 + self.patches, self.width)
        positions = self.param('positions', initial, shape, self.param_dtype)
        x = jnp.concatenate([first, x], axis=1) + positions.astype(x.dtype)
        x = self.norm('pre_norm')(x)
        of = Tower(**{each.name: getattr(self, each.name) for each in dataclasses.fields(Tower)})
        if self.stacked and self.blocks:
            scanned = nn.scan(
                _Scanned,
                variable_axes={'params': 0, 'intermediates': 0},
                split_rngs={'params': True},
                length=self.blocks,
                # Traces a block twice, and what is drawn goes by that.
                check_constancy_invariants=self.is_initializing(),
            )
            x, _ = scanned(of, name='blocks')(x)
        else:
            for i in range(self.blocks):
                x = Block(of, name=f'block{i}')(x)
        return x[:, 1:]


def preset(of: str, **changes: Any) -> ClipVision:
    """The tower that is known as `of`, with changes of its attributes.

    Raises:
      ValueError: a name that is not there.
    """
    if of not in PRESETS:
        raise ValueError(f"there is no tower '{of}'; known are: {', '.join(PRESETS)}.")
    return ClipVision(**{**PRESETS[of], **changes})
