"""Diffusion transformers of text and image tokens together: SD 3 and 3.5, Flux, Qwen-Image.

Modules have the names of `SD3Transformer2DModel` and `FluxTransformer2DModel` of `diffusers`;
equal blocks in a row are one module with a leading axis.

Sources: Esser et al. 2024, arXiv:2403.03206; Flux as released; Qwen 2025, arXiv:2508.02324.
"""

from __future__ import annotations

from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kd.models import latent_parts
from kd.models.dit import grid_embedding
from kd.models.latent_parts import (
    Attention,
    Embedder,
    FeedForward,
    Modulation,
    given,
    image_inputs,
    layer_norm,
    modulated,
    preset_of,
    sides_of,
    stacked,
    timestep_features,
    unpatched,
)
from kd.models.rope import grid_angles
from kd.ranges import Count, Size

__all__ = ['PRESETS', 'SHARDING', 'MMDiT', 'preset']

SHARDING = latent_parts.SHARDING
PATCH = (2, 2)
EPSILON = 1e-6


class Block(nn.Module):
    """Attention of tokens and text together, then a feed-forward layer for each; see `MMDiT`.

    `((x, text), None)` of (x, text) and the condition [B, D].

    Attributes:
      heads, norm, fused, dtype: of `MMDiT`.
      dual: the tokens attend to each other once more.
      last: the text ends here.
    """

    heads: int
    norm: bool
    fused: bool
    dtype: Dtype
    dual: bool = False
    last: bool = False

    @nn.compact
    def __call__(self, carry, condition, turned, seen):
        (x, text), dtype = carry, self.dtype
        size = x.shape[-1]

        def attention(name: str, joint: Literal['none', 'both', 'first']) -> Attention:
            norm: Literal['none', 'head'] = 'head' if self.norm else 'none'
            return Attention(
                self.heads, True, norm, EPSILON, joint, fused=self.fused, dtype=dtype, name=name
            )  # fmt: skip

        def normed(y: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
            return modulated(layer_norm(y, EPSILON, dtype), shift, scale)

        parts = Modulation(9 if self.dual else 6, size, dtype, name='norm1')(condition)
        shift, scale, gate, shift_ff, scale_ff, gate_ff, *again = parts
        of_text = Modulation(2 if self.last else 6, size, dtype, name='norm1_context')(condition)
        # Of two, the scale comes first.
        of_text = of_text[::-1] if self.last else of_text
        found = attention('attn', 'first' if self.last else 'both')(
            normed(x, shift, scale), normed(text, *of_text[:2]), seen, turned
        )
        found, found_text = (found, text) if self.last else found
        if self.dual:
            twice = attention('attn2', 'none')(normed(x, *again[:2]))
        x = x + gate * found
        if self.dual:
            x = x + again[2] * twice
        y = normed(x, shift_ff, scale_ff)
        x = x + gate_ff * FeedForward('gelu', dtype, name='ff')(y)
        if self.last:
            return (x, text), None
        text = text + of_text[2] * found_text
        y = normed(text, *of_text[3:5])
        return (x, text + of_text[5] * FeedForward('gelu', dtype, name='ff_context')(y)), None


class SingleBlock(nn.Module):
    """Attention and a feed-forward layer side by side, over text and tokens as one; (x, None)."""

    heads: int
    fused: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x, condition, turned):
        size, dtype = x.shape[-1], self.dtype
        shift, scale, gate = Modulation(3, size, dtype, name='norm')(condition)
        y = modulated(layer_norm(x, EPSILON, dtype), shift, scale)
        found = Attention(
            self.heads, True, 'head', EPSILON, projected=False, fused=self.fused, dtype=dtype,
            name='attn',
        )(y, turned=turned)  # fmt: skip
        hidden = nn.gelu(nn.Dense(4 * size, dtype=dtype, name='proj_mlp')(y))
        both = jnp.concatenate([found, hidden], axis=-1)
        return x + gate * nn.Dense(size, dtype=dtype, name='proj_out')(both), None


