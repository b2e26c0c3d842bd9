"""Perceptrons with structured outputs: answers of several symbols, scores of candidates."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.models.mlp import MLP
from kd.ranges import Count


class AnswerMLP(nn.Module):
    """An answer of independent symbols: [B, ...] to float32 logits [B, length, num_classes].

    Attributes:
      length: symbols of an answer.
      num_classes: values of a symbol.
      widths, activation, dtype: as in `kd.models.mlp.MLP`.
    """

    length: Count = 3
    num_classes: Count = 5
    widths: Sequence[Count] = (96, 96)
    activation: str = 'relu'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """One forward pass gives the distribution of every symbol."""
        outputs = self.length * self.num_classes
        mlp = MLP(self.widths, outputs, self.activation, self.dtype, name='mlp')
        return mlp(x, train=train).reshape(len(x), self.length, self.num_classes)


class CandidateScorer(nn.Module):
    """One score per candidate, each scored alone: [B, P, F] to float32 [B, P].

    Attributes:
      widths, activation, dtype: as in `kd.models.mlp.MLP`.
    """

    widths: Sequence[Count] = (64, 64)
    activation: str = 'relu'
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Scores are logits of a choice between the candidates; ValueError unless [B, P, F]."""
        layers.check_rank('CandidateScorer', x, {3: 'candidates [B, P, features]'})
        mlp = MLP(self.widths, 1, self.activation, self.dtype, name='mlp')
        return mlp(x.reshape(-1, x.shape[-1]), train=train).reshape(x.shape[:2])
