"""Small networks that mend images: what a decoder is to a denoiser of pixels."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.config import Block
from kd.models.autoencoder_kl import AutoencoderKL
from kd.ranges import Count

__all__ = ['LatentDecoder', 'Refiner', 'latent_decoder']


class Refiner(nn.Module):
    """x + what a perceptron says of x, [B, ...]; nothing at initialisation.

    Attributes:
      width: units of a hidden layer.
      depth: hidden layers.
    """

    width: Count = 256
    depth: Count = 2

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape of (x [1, ...],)."""
        x = spec['input']
        return (jax.ShapeDtypeStruct((1, *x.shape), x.dtype),)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Images like x."""
        del train
        hidden = x.reshape(len(x), -1)
        for layer in range(self.depth):
            hidden = nn.gelu(nn.Dense(self.width, name=f'hidden{layer}')(hidden))
        out = nn.Dense(x[0].size, kernel_init=nn.initializers.zeros, name='out')(hidden)
        return x + out.reshape(x.shape)


class LatentDecoder(nn.Module):
    """The decoder alone of an autoencoder, in its parameters; see `latent_decoder`.

    Attributes:
      inner: the autoencoder.
    """

    inner: AutoencoderKL

    def setup(self) -> None:
        nn.share_scope(self, self.inner)

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shape of (latents [1, ...],)."""
        x = spec['input']
        return (jax.ShapeDtypeStruct((1, *x.shape), x.dtype),)

    def __call__(self, latents: jax.Array, *, train: bool = False) -> jax.Array:
        """Images of latents as networks have them, scaled."""
        del train
        return self.inner.decode(self.inner.unscaled(jnp.asarray(latents)))


def latent_decoder(*, autoencoder: Block) -> LatentDecoder:
    """The decoder of an autoencoder.

    Args:
      autoencoder: its block, such as one of `kd.models.autoencoder_kl.preset`.
    """
    return LatentDecoder(config_lib.build(autoencoder, where='network.autoencoder'))
