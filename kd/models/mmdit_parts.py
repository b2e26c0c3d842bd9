"""Parts of `kd.models.mmdit`: its blocks, and what is before and after them."""

from __future__ import annotations

from typing import Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kd.models.dit import grid_embedding
from kd.models.latent_parts import (
    Attention,
    Embedder,
    FeedForward,
    Modulation,
    layer_norm,
    modulated,
    timestep_features,
    unpatched,
)
from kd.models.rope import grid_angles

__all__ = ['BRANCHES', 'PATCH', 'Block', 'Embed', 'Head', 'SingleBlock']

PATCH = (2, 2)
EPSILON = 1e-6
# What a block of text and tokens adds to them; one over both as one is a branch itself.
BRANCHES = ('attention', 'mlp', 'context_mlp')


class Block(nn.Module):
    """Attention of tokens and text together, then a feed-forward layer for each; see `MMDiT`.

    `((x, text), None)` of (x, text) and the condition [B, D].

    Attributes:
      heads, norm, fused, dtype: of `MMDiT`.
      dual: the tokens attend to each other once more.
      last: the text ends here.
      branches: those that there are, of `BRANCHES`.
      linear: branches that are linear maps, and 'after' for maps after the block.
    """

    heads: int
    norm: bool
    fused: bool
    dtype: Dtype
    dual: bool = False
    last: bool = False
    branches: tuple[str, ...] = BRANCHES
    linear: tuple[str, ...] = ()

    @nn.compact
    def __call__(self, carry, condition, turned, seen, gates=None):
        (x, text), dtype = carry, self.dtype
        size = x.shape[-1]

        def attention(name: str, joint: Literal['none', 'both', 'first']) -> Attention:
            norm: Literal['none', 'head'] = 'head' if self.norm else 'none'
            return Attention(
                self.heads, True, norm, EPSILON, joint, fused=self.fused, dtype=dtype, name=name
            )  # fmt: skip

        def normed(y: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
            return modulated(layer_norm(y, EPSILON, dtype), shift, scale)

        def modulation(branch: str, of: str) -> tuple[list[jax.Array], list[jax.Array]]:
            """Shift, scale and gate of attention, and of a branch beside it; as they are needed."""
            with_attention = 'attention' in self.branches
            beside = branch in self.branches and branch not in self.linear
            again = 3 * (self.dual and with_attention and of == 'norm1')
            count = 3 * with_attention + 3 * beside + again
            parts = Modulation(count, size, dtype, name=of)(condition) if count else []
            first, rest = parts[: 3 * with_attention], parts[3 * with_attention :]
            return first + rest[3 * beside :], rest[: 3 * beside]

        def linear(y: jax.Array, name: str) -> jax.Array:
            zeros = nn.initializers.zeros
            return y + nn.Dense(size, dtype=dtype, kernel_init=zeros, name=name)(y)

        def fed(y: jax.Array, branch: str, parts: list[jax.Array]) -> jax.Array:
            """A stream after its feed-forward layer, or after the map in its place."""
            layer = {'mlp': 'ff', 'context_mlp': 'ff_context'}[branch]
            if branch in self.linear:
                return linear(y, f'{layer}_linear')
            shift, scale, gate = parts
            hidden = FeedForward('gelu', dtype, name=layer)(normed(y, shift, scale))
            return y + on(branch) * gate * hidden

        def on(branch: str) -> jax.Array | float:
            return 1.0 if gates is None else gates[BRANCHES.index(branch)].astype(dtype)

        attends = 'attention' in self.branches
        at_x, ff = modulation('mlp', 'norm1')
        if self.last:
            # Of two, the scale comes first.
            found = Modulation(2, size, dtype, name='norm1_context')(condition) if attends else []
            at_text, ff_text = found[::-1], list[jax.Array]()
        else:
            at_text, ff_text = modulation('context_mlp', 'norm1_context')
        if attends:
            shift, scale, gate, *again = at_x
            found = attention('attn', 'first' if self.last else 'both')(
                normed(x, shift, scale), normed(text, *at_text[:2]), seen, turned
            )
            found, found_text = (found, text) if self.last else found
            if self.dual:
                twice = attention('attn2', 'none')(normed(x, *again[:2]))
            x = x + on('attention') * gate * found
            if self.dual:
                x = x + on('attention') * again[2] * twice
            if not self.last:
                text = text + on('attention') * at_text[2] * found_text
        if 'mlp' in self.branches:
            x = fed(x, 'mlp', ff)
        if 'context_mlp' in self.branches:
            text = fed(text, 'context_mlp', ff_text)
        if 'after' in self.linear:
            x = linear(x, 'after')
            text = text if self.last else linear(text, 'after_context')
        return (x, text), None


class SingleBlock(nn.Module):
    """Attention and a feed-forward layer side by side, over text and tokens as one; (x, None)."""

    heads: int
    fused: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x, condition, turned, gates=None):
        size, dtype = x.shape[-1], self.dtype
        shift, scale, gate = Modulation(3, size, dtype, name='norm')(condition)
        y = modulated(layer_norm(x, EPSILON, dtype), shift, scale)
        found = Attention(
            self.heads, True, 'head', EPSILON, projected=False, fused=self.fused, dtype=dtype,
            name='attn',
        )(y, turned=turned)  # fmt: skip
        hidden = nn.gelu(nn.Dense(4 * size, dtype=dtype, name='proj_mlp')(y))
        both = jnp.concatenate([found, hidden], axis=-1)
        gate = gate if gates is None else gates[0].astype(dtype) * gate
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


