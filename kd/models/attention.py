"""Attention in plain jnp, differentiable in forward mode and in any precision, or fused."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

__all__ = ['attend', 'attend_away', 'attend_by_head']

# Queries at a time, where no map of all may be held and there is no kernel.
BLOCK = 512


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    *,
    mask: jax.Array | None = None,
    fused: bool = False,
    edit: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v over the keys that each query sees.

    Logits and softmax in float32, or float64 for float64 input. Fused kernels have no forward-mode
    derivative, which flow-map losses need, and `jax.nn.dot_product_attention` rounds the logits of
    float64 input to float32, which hides errors from finite differences.

    Args:
      query: [B, N, H, d].
      key: [B, M, K, d]; each of the K heads serves H / K consecutive ones of the queries
        (grouped heads, arXiv:2305.13245).
      value: [B, M, K, e].
      mask: bool, of four dimensions that broadcast to [B, H, N, M]; True where a query sees a key.
        A query that sees none gets zeros.
      fused: lets a kernel that never holds the maps take over where there is one: cuDNN's, on GPUs,
        for float16 and bfloat16. Elsewhere more than `BLOCK` queries go in blocks, whose maps are
        computed again for the gradient.
      edit: a change of the maps, [B, H, N, M] -> the same, after softmax and mask, before values.

    Returns:
      [B, N, H, e], in the type of the values.

    Raises:
      ValueError: heads that do not divide, a mask of another kind, an edit of fused attention,
        which has no maps.
    """
    heads, groups = query.shape[2], key.shape[2]
    if heads % groups or value.shape[2] != groups:
        raise ValueError(
            f'attend: {heads} heads of queries over {groups} of keys and {value.shape[2]} of '
            'values; the last two must be one number, which divides the first.'
        )
    if mask is not None and (mask.dtype != jnp.bool_ or mask.ndim != 4):
        raise ValueError(
            f'attend: the mask is {mask.dtype}{list(mask.shape)}, expected bool that broadcasts to '
            '[B, H, N, M], such as [B, 1, 1, M].'
        )
    if fused and edit is not None:
        raise ValueError('attend: fused attention holds no maps that could be edited.')
    kernel = _kernel(query) if fused else None
    if kernel is not None:
        return _fused(query, key, value, mask, kernel)
    if fused and query.shape[1] > BLOCK:
        return _in_blocks(query, key, value, mask)
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    return jnp.swapaxes(attend_by_head(query, key, value, mask, edit), 1, 2)


def attend_away(
    query: jax.Array,
    positive: tuple[jax.Array, jax.Array],
    negative: tuple[jax.Array, jax.Array],
    strength: jax.Array | float,
    *,
    masks: tuple[jax.Array | None, jax.Array | None] = (None, None),
    fused: bool = False,
) -> jax.Array:
    """Z = Z+ - strength Z-: attention to one text away from another (NASA), [B, N, H, e].

    Before the output projection, whose bias would else be scaled too.

    Args:
      query: [B, N, H, d].
      positive, negative: (keys, values) of the two texts by the same projections, whose lengths may
        differ; see `attend`.
      strength: alpha, a number or [B]; 0 attends to the positive text alone, 1 is strong.
      masks: of the two, as of `attend`.
      fused: as of `attend`.

    Source: SNOOPI, arXiv:2412.02687.
    """
    towards = attend(query, *positive, mask=masks[0], fused=fused)
    away = attend(query, *negative, mask=masks[1], fused=fused)
    alpha = jnp.asarray(strength, towards.dtype)
    return towards - alpha.reshape(alpha.shape + (1,) * (towards.ndim - alpha.ndim)) * away


def attend_by_head(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None = None,
    edit: Callable[[jax.Array], jax.Array] | None = None,
) -> jax.Array:
    """`attend`, never fused, of arrays that lie head by head, as products of matrices want them.

    Args:
      query: [B, H, N, d].
      key: [B, K, M, d].
      value: [B, K, M, e].
      mask, edit: as of `attend`.

    Returns:
      [B, H, N, e], in the type of the values.
    """
    batch, heads, length, size = query.shape
    groups, keys = key.shape[1:3]
    wide = jnp.promote_types(query.dtype, jnp.float32)
    query = query.reshape(batch, groups, -1, size)
    logits = jnp.einsum('bgnd,bgmd->bgnm', query, key, preferred_element_type=wide)
    logits = logits.reshape(batch, heads, length, keys) * size**-0.5
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(wide).min)
    weights = jax.nn.softmax(logits, axis=-1)
    if mask is not None:
        weights = jnp.where(mask, weights, 0.0)
    if edit is not None:
        weights = edit(weights)
    weights = weights.astype(value.dtype).reshape(batch, groups, -1, keys)
    return jnp.einsum('bgnm,bgme->bgne', weights, value).reshape(batch, heads, length, -1)


def _in_blocks(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None
) -> jax.Array:
    """`attend`, `BLOCK` queries at a time."""
    batch, length = query.shape[:2]
    missing = -length % BLOCK

    def split(x: jax.Array, axis: int) -> jax.Array:
        x = jnp.pad(x, [(0, missing if i == axis else 0) for i in range(x.ndim)])
        x = x.reshape(*x.shape[:axis], -1, BLOCK, *x.shape[axis + 1 :])
        return jnp.moveaxis(x, axis, 0)

    own = mask is not None and mask.shape[2] > 1
    parts = (split(query, 1), split(mask, 2)) if own and mask is not None else (split(query, 1),)

    def of(query: jax.Array, seen: jax.Array | None = mask) -> jax.Array:
        return attend(query, key, value, mask=seen)

    out = jax.lax.map(lambda part: jax.checkpoint(of)(*part), parts)
    return jnp.moveaxis(out, 0, 1).reshape(batch, -1, *out.shape[3:])[:, :length]


def _kernel(query: jax.Array) -> Literal['cudnn'] | None:
    """The fused implementation of `jax.nn.dot_product_attention` for such queries, if any."""
    narrow = query.dtype in (jnp.float16, jnp.bfloat16)
    return 'cudnn' if narrow and jax.default_backend() == 'gpu' else None


def _fused(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    kernel: Literal['cudnn'],
) -> jax.Array:
    if mask is not None:
        mask = jnp.broadcast_to(mask, (*mask.shape[:2], query.shape[1], key.shape[1]))
    out = jax.nn.dot_product_attention(query, key, value, mask=mask, implementation=kernel)
    if mask is not None:
        out = jnp.where(mask.any(-1).swapaxes(1, 2)[..., None], out, 0)
    return out
