"""Parts that networks of images and latents share, named as in `diffusers`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.attention import attend, attend_away
from kd.models.rope import rotate

__all__ = [
    *('Attention', 'Embedder', 'FeedForward', 'Modulation', 'ResnetBlock', 'SHARDING', 'conv'),
    *('given', 'group_norm', 'image_inputs', 'layer_norm', 'stacked', 'timestep_features'),
    *('modulated', 'preset_of', 'sides_of', 'unpatched'),
]

# For `sharding` of a recipe, of stacked blocks: 'tensor' cuts heads and hidden units, 'fsdp' the
# rest; adapters along their layers' sides, the rank stays whole.
_STACKED = r'(blocks(_from_\d+)?|layers|_refiner)'
SHARDING = (
    (_STACKED + r'/.*lora_a$', (None, 'fsdp')),
    (_STACKED + r'/.*lora_b$', (None, None, 'fsdp')),
    (r'lora_a$', ('fsdp',)),
    (r'lora_b$', (None, 'fsdp')),
    (_STACKED + r'/.*(to_[qkv]|add_[qkv]_proj|proj|proj_mlp|linear(_[13])?)/kernel$',
     (None, 'fsdp', 'tensor')),
    (_STACKED + r'/.*(to_out_0|to_add_out|net_2|proj_out|linear_2)/kernel$',
     (None, 'tensor', 'fsdp')),
    (r'(kernel|embedding|pos_embed)$', 'fsdp'),
)  # fmt: skip


def timestep_features(
    t: jax.Array, size: int, *, max_period: float = 1e4, reached: bool = False
) -> jax.Array:
    """[cos(w_k t), sin(w_k t)], w_k = max_period^(-2k / size), [...] -> [..., size] float32.

    With `reached` the last of the size / 2 frequencies is 1 / max_period.
    """
    if size % 2:
        raise ValueError(f'timestep_features: size={size}, expected an even number.')
    half = size // 2
    steps = jnp.arange(half, dtype=jnp.float32) / (half - 1 if reached else half)
    angles = t.astype(jnp.float32)[..., None] * max_period**-steps
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Embedder(nn.Module):
    """Two layers, [..., any] -> [..., size], with as many units between them unless told."""

    size: int
    dtype: Dtype
    activation: Literal['silu', 'gelu'] = 'silu'
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Dense(self.hidden or self.size, dtype=self.dtype, name='linear_1')(x)
        x = nn.silu(x) if self.activation == 'silu' else nn.gelu(x)
        return nn.Dense(self.size, dtype=self.dtype, name='linear_2')(x)


class ResnetBlock(nn.Module):
    """Residual block to whose middle the embedding [B, E] is added; None for none."""

    features: int
    groups: int
    epsilon: float
    dropout: float
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array | None, train: bool) -> jax.Array:
        y = nn.silu(group_norm(x, self.groups, self.epsilon, self.dtype, 'norm1'))
        y = conv(y, self.features, 3, self.dtype, 'conv1')
        if embedding is not None:
            told = nn.Dense(self.features, dtype=self.dtype, name='time_emb_proj')
            y = y + told(nn.silu(embedding))[:, None, None]
        y = nn.silu(group_norm(y, self.groups, self.epsilon, self.dtype, 'norm2'))
        y = nn.Dropout(self.dropout)(y, deterministic=not train)
        y = conv(y, self.features, 3, self.dtype, 'conv2')
        if x.shape[-1] != self.features:
            x = conv(x, self.features, 1, self.dtype, 'conv_shortcut')
        return x + y


class Attention(nn.Module):
    """Attention of x [B, N, D] to itself or to a text [B, M, C], or of both to both.

    Attributes:
      heads: of size D / heads.
      bias: of the projections to queries, keys and values.
      norm: root-mean-square norms of queries and keys: of each 'head', of 'all' together.
      epsilon: of these.
      joint: 'both', a text with projections of its own is attended to and attends; or 'first', the
        same, and what it finds is left.
      projected: what is found is projected.
      groups: heads of keys and values, which divide the others; None for as many.
      out_bias: of the projection of what is found.
      keeps: keys and values of x are given back too.
      fused: by a fused kernel where there is one.
      dtype: compute type.
    """

    heads: int
    bias: bool = False
    norm: Literal['none', 'head', 'all'] = 'none'
    epsilon: float = 1e-6
    joint: Literal['none', 'both', 'first'] = 'none'
    projected: bool = True
    groups: int | None = None
    out_bias: bool = True
    keeps: bool = False
    fused: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        text: jax.Array | None = None,
        mask: jax.Array | None = None,
        turned: tuple[jax.Array, jax.Array] | None = None,
        memory: tuple[jax.Array, jax.Array] | None = None,
        away: tuple[int, jax.Array | float] | None = None,
    ) -> Any:
        """[B, N, D], and with `joint` 'both' what the text [B, M, D] finds.

        With `keeps` also keys and values [B, N, heads, D / heads], rotated.

        Args:
          x: tokens.
          text: others.
          mask: as of `attend`.
          turned: cosines and sines of the rotations of (text and) tokens, see `kd.models.rope`.
          away: (M+, strength) where the text is one of M+ tokens and one that x attends away from,
            see `attend_away`.
          memory: keys and values [B, S, heads, D / heads] of tokens before, as they were kept.
        """
        seen = x if text is None or self.joint != 'none' else text
        sources = ((x, 'to_q'), (seen, 'to_k'), (seen, 'to_v'))
        q, k, v = self._heads(sources, 'norm_q', 'norm_k')
        if self.joint != 'none':
            names = [(text, f'add_{name}_proj') for name in 'qkv']
            added = self._heads(names, 'norm_added_q', 'norm_added_k')
            both = zip(added, (q, k, v), strict=True)
            q, k, v = (jnp.concatenate(pair, axis=1) for pair in both)
        if turned is not None:
            q, k = (rotate(y, turned, paired=True) for y in (q, k))
        own = k, v
        if memory is not None:
            k, v = (jnp.concatenate(pair, axis=1) for pair in zip(memory, own, strict=True))
        y = self._found(q, k, v, mask, away)
        y = y.reshape(*y.shape[:2], -1)
        length = y.shape[1] - x.shape[1]
        found = y[:, length:]
        if self.projected:
            found = nn.Dense(
                x.shape[-1], use_bias=self.out_bias, dtype=self.dtype, name='to_out_0'
            )(found)  # fmt: skip
        if self.joint != 'both':
            return (found, own) if self.keeps else found
        return found, nn.Dense(x.shape[-1], dtype=self.dtype, name='to_add_out')(y[:, :length])

    def _found(self, q, k, v, mask, away):
        if away is None:
            return attend(q, k, v, mask=mask, fused=self.fused)
        count, strength = away
        parts = slice(count), slice(count, None)
        positive, negative = ((k[:, part], v[:, part]) for part in parts)
        seen, seen_away = (None if mask is None else mask[..., part] for part in parts)
        return attend_away(
            q, positive, negative, strength, masks=(seen, seen_away), fused=self.fused
        )

    def _heads(self, sources, *norms):
        size, out = sources[0][0].shape[-1] // self.heads, []
        for i, (x, name) in enumerate(sources):
            heads = self.groups or self.heads if i else self.heads
            y = nn.Dense(heads * size, use_bias=self.bias, dtype=self.dtype, name=name)(x)
            if self.norm == 'all' and i < 2:
                y = nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name=norms[i])(y)
            y = y.reshape(*y.shape[:2], heads, size)
            if self.norm == 'head' and i < 2:
                y = nn.RMSNorm(epsilon=self.epsilon, dtype=self.dtype, name=norms[i])(y)
            out.append(y)
        return out


class FeedForward(nn.Module):
    """Two layers, of four times the width between them unless told otherwise.

    'geglu' is gated by an exact GELU, 'gelu' is its approximation by a tangent.
    """

    kind: Literal['geglu', 'gelu']
    dtype: Dtype
    hidden: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1]
        wide = self.hidden or 4 * size
        hidden = _Projection(wide * (1 + (self.kind == 'geglu')), self.dtype, name='net_0')(x)
        if self.kind == 'geglu':
            hidden, gate = jnp.split(hidden, 2, axis=-1)
            hidden = hidden * nn.gelu(gate, approximate=False)
        else:
            hidden = nn.gelu(hidden)
        return nn.Dense(size, dtype=self.dtype, name='net_2')(hidden)


class _Projection(nn.Module):
    """A layer named 'proj'."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        return nn.Dense(self.features, dtype=self.dtype, name='proj')(x)


