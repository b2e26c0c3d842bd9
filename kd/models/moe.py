"""Mixture of experts in the place of a block's MLP: each token is computed by a few of many.

    g = softmax(x W_g);   y = sum over the k largest g_e of g_e FFN_e(x) / (sum of these g_e)

An expert has a number of slots, and what finds none is dropped: the row goes on with the residual
alone. Tokens are gathered into slots and scattered back, so that what is computed grows with k and
the capacity and not with the number of experts. A row of a batch has slots of its own: what is said
of it depends on no other row, no mesh and no micro-batches.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from kd.parallel import layout

if TYPE_CHECKING:
    from kd.models.architecture import Architecture

# Below the layer: what has an axis of experts, and what gives them tokens.
EACH, ROUTER = 'experts', 'router'


@dataclasses.dataclass(frozen=True)
class Experts:
    """How many experts a block has, and who gets a token.

    Attributes:
      count: E.
      top_k: experts of a token.
      capacity: slots of an expert, as a multiple of the tokens that it would get if all got the
        same, top_k T / E; None for as many as there are tokens, so that none is dropped.
      every: one block in so many has experts, the first of all among them.
    """

    count: int = 4
    top_k: int = 2
    capacity: float | None = 1.5
    every: int = 2

    def __post_init__(self):
        for name in ('count', 'top_k', 'every'):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f'experts.{name} must be an integer from 1, got {value!r}.')
        if self.top_k > self.count:
            raise ValueError(f'experts.top_k={self.top_k} exceeds experts.count={self.count}.')
        if self.capacity is not None and not self.capacity > 0:
            raise ValueError(f'experts.capacity must be above 0, got {self.capacity!r}.')

    def in_block(self, number: int) -> bool:
        """Whether a block has experts."""
        return number % self.every == 0

    def slots(self, tokens: int) -> int:
        """C, the slots of an expert for a row of so many tokens."""
        if self.capacity is None:
            return tokens
        return min(tokens, math.ceil(self.capacity * self.top_k * tokens / self.count))


class Routing(NamedTuple):
    """Where the tokens of a row go.

    Attributes:
      tokens: int32 [E, C], the token in each slot; T for none.
      slots: int32 [T, k], the slot of each token's choices, in 0 .. E C - 1; E C for none.
      weights: float32 [T, k], of the experts' outputs; their sum over k is 1, or 0 for a token that
        found no slot.
    """

    tokens: jax.Array
    slots: jax.Array
    weights: jax.Array

    @property
    def load(self) -> jax.Array:
        """int32 [E], tokens that each expert computes; of many rows [B, E]."""
        return (self.tokens < self.slots.shape[-2]).sum(-1)


def route(
    probabilities: jax.Array, top_k: int, capacity: int, where: jax.Array | None = None
) -> Routing:
    """Gives the tokens of a row to experts.

    A token asks for the k most probable experts, at equal probability for the first ones. All first
    choices come before all second ones, each in the order of tokens. Weights are taken relative to
    those of the choices that found a slot, as in DeepSpeed's top-2 gating; that draws the second
    expert at random in training, and here nothing is random.

    Args:
      probabilities: float32 [T, E].
      top_k: k.
      capacity: C.
      where: bool [T], the tokens that are routed; None for all.
    """
    count, experts = probabilities.shape
    weights, chosen = lax.top_k(probabilities, top_k)
    flat = chosen.T.reshape(-1)
    wanted = jax.nn.one_hot(flat, experts, dtype=jnp.int32)
    if where is not None:
        wanted = wanted * jnp.tile(where, top_k)[:, None]
    before = jnp.cumsum(wanted, axis=0) - wanted
    position = jnp.take_along_axis(before, flat[:, None], axis=1)[:, 0]
    taken = wanted.any(1) & (position < capacity)
    slots = jnp.where(taken, flat * capacity + position, experts * capacity)
    numbers = jnp.tile(jnp.arange(count, dtype=jnp.int32), top_k)
    tokens = jnp.full(experts * capacity, count, jnp.int32).at[slots].set(numbers, mode='drop')
    weights = jnp.where(taken.reshape(top_k, count).T, weights, 0.0)
    total = weights.sum(1, keepdims=True)
    return Routing(
        tokens.reshape(experts, capacity),
        slots.reshape(top_k, count).T,
        weights / jnp.where(total > 0, total, 1.0),
    )


class Router(nn.Module):
    """Tokens [..., width] to the probabilities of experts, float32 [..., E]."""

    of: Architecture

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        experts = _experts(self.of)
        kernel = self.param(
            'kernel', self.of.initial(), (x.shape[-1], experts.count), jnp.float32
        )  # fmt: skip
        return jax.nn.softmax(jnp.matmul(x.astype(jnp.float32), kernel, precision='highest'))


class Each(nn.Module):
    """A dense layer of each expert, [B, E, C, in] to [B, E, C, features]."""

    of: Architecture
    features: int
    scale: float = 1.0

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        of, count = self.of, _experts(self.of).count
        initial = nn.initializers.variance_scaling(
            self.scale**2, 'fan_in', 'normal', batch_axis=(0,)
        )
        if of.deviation is not None:
            initial = nn.initializers.normal(self.scale * of.deviation)
        shape = (count, x.shape[-1], self.features)
        kernel = self.param('kernel', initial, shape, of.param_dtype)
        kernel = layout.gathered(kernel.astype(x.dtype), 'features')
        out = jnp.einsum('beci,eio->beco', x, kernel)
        out = layout.lying(out, 'rows', 'features')
        if not of.bias:
            return out
        bias = self.param(
            'bias', nn.initializers.zeros, (count, self.features), of.param_dtype
        )  # fmt: skip
        return out + bias.astype(x.dtype)[:, None]


class Ffns(nn.Module):
    """The MLPs of all experts, [B, E, C, width] to the same; experts lie along 'features'."""

    of: Architecture

    def setup(self):
        of = self.of
        if of.mlp == 'swiglu':
            self.gate = Each(of, of.hidden_units)
        self.up = Each(of, of.hidden_units)
        self.down = Each(of, of.width, (2 * of.depth) ** -0.5)

    def __call__(self, x: jax.Array) -> jax.Array:
        if self.of.mlp == 'swiglu':
            return self.down(nn.silu(self.gate(x)) * self.up(x))
        return self.down(nn.gelu(self.up(x), approximate=True))


class Moe(nn.Module):
    """The layer; its feature `router` is the probabilities, from which `balance` and loads follow.

    The experts' leaves lie below `experts`, [E, in, out], and are those of the dense MLP beside.
    """

    of: Architecture

    def setup(self):
        self.router = Router(self.of)
        self.experts = Ffns(self.of)

    def __call__(self, x: jax.Array, where: jax.Array | None = None) -> jax.Array:
        """[B, T, width] to the same; 0 for tokens that found no slot or are outside `where`."""
        found = routed(self.router(x), _experts(self.of), where)
        # Slots and choices that are none lie one past the end.
        taken = _pick(x.astype(self.of.dtype), found.tokens)
        out = self.experts(layout.lying(taken, 'rows', 'features'))
        return _combined(out, found)


def _combined(out: jax.Array, found: Routing) -> jax.Array:
    """What the experts say [B, E, C, width], added up for each token, [B, T, width].

    Devices that share the experts add up what theirs say of a token before it moves: once, and not
    for each of its k experts.
    """
    rows, experts, slots, width = out.shape
    parts = layout.parts(experts, 'features')
    size = experts * slots // parts
    own = found.slots[:, None] - size * jnp.arange(parts)[:, None, None]
    # A negative index would count from the end.
    own = layout.lying(jnp.where(own < 0, size, own), 'rows', 'features')
    held = layout.lying(out.reshape(rows, parts, size, width), 'rows', 'features')
    chosen = jax.vmap(_pick)(held, own)
    weights = found.weights[:, None, ..., None].astype(chosen.dtype)
    added = layout.lying((weights * chosen).sum(3), 'rows', 'features')
    return layout.lying(added.sum(1), 'rows')


def _pick(of: jax.Array, at: jax.Array) -> jax.Array:
    """[B, n, width] at int [B, ...]; 0 for what is past the end."""
    return jax.vmap(lambda of, at: of.at[at].get(mode='fill', fill_value=0))(of, at)


def routed(
    probabilities: jax.Array, experts: Experts, where: jax.Array | None = None
) -> Routing:  # fmt: skip
    """`route` of every row, of what a router says [B, T, E]; where: bool [B, T]."""
    slots = experts.slots(probabilities.shape[1])

    def of_row(row, counted=None):
        return route(row, experts.top_k, slots, counted)

    return jax.vmap(of_row)(probabilities, *(() if where is None else (where,)))


def routers(decoder: Any) -> tuple[str, ...]:
    """Features of a decoder that are the probabilities of its experts, for `Network.apply`."""
    experts = getattr(decoder, 'experts', None)
    if experts is None:
        return ()
    if decoder.stacked:
        return ('blocks/mlp/router',)
    blocks = [number for number in range(decoder.depth) if experts.in_block(number)]
    return tuple(f'block{number}/mlp/router' for number in blocks)


def upcycle(dense: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Parameters of a decoder with experts, each of which is a copy of the dense one's MLP.

    Args:
      dense: parameters of a decoder without experts; or with, which stay.
      own: parameters of the decoder with experts, of which the routers are kept.
    """
    made, copied = dict(dense), set[str]()
    for name, x in own.items():
        if name in dense:
            if isinstance(x, Mapping) and isinstance(dense[name], Mapping):
                made[name] = upcycle(dense[name], x)
        elif name == EACH:
            made[name] = _copies(dense, x)
            copied |= set(made[name])
        elif name == ROUTER:
            made[name] = x
    return {name: x for name, x in made.items() if name not in copied}


def _copies(dense: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What the dense one has of the own names, once for each expert."""
    made: dict[str, Any] = {}
    for name, x in own.items():
        if name not in dense:
            continue
        if isinstance(x, Mapping):
            made[name] = _copies(dense[name], x)
        else:
            axis = x.ndim - (3 if name == 'kernel' else 2)
            made[name] = jnp.repeat(jnp.expand_dims(dense[name], axis), x.shape[axis], axis)
    return made


def _experts(of: Architecture) -> Experts:
    assert of.experts is not None
    return of.experts
