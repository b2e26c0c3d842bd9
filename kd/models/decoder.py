"""Decoder-only language models of the Llama, Qwen, Phi-3 and GPT-2 shapes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from kd.losses import numerics
from kd.models import rope
from kd.models.causal_attention import attend_cached, attend_causally
from kd.ranges import Count, Positive

__all__ = [
    'SHARDING',
    'Architecture',
    'Cache',
    'Decoder',
    'head_of',
    'init_cache',
    'positions_in',
    'unstacked',
]

# For `sharding` of a recipe: 'tensor' cuts heads, hidden units and the vocabulary, 'fsdp' the rest.
SHARDING = (
    (r'blocks/.*(query|key|value|gate|up)/kernel$', (None, 'fsdp', 'tensor')),
    (r'blocks/.*(output|down)/kernel$', (None, 'tensor', 'fsdp')),
    (r'(query|key|value|gate|up)/kernel$', ('fsdp', 'tensor')),
    (r'(output|down)/kernel$', ('tensor', 'fsdp')),
    (r'embed/embedding$', ('tensor', 'fsdp')),
    (r'head$', ('fsdp', 'tensor')),
)


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens that have been read.

    Attributes:
      keys, values: [B, K, S, d] of each layer.
      valid: bool [B, S], the slots that hold a token; padding holds none.
      length: int32 scalar, the slots that are written. Prompts are padded on the left, so that all
        rows go on in the same slot.
    """

    keys: tuple[jax.Array, ...]
    values: tuple[jax.Array, ...]
    valid: jax.Array
    length: jax.Array


@dataclasses.dataclass(unsafe_hash=True)
class Architecture:
    """What a decoder computes.

    Attributes:
      num_classes: size of the vocabulary, of inputs and outputs.
      width: size of a token.
      depth: number of blocks.
      heads: of the queries.
      kv_heads: of keys and values; divides `heads`. None for as many.
      head_dim: size of a head; None for width / heads.
      mlp_hidden: hidden units of a block's MLP; None for 4 width.
      mlp: 'swiglu' with a gate, 'gelu' (by tanh) without.
      norm: 'rms' or 'layer'.
      epsilon: of the norms.
      bias: whether output projections and MLPs have biases, as GPT-2's.
      qkv_bias: whether queries, keys and values have.
      qk_norm: whether queries and keys are normalised, by head, as Qwen3's.
      rope_theta: base of the rotations' wavelengths; None for learned positions, as GPT-2's.
      rope_scaling: how rotations reach beyond the lengths of pre-training, see `kd.models.rope`.
      window: how many tokens back, itself included, a token sees; None for all.
      tied: whether the embedding is the head too.
      max_length: the positions that there are.
      deviation: of weights at the start, as of released models; None for 1 / sqrt(inputs), and 1 of
        embeddings that are no head, from which small networks learn in fewer steps.
      dtype: compute type; logits, softmax and statistics of norms are at least float32.
      param_dtype: of the parameters.
      block: queries at a time where the maps of all would be large, see `attend_causally`.
    """

    num_classes: Count = 72
    width: Count = 64
    depth: Count = 2
    heads: Count = 4
    kv_heads: Count | None = None
    head_dim: Count | None = None
    mlp_hidden: Count | None = None
    mlp: Literal['swiglu', 'gelu'] = 'swiglu'
    norm: Literal['rms', 'layer'] = 'rms'
    epsilon: Positive = 1e-5
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: Positive | None = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    window: Count | None = None
    tied: bool = True
    max_length: Count = 2048
    deviation: Positive | None = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    block: Count = 512

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def size_of_head(self) -> int:
        """Features of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def hidden_units(self) -> int:
        """Of a block's MLP."""
        return self.mlp_hidden or 4 * self.width

    def dense(self, features: int, bias: bool, depth: int | None = None) -> nn.Dense:
        """A projection; one that ends a residual branch of `depth` blocks starts smaller."""
        scale = 1.0 if depth is None else (2 * depth) ** -0.5
        return nn.Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.initial(scale),
        )

    def initial(self, scale: float = 1.0) -> nn.initializers.Initializer:
        """Of a matrix [inputs, outputs]."""
        if self.deviation is None:
            return nn.initializers.variance_scaling(scale**2, 'fan_in', 'normal')
        return nn.initializers.normal(scale * self.deviation)

    def embedding(self) -> nn.initializers.Initializer:
        """Of a table [tokens or positions, width]."""
        own = self.width**-0.5 if self.tied else 1.0
        return nn.initializers.normal(self.deviation or own)

    def normalise(self) -> nn.Module:
        """A norm over the last axis."""
        kind = nn.RMSNorm if self.norm == 'rms' else nn.LayerNorm
        return kind(epsilon=self.epsilon, dtype=self.dtype, param_dtype=self.param_dtype)


