"""The autoencoder of Wan 2.1 and of Qwen-Image: videos to latents and back, causal in time.

Modules have the names of `AutoencoderKLWan` of `diffusers`. Source: Wan 2025, arXiv:2503.20314.

    mean, log_variance = network.apply(variables, videos, method='encode')
    latents = network.scaled(mean)                       # of about unit variance
    videos = network.apply(variables, network.unscaled(latents), method='decode')

The released code goes through a video four frames at a time and remembers what convolutions saw;
here all frames are one sequence, with zeros before the first, which is the same.
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.attention import attend
from kd.models.autoencoder_kl import LOG_VARIANCE
from kd.models.latent_parts import preset_of
from kd.ranges import Count, Finite, Positive

__all__ = ['PRESETS', 'WanAutoencoder', 'preset']


def _causal(x: jax.Array, features: int, size: int, dtype: Dtype, name: str) -> jax.Array:
    """Convolution of frames [B, T, H, W, C] that keeps the sides and sees none to come."""
    side = size // 2
    padding = ((2 * side, 0), (side, side), (side, side))
    return nn.Conv(features, (size,) * 3, padding=padding, dtype=dtype, name=name)(x)


class _Norm(nn.Module):
    """x over its root mean square over channels, times a factor for each."""

    axes: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (x.shape[-1], *(1,) * self.axes)
        factor = self.param('gamma', nn.initializers.ones, shape, jnp.float32).reshape(-1)
        wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
        length = jnp.linalg.norm(wide, axis=-1, keepdims=True)
        normed = wide * (x.shape[-1] ** 0.5 / jnp.maximum(length, 1e-12))
        return normed.astype(self.dtype) * factor.astype(self.dtype)


class _Residual(nn.Module):
    """Two convolutions beside the identity, or beside a projection."""

    features: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = x
        for number in (1, 2):
            y = nn.silu(_Norm(3, self.dtype, name=f'norm{number}')(y))
            y = _causal(y, self.features, 3, self.dtype, f'conv{number}')
        if x.shape[-1] != self.features:
            x = _causal(x, self.features, 1, self.dtype, 'conv_shortcut')
        return x + y


class _Attention(nn.Module):
    """Attention of the pixels of a frame to each other, one head."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1]
        y = _Norm(2, self.dtype, name='norm')(x).reshape(-1, *x.shape[2:])
        y = nn.Conv(3 * size, (1, 1), dtype=self.dtype, name='to_qkv')(y)
        q, k, v = jnp.split(y.reshape(len(y), -1, 1, 3 * size), 3, axis=-1)
        y = attend(q, k, v).reshape(*y.shape[:-1], size)
        return x + nn.Conv(size, (1, 1), dtype=self.dtype, name='proj')(y).reshape(x.shape)


class _Middle(nn.Module):
    """Attention between two residual blocks."""

    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1]
        x = _Residual(size, self.dtype, name='resnets_0')(x)
        x = _Attention(self.dtype, name='attentions_0')(x)
        return _Residual(size, self.dtype, name='resnets_1')(x)


class _Down(nn.Module):
    """Half the sides, and where told half the frames, of which the first stays by itself."""

    frames: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, (batch, count) = x.shape[-1], x.shape[:2]
        y = nn.Conv(
            size, (3, 3), 2, padding=((0, 1), (0, 1)), dtype=self.dtype, name='resample_1'
        )(x.reshape(batch * count, *x.shape[2:]))  # fmt: skip
        y = y.reshape(batch, count, *y.shape[1:])
        if not self.frames:
            return y
        halved = nn.Conv(
            size, (3, 1, 1), (2, 1, 1), padding='VALID', dtype=self.dtype, name='time_conv'
        )
        if count == 1:
            # Its parameters are there for a picture too.
            return y + 0 * halved(jnp.repeat(y, 3, axis=1)) if self.is_initializing() else y
        return jnp.concatenate([y[:, :1], halved(y)], axis=1)


