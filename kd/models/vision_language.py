"""Language models that see: features of an image in the place of some tokens (LLaVA's design)."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd import callables, config
from kd.errors import UserError
from kd.models.clip import ClipVision
from kd.models.decoder import Decoder
from kd.parallel import layout
from kd.ranges import Size

# Parts of the parameters beside those of a decoder.
VISION, ADAPTOR = 'vision', 'adaptor'


class Adaptor(nn.Module):
    """Features of patches to embeddings: down(gelu(up x)), both of the width of a token.

    Source: LLaVA-1.5, arXiv:2310.03744.
    """

    width: int
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        def dense(name, product):
            return nn.Dense(
                self.width, dtype=self.dtype, param_dtype=self.param_dtype, name=name,
                dot_general=product,
            )  # fmt: skip

        hidden = nn.gelu(dense('up', layout.WIDENING)(x), approximate=False)
        return dense('down', layout.NARROWING)(hidden)


class VisionDecoder(Decoder):
    """A decoder that reads an image with every row.

    Where a token is `image_token`, the next feature of the row's image stands, patch by patch. A
    row has as many of them as the image has patches, or none; places beyond the patches are NaN.

    Attributes:
      as of `Decoder`, and
      vision: the tower.
      image_token: a token that the text does not have.

    Leaves: those of a decoder; below `vision` and `adaptor` what the image goes through.
    """

    vision: ClipVision | None = None
    image_token: Size = 0
    required_fields: ClassVar[tuple[str, ...]] = ('input', 'image')

    def __post_init__(self):
        if self.vision is None or not self.image_token < self.num_classes:
            raise ValueError(
                f'VisionDecoder needs a tower, and image_token={self.image_token} among its '
                f'{self.num_classes} tokens.'
            )
        super().__post_init__()

    def setup(self):
        super().setup()
        self.adaptor = Adaptor(self.width, self.dtype, self.param_dtype)

    def __call__(  # type: ignore[override]  # An image comes with the tokens.
        self,
        tokens: jax.Array,
        image: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """Float32 logits [B, T, num_classes]; arguments as of `hidden`."""
        return self._logits(self.hidden(tokens, image, positions, segments, train=train))

    def hidden(  # type: ignore[override]
        self,
        tokens: jax.Array,
        image: jax.Array,
        positions: jax.Array | None = None,
        segments: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """What the head is applied to, [B, T, width].

        Args:
          tokens, positions, segments: as of `Decoder`.
          image: [B, H, W, C] in [-1, 1].
          train: nothing depends on it.
        """
        del train
        assert self.vision is not None
        x, angles = self._read(tokens, positions, segments)
        seen = self.adaptor(self.vision(image)).astype(x.dtype)
        return self._through(splice(x, seen, tokens == self.image_token), angles, segments)

    def step(self, tokens, positions, cache, valid=None, *, last=False):
        """Would go on with text alone; answers to images cannot be sampled yet."""
        raise UserError('answers to images cannot be sampled; take answers of the data.')


def splice(embedded: jax.Array, image: jax.Array, where: jax.Array) -> jax.Array:
    """Puts features of an image in the place of tokens, in order.

    Args:
      embedded: [B, T, D].
      image: [B, N, D].
      where: bool [B, T]; the n-th True of a row gets feature n, NaN from n = N on.

    Returns:
      [B, T, D].
    """
    place = jnp.cumsum(where, axis=1) - 1
    pick = jax.vmap(lambda row, at: row.at[at].get(mode='fill', fill_value=jnp.nan))
    return jnp.where(where[..., None], pick(image, jnp.maximum(place, 0)), embedded)


def vision_decoder(
    num_classes: int | None = None,
    *,
    language: Mapping[str, Any],
    vision: Mapping[str, Any],
    image_token: Size,
) -> VisionDecoder:
    """A decoder with the tower of a block.

        network=dict(
            name='kd.models.vision_language.vision_decoder',
            language=dict(name='kd.models.decoders.preset', of='qwen2_0_5b'),
            vision=dict(name='kd.models.clip.preset', of='vit_l_14_336'),
            image_token=151_655)

    Args:
      num_classes: of the data, for a decoder that takes it and does not say.
      language: block of a `Decoder`.
      vision: block of a `ClipVision`.
      image_token: see `VisionDecoder`.

    Raises:
      ValueError: blocks of other networks.
    """
    block = dict(language)
    takes = inspect.signature(callables.resolve(block.get('name', ''))).parameters
    if num_classes is not None and 'num_classes' in takes:
        block.setdefault('num_classes', num_classes)
    decoder = config.build(block, where='language')
    tower = config.build(vision, where='vision')
    if not isinstance(decoder, Decoder) or not isinstance(tower, ClipVision):
        raise ValueError(
            f'an image is read by a ClipVision and a Decoder, not by a {type(tower).__name__} and '
            f'a {type(decoder).__name__}.'
        )
    own = {
        field.name: getattr(decoder, field.name)
        for field in dataclasses.fields(Decoder)
        if field.init and field.name not in ('parent', 'name')
    }
    return VisionDecoder(**own, vision=tower, image_token=image_token)