class Attention(nn.Module):
    """Causal attention with grouped heads and rotated positions; see `Decoder`."""

    of: Architecture

    def setup(self):
        of, size = self.of, self.of.size_of_head
        self.query = of.dense(of.heads * size, of.qkv_bias)
        self.key = of.dense(of.groups * size, of.qkv_bias)
        self.value = of.dense(of.groups * size, of.qkv_bias)
        self.output = of.dense(of.width, of.bias, of.depth)
        if of.qk_norm:
            self.query_norm = of.normalise()
            self.key_norm = of.normalise()

    def _queries(self, x, angles):
        query = rearrange(self.query(x), 'b t (h d) -> b t h d', d=self.of.size_of_head)
        if self.of.qk_norm:
            query = self.query_norm(query)
        return query if angles is None else rope.rotate(query, angles)

    def _keys_and_values(self, x, angles):
        key, value = (
            rearrange(f(x), 'b t (h d) -> b t h d', d=self.of.size_of_head)
            for f in (self.key, self.value)
        )
        if self.of.qk_norm:
            key = self.key_norm(key)
        return (key if angles is None else rope.rotate(key, angles)), value

    def __call__(self, x, angles, segments):
        out = attend_causally(
            self._queries(x, angles), *self._keys_and_values(x, angles),
            segments=segments, window=self.of.window, block=self.of.block,
        )  # fmt: skip
        return self.output(rearrange(out, 'b t h d -> b t (h d)'))

    def step(self, x, angles, keys, values, valid, start, first):
        key, value = self._keys_and_values(x, angles)
        keys, values = _written(keys, key, start), _written(values, value, start)
        query = self._queries(*jax.tree.map(lambda y: y[:, first:], (x, angles)))
        out = attend_cached(
            query, keys, values, valid=valid, start=start + first, window=self.of.window
        ).astype(x.dtype)
        return self.output(rearrange(out, 'b t h d -> b t (h d)')), keys, values


class Mlp(nn.Module):
    """down(silu(gate x) * up x), or down(gelu(up x)); see `Decoder`."""

    of: Architecture

    def setup(self):
        of = self.of
        if of.mlp == 'swiglu':
            self.gate = of.dense(of.hidden_units, of.bias)
        self.up = of.dense(of.hidden_units, of.bias)
        self.down = of.dense(of.width, of.bias, of.depth)

    def __call__(self, x):
        if self.of.mlp == 'swiglu':
            return self.down(nn.silu(self.gate(x)) * self.up(x))
        return self.down(nn.gelu(self.up(x), approximate=True))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    of: Architecture

    def setup(self):
        self.norm1, self.norm2 = self.of.normalise(), self.of.normalise()
        self.attention, self.mlp = Attention(self.of), Mlp(self.of)

    def __call__(self, x, angles, segments):
        x = x + self.attention(self.norm1(x), angles, segments)
        return x + self.mlp(self.norm2(x))

    def step(self, x, angles, keys, values, valid, start, first):
        """Of all tokens the cache gets keys and values, of those from `first` on come outputs."""
        out, keys, values = self.attention.step(
            self.norm1(x), angles, keys, values, valid, start, first
        )
        x = x[:, first:] + out
        return x + self.mlp(self.norm2(x)), keys, values


class _Scanned(Block):
    """A block as the body of a scan."""

    def __call__(self, x, angles, segments):
        return super().__call__(x, angles, segments), None


