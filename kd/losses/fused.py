"""The sweep behind `kd.losses.sequence`: a loss of logits that never exist whole, and its gradient.

Tokens are dealt to slabs of `chunk`. A slab goes through the head, the loss and back while its
logits exist; what stays is one value per token and the gradients of the two factors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from kd.losses import numerics, signal

# (logits [n, V], what each token has [n, ...], what all share) -> (loss [n], aux [n, ...]).
Run = Callable[[jax.Array, Any, Any], tuple[jax.Array, Any]]


class Given(NamedTuple):
    """What a sweep is given beside the factors, and does not differentiate.

    Attributes:
      per_token: pytree of arrays [N, ...].
      shared: pytree of arrays that every slab sees whole.
      valid: bool [N], the tokens that count; None for all.
    """

    per_token: Any
    shared: Any
    valid: jax.Array | None


class How(NamedTuple):
    """How tokens are swept over.

    Attributes:
      chunk: tokens of a slab.
      shards: equal parts of the tokens over devices.
      tied: whether the head [D, V] is kept as the embedding [V, D] that it is, turned. XLA drops
        what is turned twice, and copies what is turned once, before a loop.
    """

    chunk: int
    shards: int
    tied: bool

    def turned(self, head: jax.Array) -> jax.Array:
        """What is kept of a head, and the head of what is kept."""
        return head.T if self.tied else head


def token_losses(
    run: Run, how: How, hidden: jax.Array, head: jax.Array, given: Given
) -> tuple[jax.Array, Any]:
    """(loss [N], aux [N, ...]) of `run` on hidden [N, D] @ head [D, V]; see `sequence`."""
    given = lax.stop_gradient(given)
    # Inside shard_map one operand may be replicated where another varies over the devices. Adding a
    # zero that varies like all of them makes JAX sum the gradient of a replicated head over the
    # devices; XLA drops the addition.
    zero = jnp.zeros_like(hidden, shape=())
    for operand in jax.tree.leaves((head, given)):
        zero += jnp.zeros_like(operand, zero.dtype, ())
    hidden, kept = hidden + zero, how.turned(head) + zero.astype(head.dtype)
    run, closed_over = _closed(run, _Slabs(how, hidden, given), kept)
    given = given._replace(shared=(given.shared, lax.stop_gradient(closed_over)))
    return _losses(run, how, hidden, kept, given)


def _closed(run: Run, slabs: _Slabs, kept: jax.Array) -> tuple[Run, list[jax.Array]]:
    """`run` without the arrays that it closes over, and these.

    A traced one would be out of reach where the backward pass is traced elsewhere, as it is for a
    loss that is jitted before it is differentiated.
    """

    def first_slab():
        hidden, _, per_token = slabs[0]
        return slabs.logits(hidden, kept), per_token, slabs.shared

    arguments = jax.eval_shape(first_slab)
    traced, outputs = jax.make_jaxpr(run, return_shape=True)(*arguments)
    tree = jax.tree.structure(outputs)

    def run_closed(logits, per_token, shared):
        shared, closed_over = shared
        leaves = jax.tree.leaves((logits, per_token, shared))
        return jax.tree.unflatten(tree, jax.core.eval_jaxpr(traced.jaxpr, closed_over, *leaves))

    return run_closed, traced.consts


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _losses(run, how, hidden, kept, given):
    return _sweep(run, _Slabs(how, hidden, given), kept, ('value',))['value']


def _forward(run, how, hidden, kept, given):
    slabs = _Slabs(how, hidden, given)
    ones = jnp.ones_like(hidden, numerics.accumulation_dtype(hidden, kept), hidden.shape[:1])
    found = _sweep(run, slabs, kept, ('value', 'slopes', 'hidden', 'head'), [ones])
    return found.pop('value'), (hidden, kept, given, found)


def _backward(run, how, residuals, cotangents):
    hidden, kept, given, found = residuals
    weights, of_aux = cotangents[0].astype(found['head'].dtype), _floats(cotangents[1])
    slabs = _Slabs(how, hidden, given)
    common = weights[jnp.argmax(found['slopes'])]
    alike = jnp.all((weights == common) | ~found['slopes'])

    def scale():
        return weights[:, None] * found['hidden'], common * found['head']

    def head_again():
        again = _sweep(run, slabs, kept, ('head',), [weights])
        return weights[:, None] * found['hidden'], again['head']

    def both_again():
        again = _sweep(run, slabs, kept, ('hidden', 'head'), [weights, *of_aux])
        return again['hidden'], again['head']

    way, ways = jnp.where(alike, 0, 1), [scale, head_again]
    if of_aux:
        way, ways = jnp.where(_any_nonzero(of_aux), 2, way), [*ways, both_again]
    to_hidden, to_head = lax.switch(way, ways)
    to_head = jnp.sum(to_head, axis=0)
    return to_hidden.astype(hidden.dtype), to_head.astype(kept.dtype), None


_losses.defvjp(_forward, _backward)


def _sweep(
    run: Run,
    slabs: _Slabs,
    kept: jax.Array,
    wanted: Sequence[str],
    weights: Sequence[jax.Array] = (),
) -> dict[str, Any]:
    """One pass over the slabs, for what is wanted of it.

    - 'value': (loss [N], aux [N, ...]).
    - 'hidden' [N, D], 'head' [shards, *kept]: the gradients of the sum over tokens of outputs times
      `weights` [N, ...]: one for the loss, or one for it and for each floating leaf of aux. That of
      what is kept of the head is yet to be summed over shards: a sum over devices once, not for
      each slab.
    - 'slopes': bool [N], whether the gradient in the token's logits is other than 0.
    """
    dtype = numerics.accumulation_dtype(slabs.hidden, kept)

    def value_of(i):
        hidden, _, per_token = slabs[i]
        return run(slabs.logits(hidden, kept), per_token, slabs.shared)

    def turn(i, found):
        found = dict(found)
        if not weights:
            new = {'value': value_of(i)}
        else:
            hidden, counts, per_token = slabs[i]

            def outputs(logits):
                loss, aux = run(logits, per_token, slabs.shared)
                return [loss, *_floats(aux)][: len(weights)], (loss, aux)

            logits = slabs.logits(hidden, kept)
            values, pull, value = jax.vjp(outputs, logits, has_aux=True)
            ours = [slabs.take(w, i).astype(v.dtype) for w, v in zip(weights, values, strict=True)]
            to_logits = jnp.where(counts[:, None], pull(ours)[0], 0).astype(kept.dtype)
            by_shard = [slabs.by_shard(x) for x in (hidden, to_logits)]
            product = 'snd,snv->svd' if slabs.how.tied else 'snd,snv->sdv'
            found['head'] += jnp.einsum(product, *by_shard, preferred_element_type=dtype)
            head = slabs.how.turned(kept)
            to_hidden = jnp.matmul(to_logits, head.T, preferred_element_type=dtype)
            slopes = jnp.any(to_logits != 0, axis=-1)
            new = {'value': value, 'hidden': to_hidden, 'slopes': slopes}
        for name in found.keys() & new.keys():
            found[name] = jax.tree.map(
                lambda all_, one: lax.dynamic_update_index_in_dim(all_, one, i, 0),
                found[name],
                new[name],
            )
        return found

    value = jax.eval_shape(value_of, 0)
    _check_outputs(value, slabs.tokens)
    empty = {
        'value': jax.tree.map(lambda x: slabs.zeros((slabs.count, *x.shape), x.dtype), value),
        'hidden': slabs.zeros((slabs.count, slabs.tokens, slabs.hidden.shape[1]), dtype),
        'head': slabs.zeros((slabs.shards, *kept.shape), dtype),
        'slopes': slabs.zeros((slabs.count, slabs.tokens), bool),
    }
    found = slabs.each(turn, {name: empty[name] for name in wanted})
    return {name: x if name == 'head' else jax.tree.map(slabs.join, x) for name, x in found.items()}


class _Slabs:
    """Tokens in slabs of equal size, the i-th of which is `slabs[i]`.

    Each of the `shards` equal parts of the tokens has a share of every slab, so that devices which
    hold a part each work on all slabs together.

    Without `valid` a part's tokens are dealt like cards: slab i has its tokens i, i + count,
    i + 2 count, ... (so too where more devices hold the tokens than `shards` tells). With `valid`
    they are packed, those that count first, slab i has the i-th run of them, and the slabs after
    the last that has a token that counts are skipped. By a condition inside a loop of known length:
    what is compiled ahead of time then tells its cost, and XLA passes gradients through in place.
    """

    def __init__(self, how: How, hidden, given: Given):
        self.how, self.hidden, self.shared, self.valid = how, hidden, given.shared, given.valid
        self.per_token = given.per_token
        self.shards = shards = how.shards
        self.part = hidden.shape[0] // shards
        self.count = min(-(-hidden.shape[0] // how.chunk), self.part)
        self.size = -(-self.part // self.count)
        self.tokens = shards * self.size
        self.missing = self.size * self.count - self.part
        if given.valid is not None:
            valid = given.valid.reshape(shards, self.part)
            order = jnp.argsort(~valid, axis=1, stable=True).astype(jnp.int32)
            self.place = jnp.argsort(order, axis=1).astype(jnp.int32)
            self.order = jnp.pad(order, ((0, 0), (0, self.missing)), 'edge')
            self.counted = jnp.sum(valid, axis=1, dtype=jnp.int32)
            self.needed = jnp.max(-(-self.counted // self.size))

    def __getitem__(self, i):
        """Hidden [n, D], whether it counts [n], and what else each of the n tokens of slab i has.

        A token that does not count has zeros for its hidden state, whatever was there.
        """
        at = jnp.arange(self.size)
        if self.valid is None:
            counts = jnp.broadcast_to(at * self.count + i < self.part, (self.shards, self.size))
        else:
            counts = i * self.size + at < self.counted[:, None]
        counts = counts.reshape(self.tokens)
        hidden = jnp.where(counts[:, None], self.take(self.hidden, i), 0)
        return hidden, counts, jax.tree.map(lambda x: self.take(x, i), self.per_token)

    def logits(self, hidden, kept):
        """[n, V] of hidden states [n, D] and what is kept of the head."""
        return signal.HiddenHead(hidden, self.how.turned(kept)).logits()

    def take(self, x, i):
        """Slab i of [N, ...], [n, ...]; empty places repeat a token."""
        rest = x.shape[1:]
        x = x.reshape(self.shards, self.part, *rest)
        if self.valid is None:
            if self.missing:
                x = jnp.pad(x, [(0, 0), (0, self.missing)] + [(0, 0)] * len(rest), 'edge')
            x = x.reshape(self.shards, self.size, self.count, *rest)
            slab = lax.dynamic_index_in_dim(x, i, axis=2, keepdims=False)
        else:
            at = lax.dynamic_slice_in_dim(self.order, i * self.size, self.size, axis=1)
            slab = _rows(x, at)
        return slab.reshape(self.tokens, *rest)

    def join(self, x):
        """[count, n, ...] -> [N, ...], with zeros for tokens that do not count."""
        rest = x.shape[2:]
        x = x.reshape(self.count, self.shards, self.size, *rest)
        if self.valid is None:
            x = jnp.moveaxis(x, 0, 2).reshape(self.shards, -1, *rest)[:, : self.part]
            return x.reshape(-1, *rest)
        x = jnp.moveaxis(x, 0, 1).reshape(self.shards, -1, *rest)
        x = _rows(x, self.place).reshape(-1, *rest)
        return jnp.where(self.valid.reshape(-1, *(1,) * len(rest)), x, jnp.zeros((), x.dtype))

    def by_shard(self, x):
        """[n, ...] -> [shards, n / shards, ...]"""
        return x.reshape(self.shards, self.size, *x.shape[1:])

    def each(self, turn, found):
        """`found` after turn(i, found) for every slab i that is needed."""
        if self.valid is None:
            return lax.fori_loop(0, self.count, turn, found)

        def turn_if_needed(i, found):
            return lax.cond(i < self.needed, turn, lambda i, found: found, i, found)

        return lax.fori_loop(0, self.count, turn_if_needed, found)

    def zeros(self, shape, dtype):
        """Zeros that vary over devices as the hidden states do."""
        return jnp.zeros_like(self.hidden, dtype, shape)


def _rows(x, at):
    """[S, M, ...] and int [S, n] -> [S, n, ...]."""
    return jax.vmap(lambda rows, at: rows.at[at].get(mode='promise_in_bounds'))(x, at)


def _floats(tree):
    return [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]


def _any_nonzero(arrays):
    return jnp.any(jnp.stack([jnp.any(x != 0) for x in arrays]))


def _check_outputs(value, tokens):
    loss, aux = value
    if loss.shape != (tokens,) or any(x.shape[:1] != (tokens,) for x in jax.tree.leaves(aux)):
        raise ValueError(
            f'token_loss must return (loss [n], aux) with n leading each array of aux; for n = '
            f'{tokens} it returned shapes {jax.tree.map(jnp.shape, (loss, aux))}.'
        )
