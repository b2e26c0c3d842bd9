"""Sampling from a decoder, token by token, in one compiled loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kd.losses import numerics
from kd.models.decoder import Cache, Decoder, head_of, init_cache, unstacked

__all__ = ['Rollout', 'Sampler', 'sampler', 'truncate']


class Rollout(NamedTuple):
    """Answers to a batch of prompts.

    Attributes:
      tokens: int32 [B, R]; 0 after the end.
      mask: bool [B, R]; the tokens of the answer, a stop token included. By length, never by token.
      log_probs: float32 [B, R], of each token under softmax(logits / temperature) over the allowed
        tokens, not over those that top-k and top-p leave (at temperature 0 under softmax(logits));
        0 after the end.
      truncated: bool [B], whether the answer came to no stop token.
    """

    tokens: jax.Array
    mask: jax.Array
    log_probs: jax.Array
    truncated: jax.Array

    @property
    def there(self) -> jax.Array:
        """bool [B, R], the tokens to be read: of an answer all that it has."""
        return self.mask


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Draws answers; made by `sampler`, whose arguments are its attributes."""

    decoder: Decoder
    max_new: int
    temperature: float
    top_p: float
    top_k: int
    stop: tuple[int, ...]
    forbidden: tuple[int, ...]
    block: int
    only: tuple[int, ...] = ()

    def __call__(
        self,
        variables: Mapping[str, Any],
        prompt: jax.Array,
        prompt_mask: jax.Array,
        key: jax.Array,
        *,
        rows: jax.Array | None = None,
    ) -> Rollout:
        """An answer to each prompt.

        A row's answer depends on its prompt, the key and its number alone: not on the other rows,
        the padding, the mesh or the size of blocks, up to the rounding of sums.

        Args:
          variables: of the decoder, such as `context.rollout(variables)`, so that nothing is
            gathered inside the loop.
          prompt: int [B, P], padded on the left.
          prompt_mask: bool [B, P], False for padding.
          key: typed random key; row b draws token t by fold_in(fold_in(key, rows[b]), t).
          rows: int [B], numbers of the rows; None for 0 .. B - 1.
        """
        cache = self.start(prompt.shape[0], prompt.shape[1])
        return self.answer(variables, cache, prompt, prompt_mask, key, rows=rows)[0]

    def of(
        self,
        variables: Mapping[str, Any],
        batch: Mapping[str, jax.Array],
        key: jax.Array,
        *,
        rows: jax.Array | None = None,
    ) -> Rollout:
        """Answers to the prompts of a batch, its fields `input` and `prompt_mask`."""
        return self(variables, batch['input'], batch['prompt_mask'], key, rows=rows)

    def start(self, rows: int, read: int, turns: int = 1) -> Cache:
        """An empty cache for so many turns of answers, and `read` tokens to be read in all."""
        count, size = self._blocks()
        return init_cache(self.decoder, rows, read + turns * (1 + count * size))

    def turn(
        self,
        variables: Mapping[str, Any],
        cache: Cache,
        tokens: jax.Array,
        mask: jax.Array,
        key: jax.Array,
        *,
        rows: jax.Array | None = None,
    ) -> tuple[Rollout, Cache]:
        """Reads further tokens, such as what an environment says, and answers.

        Args:
          variables: as of `__call__`.
          cache: of all turns so far.
          tokens: int [B, s], padded on the left.
          mask: bool [B, s], False for padding; a row without any token says nothing in this turn.
          key, rows: as of `__call__`; another key for each turn.

        Returns:
          The answers, and the cache with what was read and said.
        """
        said, cache, unread = self.answer(variables, cache, tokens, mask, key, rows=rows)
        return said, self.read(variables, cache, *unread)[1]

    def read(
        self, variables: Mapping[str, Any], cache: Cache, tokens: jax.Array, mask: jax.Array
    ) -> tuple[jax.Array, Cache]:
        """Reads tokens [B, s] without an answer: what the head is applied to at the last of them,
        [B, D], and the cache."""
        ready, variables = self.prepared(variables)
        positions = jnp.maximum(cache.valid.sum(1)[:, None] + jnp.cumsum(mask, 1) - 1, 0)
        said: Any = ready.decoder.apply(
            variables, tokens, positions, cache, mask, last=True, method='step'
        )
        return said[0][:, 0], said[1]

    def prepared(self, variables: Mapping[str, Any]) -> tuple[Sampler, Mapping[str, Any]]:
        """This sampler and variables, made ready once for a loop over turns."""
        decoder, variables = unstacked(self.decoder, _in_compute_type(self.decoder, variables))
        return dataclasses.replace(self, decoder=decoder), variables

    def answer(
        self,
        variables: Mapping[str, Any],
        cache: Cache,
        tokens: jax.Array,
        mask: jax.Array,
        key: jax.Array,
        *,
        rows: jax.Array | None = None,
    ) -> tuple[Rollout, Cache, tuple[jax.Array, jax.Array]]:
        """`turn`, but for the last token of the loop, which is yet to be read.

        Returns:
          The answers, the cache, and the tokens int [B, 1] that it lacks, with the mask bool [B, 1]
          of those that are there: to be read before anything else, and best together with it.
        """
        ready, variables = self.prepared(variables)
        head = head_of(ready.decoder, variables).T
        if self.only:
            head = head[jnp.asarray(self.only)]
        keys = jax.vmap(jax.random.fold_in, (None, 0))(
            key, jnp.arange(tokens.shape[0]) if rows is None else rows
        )

        def say(hidden, done, t):
            token, log_prob = self._draw(hidden, head, keys, t)
            alive = ~done & (t < self.max_new)
            said = (jnp.where(alive, token, 0), alive, jnp.where(alive, log_prob, 0.0))
            return said, done | (alive & self._stops(token))

        def one(carry, t):
            cache, (token, alive, _), done = carry
            hidden, cache = ready.read(variables, cache, token[:, None], alive[:, None])
            said, done = say(hidden, done, t)
            return (cache, said, done), said

        def some(carry, first):
            return lax.scan(one, carry, first + jnp.arange(size))

        def none(carry, first):
            del first
            carry = (carry[0].replace(length=carry[0].length + size), *carry[1:])
            return carry, tuple(jnp.zeros((size, *x.shape), x.dtype) for x in carry[1])

        blocks, size = self._blocks()
        hidden, cache = ready.read(variables, cache, tokens, mask)
        silent = ~mask[:, -1]
        first, done = say(hidden, silent, 0)
        carry, later = lax.scan(
            lambda carry, first: lax.cond(carry[2].all(), none, some, carry, first),
            (cache, first, done),
            1 + size * jnp.arange(blocks),
        )
        said_tokens, said_mask, log_probs = (
            jnp.concatenate([x[None], rest.reshape(blocks * size, *x.shape)])[: self.max_new].T
            for x, rest in zip(first, later, strict=True)
        )
        cache, (token, alive, _), done = carry
        unread = token[:, None], alive[:, None]
        return Rollout(said_tokens, said_mask, log_probs, ~done & ~silent), cache, unread

    def turns(self, mask: jax.Array) -> jax.Array:
        """Tokens of each row that the loop goes through for answers of this mask, bool [B, R].

        What all rows of a batch take is as much as the longest takes: the first token, and blocks.
        """
        size = max(self._blocks()[1], 1)
        return 1 + size * -(-(mask.sum(1).max() - 1) // size)

    def allowed(self, size: int) -> np.ndarray | None:
        """The tokens of `size` logits that may be said, bool [V]; None for all of them."""
        said = np.arange(size) < self.decoder.num_classes
        said[[token for token in self.forbidden if token < size]] = False
        if self.only:
            said &= np.isin(np.arange(size), self.only)
        return None if said.all() else said

    def _blocks(self) -> tuple[int, int]:
        """How many blocks of how many tokens after the first: as few too many as may be."""
        count = -(-(self.max_new - 1) // self.block)
        return count, -(-(self.max_new - 1) // max(count, 1))

    def _stops(self, token: jax.Array) -> jax.Array:
        stops = jnp.zeros(token.shape, bool)
        for each in self.stop:
            stops |= token == each
        return stops

    def _draw(self, hidden, head, keys, t):
        """The t-th token of each row, and its log-probability."""
        wide = numerics.accumulation_dtype(hidden, head)
        logits = jnp.einsum('bd,vd->bv', hidden, head, preferred_element_type=wide)
        if self.forbidden:
            logits = logits.at[:, jnp.asarray(self.forbidden)].set(-jnp.inf)
        if self.temperature:
            logits = logits / self.temperature
            left = truncate(logits, top_k=self.top_k, top_p=self.top_p)
            keys = jax.vmap(jax.random.fold_in, (0, None))(keys, t)
            noise = jax.vmap(lambda key: jax.random.gumbel(key, left.shape[1:], wide))(keys)
            token = _largest(left + noise)
        else:
            token = _largest(logits)
        chosen = jnp.take_along_axis(logits, token[:, None], axis=1)[:, 0]
        log_prob = chosen - jax.nn.logsumexp(logits, axis=-1)
        return (jnp.asarray(self.only, jnp.int32)[token] if self.only else token), log_prob


def sampler(
    decoder: Decoder,
    *,
    max_new: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    stop: Sequence[int] = (),
    forbidden: Sequence[int] = (),
    only: Sequence[int] = (),
    block: int = 16,
) -> Sampler:
    """A sampler of answers of at most `max_new` tokens.

    Tokens are drawn in blocks, and a block is skipped once every row has stopped: the number of
    turns of the loop is known to the compiler, and a batch of short answers costs no more than its
    longest one, up to a block.

    Args:
      decoder: the module; stacked blocks are taken apart before the loop.
      max_new: tokens of the longest answer.
      temperature: of the law; 0 for the most probable token.
      top_p: draws from the fewest most probable tokens whose probability is at least this
        (arXiv:1904.09751); 1 for all.
      top_k: draws from so many of the most probable tokens; 0 for all.
      stop: tokens that end an answer; all are part of it.
      forbidden: tokens that have probability 0.
      only: the tokens that may be said, such as actions; () for all that are not forbidden.
      block: tokens between two looks whether all rows have stopped.

    Raises:
      ValueError: a number out of range, or a token outside the vocabulary; both `only` and
        `forbidden`.
    """
    if max_new < 1 or block < 1:
        raise ValueError(f'sampler: max_new={max_new} and block={block} must be at least 1.')
    if not 0 <= temperature < float('inf') or not 0 < top_p <= 1 or top_k < 0:
        raise ValueError(
            f'sampler: temperature={temperature} must be at least 0, top_p={top_p} in (0, 1] and '
            f'top_k={top_k} at least 0.'
        )
    if only and forbidden:
        raise ValueError(
            'sampler: where `only` some tokens may be said, none is forbidden besides.'
        )
    for name, tokens in (('stop', stop), ('forbidden', forbidden), ('only', only)):
        for token in tokens:
            if not 0 <= token < decoder.num_classes:
                raise ValueError(
                    f'sampler: {name} token {token} is outside the vocabulary of '
                    f'{decoder.num_classes}.'
                )
    return Sampler(
        decoder=decoder,
        max_new=max_new,
        temperature=float(temperature),
        top_p=float(top_p),
        top_k=min(top_k, len(only) or decoder.num_classes),
        stop=tuple(stop),
        forbidden=tuple(forbidden),
        block=block,
        only=tuple(only),
    )


def truncate(logits: jax.Array, *, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """Logits [..., V] with -inf for what top-k, and then top-p of the rest, leave out.

    Tokens as probable as the last one that is left are left too.
    """
    if top_k:
        last = lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits < last, -jnp.inf, logits)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probs = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(probs, axis=-1) - probs
        last = jnp.where(before < top_p, ordered, jnp.inf).min(-1, keepdims=True)
        logits = jnp.where(logits < last, -jnp.inf, logits)
    return logits


def _largest(x: jax.Array) -> jax.Array:
    """int32 [B], the first of the largest in each row of [B, V]; 0 where there is NaN.

    Two passes that run on vectors: on CPU, XLA's `argmax` is a loop of eight times their time.
    """
    at = jnp.arange(x.shape[-1], dtype=jnp.int32)
    found = jnp.where(x == x.max(-1, keepdims=True), at, x.shape[-1]).min(-1)
    return jnp.where(found == x.shape[-1], 0, found)


def _in_compute_type(decoder: Decoder, variables: Mapping[str, Any]) -> dict[str, Any]:
    """Matrices in the type that they are computed in, once and not at every token."""

    def cast(x):
        return x.astype(decoder.dtype) if x.ndim > 1 else x

    return {**variables, 'params': jax.tree.map(cast, variables['params'])}
