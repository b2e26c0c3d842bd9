"""Causal attention by the splash kernel of JAX's Pallas, for TPUs: no map ever leaves the chip."""

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel as splash,
)
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from kd.parallel import layout

__all__ = ['attend_on_tpu']

# The kernel takes whole lanes of tokens, and is fastest with blocks of several.
_LANES, _BLOCK = 128, 512


def attend_on_tpu(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    segments: jax.Array | None,
    *,
    window: int | None,
    interpret: bool = False,
) -> jax.Array:
    """As `kd.models.causal_attention.attend_causally`; rows are padded to whole blocks.

    On several devices each attends to its own rows and heads. Reverse mode only.

    Args:
      query, key, value, segments, window: as there.
      interpret: runs the kernel step by step, on any device, for tests.
    """
    length, groups = query.shape[1], key.shape[2]
    block = _BLOCK if length >= _BLOCK else _LANES
    padding = -length % block
    if padding and segments is None:
        segments = jnp.zeros(query.shape[:2], jnp.int32)

    def padded(x, value=0):
        widths = [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2)
        return jnp.pad(x, widths, constant_values=value) if padding else x

    def of_device(query, key, value, segments=None):
        kernel = _kernel(query.shape[2], length + padding, block, window, interpret)
        heads_first = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
        ids = None if segments is None else splash.SegmentIds(segments, segments)
        return jnp.swapaxes(jax.vmap(kernel)(*heads_first, ids), 1, 2)

    query = query * query.shape[3] ** -0.5
    arrays = [padded(x) for x in (query, key, value)]
    # What pads a row is a document of its own.
    arrays += [] if segments is None else [padded(segments, -1)]
    names = ('rows', None, 'features') if layout.divides(groups, 'features') else ('rows',)
    return layout.by_device(of_device, *arrays, names=names)[:, :length]


def _kernel(heads: int, length: int, block: int, window: int | None, interpret: bool):
    shape = (length, length)
    seen = (
        masks.CausalMask(shape)
        if window is None
        else masks.LocalMask(shape, window_size=(window - 1, 0), offset=0)
    )
    sizes = splash.BlockSizes(
        block_q=block, block_kv=block, block_kv_compute=block,
        block_q_dkv=block, block_kv_dkv=block, block_kv_dkv_compute=block,
        block_q_dq=block, block_kv_dq=block,
    )  # fmt: skip
    return splash.make_splash_mha(
        masks.MultiHeadMask([seen] * heads), block_sizes=sizes, head_shards=1, q_seq_shards=1,
        interpret=interpret,
    )  # fmt: skip
