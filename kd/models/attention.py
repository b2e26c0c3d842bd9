"""Attention in plain jnp, differentiable in forward mode and in any precision."""

import jax
import jax.numpy as jnp

__all__ = ['attend']


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v, [B, N, heads, d] each -> [B, N, heads, d].

    Logits and softmax in float32, or float64 for float64 input. Fused kernels have no forward-mode
    derivative, which flow-map losses need, and `jax.nn.dot_product_attention` rounds the logits of
    float64 input to float32, which hides errors from finite differences.
    """
    wide = jnp.promote_types(query.dtype, jnp.float32)
    logits = jnp.einsum('bqhd,bkhd->bhqk', query, key, preferred_element_type=wide)
    weights = jax.nn.softmax(logits * query.shape[-1] ** -0.5, axis=-1).astype(value.dtype)
    return jnp.einsum('bhqk,bkhd->bqhd', weights, value)
