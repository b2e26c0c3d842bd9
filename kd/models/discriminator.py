"""Heads that tell real examples from generated ones by features of another network."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.ranges import Count, Positive, Seed

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


class FourierHead(nn.Module):
    """Logits [B] of points: a perceptron on x and on sines and cosines of frozen random directions.

    What it sees is random and fixed, as of projected GANs (arXiv:2111.01007), for data that no
    network has been trained on.

    Attributes:
      width: of its two hidden layers.
      frequencies: directions, whose projections are normal with deviation `scale`.
      scale: see above; the larger, the finer what it tells apart.
      seed: of the directions.
      dtype: compute type.
    """

    width: Count = 96
    frequencies: Count = 48
    scale: Positive = 2.0
    seed: Seed = 0
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = x.reshape(len(x), -1)
        key = jax.random.key(self.seed)
        angles = x @ (self.scale * jax.random.normal(key, (x.shape[1], self.frequencies), x.dtype))
        x = jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=1)
        for layer in range(2):
            x = nn.silu(nn.Dense(self.width, dtype=self.dtype, name=f'hidden{layer}')(x))
        return nn.Dense(1, dtype=self.dtype, name='logit')(x)[:, 0].astype(jnp.float32)
