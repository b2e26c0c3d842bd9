"""The video transformer Wan 2.1, whole or causal in time.

Modules have the names of `WanTransformer3DModel` of `diffusers`; blocks are one module with a
leading axis. Source: Wan 2025, arXiv:2503.20314; causal in time as Self-Forcing, arXiv:2506.08009.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kd.models import latent_parts
from kd.models.latent_parts import (
    Attention,
    Embedder,
    FeedForward,
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
from kd.ranges import Count, Positive, Size

__all__ = ['PRESETS', 'SHARDING', 'Wan', 'preset']

SHARDING = latent_parts.SHARDING
# Keys and values of the tokens of all blocks, those not made yet zeros.
Memory = tuple[jax.Array, jax.Array]


class Block(nn.Module):
    """Attention, attention to the text and a feed-forward layer, told [B, 1 or N, 6, D].

    (x, None), or (x, (keys, values) of the attention) of one that keeps them.

    Attributes:
      heads, hidden, epsilon, fused, dtype: of `Wan`.
      keeps: see above.
    """

    heads: int
    hidden: int
    epsilon: float
    fused: bool
    dtype: Dtype
    keeps: bool = False

    @nn.compact
    def __call__(self, x, shared, text, seen, turned, memory=None):
        size, dtype = x.shape[-1], self.dtype
        table = self.param('scale_shift_table', nn.initializers.normal(size**-0.5), (1, 6, size))
        own = table.astype(dtype) + shared
        shift, scale, gate, shift_ff, scale_ff, gate_ff = (own[..., i, :] for i in range(6))

        def attention(name: str, keeps: bool = False) -> Attention:
            return Attention(
                self.heads, True, 'all', self.epsilon, fused=self.fused, dtype=dtype, keeps=keeps,
                name=name,
            )  # fmt: skip

        y = modulated(layer_norm(x, self.epsilon, dtype), shift, scale)
        found = attention('attn1', self.keeps)(y, None, seen, turned, memory)
        found, kept = found if self.keeps else (found, None)
        x = x + gate * found
        y = nn.LayerNorm(epsilon=self.epsilon, dtype=dtype, name='norm2')(x)
        x = x + attention('attn2')(y, text)
        y = modulated(layer_norm(x, self.epsilon, dtype), shift_ff, scale_ff)
        return x + gate_ff * FeedForward('gelu', dtype, self.hidden, name='ffn')(y), kept


class _Condition(nn.Module):
    """(what blocks are modulated with [B, ., 6, D], condition [B, ., D], text [B, M, D])."""

    size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, t, text):
        waves = timestep_features(t, 256).astype(self.dtype)
        told = Embedder(self.size, self.dtype, name='time_embedder')(waves)
        shared = nn.Dense(6 * self.size, dtype=self.dtype, name='time_proj')(nn.silu(told))
        text = Embedder(self.size, self.dtype, 'gelu', name='text_embedder')(text)
        return shared.reshape(*told.shape[:2], 6, self.size), told, text


class Wan(nn.Module):
    """F(t, x, text) like x, for latents of videos x [B, T, H, W, C]; defaults are the 1.3B's.

    One that is causal also says of a block of frames alone what it says of it in the whole, told of
    the keys and values of the clean blocks before (`say`, `remember`, `empty`, as
    `kd.sampling.causal` asks for).

    Attributes:
      width, depth, heads, hidden: of the transformer; units between the feed-forward layers.
      patch: frames, rows and columns of a token.
      context: size of a token of the text.
      causal: frames of latents that see each other and those before; 0 for all see all.
      epsilon: of norms.
      remat: blocks are computed again for the gradient.
      fused: attention by a fused kernel where there is one.
      dtype: compute type; parameters are float32, the output has the type of x.
    """

    width: Count = 1_536
    depth: Count = 30
    heads: Count = 12
    hidden: Count = 8_960
    patch: tuple[Count, Count, Count] = (1, 2, 2)
    context: Count = 4_096
    causal: Size = 0
    epsilon: Positive = 1e-6
    remat: bool = False
    fused: bool = False
    dtype: Dtype = jnp.float32

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        return ('text',)

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
        train: bool = False,
        memory: Memory | None = None,
        number: jax.Array | None = None,
        keeps: bool = False,
    ) -> Any:
        """F [B, T, H, W, C], or with `keeps` keys and values of its tokens, as of `empty`.

        Args:
          t: what it is told of the noise, 1000 times a time in [0, 1]: [B], or [B, T / patch] for
            each frame.
          x: noised latents.
          text: [B, M, context], as the text encoder says it, with zeros after its end.
          train: nothing here depends on it.
          memory: of the blocks before, of which x is one.
          number: int32, of the block.
          keeps: see above.

        Raises:
          ValueError: an input that is missing, or of another size.
        """
        del train
        told = given(self, len(x), dict(text=(1, self.context)), dict(text=text))
        patch, dtype = tuple(self.patch), self.dtype
        sides = sides_of(self, x, patch)
        frames, area = sides[0], sides[1] * sides[2]
        y = nn.Conv(
            self.width, patch, patch, padding='VALID', dtype=dtype, name='patch_embedding'
        )(x.astype(dtype)).reshape(len(x), -1, self.width)  # fmt: skip
        shared, condition, text = _Condition(self.width, dtype, name='condition_embedder')(
            t[:, None] if t.ndim == 1 else t, told['text'].astype(dtype)
        )
        if t.ndim == 2:
            if t.shape[1] != frames:
                raise ValueError(
                    f'Wan: times of {t.shape[1]} frames of latents, there are {frames}.'
                )
            shared, condition = (jnp.repeat(z, area, axis=1) for z in (shared, condition))
        blocks = stacked(
            Block,
            self.depth,
            self.remat,
            4,
            gated=memory is not None,
            begins=self.is_initializing(),
        )(self.heads, self.hidden, self.epsilon, self.fused, dtype, keeps, name='blocks')
        if memory is None:
            y, kept = blocks(y, shared, text, self._seen(frames, area), self._turned(sides))
        else:
            y, kept = blocks(y, shared, text, *self._after(memory, number, sides), memory)
        if keeps:
            return kept
        start = nn.initializers.normal(self.width**-0.5)
        table = self.param('scale_shift_table', start, (1, 2, self.width)).astype(dtype)
        last = table + condition[:, :, None]
        y = modulated(layer_norm(y, self.epsilon, dtype), last[..., 0, :], last[..., 1, :])
        y = nn.Dense(int(np.prod(patch)) * x.shape[-1], dtype=dtype, name='proj_out')(y)
        return unpatched(y, sides, patch).astype(x.dtype)

    def _seen(self, frames: int, area: int) -> jax.Array | None:
        """Which tokens see which, [1, 1, N, N]."""
        if not self.causal:
            return None
        block = np.repeat(np.arange(frames) // self.causal, area)
        return jnp.asarray(block[:, None] >= block)[None, None]

    def _after(self, memory, number, sides):
        """(which are seen, [1, 1, 1, S + N], rotations) of a block that comes after others."""
        tokens, slots = sides[0] * sides[1] * sides[2], memory[0].shape[2]
        start = number * tokens
        seen = jnp.concatenate([jnp.arange(slots) < start, jnp.ones(tokens, bool)])
        turned = (
            jax.lax.dynamic_slice_in_dim(x, start, tokens, axis=1)
            for x in self._turned([slots // (sides[1] * sides[2]), *sides[1:]])
        )
        return seen[None, None, None], tuple(turned)

    def say(self, t: jax.Array, x: jax.Array, memory: Memory, number: jax.Array, **told) -> Any:
        """F of block `number`, [B, causal, H, W, C], told of the clean ones before it."""
        return self(t, x, memory=memory, number=number, **told)

    def remember(
        self, t: jax.Array, x: jax.Array, memory: Memory, number: jax.Array, **told
    ) -> Memory:
        """Memory with that of a clean block, at its time of no noise."""
        kept = self(t, x, memory=memory, number=number, keeps=True, **told)
        start = number * kept[0].shape[2]
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(whole, own.astype(whole.dtype), start, axis=2)
            for whole, own in zip(memory, kept, strict=True)
        )
        return keys, values

    def empty(self, z: jax.Array) -> Memory:
        """Before the first block of videos like z: zeros [depth, B, tokens, heads, D / heads]."""
        if not self.causal or z.shape[1] % self.causal or self.patch[0] != 1:
            raise ValueError(
                f'Wan with causal={self.causal} and patches of {self.patch[0]} frames makes no '
                f'videos of {z.shape[1]} frames block by block.'
            )
        sides = sides_of(self, z, tuple(self.patch))
        shape = (self.depth, len(z), int(np.prod(sides)), self.heads, self.width // self.heads)
        return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

    def _turned(self, sides: list[int]) -> tuple[jax.Array, jax.Array]:
        size = self.width // self.heads
        axis = 2 * (size // 6)
        places = np.indices(tuple(sides)).reshape(3, -1)
        return grid_angles(list(places), (size - 2 * axis, axis, axis))


# By name, the arguments of `Wan`: 1.42 and 14.29 billion parameters.
PRESETS: dict[str, dict[str, Any]] = {
    'wan21_1_3b': {},
    'wan21_14b': dict(width=5_120, depth=40, heads=40, hidden=13_824),
}


def preset(of: str, **changes: Any) -> Wan:
    """The network that is known as `of`, with changes.

        network=dict(name='kd.models.wan.preset', of='wan21_1_3b', dtype='bfloat16', causal=3)

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `Wan`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    return preset_of(Wan, PRESETS, of, changes)
