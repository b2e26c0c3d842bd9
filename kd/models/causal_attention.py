"""Attention over packed rows, causal or not, and over a cache, in blocks of queries."""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from kd.models.attention import attend, attend_by_head
from kd.models.tpu_attention import attend_on_tpu

__all__ = ['attend_cached', 'attend_causally']

# Tokens of a row, below which maps are small.
_WORTH_A_KERNEL = 256


def attend_causally(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    segments: jax.Array | None = None,
    window: int | None = None,
    block: int = 512,
    causal: bool = True,
) -> jax.Array:
    """Attention of each token to those before it and to itself, within its document.

    Rows of more than `block` tokens go through it in blocks of queries, whose maps are computed
    again for the gradient, so that no array of [T, T] ever exists. Queries in float16 or bfloat16
    go through a kernel instead: on a GPU, where rows are one document, cuDNN's, and on a TPU, of
    rows of 256 tokens and more in bfloat16, that of `kd.models.tpu_attention`.

    Args:
      query: [B, T, H, d].
      key, value: [B, T, K, d]; each of the K heads serves H / K consecutive ones of the queries.
      segments: int [B, T], equal within a document; None for one document in a row.
      window: how many tokens back, itself included, a token sees; None for all.
      block: queries at a time.
      causal: False lets tokens see those behind them too, all of their document.

    Returns:
      [B, T, H, d], in the type of the values.
    """
    narrow = query.dtype in (jnp.float16, jnp.bfloat16)
    if segments is None and window is None and narrow and jax.default_backend() == 'gpu':
        return jax.nn.dot_product_attention(
            query, key, value, is_causal=causal, implementation='cudnn'
        )
    if segments is not None and segments.shape != query.shape[:2]:
        raise ValueError(
            f'attend_causally: segments have shape {list(segments.shape)}, the queries are of '
            f'{list(query.shape[:2])} tokens.'
        )

    def plain(query, key, value, segments):
        return _in_blocks(query, key, value, segments, window, block, causal)

    if not causal or query.dtype != jnp.bfloat16 or query.shape[1] < _WORTH_A_KERNEL:
        return plain(query, key, value, segments)
    on_tpu = partial(attend_on_tpu, window=window)
    return lax.platform_dependent(query, key, value, segments, tpu=on_tpu, default=plain)


def attend_cached(
    query: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    *,
    valid: jax.Array,
    start: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Attention of the tokens in the slots start, start + 1, ... to all valid slots up to theirs.

    Args:
      query: [B, s, H, d], of the tokens that were written last.
      keys, values: [B, K, S, d], the cache, head by head, so that no token moves it.
      valid: bool [B, S]; False for padding and for what is not written yet.
      start: int scalar, the slot of the first query.
      window: as of `attend_causally`; slots are counted, so rows have no padding within.

    Returns:
      [B, s, H, d].
    """
    rows = start + jnp.arange(query.shape[1])
    mask = _seen(rows, jnp.arange(keys.shape[2]), window)[None, None] & valid[:, None, None]
    out = attend_by_head(jnp.swapaxes(query, 1, 2), keys, values, mask)
    return jnp.swapaxes(out, 1, 2)


def _seen(rows: jax.Array, columns: jax.Array, window: int | None) -> jax.Array:
    """Bool [rows, columns]: which slots the token in a slot sees."""
    back = rows[:, None] - columns
    return back >= 0 if window is None else (back >= 0) & (back < window)


def _in_blocks(query, key, value, segments, window, block, causal):
    length = query.shape[1]

    def of(rows, queries, own):
        mask = _seen(rows, jnp.arange(length), window)[None, None] if causal else None
        if segments is not None:
            same = (own[:, :, None] == segments[:, None])[:, None]
            mask = same if mask is None else mask & same
        return attend(queries, key, value, mask=mask)

    if length <= block:
        return of(jnp.arange(length), query, segments)
    count = -(-length // block)
    missing = count * block - length

    def split(x):
        x = jnp.pad(x, [(0, 0), (0, missing)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], count, block, *x.shape[2:]), 1, 0)

    rows = jnp.arange(count * block).reshape(count, block)
    parts = (rows, split(query), None if segments is None else split(segments))
    out = lax.map(lambda part: jax.checkpoint(of)(*part), parts)
    return jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *out.shape[3:])[:, :length]
