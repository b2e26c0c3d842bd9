"""Diffusion transformers of one stream of text and image tokens: Lumina-Image 2.0 and Z-Image.

Modules have the names of `Lumina2Transformer2DModel` of `diffusers`; equal blocks in a row are one
module with a leading axis.

Sources: Lumina-Image 2.0 2025, arXiv:2503.21758; Z-Image 2025, arXiv:2511.22699.
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
    given,
    image_inputs,
    layer_norm,
    preset_of,
    sides_of,
    stacked,
    timestep_features,
    unpatched,
)
from kd.models.rope import angles
from kd.ranges import Count, Positive, Size

__all__ = ['PRESETS', 'SHARDING', 'NextDiT', 'preset']

SHARDING = latent_parts.SHARDING
PATCH = (2, 2)
# Of the norms of queries and keys.
HEAD_EPSILON = 1e-5


class Block(nn.Module):
    """Attention and a gated feed-forward layer, between norms each; (y, None) like (tokens, None).

    Attributes:
      heads, groups, hidden, epsilon, activated, fused, dtype: of `NextDiT`.
    """

    heads: int
    groups: int
    hidden: int
    epsilon: float
    activated: bool
    fused: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, y, condition, turned, seen):
        dtype = self.dtype

        def norm(name: str) -> nn.RMSNorm:
            return nn.RMSNorm(epsilon=self.epsilon, dtype=dtype, name=name)

        if condition is None:
            normed, gate, scale, gate_ff = norm('norm1')(y), 1.0, 0.0, 1.0
        else:
            normed, gate, scale, gate_ff = _ToldNorm(
                self.epsilon, self.activated, dtype, name='norm1'
            )(y, condition)  # fmt: skip
        found = Attention(
            self.heads, False, 'head', HEAD_EPSILON, fused=self.fused, groups=self.groups,
            out_bias=False, dtype=dtype, name='attn',
        )(normed, None, seen, turned)  # fmt: skip
        y = y + gate * norm('norm2')(found)
        fed = _FeedForward(self.hidden, dtype, name='feed_forward')(
            norm('ffn_norm1')(y) * (1 + scale)
        )
        return y + gate_ff * norm('ffn_norm2')(fed), None


class _FeedForward(nn.Module):
    """W2 (silu(W1 x) * W3 x)."""

    hidden: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x):
        def dense(features: int, number: int) -> nn.Dense:
            return nn.Dense(features, use_bias=False, dtype=self.dtype, name=f'linear_{number}')

        return dense(x.shape[-1], 2)(nn.silu(dense(self.hidden, 1)(x)) * dense(self.hidden, 3)(x))


class _ToldNorm(nn.Module):
    """(norm(y) (1 + scale), gate, scale, gate), the latter of the feed-forward layer."""

    epsilon: float
    activated: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, y, condition):
        told = nn.silu(condition) if self.activated else condition
        told = nn.Dense(4 * y.shape[-1], dtype=self.dtype, name='linear')(told)
        scale, gate, scale_ff, gate_ff = jnp.split(told[:, None], 4, axis=-1)
        normed = nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name='norm')(y)
        return normed * (1 + scale), jnp.tanh(gate), scale_ff, jnp.tanh(gate_ff)


class _Condition(nn.Module):
    """(condition [B, time], text [B, M, size])."""

    size: int
    time: tuple[int, ...]
    epsilon: float
    dtype: Dtype

    @nn.compact
    def __call__(self, t, text):
        waves = timestep_features(t, 256).astype(self.dtype)
        told = Embedder(self.time[1], self.dtype, hidden=self.time[0], name='timestep_embedder')
        text = nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name='caption_embedder_0')(text)
        return told(waves), nn.Dense(self.size, dtype=self.dtype, name='caption_embedder_1')(text)


class _Head(nn.Module):
    """So many numbers of each token."""

    out: int
    dtype: Dtype

    @nn.compact
    def __call__(self, y, condition):
        scale = nn.Dense(y.shape[-1], dtype=self.dtype, name='linear_1')(nn.silu(condition))
        y = layer_norm(y, 1e-6, self.dtype) * (1 + scale[:, None])
        return nn.Dense(self.out, dtype=self.dtype, name='linear_2')(y)


class NextDiT(nn.Module):
    """F(t, x, text, mask) like x [B, H, W, C], of the kind 'flow'; defaults are Lumina-Image 2.0's.

    As released, these networks are told 1 less a time and say x0 - eps; here they are told times
    and say eps - x0, as all others.

    Attributes:
      width, depth, heads: of the transformer.
      refiners: blocks of texts alone, and of images alone, before those of both.
      groups: heads of keys and values.
      hidden: units between the feed-forward layers.
      context: size of a token of the text.
      time: units of the two layers that embed times.
      clock: what times of [0, 1] are multiplied by.
      activated: what blocks are told goes through silu first.
      filled: texts and images are filled up to a multiple of so many tokens, which are learned; 0
        for none.
      axes: features of a head that rotations turn by text, row and column.
      theta: base of their wavelengths.
      epsilon: of norms.
      remat: blocks are computed again for the gradient.
      fused: attention by a fused kernel where there is one.
      dtype: compute type; parameters are float32, the output has the type of x.
    """

    width: Count = 2_304
    depth: Count = 26
    heads: Count = 24
    refiners: Size = 2
    groups: Count = 8
    hidden: Count = 9_216
    context: Count = 2_304
    time: tuple[Count, Count] = (1_024, 1_024)
    clock: Positive = 1.0
    activated: bool = True
    filled: Size = 0
    axes: tuple[Count, ...] = (32, 32, 32)
    theta: Positive = 1e4
    epsilon: Positive = 1e-5
    remat: bool = False
    fused: bool = False
    dtype: Dtype = jnp.float32

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        return ('text', 'mask')

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
        train: bool = False,
    ) -> jax.Array:
        """F [B, H, W, C].

        Args:
          t: what it is told of the noise, [B], 1000 times a time in [0, 1].
          x: noised latents.
          text: [B, M, context], as the text encoder says it.
          mask: bool [B, M], which of these tokens are text, from the first on; None for all. Places
            of the image come after the end of its text.
          train: nothing here depends on it.

        Raises:
          ValueError: an input that is missing, or of another size.
        """
        del train
        told = given(self, len(x), dict(text=(1, self.context)), dict(text=text))
        sides, dtype = sides_of(self, x, PATCH), self.dtype
        condition, words = _Condition(
            self.width, tuple(self.time), self.epsilon, dtype, name='time_caption_embed'
        )(self.clock * (1 - t / 1_000), told['text'].astype(dtype))
        pixels = nn.Dense(self.width, dtype=dtype, name='x_embedder')(
            _patches(x, sides).astype(dtype)
        )
        words, seen, length = self._text(words, mask)
        pixels, row, column = self._image(pixels, sides)
        turned_text = self._turned(jnp.arange(words.shape[1])[None] + (self.filled > 0))
        # What fills up an image is at the origin.
        start = jnp.where(row >= 0, (length + (self.filled > 0))[:, None], 0)
        turned = self._turned(start, jnp.maximum(row, 0), jnp.maximum(column, 0))
        sight = None if seen is None else seen[:, None, None]
        words = self._blocks('context_refiner', self.refiners)(words, None, turned_text, sight)[0]
        pixels = self._blocks('noise_refiner', self.refiners)(pixels, condition, turned, None)[0]
        turned = jax.tree.map(_one, turned_text, turned)
        if seen is not None:
            sight = _one(seen, jnp.ones(pixels.shape[:2], bool))[:, None, None]
        y = self._blocks('layers', self.depth)(_one(words, pixels), condition, turned, sight)[0]
        y = y[:, words.shape[1] :][:, : sides[0] * sides[1]]
        y = _Head(4 * x.shape[-1], dtype, name='norm_out')(y, condition)
        return -unpatched(y, sides, PATCH).astype(x.dtype)

    def _blocks(self, name: str, count: int) -> Any:
        return stacked(Block, count, self.remat, 3, begins=self.is_initializing())(
            self.heads, self.groups, self.hidden, self.epsilon, self.activated, self.fused,
            self.dtype, name=name,
        )  # fmt: skip

    def _text(self, words, mask):
        """(tokens [B, M', D], which are seen or None for all, how many [B])."""
        count = words.shape[1]
        length = jnp.full(len(words), count) if mask is None else jnp.sum(mask, axis=1)
        if not self.filled:
            return words, mask, length
        end = self.filled * -(-length // self.filled)
        words = jnp.pad(words, ((0, 0), (0, -count % self.filled), (0, 0)))
        places = jnp.arange(words.shape[1])
        fill = self._fill('cap_pad_token')
        words = jnp.where((places < length[:, None])[..., None], words, fill)
        return words, None if mask is None else places < end[:, None], end

    def _image(self, pixels, sides):
        """(tokens [B, N', D], their rows and columns [N'], -1 for what fills up)."""
        row, column = np.indices(tuple(sides)).reshape(2, -1)
        missing = -len(row) % self.filled if self.filled else 0
        if self.filled:
            fill = jnp.broadcast_to(self._fill('x_pad_token'), (len(pixels), missing, self.width))
            pixels = jnp.concatenate([pixels, fill], axis=1)
        filled = (np.pad(x, (0, missing), constant_values=-1) for x in (row, column))
        return pixels, *map(jnp.asarray, filled)

    def _fill(self, name: str) -> jax.Array:
        fill = self.param(name, nn.initializers.normal(0.02), (1, self.width), jnp.float32)
        return fill.astype(self.dtype)

    def _turned(self, place, *others):
        """Rotations [B or 1, T, 1, half of a head] of places of text [B or 1, T] and [T]."""
        places = [place, *(jnp.broadcast_to(x, place.shape) for x in others)]
        places += [0 * place] * (3 - len(places))
        each = zip(places, self.axes, strict=True)
        found = [angles(x, size, self.theta) for x, size in each]
        return tuple(jnp.concatenate(parts, axis=-1) for parts in zip(*found, strict=True))


def _patches(x: jax.Array, sides: list[int]) -> jax.Array:
    """Tokens [B, N, 4 C] of x [B, H, W, C]."""
    rows, columns = sides
    x = x.reshape(len(x), rows, 2, columns, 2, -1).swapaxes(2, 3)
    return x.reshape(len(x), rows * columns, -1)


def _one(words: jax.Array, pixels: jax.Array) -> jax.Array:
    """Text and image as one sequence."""
    rows = max(len(words), len(pixels))
    both = (jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (words, pixels))
    return jnp.concatenate(list(both), axis=1)


# By name, the arguments of `NextDiT`: 2.61 and 6.15 billion parameters.
PRESETS: dict[str, dict[str, Any]] = {
    'lumina2': {},
    'z_image': dict(
        width=3_840,
        depth=30,
        heads=30,
        groups=30,
        hidden=10_240,
        context=2_560,
        time=(1_024, 256),
        clock=1_000.0,
        activated=False,
        filled=32,
        axes=(32, 48, 48),
        theta=256.0,
    ),
}


def preset(of: str, **changes: Any) -> NextDiT:
    """The network that is known as `of`, with changes.

        network=dict(name='kd.models.next_dit.preset', of='z_image', dtype='bfloat16')

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `NextDiT`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    return preset_of(NextDiT, PRESETS, of, changes)
