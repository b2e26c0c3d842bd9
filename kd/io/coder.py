"""Autoencoders of images from directories of diffusers, as two functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd.errors import UserError
from kd.io import pretrained

__all__ = ['Coder', 'coder', 'of_pixels']


class Coder(NamedTuple):
    """Latents as networks of them take them.

    Attributes:
      encode: latents (the means) of images [B, H, W, 3] in [-1, 1].
      decode: images of latents.
    """

    encode: Callable[[jax.Array], jax.Array]
    decode: Callable[[jax.Array], jax.Array]


def of_pixels() -> Coder:
    """Images that are their own latents."""
    return Coder(lambda x: x, lambda x: x)


def coder(reference: str, size: int) -> Coder:
    """Of `VQModel` or `AutoencoderKL`.

    Args:
      reference: 'hf:DIR'; '' for `of_pixels`.
      size: a side of images, for their shapes alone.

    Raises:
      UserError: no such directory, or one of another network.
    """
    if not reference:
        return of_pixels()
    module: Any = pretrained.network(reference)
    if not hasattr(module, 'scaled'):
        raise UserError(f'{reference} is a {type(module).__name__}, no autoencoder.')
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, size, size, 3)))
    variables = pretrained.load(reference, abstract)
    return Coder(
        lambda x: module.scaled(module.apply(variables, x, method='encode')[0]),
        lambda z: module.apply(variables, module.unscaled(z), method='decode'),
    )
