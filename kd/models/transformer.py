"""Decoder-only transformer for sequences of symbols."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.models.vit import MlpBlock
from kd.ranges import Count, Decay, Positive


class DecoderBlock(nn.Module):
    """Pre-norm block with causal attention: x + attention(norm(x)), then x + mlp(norm(x))."""

    heads: int
    mlp_hidden: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, train: bool) -> jax.Array:
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
    """Causal language model with learned positions, as GPT-2 (Radford et al. 2019).

    GPT-2 small has depth 12, width 768, 12 heads and length 1024.

    Attributes:
      num_classes: size of the vocabulary, of inputs and outputs.
      width: size of a token.
      depth: number of blocks.
      heads: attention heads; divides `width`.
      max_length: longest sequence.
      mlp_ratio: hidden units of a block's MLP over `width`.
      dropout: rate on what each half of a block adds, in training.
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
    dtype: Any = jnp.float32

    def __post_init__(self):
        if self.width % self.heads:
            raise ValueError(
                f'Transformer width={self.width} must be divisible by heads={self.heads}'
            )
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Symbols int [B, L] to float32 logits [B, L, num_classes] of the symbol that follows each.

        Logits at position i depend on the symbols 0 .. i alone. A symbol that is none of
        0 .. num_classes - 1 makes them NaN.

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
        mask = nn.make_causal_mask(x)
        y = nn.Embed(
            self.num_classes, self.width, embedding_init=init, dtype=self.dtype, name='embed'
        )(jnp.where(x < 0, self.num_classes, x))  # A negative one would count from the end.
        positions = self.param('positions', init, (self.max_length, self.width))
        y = y + positions[:length].astype(y.dtype)
        hidden = int(self.width * self.mlp_ratio)
        for i in range(self.depth):
            y = DecoderBlock(self.heads, hidden, self.dropout, self.dtype, name=f'block{i}')(
                y, mask, train
            )
        y = nn.LayerNorm(dtype=self.dtype, name='final_norm')(y)
        return layers.classifier(y, self.num_classes)
