"""Transformer for sequences of symbols, that sees what came before or, without order, all of it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.models.vit import MlpBlock
from kd.ranges import Count, Decay, Positive, Size


class DecoderBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    mlp_hidden: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array | None, train: bool) -> jax.Array:
        def drop(y):
            return nn.Dropout(self.dropout, deterministic=not train)(y)

        y = nn.LayerNorm(dtype=self.dtype, name='norm1')(x)
        y = nn.MultiHeadDotProductAttention(
            self.heads, dtype=self.dtype, force_fp32_for_softmax=True, name='attention'
        )(y, mask=mask)
        x = x + drop(y)
        y = nn.LayerNorm(dtype=self.dtype, name='norm2')(x)
        return x + drop(MlpBlock(self.mlp_hidden, self.dtype, name='mlp')(y))


class Transformer(nn.Module):
    """Language model with learned positions, as GPT-2 (Radford et al. 2019).

    Causal, or not, as the network of a masked diffusion model. GPT-2 small has depth 12, width
    768, 12 heads and length 1024.

    Attributes:
      num_classes: size of the vocabulary, of inputs and outputs.
      width: size of a token.
      depth: number of blocks.
      heads: attention heads; divides `width`.
      max_length: longest sequence.
      mlp_ratio: hidden units of a block's MLP over `width`.
      dropout: rate on what each half of a block adds, in training.
      causal: whether a position sees those before it alone, or all.
      extra_symbols: further inputs num_classes, ... that are no outputs, such as a mask.
      dtype: compute type, softmax and head excepted.

    Features: `embed`, `block0`, ..., `final_norm` and `features`, the head's input, [B, L, width].
    """

    num_classes: Count = 27
    width: Count = 64
    depth: Count = 2
    heads: Count = 4
    max_length: Count = 1024
    mlp_ratio: Positive = 4.0
    dropout: Decay = 0.0
    causal: bool = True
    extra_symbols: Size = 0
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(
                f'Transformer width={self.width} must be divisible by heads={self.heads}'
            )
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: jax.Array, *, padding: jax.Array | None = None, train: bool = False
    ) -> jax.Array:
        """Symbols int [B, L] to float32 logits [B, L, num_classes].

        Of the symbol that follows each; they depend on the symbols up to it alone. Where nothing is
        causal, of the symbol at each position; they depend on all of them. A symbol that is none of
        0 .. num_classes + extra_symbols - 1 makes them NaN.

        Args:
          x: symbols.
          padding: bool [B, L], True for symbols that nobody sees; None for none.
          train: whether dropout acts.

        Raises:
          ValueError: an input that is not int [B, L], or longer than `max_length`.
        """
        layers.check_rank('Transformer', x, {2: 'symbols [B, L]'})
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f'Transformer takes integer symbols [B, L], got {x.dtype}')
        length = x.shape[1]
        if length > self.max_length:
            raise ValueError(
                f'the sequence of {length} symbols exceeds max_length={self.max_length}'
            )
        init = nn.initializers.normal(0.02)
        known = self.num_classes + self.extra_symbols
        mask = nn.make_causal_mask(x) if self.causal else None
        if padding is not None:
            mask = nn.combine_masks(mask, ~padding[:, None, None], dtype=bool)
        y = nn.Embed(known, self.width, embedding_init=init, dtype=self.dtype, name='embed')(
            jnp.where(x < 0, known, x)  # A negative one would count from the end.
        )
        positions = self.param('positions', init, (self.max_length, self.width))
        y = y + positions[:length].astype(y.dtype)
        hidden = int(self.width * self.mlp_ratio)
        for i in range(self.depth):
            y = DecoderBlock(self.heads, hidden, self.dropout, self.dtype, name=f'block{i}')(
                y, mask, train
            )
        y = nn.LayerNorm(dtype=self.dtype, name='final_norm')(y)
        return layers.classifier(y, self.num_classes)
