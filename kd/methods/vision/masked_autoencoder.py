"""Masked autoencoders (He et al. 2021, arXiv:2111.06377): pixels of patches that are hidden."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, NamedTuple

import jax
import jax.numpy as jnp

from kd import callables
from kd.context import Context
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses import pixel
from kd.method import Method, Objective, minimize
from kd.methods import start
from kd.metrics import mean
from kd.models import layers
from kd.models.masked_autoencoder import Decoder, Encoder, Mask, random_mask, visible_patches
from kd.network import Network, Output, from_linen
from kd.ranges import Count, Decay, Keywords
from kd.state import NETWORK, PyTree

DECODER = 'decoder'
Block = Annotated[Mapping[str, Any] | None, Keywords(Decoder, reserved=('grid', 'outputs'))]


class Autoencoder(NamedTuple):
    """An encoder and the decoder beside it.

    Attributes:
      network: of an `Encoder`.
      decoder: of a `Decoder`.
      patch: side of a patch.
      patches, visible: how many an image has, and how many of them are seen.
      normalise: of `kd.losses.pixel.masked_pixel`.
    """

    network: Network
    decoder: Network
    patch: int
    patches: int
    visible: int
    normalise: bool

    def init(self, key: jax.Array) -> dict[str, PyTree]:
        """Variables of both parts."""
        decoder = self.decoder.init(jax.random.fold_in(key, 0))
        return {NETWORK: self.network.init(key), DECODER: decoder}

    def mask(self, key: jax.Array, batch: int) -> Mask:
        """Fresh, for a batch of so many images."""
        return random_mask(key, batch, self.patches, self.visible)

    def encode(
        self, variables: PyTree, images: jax.Array, mask: Mask, capture: tuple[str, ...] = ()
    ) -> Output:
        """What the encoder makes of the patches that are seen, with features."""
        return self.network.apply(variables, images, train=True, keep=mask.keep, capture=capture)

    def loss(self, decoder: PyTree, tokens: jax.Array, images: jax.Array, mask: Mask) -> jax.Array:
        """`masked_pixel` of the decoder of the encoder's tokens, [B]."""
        predicted = self.decoder.apply(decoder, tokens, mask.restore, train=True).logits
        module: Any = self.network.module
        seen = layers.standardised(images, module.pixel_mean, module.pixel_std)
        patches = pixel.patchify(seen, self.patch)
        return pixel.masked_pixel(predicted, patches, mask.hidden, normalise=self.normalise)


def masked_autoencoder(
    context: Context,
    *,
    mask_ratio: Decay = 0.75,
    decoder: Block = None,
    normalise: bool = False,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """The pixels of hidden patches from those that are seen.

        loss = sum_l m_l mean_k (D(E(x_seen))_lk - x_lk)^2 / sum_l m_l

    with a fresh mask m for every image, pixels as the encoder standardises them. The encoder is the
    stage's result; the decoder is the part `decoder` of the state, which is not exported.

    Args:
      context: the stage; its network is an `Encoder` of `kd.models.masked_autoencoder`. It begins
        as `references.start`, if there is one.
      mask_ratio: share of hidden patches, rounded up to whole ones.
      decoder: keywords of `kd.models.masked_autoencoder.Decoder`.
      normalise: predict patches of mean 0 and variance 1 instead of pixels.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.
    """
    of = autoencoder(context, mask_ratio=mask_ratio, decoder=decoder, normalise=normalise)

    def loss(params, state, batch, key) -> Objective:
        augment_key, mask_key = jax.random.split(key)
        images = augment.augment(augment_key, batch, augmentation, context.num_classes)['input']
        mask = of.mask(mask_key, len(images))
        tokens = of.encode({'params': params[NETWORK]}, images, mask).logits
        return Objective(mean(of.loss({'params': params[DECODER]}, tokens, images, mask)))

    init = start.from_reference(of.init, context)
    return minimize(loss, context.tx, init, micro_batches=micro_batches)


def autoencoder(
    context: Context, *, mask_ratio: Decay, decoder: Block, normalise: bool
) -> Autoencoder:
    """The stage's encoder with a decoder for its images.

    Raises:
      UserError: a network that is no `Encoder`, a decoder that cannot be.
    """
    network = context.network
    encoder = checked(network, f'{context.stage}.network')
    _, height, width, channels = network.inputs[0].shape
    grid = height // encoder.patch, width // encoder.patch
    where = f'{context.stage}.method.decoder'
    callables.check_arguments(Decoder, decoder or {}, where=where, reserved=('grid', 'outputs'))
    try:
        module = Decoder(grid=grid, outputs=encoder.patch**2 * channels, **(decoder or {}))
    except ValueError as error:
        raise UserError(f'{where}: {error}.') from error
    patches = grid[0] * grid[1]
    visible = visible_patches(patches, mask_ratio)
    inputs = (
        jax.ShapeDtypeStruct((1, 1 + visible, encoder.width), jnp.float32),
        jax.ShapeDtypeStruct((1, patches), jnp.int32),
    )
    made = from_linen(module, *inputs)
    return Autoencoder(network, made, encoder.patch, patches, visible, normalise)


def checked(network: Network, where: str) -> Encoder:
    """The `Encoder` of a network; raises `UserError` for another module."""
    if not isinstance(network.module, Encoder):
        raise UserError(
            f'{where} is a {type(network.module).__name__}; name an encoder that sees a part of '
            'the patches, kd.models.masked_autoencoder.Encoder.'
        )
    return network.module