class Decoder(Architecture, nn.Module):
    """Causal language model; `kd.models.decoders` names those that are known by name.

    Attributes:
      as of `Architecture`, and
      remat: what is computed again for the gradient: 'none', the whole 'block', or all but the
        products with weights ('dots').
      stacked: whether the blocks' parameters are stacked, [depth, ...], and run by one scan, which
        compiles faster. Decoding takes them apart, see `unstacked`.
      fields: of a batch, as many of `input`, `positions`, `segments` as there are. Where a recipe
        builds the decoder, None is for those that the data have, so that packed documents stay
        apart.

    Features: `embed`, `block0`, ... (unless stacked), `final_norm`.
    """

    remat: Literal['none', 'block', 'dots'] = 'none'
    stacked: bool = False
    fields: tuple[str, ...] | None = None
    optional_fields = ('positions', 'segments')

    def __post_init__(self):
        _check(self)
        super().__post_init__()

    def setup(self):
        self.embed = nn.Embed(
            self.num_classes,
            self.width,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            embedding_init=self.embedding(),
        )
        if self.rope_theta is None:
            self.positions = self.param(
                'positions',
                self.embedding(),
                (self.max_length, self.width),
                self.param_dtype,
            )
        of = self.architecture
        kind = _rematerialised(_Scanned if self.stacked else Block, self.remat)
        if self.stacked:
            scanned = nn.scan(
                kind,
                variable_axes={'params': 0},
                split_rngs={'params': True},
                in_axes=nn.broadcast,
                length=self.depth,
            )
            self.blocks = scanned(of)
        else:
            for i in range(self.depth):
                setattr(self, f'block{i}', kind(of))
        self.final_norm = self.normalise()
        if not self.tied:
            self.head = self.param(
                'head',
                self.initial(),
                (self.width, self.num_classes),
                self.param_dtype,
            )

    def __call__(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Float32 logits [B, T, num_classes] of the token that follows each.

        Args:
          tokens: int [B, T]; one that is none of 0 .. num_classes - 1 makes those of its row NaN.
          positions: int [B, T], within the token's document; None counts from the start of each.
          segments: int [B, T], a number for each document of a row: tokens see those of their own
            alone. Padding is a segment too. None for one document.
          train: nothing depends on it.

        Raises:
          ValueError: tokens that are not int [B, T], or more than there are positions.
        """
        hidden = self.hidden(tokens, positions, segments, train=train)
        head = self.embed.embedding.T if self.tied else self.head
        return _logits(hidden, head)

    def hidden(
        self,
        tokens: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """What the head is applied to, [B, T, width] in `dtype`; arguments as of `__call__`."""
        del train
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ValueError(
                f'Decoder takes integer tokens [B, T], got {tokens.dtype}{list(tokens.shape)}.'
            )
        if tokens.shape[1] > self.max_length:
            raise ValueError(
                f'a row of {tokens.shape[1]} tokens exceeds max_length={self.max_length}.'
            )
        if positions is None:
            positions = positions_in(tokens.shape, segments)
        x, angles = self._embedded(tokens, positions)
        if self.stacked:
            x, _ = self.blocks(x, angles, segments)
        else:
            for i in range(self.depth):
                x = getattr(self, f'block{i}')(x, angles, segments)
        return self.final_norm(x)

    def step(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache,
        valid: jax.Array | None = None,
        *,
        last: bool = False,
    ) -> tuple[jax.Array, Cache]:
        """Reads the tokens that follow: a prompt whole, or an answer token by token.

        Args:
          tokens: int [B, s]; they go into the slots `cache.length` and following.
          positions: int [B, s].
          cache: of the tokens before, with s free slots: past the end it would be overwritten.
          valid: bool [B, s], False for padding; None for all True.
          last: of the last token alone, which spares most of the last block for the others.

        Returns:
          What the head is applied to, [B, s, width] (or [B, 1, width]), and the cache with these
          tokens.
        """
        if self.stacked:
            raise ValueError('Decoder.step: take stacked blocks apart first, by `unstacked`.')
        if valid is None:
            valid = jnp.ones(tokens.shape, bool)
        start = cache.length
        valid = lax.dynamic_update_slice_in_dim(cache.valid, valid, start, 1)
        x, angles = self._embedded(tokens, positions)
        keys, values = [], []
        for i, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
            first = tokens.shape[1] - 1 if last and i == self.depth - 1 else 0
            block = getattr(self, f'block{i}')
            x, key, value = block.step(x, angles, key, value, valid, start, first)
            keys.append(key)
            values.append(value)
        written = Cache(tuple(keys), tuple(values), valid, start + tokens.shape[1])
        return self.final_norm(x), written

    def _embedded(self, tokens, positions):
        # A negative token would count from the end.
        x = self.embed(jnp.where(tokens < 0, self.num_classes, tokens))
        if self.rope_theta is None:
            return x + self.positions[positions].astype(x.dtype), None
        turned = rope.angles(
            positions,
            self.size_of_head,
            self.rope_theta,
            self.rope_scaling,
            dtype=numerics.accumulation_dtype(x),
        )
        return x, turned

    @property
    def architecture(self) -> Architecture:
        """These attributes without the module, for what it is made of."""
        names = [field.name for field in dataclasses.fields(Architecture)]
        return Architecture(**{name: getattr(self, name) for name in names})


def init_cache(decoder: Architecture, rows: int, slots: int, dtype: Any = None) -> Cache:
    """An empty cache of [rows, slots] tokens, in `dtype` or that of the decoder."""
    shape = (rows, decoder.groups, slots, decoder.size_of_head)
    empty = tuple(jnp.zeros(shape, dtype or decoder.dtype) for _ in range(decoder.depth))
    return Cache(empty, empty, jnp.zeros((rows, slots), bool), jnp.int32(0))


def head_of(decoder: Decoder, variables: Mapping[str, Any]) -> jax.Array:
    """The head [width, num_classes], in the type of the parameters."""
    params = variables['params']
    return params['embed']['embedding'].T if decoder.tied else params['head']


def unstacked(decoder: Decoder, variables: Mapping[str, Any]) -> tuple[Decoder, Mapping[str, Any]]:
    """The decoder with a tree for each block, and variables for it.

    A loop over tokens that scans over stacked blocks slices all weights at every token; taken apart
    before the loop they are sliced once.
    """
    if not decoder.stacked:
        return decoder, variables
    params = dict(variables['params'])
    blocks = params.pop('blocks')
    for i in range(decoder.depth):
        params[f'block{i}'] = jax.tree.map(lambda x, i=i: x[i], blocks)
    return decoder.clone(stacked=False), {**variables, 'params': params}


def positions_in(shape: tuple[int, ...], segments: jax.Array | None) -> jax.Array:
    """Positions int [B, T] that count from 0 in each document of a row."""
    slots = jnp.broadcast_to(jnp.arange(shape[1]), shape)
    if segments is None:
        return slots
    begins = jnp.concatenate(
        [jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1
    )
    return slots - lax.cummax(jnp.where(begins, slots, 0), axis=1)


def _written(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """A cache [B, K, S, d] with [B, s, K, d] in the slots `start` and following."""
    new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
    return lax.dynamic_update_slice_in_dim(cache, new, start, 2)


def _logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    wide = numerics.accumulation_dtype(hidden, head)
    return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=wide)


def _rematerialised(kind: type[Block], what: str) -> type[Block]:
    if what == 'none':
        return kind
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if what == 'dots' else None
    return nn.remat(kind, policy=policy)


def _check(decoder: Decoder) -> None:
    """Raises ValueError for sizes that do not go together."""
    if decoder.head_dim is None and decoder.width % decoder.heads:
        raise ValueError(
            f'Decoder width={decoder.width} must be divisible by heads={decoder.heads}, unless '
            'head_dim is given.'
        )
    if decoder.heads % decoder.groups:
        raise ValueError(
            f'Decoder heads={decoder.heads} must be divisible by kv_heads={decoder.kv_heads}.'
        )
    if decoder.rope_theta is not None and decoder.size_of_head % 2:
        raise ValueError(f'Decoder: a head of {decoder.size_of_head} features cannot be rotated.')
    if decoder.rope_scaling is not None:
        rope.check(decoder.rope_scaling)
