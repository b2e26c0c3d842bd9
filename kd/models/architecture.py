"""What a decoder is made of: its sizes, and the layers that follow from them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax.numpy as jnp

from kd.models.adapters import Adapter, Dense
from kd.models.moe import Experts
from kd.parallel import layout
from kd.ranges import Count, Positive


@dataclasses.dataclass(unsafe_hash=True)
class Architecture:
    """What a decoder computes.

    Attributes:
      num_classes: size of the vocabulary, of inputs and outputs.
      width: size of a token.
      depth: number of blocks.
      heads: of the queries.
      kv_heads: of keys and values; divides `heads`. None for as many.
      head_dim: size of a head; None for width / heads.
      mlp_hidden: hidden units of a block's MLP; None for 4 width.
      mlp: 'swiglu' with a gate, 'gelu' (by tanh) without.
      norm: 'rms' or 'layer'.
      epsilon: of the norms.
      bias: whether output projections and MLPs have biases, as GPT-2's.
      qkv_bias: whether queries, keys and values have.
      qk_norm: whether queries and keys are normalised, by head, as Qwen3's.
      rope_theta: base of the rotations' wavelengths; None for learned positions, as GPT-2's.
      rope_scaling: how rotations reach beyond the lengths of pre-training, see `kd.models.rope`.
      causal: whether a token sees those before it alone, or all of its document, as in a masked
        diffusion model.
      window: how many tokens back, itself included, a token sees; None for all.
      tied: whether the embedding is the head too.
      max_length: the positions that there are.
      deviation: of weights at the start, as of released models; None for 1 / sqrt(inputs), and 1 of
        embeddings that are no head, from which small networks learn in fewer steps.
      dtype: compute type; logits, softmax and statistics of norms are at least float32.
      param_dtype: of the parameters.
      block: queries at a time where the maps of all would be large, see `attend_causally`.
      experts: keywords of `kd.models.moe.Experts`, which some blocks have in the place of an MLP;
        None for none.
      adapter: what is trained beside matrices that are not, see `kd.models.adapters`.
    """

    num_classes: Count = 72
    width: Count = 64
    depth: Count = 2
    heads: Count = 4
    kv_heads: Count | None = None
    head_dim: Count | None = None
    mlp_hidden: Count | None = None
    mlp: Literal['swiglu', 'gelu'] = 'swiglu'
    norm: Literal['rms', 'layer'] = 'rms'
    epsilon: Positive = 1e-5
    bias: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    rope_theta: Positive | None = 10_000.0
    rope_scaling: Mapping[str, Any] | None = None
    causal: bool = True
    window: Count | None = None
    tied: bool = True
    max_length: Count = 2048
    deviation: Positive | None = 0.02
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    block: Count = 512
    experts: Experts | None = None
    adapter: Adapter | None = None

    @property
    def groups(self) -> int:
        """Heads of keys and values."""
        return self.kv_heads or self.heads

    @property
    def size_of_head(self) -> int:
        """Features of a head."""
        return self.head_dim or self.width // self.heads

    @property
    def hidden_units(self) -> int:
        """Of a block's MLP."""
        return self.mlp_hidden or 4 * self.width

    def dense(self, features: int, bias: bool, depth: int | None = None) -> nn.Dense:
        """A projection; one that ends a residual branch of `depth` blocks starts smaller."""
        scale = 1.0 if depth is None else (2 * depth) ** -0.5
        return Dense(
            features,
            use_bias=bias,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            kernel_init=self.initial(scale),
            adapter=self.adapter,
            dot_general=layout.WIDENING if depth is None else layout.NARROWING,
        )

    def initial(self, scale: float = 1.0) -> nn.initializers.Initializer:
        """Of a matrix [inputs, outputs]."""
        if self.deviation is None:
            return nn.initializers.variance_scaling(scale**2, 'fan_in', 'normal')
        return nn.initializers.normal(scale * self.deviation)

    def embedding(self) -> nn.initializers.Initializer:
        """Of a table [tokens or positions, width]."""
        own = self.width**-0.5 if self.tied else 1.0
        return nn.initializers.normal(self.deviation or own)

    def normalise(self) -> nn.Module:
        """A norm over the last axis."""
        kind = nn.RMSNorm if self.norm == 'rms' else nn.LayerNorm
        return kind(epsilon=self.epsilon, dtype=self.dtype, param_dtype=self.param_dtype)
