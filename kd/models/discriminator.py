"""Heads that tell real examples from generated ones by features of another network."""

from __future__ import annotations

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.latent_parts import timestep_features
from kd.models.layers import torch_kernel_init
from kd.ranges import Count, Positive, Seed

# Sides of feature maps are halved down to this.
_SIDE = 4


class FeatureHead(nn.Module):
    """Logits [B] or [B, n] of vectors [B, D], tokens [B, N, D], maps [B, H, W, D] or videos.

    Maps are halved by convolutions down to four pixels, those of videos [B, T, H, W, D] with a
    frame before and after; then, as tokens, pooled; and two layers.
    That of DMD2 (arXiv:2405.14867, appendix) for the bottleneck of a UNet, with a mean in place of
    its last convolution, which has the size of the map.

    Attributes:
      width: of its hidden layers.
      groups: of the normalisation of maps.
      logits: n, one for [B].
      dtype: compute type.
    """

    width: Count = 128
    groups: Count = 8
    logits: Count = 1
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        del train
        layer = 0
        frames = max(x.ndim - 4, 0)
        kernel, strides = (3,) * frames + (4, 4), (1,) * frames + (2, 2)
        while x.ndim > 3 and min(x.shape[-3:-1]) > _SIDE:
            x = nn.Conv(self.width, kernel, strides, dtype=self.dtype, name=f'down{layer}')(x)
            x = nn.GroupNorm(self.groups, dtype=self.dtype, name=f'norm{layer}')(x)
            x, layer = nn.silu(x), layer + 1
        if x.ndim > 2:
            x = x.mean(tuple(range(1, x.ndim - 1)))
        x = nn.silu(nn.Dense(self.width, dtype=self.dtype, name='hidden')(x))
        said = nn.Dense(self.logits, dtype=self.dtype, name='logit')(x).astype(jnp.float32)
        return said[:, 0] if self.logits == 1 else said


class PatchHead(nn.Module):
    """Logits [B, n] of images [B, H, W, C], each of a part of it (PatchGAN, arXiv:1611.07004).

    Convolutions of 4x4 pixels, of which all but the last two halve the sides and double the
    channels, as latent diffusion has them, with group in place of batch normalisation.

    Attributes:
      width: channels of the first.
      depth: convolutions that halve.
      groups: of the normalisation.
      dtype: compute type.
    """

    width: Count = 64
    depth: Count = 3
    groups: Count = 8
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for layer in range(self.depth + 1):
            width, stride = self.width * 2 ** min(layer, 3), 2 if layer < self.depth else 1
            x = nn.Conv(width, (4, 4), stride, dtype=self.dtype, name=f'layer{layer}')(x)
            if layer:
                x = nn.GroupNorm(self.groups, dtype=self.dtype, name=f'norm{layer}')(x)
            x = nn.leaky_relu(x, 0.2)
        x = nn.Conv(1, (4, 4), dtype=self.dtype, name='logits')(x)
        return x.reshape(len(x), -1).astype(jnp.float32)


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


class TimeAwareHeads(nn.Module):
    """Logits [B, n] of several features of one network, by a head for each that is told the time.

        h = norm(F) (1 + scale(t)) + shift(t);  3x3 convolution of silu(h), zero at the start;
        one token a pixel: a = block(1), b = (a + block(9)(a)) / sqrt 2, `logits` for each of these

    where block(k) is a circular convolution along the tokens of spectral norm 1, group norm and a
    leaky ReLU. Of vectors [B, D], which have no space, both are dense layers.

    Its variables have a collection `batch_stats`, vectors of power iteration, which a call with
    `update` moves by a step.

    Attributes:
      logits: of a token.
      waves: features of the time.
      dtype: compute type.

    Source: TAD-SR, arXiv:2408.07476, as released; heads of StyleGAN-T, arXiv:2301.09515.
    """

    logits: Count = 64
    waves: Count = 128
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, features: Sequence[jax.Array], t: jax.Array, *, update: bool = False
    ) -> jax.Array:
        """Logits of features [B, H, W, C] or [B, D] and times [B].

        Raises:
          ValueError: features of another shape, or of a width that groups do not divide.
        """
        for x in features:
            if x.ndim not in (2, 4) or not _divided(x.shape[-1]):
                raise ValueError(
                    'TimeAwareHeads reads maps [B, H, W, C] and vectors [B, D] whose width is a '
                    f'multiple of 4, and of 32 from 128 on, got {x.shape}.'
                )
        waves = nn.silu(timestep_features(t, self.waves)).astype(self.dtype)
        return jnp.concatenate(
            [
                TimeAwareHead(self.logits, self.dtype, name=f'head{i}')(feature, waves, update)
                for i, feature in enumerate(features)
            ],
            axis=1,
        )


def _divided(channels: int) -> bool:
    """Whether both normalisations of a head divide so many channels."""
    return channels % 4 == 0 and channels % min(32, channels // 4) == 0


class TimeAwareHead(nn.Module):
    """One of `TimeAwareHeads`."""

    logits: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array, waves: jax.Array, update: bool) -> jax.Array:
        channels, flat = x.shape[-1], x.ndim == 2
        told = nn.Dense(2 * channels, dtype=self.dtype, name='time')(waves)
        scale, shift = jnp.split(told.reshape(len(x), *(1,) * (x.ndim - 2), -1), 2, axis=-1)
        h = nn.GroupNorm(min(32, channels // 4), epsilon=1e-5, dtype=self.dtype, name='norm')(x)
        h = nn.silu(h * (1 + scale) + shift)
        zero = nn.initializers.zeros
        if flat:
            h = nn.Dense(channels, dtype=self.dtype, kernel_init=zero, name='mix')(h)[:, None]
        else:
            h = nn.Conv(channels, (3, 3), dtype=self.dtype, kernel_init=zero, name='mix')(h)
            h = h.reshape(len(x), -1, channels)
        h = self._block(h, 1, update, 'first')
        h = (h + self._block(h, 1 if flat else 9, update, 'second')) * 2**-0.5
        said = self._spectral(h, self.logits, 1, update, 'logits')
        return said.reshape(len(x), -1).astype(jnp.float32)

    def _block(self, x, size, update, name):
        y = self._spectral(x, x.shape[-1], size, update, name)
        y = nn.GroupNorm(4, epsilon=1e-5, dtype=self.dtype, name=f'{name}_norm')(y)
        return nn.leaky_relu(y, 0.2)

    def _spectral(self, x, width, size, update, name):
        options = dict(dtype=self.dtype, kernel_init=torch_kernel_init, name=name)
        layer = (
            nn.Dense(width, **options)
            if size == 1
            else nn.Conv(width, (size,), padding='CIRCULAR', **options)
        )
        return nn.SpectralNorm(layer, name=f'{name}_spectral')(x, update_stats=update)