class _Up(nn.Module):
    """Twice the sides and half the channels, and where told two frames of each but the first."""

    frames: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, batch = x.shape[-1], len(x)
        if self.frames:
            doubled = nn.Conv(
                2 * size, (3, 1, 1), padding=((2, 0), (0, 0), (0, 0)), dtype=self.dtype,
                name='time_conv',
            )  # fmt: skip
            if x.shape[1] > 1 or self.is_initializing():
                y = doubled(x[:, 1:] if x.shape[1] > 1 else x)
                y = jnp.moveaxis(y.reshape(*y.shape[:-1], 2, size), -2, 2)
                y = y.reshape(batch, -1, *x.shape[2:])
                x = jnp.concatenate([x[:, :1], y], axis=1) if x.shape[1] > 1 else x
        count = x.shape[1]
        y = x.reshape(batch * count, *x.shape[2:])
        y = jnp.repeat(jnp.repeat(y, 2, axis=1), 2, axis=2)
        y = nn.Conv(size // 2, (3, 3), dtype=self.dtype, name='resample_1')(y)
        return y.reshape(batch, count, *y.shape[1:])


class _Encoder(nn.Module):
    """Moments of latents; settings are those of `WanAutoencoder`."""

    of: WanAutoencoder

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        of, number = self.of, 0
        residual = nn.remat(_Residual) if of.remat else _Residual
        y = _causal(x.astype(of.dtype), of.channels[0], 3, of.dtype, 'conv_in')
        for level, width in enumerate(of.channels):
            for _ in range(of.blocks):
                y = residual(width, of.dtype, name=f'down_blocks_{number}')(y)
                number += 1
            if level < len(of.frames):
                y = _Down(of.frames[level], of.dtype, name=f'down_blocks_{number}')(y)
                number += 1
        y = _Middle(of.dtype, name='mid_block')(y)
        y = nn.silu(_Norm(3, of.dtype, name='norm_out')(y))
        return _causal(y, 2 * of.latent, 3, of.dtype, 'conv_out')


class _Level(nn.Module):
    """Residual blocks of the decoder, then twice the sides but at the last level."""

    of: WanAutoencoder
    width: int
    frames: bool | None

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        of = self.of
        residual = nn.remat(_Residual) if of.remat else _Residual
        for i in range(of.blocks + 1):
            y = residual(self.width, of.dtype, name=f'resnets_{i}')(y)
        return y if self.frames is None else _Up(self.frames, of.dtype, name='upsamplers_0')(y)


class _Decoder(nn.Module):
    """Videos; settings are those of `WanAutoencoder`."""

    of: WanAutoencoder

    @nn.compact
    def __call__(self, y: jax.Array) -> jax.Array:
        of = self.of
        y = _causal(y, of.channels[-1], 3, of.dtype, 'conv_in')
        y = _Middle(of.dtype, name='mid_block')(y)
        for i, width in enumerate(of.channels[::-1]):
            frames = (*of.frames[::-1], None)[i]
            y = _Level(of, width, frames, name=f'up_blocks_{i}')(y)
        y = nn.silu(_Norm(3, of.dtype, name='norm_out')(y))
        return _causal(y, 3, 3, of.dtype, 'conv_out')


class WanAutoencoder(nn.Module):
    """Videos [B, T, H, W, 3] in [-1, 1] and latents [B, 1 + (T - 1) / 4, H / 8, W / 8, c].

    Defaults are those of Wan 2.1. An image is a video of one frame.

    Attributes:
      channels: of each level.
      blocks: of a level; one more in the decoder.
      frames: after each level but the last, which halves the sides, whether it halves frames too.
      latent: c.
      mean, deviation: of the latents' channels; networks are given (latent - mean) / deviation.
      remat: residual blocks are computed again for the gradient.
      dtype: compute type; parameters are float32, outputs have the type of inputs.
    """

    channels: tuple[Count, ...] = (96, 192, 384, 384)
    blocks: Count = 2
    frames: tuple[bool, ...] = (False, True, True)
    latent: Count = 16
    mean: tuple[Finite, ...] = (
        -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
    )  # fmt: skip
    deviation: tuple[Positive, ...] = (
        2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
    )  # fmt: skip
    remat: bool = False
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        plain = self.clone(parent=None, name=None)
        self.encoder, self.decoder = _Encoder(plain), _Decoder(plain)
        self.quant_conv = nn.Conv(2 * self.latent, (1, 1, 1), dtype=self.dtype)
        self.post_quant_conv = nn.Conv(self.latent, (1, 1, 1), dtype=self.dtype)

    @property
    def factors(self) -> tuple[int, int]:
        """Frames and pixels along a side of one of latents."""
        return 2 ** sum(self.frames), 2 ** len(self.frames)

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (x [1, ...],): of data that are latents, of the videos they are of."""
        x = spec['input']
        if x.shape[-1] == self.latent:
            frames, side = self.factors
            shape = (1 + frames * (x.shape[0] - 1), side * x.shape[1], side * x.shape[2], 3)
            return (jax.ShapeDtypeStruct((1, *shape), x.dtype),)
        return (jax.ShapeDtypeStruct((1, *x.shape), x.dtype),)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Videos by way of the means of their latents."""
        del train
        return self.decode(self.encode(x)[0])

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean, log of the variance) of the latents of videos.

        Raises:
          ValueError: sides or frames that do not divide.
        """
        frames, side = self.factors
        if x.ndim != 5 or (x.shape[1] - 1) % frames or x.shape[2] % side or x.shape[3] % side:
            raise ValueError(
                f'WanAutoencoder needs videos [B, T, H, W, 3] of one frame and a multiple of '
                f'{frames}, with sides divisible by {side}, got {list(x.shape)}.'
            )
        y = self.quant_conv(self.encoder(x)).astype(x.dtype)
        mean, log_variance = jnp.split(y, 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Videos in [-1, 1] of latents as `encode` gives them."""
        if latents.shape[-1] != self.latent:
            raise ValueError(
                f'WanAutoencoder decodes latents of {self.latent} channels, got '
                f'{latents.shape[-1]}; are they of another autoencoder?'
            )
        y = self.decoder(self.post_quant_conv(latents.astype(self.dtype)))
        return jnp.clip(y, -1, 1).astype(latents.dtype)

    def scaled(self, latents: jax.Array) -> jax.Array:
        """What a network of latents takes."""
        mean, deviation = (jnp.asarray(x, latents.dtype) for x in (self.mean, self.deviation))
        return (latents - mean) / deviation

    def unscaled(self, latents: jax.Array) -> jax.Array:
        """The inverse of `scaled`."""
        mean, deviation = (jnp.asarray(x, latents.dtype) for x in (self.mean, self.deviation))
        return latents * deviation + mean


# By name, the arguments of `WanAutoencoder`: 126.9 million parameters.
PRESETS: dict[str, dict[str, Any]] = {'wan21': {}, 'qwen_image': {}}


def preset(of: str, **changes: Any) -> WanAutoencoder:
    """The autoencoder that is known as `of`, with changes.

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `WanAutoencoder`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    return preset_of(WanAutoencoder, PRESETS, of, changes)
