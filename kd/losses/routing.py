"""Losses of routers, that give tokens to experts (`kd.models.moe`)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from kd.losses import numerics


def balance(probabilities: ArrayLike, *, where: ArrayLike | None = None) -> jax.Array:
    """E sum_e mean_n(g_ne) mean_n([argmax_e' g_ne' = e]): 1 where all experts get the same.

    E where one gets all with probability 1. The second factor is a constant to the gradient.

    Args:
      probabilities: [..., T, E] of the experts of each token, the sum over E 1.
      where: bool [..., T], the tokens that count; of none the loss is 0.

    Returns:
      float32 [...].

    Source: Shazeer et al. 2017 as GShard has it, arXiv 2006.16668; LLaVA-MoD, arXiv 2408.15881.
    """
    probabilities = jnp.asarray(probabilities)
    dtype = numerics.accumulation_dtype(probabilities)
    probabilities = probabilities.astype(dtype)
    experts = probabilities.shape[-1]
    counted = jnp.asarray(True) if where is None else jnp.asarray(where, bool)
    counted = jnp.broadcast_to(counted, probabilities.shape[:-1])[..., None]
    tokens = jnp.maximum(counted.sum(-2), 1)
    first = jax.nn.one_hot(probabilities.argmax(-1), experts, dtype=dtype)
    share = lax.stop_gradient(jnp.where(counted, first, 0.0).sum(-2) / tokens)
    mean = jnp.where(counted, probabilities, 0.0).sum(-2) / tokens
    return experts * (share * mean).sum(-1)
