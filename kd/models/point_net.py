"""A small network of point clouds in the manner of PointNet (arXiv:1612.00593)."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models.conditioning import positional_embedding
from kd.ranges import Count


class PointNet(nn.Module):
    """F(c, x, partial) [B, N, d]: what it says of each point, told of the clouds by their maxima.

    The order of points means nothing. It stands where others have sparse convolutions over voxels
    (MinkUNet), and sees no neighbourhoods.

    Attributes:
      width: of all its layers.
      depth: layers of a point after it has been told of the clouds.
    """

    width: Count = 64
    depth: Count = 2

    @property
    def conditions(self) -> tuple[str, ...]:
        """What it is conditioned on, a partial cloud [B, n, d]."""
        return ('partial',)

    @nn.compact
    def __call__(
        self,
        c: jax.Array,
        x: jax.Array,
        *,
        partial: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """From c [B], what it is told of the noise, points [B, N, d] and a partial cloud."""
        del train
        partial = x[:, :1] if partial is None else partial
        points = self._layers('point', x)
        known = self._layers('partial', partial).max(1)
        whole = jnp.concatenate([points.max(1), known, positional_embedding(c, 32)], axis=1)
        whole = nn.Dense(self.width, name='whole')(whole)
        hidden = nn.silu(nn.Dense(self.width, name='join')(points) + whole[:, None])
        for layer in range(self.depth):
            hidden = nn.silu(nn.Dense(self.width, name=f'hidden{layer}')(hidden))
        return nn.Dense(x.shape[-1], name='out')(hidden)

    def _layers(self, name: str, x: jax.Array) -> jax.Array:
        for layer in range(2):
            x = nn.silu(nn.Dense(self.width, name=f'{name}{layer}')(x))
        return x