class _Condition(nn.Module):
    """[B, D] of the time, the pooled text and the scale of guidance."""

    size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, t, pooled, guidance):
        def embedded(value, name):
            waves = timestep_features(value, 256).astype(self.dtype)
            return Embedder(self.size, self.dtype, name=name)(waves)

        total = embedded(t, 'timestep_embedder')
        if guidance is not None:
            total = total + embedded(1_000 * guidance, 'guidance_embedder')
        if pooled is None:
            return total
        text = Embedder(self.size, self.dtype, name='text_embedder')
        return total + text(pooled.astype(self.dtype))


class _Placed(nn.Module):
    """Tokens [B, N, D] of patches, with the middle of a table of places added."""

    size: int
    table: int
    span: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        sides = x.shape[1] // PATCH[0], x.shape[2] // PATCH[1]
        if max(sides) > self.table:
            raise ValueError(f'MMDiT knows {self.table} places along a side, got {max(sides)}.')
        y = nn.Conv(self.size, PATCH, PATCH, padding='VALID', dtype=self.dtype, name='proj')(x)

        def made() -> jax.Array:
            return grid_embedding(self.table, self.table, self.size, self.span)[None]

        places = self.variable('constants', 'pos_embed', made).value
        first = [(self.table - side) // 2 for side in sides]
        places = places.reshape(self.table, self.table, -1)[
            first[0] : first[0] + sides[0], first[1] : first[1] + sides[1]
        ]
        return (y + places.astype(self.dtype)).reshape(len(x), -1, self.size)


class MMDiT(nn.Module):
    """F(t, x, ...) like x, for x [B, H, W, C]; defaults are those of Stable Diffusion 3 medium.

    Attributes:
      width, depth, heads: of the transformer; blocks with a text of their own.
      single: blocks after these, over text and tokens as one.
      dual: so many first blocks attend once more (SD 3.5 medium).
      norm: queries and keys are normalised by head.
      context: size of a token of the text.
      text_norm: tokens of the text are normalised first (Qwen-Image).
      masked: the text comes with a mask of its tokens.
      pooled: size of the text as one vector; 0 for none.
      guided: it is told the scale of its guidance (Flux dev).
      table: patches along a side of the table of places; 0 for rotations.
      grid: patches along a side of the images of the table's training.
      axes: features of a head that rotations turn by text, row and column.
      centred: rows and columns count from the middle, and texts from where these end.
      remat: blocks are computed again for the gradient.
      fused: attention by a fused kernel where there is one.
      dtype: compute type; parameters are float32, the output has the type of x.
    """

    width: Count = 1_536
    depth: Count = 24
    heads: Count = 24
    single: Size = 0
    dual: Size = 0
    norm: bool = False
    context: Count = 4_096
    text_norm: bool = False
    masked: bool = False
    pooled: Size = 2_048
    guided: bool = False
    table: Size = 192
    grid: Count = 64
    axes: tuple[Count, ...] = (16, 56, 56)
    centred: bool = False
    remat: bool = False
    fused: bool = False
    dtype: Dtype = jnp.float32

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        masked, pooled = self.masked * ('mask',), bool(self.pooled) * ('pooled',)
        return ('text', *masked, *pooled, *(self.guided * ('guidance',)))

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], x [1, ...])."""
        return image_inputs(spec)

    @nn.compact
    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        *,
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
        pooled: jax.Array | None = None,
        guidance: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """F [B, H, W, C].

        Args:
          t: what it is told of the noise, [B], 1000 times a time in [0, 1].
          x: noised latents.
          text: [B, M, context], as the text encoders say it.
          mask: bool [B, M], which of these tokens are seen; None for all.
          pooled: [B, pooled], the text as one vector.
          guidance: [B], the scale.
          train: nothing here depends on it.

        Raises:
          ValueError: an input that is missing, or of another size.
        """
        del train
        rows, dtype = len(x), self.dtype
        shapes: dict[str, tuple[int, ...]] = dict(text=(1, self.context))
        shapes |= dict(pooled=(self.pooled,)) if self.pooled else {}
        shapes |= dict(guidance=()) if self.guided else {}
        told = given(self, rows, shapes, dict(text=text, pooled=pooled, guidance=guidance))
        sides = sides_of(self, x, PATCH)
        condition = _Condition(self.width, dtype, name='time_text_embed')(
            t, told['pooled'], told['guidance']
        )
        text = told['text']
        if self.text_norm:
            text = nn.RMSNorm(epsilon=EPSILON, dtype=dtype, name='txt_norm')(text)
        text = nn.Dense(self.width, dtype=dtype, name='context_embedder')(text)
        y, turned = self._tokens(x.astype(dtype), sides, text.shape[1])
        seen = mask
        if mask is not None:
            seen = jnp.concatenate([mask, jnp.ones(y.shape[:2], bool)], axis=1)[:, None, None]
        y = self._blocks(y, text, condition, turned, seen)
        scale, shift = Modulation(2, self.width, dtype, name='norm_out')(condition)
        y = modulated(layer_norm(y, EPSILON, dtype), shift, scale)
        y = nn.Dense(4 * x.shape[-1], dtype=dtype, name='proj_out')(y)
        if not self.table:
            # Channels come before the pixels of a patch.
            y = y.reshape(*y.shape[:2], -1, 4).swapaxes(2, 3)
        return unpatched(y, sides, PATCH).astype(x.dtype)

    def _tokens(self, x, sides, texts):
        if self.table:
            tokens = _Placed(self.width, self.table, self.grid, self.dtype, name='pos_embed')(x)
            return tokens, None
        (rows, columns), batch = sides, len(x)
        patches = x.reshape(batch, rows, 2, columns, 2, -1).transpose(0, 1, 3, 5, 2, 4)
        patches = patches.reshape(batch, rows * columns, -1)
        row, column = np.indices(tuple(sides)).reshape(2, -1)
        first = 0 * np.arange(texts)
        if self.centred:
            row, column = row - (rows - rows // 2), column - (columns - columns // 2)
            first = max(rows // 2, columns // 2) + np.arange(texts)
        places = [np.concatenate([first, place]) for place in (0 * row, row, column)]
        tokens = nn.Dense(self.width, dtype=self.dtype, name='x_embedder')(patches)
        return tokens, grid_angles(places, self.axes)

    def _blocks(self, x, text, condition, turned, seen):
        settings = self.heads, self.norm, self.fused, self.dtype
        # In Stable Diffusion the text ends in the last block.
        whole = self.depth - (self.table > 0)
        name, carry = 'transformer_blocks', (x, text)
        for first, count, dual in ((0, self.dual, True), (self.dual, whole - self.dual, False)):
            if count:
                made = stacked(Block, count, self.remat, 3)(
                    *settings, dual, name=f'{name}_from_{first}' if first else name
                )
                carry = made(carry, condition, turned, seen)[0]
        if self.table:
            kind = nn.remat(Block) if self.remat else Block
            last = kind(*settings, last=True, name=f'{name}_{whole}')
            return last(carry, condition, turned, seen)[0][0]
        x, text = carry
        x = jnp.concatenate([text, x], axis=1)
        if self.single:
            x = stacked(SingleBlock, self.single, self.remat, 2)(
                self.heads, self.fused, self.dtype, name=f'single_{name}'
            )(x, condition, turned)[0]
        return x[:, text.shape[1] :]


_FLUX = dict(
    width=3_072, depth=19, heads=24, single=38, norm=True, pooled=768, table=0
)  # fmt: skip
# By name, the arguments of `MMDiT`: billions of parameters 2.03, 2.24, 8.06, 11.89, 11.90, 20.43.
PRESETS: dict[str, dict[str, Any]] = {
    'sd3_medium': {},
    'sd35_medium': dict(dual=13, norm=True, table=384),
    'sd35_large': dict(width=2_432, depth=38, heads=38, norm=True),
    'flux_schnell': _FLUX,
    'flux_dev': dict(guided=True, **_FLUX),
    'qwen_image': dict(
        width=3_072,
        depth=60,
        heads=24,
        norm=True,
        context=3_584,
        text_norm=True,
        masked=True,
        pooled=0,
        table=0,
        centred=True,
    ),
}


def preset(of: str, **changes: Any) -> MMDiT:
    """The network that is known as `of`, with changes.

        network=dict(name='kd.models.mmdit.preset', of='sd3_medium', dtype='bfloat16')

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `MMDiT`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    return preset_of(MMDiT, PRESETS, of, changes)
