"""The convolutions of VGG, for distances of images (arXiv:1409.1556)."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.layers import Features
from kd.ranges import Count

__all__ = ['VGGFeatures']

# Of pixels in [-1, 1]: means and deviations of ImageNet's, as LPIPS has them.
_SHIFT, _SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class VGGFeatures(nn.Module):
    """Features of images [B, H, W, 3] in [-1, 1]; defaults are those of VGG16.

    Features: `level0`, ..., `level4`, the last rectified ones of each level, [B, h, w, C].

    Attributes:
      widths: channels of each level; each but the first halves the sides.
      convolutions: of each level.
      dtype: compute type; parameters are float32.
    """

    widths: Sequence[Count] = (64, 128, 256, 512, 512)
    convolutions: Sequence[Count] = (2, 2, 3, 3, 3)
    dtype: Dtype = jnp.float32

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape of (images [1, H, W, 3],): of `image` where the data have it."""
        x = spec['image'] if 'image' in spec else spec['input']
        return (jax.ShapeDtypeStruct((1, *x.shape), x.dtype),)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Means over places of the last level, [B, C]."""
        del train
        y = ((x - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)).astype(self.dtype)
        place = 0  # As in the list of layers of torchvision, where ReLUs and pools count.
        for level, (width, count) in enumerate(zip(self.widths, self.convolutions, strict=True)):
            if level:
                y, place = nn.max_pool(y, (2, 2), (2, 2)), place + 1
            for _ in range(count):
                name = f'features_{place}'
                y = nn.relu(nn.Conv(width, (3, 3), dtype=self.dtype, name=name)(y))
                place += 2
            y = Features(name=f'level{level}')(y)
        return y.mean((1, 2)).astype(jnp.float32)
