"""Decoder-only language models of the Llama, Qwen, Phi-3 and GPT-2 shapes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import lax

from kd.losses import numerics
from kd.models import rope
from kd.models.architecture import Architecture
from kd.models.decoder_parts import Block, Scanned, rematerialised, stepped
from kd.models.moe import Experts
from kd.parallel import layout

__all__ = [
    'SHARDING',
    'Cache',
    'Decoder',
    'head_of',
    'init_cache',
    'positions_in',
    'unstacked',
]

# For `sharding` of a recipe: 'tensor' cuts heads, hidden units, the vocabulary and experts, 'fsdp'
# the rest.
SHARDING = (
    (r'blocks/.*experts/(gate|up|down)/kernel$', (None, 'tensor', 'fsdp')),
    (r'experts/(gate|up|down)/kernel$', ('tensor', 'fsdp')),
    (r'blocks/.*(query|key|value|gate|up)/lora_b$', (None, None, 'tensor')),
    (r'blocks/.*(query|key|value|gate|up)/lora_a$', (None, 'fsdp')),
    (r'blocks/.*(output|down)/lora_b$', (None, None, 'fsdp')),
    (r'blocks/.*(output|down)/lora_a$', (None, 'tensor')),
    (r'(query|key|value|gate|up)/lora_b$', (None, 'tensor')),
    (r'(query|key|value|gate|up)/lora_a$', ('fsdp',)),
    (r'(output|down)/lora_b$', (None, 'fsdp')),
    (r'(output|down)/lora_a$', ('tensor',)),
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


class Decoder(Architecture, nn.Module):
    """Language model, causal by default; `kd.models.decoders` names those that are known by name.

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
    required_fields: ClassVar[tuple[str, ...]] = ('input',)
    optional_fields: ClassVar[tuple[str, ...]] = ('positions', 'segments')

    def __post_init__(self):
        if isinstance(self.experts, Mapping):
            object.__setattr__(self, 'experts', Experts(**self.experts))
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
        kind = rematerialised(Scanned if self.stacked else Block, self.remat)
        if self.stacked:
            scanned = nn.scan(
                kind,
                variable_axes={'params': 0, 'intermediates': 0},
                split_rngs={'params': True},
                in_axes=nn.broadcast,
                length=self.depth,
                # Traces a block twice, and what is drawn goes by that.
                check_constancy_invariants=self.is_initializing(),
            )
            self.blocks = scanned(of, of.experts is not None)
        else:
            for i in range(self.depth):
                sparse = of.experts is not None and of.experts.in_block(i)
                setattr(self, f'block{i}', kind(of, sparse))
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
        """Float32 logits [B, T, num_classes] of the token that follows each; where nothing is
        causal, of the token at each position.

        Args:
          tokens: int [B, T]; one that is none of 0 .. num_classes - 1 makes those of its row NaN.
          positions: int [B, T], within the token's document; None counts from the start of each.
          segments: int [B, T], a number for each document of a row: tokens see those of their own
            alone. Padding is a segment too, 0, of which experts compute nothing. None for one
            document.
          train: nothing depends on it.

        Raises:
          ValueError: tokens that are not int [B, T], or more than there are positions.
        """
        return self._logits(self.hidden(tokens, positions, segments, train=train))

    def _logits(self, hidden):
        head = _used(self, self.embed.embedding if self.tied else self.head)
        wide = numerics.accumulation_dtype(hidden, head)
        return jnp.matmul(hidden, head.astype(hidden.dtype), preferred_element_type=wide)

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
        x, angles = self._read(tokens, positions, segments)
        return self._through(x, angles, segments)

    def _read(self, tokens, positions, segments):
        """Embedded tokens [B, T, width], and the angles of their positions."""
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
        return self._embedded(tokens, positions, spread=True)

    def _through(self, x, angles, segments):
        """Embedded tokens through all blocks."""
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
        if not self.causal:
            raise ValueError('Decoder.step: tokens one after another need a causal decoder.')
        if self.stacked:
            raise ValueError('Decoder.step: take stacked blocks apart first, by `unstacked`.')
        if valid is None:
            valid = jnp.ones(tokens.shape, bool)
        start = cache.length
        valid = lax.dynamic_update_slice_in_dim(cache.valid, valid, start, 1)
        x, angles = self._embedded(tokens, positions, spread=False)
        keys, values = [], []
        for i, (key, value) in enumerate(zip(cache.keys, cache.values, strict=True)):
            first = tokens.shape[1] - 1 if last and i == self.depth - 1 else 0
            block = getattr(self, f'block{i}')
            if self.adapter is None:
                alike = Block(block.of, block.sparse, parent=None)
                step = functools.partial(stepped, alike, block.variables, first=first)
            else:  # Which kernels have adapters may depend on the block's name.
                step = functools.partial(block.step, first=first)
            x, key, value = step(x, angles, key, value, valid, start)
            keys.append(key)
            values.append(value)
        written = Cache(tuple(keys), tuple(values), valid, start + tokens.shape[1])
        return self.final_norm(x), written

    def _embedded(self, tokens, positions, *, spread):
        """Tokens [B, T, width] and angles; `spread` tells that weights may lie along fsdp."""
        # A negative token would count from the end, and one past it is NaN.
        known = jnp.where(tokens < 0, self.num_classes, tokens)
        if spread:
            # Devices look up the columns that they have, and exchange: neither the table nor rows
            # are gathered, here and for the gradient.
            known = layout.lying(known, 'copies')
        x = jnp.take(self.embed.embedding.astype(self.dtype), known, axis=0)
        if spread:
            x = layout.lying(x, 'copies', None, 'width')
        x = layout.lying(x, 'rows')
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
    """The head [width, num_classes], in the type of computation; on several devices cut along the
    vocabulary alone, so that a loop over slabs of tokens finds it at hand."""
    params = variables['params']
    return _used(decoder, params['embed']['embedding'] if decoder.tied else params['head'])


def _used(decoder: Decoder, weight: jax.Array) -> jax.Array:
    """The head [width, num_classes] that an embedding is or a weight; see `head_of`."""
    weight = weight.astype(decoder.dtype)
    if decoder.tied:
        return layout.gathered(weight, 'features').T
    return layout.gathered(weight, None, 'features')


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


def _check(decoder: Decoder) -> None:
    """Raises ValueError for sizes that do not go together."""
    if decoder.window is not None and not decoder.causal:
        raise ValueError('Decoder: a window looks back; set window=None where causal=False.')
    if decoder.head_dim is None and decoder.width % decoder.heads:
        raise ValueError(
            f'Decoder width={decoder.width} must be divisible by heads={decoder.heads}, unless '
            'head_dim is given.'
        )
    if decoder.experts is not None and decoder.stacked and decoder.experts.every > 1:
        raise ValueError(
            f'Decoder: experts in one block of {decoder.experts.every} cannot be stacked; set '
            'experts.every=1 or stacked=False.'
        )
    if decoder.heads % decoder.groups:
        raise ValueError(
            f'Decoder heads={decoder.heads} must be divisible by kv_heads={decoder.kv_heads}.'
        )
    if decoder.rope_theta is not None and decoder.size_of_head % 2:
        raise ValueError(f'Decoder: a head of {decoder.size_of_head} features cannot be rotated.')
    if decoder.rope_scaling is not None:
        rope.check(decoder.rope_scaling)
