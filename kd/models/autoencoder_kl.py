"""The autoencoders of latent diffusion: images to latents and back.

Modules have the names of `AutoencoderKL` and of `VQModel` of `diffusers`. Source: Rombach et al.
2022, arXiv:2112.10752; Esser et al. 2024, arXiv:2403.03206, for 16 channels.

    mean, log_variance = network.apply(variables, images, method='encode')
    latents = network.scaled(mean)                       # of about unit variance
    images = network.apply(variables, network.unscaled(latents), method='decode')
"""

from __future__ import annotations

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.attention import attend
from kd.models.latent_parts import ResnetBlock, conv, group_norm, preset_of
from kd.models.unet import resample
from kd.ranges import Count, Finite, Positive, Size

__all__ = ['PRESETS', 'AutoencoderKL', 'preset']

# Bounds of the logarithm of a variance, as released.
LOG_VARIANCE = (-30.0, 20.0)


class _Attention(nn.Module):
    """Attention of pixels to each other, one head, beside a map [B, H, W, C]."""

    groups: int
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size = x.shape[-1]
        y = group_norm(x, self.groups, 1e-6, self.dtype, 'group_norm').reshape(len(x), -1, 1, size)
        q, k, v = (nn.Dense(size, dtype=self.dtype, name=f'to_{name}')(y) for name in 'qkv')
        y = attend(q, k, v).reshape(x.shape)
        return x + nn.Dense(size, dtype=self.dtype, name='to_out_0')(y)


class _Blocks(nn.Module):
    """Residual blocks of one side: 'down' halves it at the end, 'up' doubles it, 'mid' attends."""

    features: int
    blocks: int
    groups: int
    kind: str
    resampled: bool
    remat: bool
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        resnet = nn.remat(ResnetBlock, static_argnums=(3,)) if self.remat else ResnetBlock
        for i in range(self.blocks):
            x = resnet(
                self.features, self.groups, 1e-6, 0.0, self.dtype, name=f'resnets_{i}'
            )(x, None, False)  # fmt: skip
            if self.kind == 'mid' and i == 0:
                x = _Attention(self.groups, self.dtype, name='attentions_0')(x)
        if self.resampled:
            x = _Resampler(self.kind, self.dtype, name=f'{self.kind}samplers_0')(x)
        return x


class _Resampler(nn.Module):
    """Convolution to twice the side, or to half of it with zeros after the last pixels alone."""

    kind: str
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        if self.kind == 'up':
            return conv(resample(x, 'up'), x.shape[-1], 3, self.dtype, 'conv')
        return nn.Conv(
            x.shape[-1], (3, 3), 2, padding=((0, 1), (0, 1)), dtype=self.dtype, name='conv'
        )(x)  # fmt: skip


class _Half(nn.Module):
    """The encoder or the decoder of `AutoencoderKL`, whose settings are `of`."""

    of: AutoencoderKL
    out: int
    encodes: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        of, widths = self.of, self.of.channels
        kind, last = 'down' if self.encodes else 'up', len(widths) - 1
        order = widths if self.encodes else widths[::-1]

        def blocks(kind, features, count, resampled, name, x):
            return _Blocks(
                features, count, of.groups, kind, resampled, of.remat, of.dtype, name=name
            )(x)  # fmt: skip

        y = conv(x.astype(of.dtype), order[0], 3, of.dtype, 'conv_in')
        if not self.encodes:
            y = blocks('mid', widths[-1], 2, False, 'mid_block', y)
        for i, width in enumerate(order):
            count = of.blocks + (not self.encodes)
            y = blocks(kind, width, count, i < last, f'{kind}_blocks_{i}', y)
        if self.encodes:
            y = blocks('mid', widths[-1], 2, False, 'mid_block', y)
        y = nn.silu(group_norm(y, of.groups, 1e-6, of.dtype, 'conv_norm_out'))
        return conv(y, self.out, 3, of.dtype, 'conv_out')


class _Codebook(nn.Module):
    """The nearest of so many vectors for each pixel, [B, H, W, c]."""

    codes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        known = nn.Embed(self.codes, x.shape[-1], name='embedding').embedding
        # |x - e|^2 but for |x|^2, which all have.
        apart = jnp.square(known).sum(-1) - 2 * jnp.einsum(
            'bhwc,kc->bhwk', x.astype(known.dtype), known, precision=jax.lax.Precision.HIGHEST
        )
        return known[jnp.argmin(apart, axis=-1)].astype(x.dtype)


