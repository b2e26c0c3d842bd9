"""Parts of `kd.models.decoder`: attention over a row and over a cache, the MLP, and the block."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from kd.models import rope
from kd.models.architecture import Architecture
from kd.models.causal_attention import attend_cached, attend_causally
from kd.models.moe import Moe


class Attention(nn.Module):
    """Attention with grouped heads and rotated positions; see `Decoder`."""

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
            segments=segments, window=self.of.window, block=self.of.block, causal=self.of.causal,
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

    def __call__(self, x, where=None):
        del where  # For `Moe` alone.
        if self.of.mlp == 'swiglu':
            return self.down(nn.silu(self.gate(x)) * self.up(x))
        return self.down(nn.gelu(self.up(x), approximate=True))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)).

    Attributes:
      of: what it computes.
      sparse: whether it has experts. They compute no padding.
    """

    of: Architecture
    sparse: bool = False

    def setup(self):
        self.norm1, self.norm2 = self.of.normalise(), self.of.normalise()
        self.attention = Attention(self.of)
        self.mlp = Moe(self.of) if self.sparse else Mlp(self.of)

    def __call__(self, x, angles, segments):
        x = x + self.attention(self.norm1(x), angles, segments)
        return x + self.mlp(self.norm2(x), None if segments is None else segments > 0)

    def step(self, x, angles, keys, values, valid, start, first):
        """Of all tokens the cache gets keys and values, of those from `first` on come outputs."""
        tokens = x.shape[1] - first
        out, keys, values = self.attention.step(
            self.norm1(x), angles, keys, values, valid, start, first
        )
        x = x[:, first:] + out
        there = lax.dynamic_slice_in_dim(valid, start + first, tokens, 1)
        return x + self.mlp(self.norm2(x), there), keys, values


@functools.partial(jax.jit, static_argnums=0, static_argnames='first')
def stepped(block, variables, x, angles, keys, values, valid, start, *, first):
    """`Block.step`, traced once for all blocks of a kind."""
    arguments = (x, angles, keys, values, valid, start)
    return block.apply(variables, *arguments, first=first, method='step')


class Scanned(Block):
    """A block as the body of a scan."""

    def __call__(self, x, angles, segments):
        return super().__call__(x, angles, segments), None


def _written(cache: jax.Array, new: jax.Array, start: jax.Array) -> jax.Array:
    """A cache [B, K, S, d] with [B, s, K, d] in the slots `start` and following."""
    new = jnp.swapaxes(new, 1, 2).astype(cache.dtype)
    return lax.dynamic_update_slice_in_dim(cache, new, start, 2)


def rematerialised(kind: type[Block], what: str) -> type[Block]:
    """The kind of block that computes again what `Decoder.remat` says."""
    if what == 'none':
        return kind
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable if what == 'dots' else None
    return nn.remat(kind, policy=policy)