class Modulation(nn.Module):
    """So many vectors [B, 1, size] of a condition [B, any]."""

    count: int
    size: int
    dtype: Dtype

    @nn.compact
    def __call__(self, condition: jax.Array) -> list[jax.Array]:
        out = nn.Dense(self.count * self.size, dtype=self.dtype, name='linear')(nn.silu(condition))
        return jnp.split(out[:, None], self.count, axis=-1)


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """x (1 + scale) + shift."""
    return x * (1 + scale) + shift


def stacked(
    kind: type[nn.Module],
    depth: int,
    remat: bool,
    inputs: int,
    gated: bool = False,
    *,
    begins: bool,
) -> Any:
    """So many blocks as one with a leading axis: `kind(...)(x, *inputs) -> (x, None)`.

    Where they are gated, a last input has one entry for each block. A block is traced once, and
    twice where the module `begins`, as what is drawn goes by that: see its `is_initializing`.
    """
    return nn.scan(
        nn.remat(kind, prevent_cse=False) if remat else kind,
        variable_axes={'params': 0, 'intermediates': 0},
        split_rngs={'params': True},
        in_axes=(nn.broadcast,) * inputs + (0,) * gated,
        length=depth,
        check_constancy_invariants=begins,
    )


def given(
    module: nn.Module, rows: int, shapes: Mapping[str, tuple[int, ...]], told: Mapping[str, Any]
) -> dict[str, Any]:
    """What a network is told, zeros where only shapes matter.

    Args:
      module: the network, with `conditions` and `dtype`.
      rows: B.
      shapes: [...] of one row of each input that it needs; the last is held to.
      told: inputs [B, ...] or None by name.

    Raises:
      ValueError: an input that is missing, is not the network's, or has another size.
    """
    name_of, out, need = type(module).__name__, dict(told), getattr(module, 'conditions', ())
    for name, value in told.items():
        if name in shapes and value is None and module.is_initializing():
            out[name] = jnp.zeros((rows, *shapes[name]), getattr(module, 'dtype', jnp.float32))
        elif (value is None) != (name not in shapes):
            raise ValueError(
                f'{name_of} is told {need}, and '
                f"'{name}' was {'missing' if value is None else 'given'}."
            )
        elif value is not None and shapes[name] and value.shape[-1] != shapes[name][-1]:
            raise ValueError(
                f"{name_of}: '{name}' has {value.shape[-1]} features, expected "
                f'{shapes[name][-1]}; is it of another encoder?'
            )
    return out