class AutoencoderKL(nn.Module):
    """Images [B, H, W, 3] in [-1, 1] and latents [B, H / f, W / f, c]; defaults are SD 1.5's.

    Attributes:
      channels: of each level; each but the first halves the side, so f = 2^(levels - 1).
      blocks: of a level; one more in the decoder.
      latent: c.
      scale, shift: latents of networks are (latent - shift) scale.
      moments: a further product of moments and latents with themselves, of SD 1.5 to XL.
      codes: vectors of a codebook, by which latents are replaced before they are decoded (VQ); they
        then have no variance. 0 for none.
      groups: of the normalisation.
      remat: residual blocks are computed again for the gradient.
      dtype: compute type; parameters are float32, outputs have the type of inputs.
    """

    channels: tuple[Count, ...] = (128, 256, 512, 512)
    blocks: Count = 2
    latent: Count = 4
    scale: Positive = 0.18215
    shift: Finite = 0.0
    moments: bool = True
    codes: Size = 0
    groups: Count = 32
    remat: bool = False
    dtype: Dtype = jnp.float32

    def setup(self) -> None:
        plain = self.clone(parent=None, name=None)
        encoded = self.latent if self.codes else 2 * self.latent
        self.encoder = _Half(plain, encoded, True)
        self.decoder = _Half(plain, 3, False)
        if self.codes:
            self.quantize = _Codebook(self.codes)
        if self.moments:
            self.quant_conv = nn.Conv(encoded, (1, 1), dtype=self.dtype)
            self.post_quant_conv = nn.Conv(self.latent, (1, 1), dtype=self.dtype)

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (x [1, ...],): of data that are latents, of the images they are of."""
        x = spec['input']
        if x.shape[-1] == self.latent:
            factor = 2 ** (len(self.channels) - 1)
            sides = (factor * x.shape[0], factor * x.shape[1])
            return (jax.ShapeDtypeStruct((1, *sides, 3), x.dtype),)
        return (jax.ShapeDtypeStruct((1, *x.shape), x.dtype),)

    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images by way of the means of their latents."""
        del train
        return self.decode(self.encode(x)[0])

    def encode(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(mean, log of the variance) of the latents of images.

        Raises:
          ValueError: sides that do not divide.
        """
        factor = 2 ** (len(self.channels) - 1)
        if x.shape[1] % factor or x.shape[2] % factor:
            raise ValueError(
                f'AutoencoderKL with {len(self.channels)} levels needs image sides divisible by '
                f'{factor}, got {x.shape[1]}x{x.shape[2]}.'
            )
        y = self.encoder(x)
        y = self.quant_conv(y) if self.moments else y
        if self.codes:
            y = y.astype(x.dtype)
            return y, jnp.full_like(y, LOG_VARIANCE[0])
        mean, log_variance = jnp.split(y.astype(x.dtype), 2, axis=-1)
        return mean, jnp.clip(log_variance, *LOG_VARIANCE)

    def decode(self, latents: jax.Array) -> jax.Array:
        """Images of latents as `encode` gives them."""
        if latents.shape[-1] != self.latent:
            raise ValueError(
                f'AutoencoderKL decodes latents of {self.latent} channels, got '
                f'{latents.shape[-1]}; are they of another autoencoder?'
            )
        y = latents.astype(self.dtype)
        y = self.quantize(y) if self.codes else y
        y = self.post_quant_conv(y) if self.moments else y
        return self.decoder(y).astype(latents.dtype)

    def scaled(self, latents: jax.Array) -> jax.Array:
        """What a network of latents takes."""
        return (latents - self.shift) * self.scale

    def unscaled(self, latents: jax.Array) -> jax.Array:
        """The inverse of `scaled`."""
        return latents / self.scale + self.shift


_WIDE = dict(latent=16, moments=False)
# By name, the arguments of `AutoencoderKL`: 83.7 million parameters, 83.8 with 16 channels; 55.3
# that of a codebook, a quarter of the side.
PRESETS: dict[str, dict[str, Any]] = {
    'sd15': {},
    'sdxl': dict(scale=0.13025),
    'sd3': dict(scale=1.5305, shift=0.0609, **_WIDE),
    'flux': dict(scale=0.3611, shift=0.1159, **_WIDE),
    'vq_f4': dict(channels=(128, 256, 512), latent=3, scale=1.0, codes=8_192),
}


def preset(of: str, **changes: Any) -> AutoencoderKL:
    """The autoencoder that is known as `of`, with changes.

    Args:
      of: one of `PRESETS`.
      **changes: attributes of `AutoencoderKL`.

    Raises:
      ValueError: a name or an attribute that is not there.
    """
    return preset_of(AutoencoderKL, PRESETS, of, changes)