class Embed(nn.Module):
    """((tokens, text), what all blocks have) of the inputs; see `MMDiT`, whose scope it shares."""

    width: int
    text_norm: bool
    table: int
    grid: int
    axes: tuple[int, ...]
    centred: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, t, x, text, mask, pooled, guidance):
        dtype = self.dtype
        condition = _Condition(self.width, dtype, name='time_text_embed')(t, pooled, guidance)
        if self.text_norm:
            text = nn.RMSNorm(epsilon=EPSILON, dtype=dtype, name='txt_norm')(text)
        text = nn.Dense(self.width, dtype=dtype, name='context_embedder')(text)
        y, turned = self._tokens(x.astype(dtype), text.shape[1])
        seen = mask
        if mask is not None:
            seen = jnp.concatenate([mask, jnp.ones(y.shape[:2], bool)], axis=1)[:, None, None]
        return (y, text), (condition, turned, seen)

    def _tokens(self, x, texts):
        if self.table:
            tokens = _Placed(self.width, self.table, self.grid, self.dtype, name='pos_embed')(x)
            return tokens, None
        rows, columns, batch = x.shape[1] // PATCH[0], x.shape[2] // PATCH[1], len(x)
        patches = x.reshape(batch, rows, 2, columns, 2, -1).transpose(0, 1, 3, 5, 2, 4)
        patches = patches.reshape(batch, rows * columns, -1)
        row, column = np.indices((rows, columns)).reshape(2, -1)
        first = 0 * np.arange(texts)
        if self.centred:
            row, column = row - (rows - rows // 2), column - (columns - columns // 2)
            first = max(rows // 2, columns // 2) + np.arange(texts)
        places = [np.concatenate([first, place]) for place in (0 * row, row, column)]
        tokens = nn.Dense(self.width, dtype=self.dtype, name='x_embedder')(patches)
        return tokens, grid_angles(places, self.axes)


class Head(nn.Module):
    """F like x of the tokens; see `MMDiT`, whose scope it shares."""

    width: int
    table: int
    dtype: Dtype

    @nn.compact
    def __call__(self, y, condition, x):
        dtype = self.dtype
        scale, shift = Modulation(2, self.width, dtype, name='norm_out')(condition)
        y = modulated(layer_norm(y, EPSILON, dtype), shift, scale)
        y = nn.Dense(4 * x.shape[-1], dtype=dtype, name='proj_out')(y)
        if not self.table:
            # Channels come before the pixels of a patch.
            y = y.reshape(*y.shape[:2], -1, 4).swapaxes(2, 3)
        sides = [side // step for side, step in zip(x.shape[1:3], PATCH, strict=True)]
        return unpatched(y, sides, PATCH).astype(x.dtype)