def preset_of(
    kind: Any, presets: Mapping[str, Mapping[str, Any]], of: str, changes: Mapping[str, Any]
) -> Any:
    """The network of a class that is known by a name, with changes.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    if of not in presets:
        raise ValueError(f"there is no {kind.__name__} '{of}'; known are: {', '.join(presets)}.")
    names = [field.name for field in dataclasses.fields(kind) if field.init]
    if unknown := [name for name in changes if name not in names]:
        raise ValueError(f"{kind.__name__} has no '{unknown[0]}'; it has: {', '.join(names)}.")
    return kind(**{**presets[of], **changes})


def image_inputs(spec: Mapping[str, Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of (t [1], x [1, ...]) for one example as `spec` has it."""
    x = spec['input']
    return jax.ShapeDtypeStruct((1,), x.dtype), jax.ShapeDtypeStruct((1, *x.shape), x.dtype)


def sides_of(module: nn.Module, x: jax.Array, patch: tuple[int, ...]) -> list[int]:
    """Patches along the sides of x [B, sides, C].

    Raises:
      ValueError: sides that a patch does not divide.
    """
    sides = x.shape[1:-1]
    if any(side % step for side, step in zip(sides, patch, strict=True)):
        raise ValueError(
            f'{type(module).__name__} with patches of {"x".join(map(str, patch))} got '
            f'{"x".join(map(str, sides))}; the sides must be divisible by the patch.'
        )
    return [side // step for side, step in zip(sides, patch, strict=True)]


def unpatched(tokens: jax.Array, sides: list[int], patch: tuple[int, ...]) -> jax.Array:
    """[B, sides, C] of tokens [B, N, patch and then C]."""
    batch, rank = tokens.shape[0], len(sides)
    x = tokens.reshape(batch, *sides, *patch, -1)
    order = [0, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)), 1 + 2 * rank]
    whole = [side * step for side, step in zip(sides, patch, strict=True)]
    return x.transpose(order).reshape(batch, *whole, -1)


def conv(x: jax.Array, features: int, size: int, dtype: Dtype, name: str) -> jax.Array:
    """Convolution that keeps the sides; inside a module."""
    return nn.Conv(features, (size, size), padding=size // 2, dtype=dtype, name=name)(x)


def group_norm(x: jax.Array, groups: int, epsilon: float, dtype: Dtype, name: str) -> jax.Array:
    """Of the channels in groups; inside a module."""
    return nn.GroupNorm(groups, epsilon=epsilon, dtype=dtype, name=name)(x)


def layer_norm(x: jax.Array, epsilon: float, dtype: Dtype) -> jax.Array:
    """Without parameters; inside a module."""
    return nn.LayerNorm(epsilon=epsilon, use_bias=False, use_scale=False, dtype=dtype)(x)
