"""Heads that tell real examples from generated ones by features of another network."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.ranges import Count

# Sides of feature maps are halved down to this.
_SIDE = 4


class FeatureHead(nn.Module):
    """Logits [B] of features: vectors [B, D], tokens [B, N, D] or maps [B, H, W, D].

    Maps are halved by convolutions down to four pixels; then, as tokens, pooled; and two layers.
    That of DMD2 (arXiv:2405.14867, appendix) for the bottleneck of a UNet, with a mean in place of
    its last convolution, which has the size of the map.

    Attributes:
      width: of its hidden layers.
      groups: of the normalisation of maps.
      dtype: compute type.
    """

    width: Count = 128
    groups: Count = 8
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        layer = 0
        while x.ndim == 4 and min(x.shape[1:3]) > _SIDE:
            x = nn.Conv(self.width, (4, 4), 2, dtype=self.dtype, name=f'down{layer}')(x)
            x = nn.GroupNorm(self.groups, dtype=self.dtype, name=f'norm{layer}')(x)
            x, layer = nn.silu(x), layer + 1
        if x.ndim > 2:
            x = x.mean(tuple(range(1, x.ndim - 1)))
        x = nn.silu(nn.Dense(self.width, dtype=self.dtype, name='hidden')(x))
        return nn.Dense(1, dtype=self.dtype, name='logit')(x)[:, 0].astype(jnp.float32)
