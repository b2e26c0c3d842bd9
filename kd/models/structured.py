"""Small networks with structured inputs or outputs: answers of symbols, candidates, tables."""

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


class BottleneckLM(nn.Module):
    """A language model of one token: contexts int [B, n] to float32 logits [B, num_classes].

    Embeddings of the tokens side by side, through tanh of a few features. Features: `bottleneck`.

    Attributes:
      num_classes: size of the vocabulary, of contexts and answers.
      embedding: features of each token.
      width: features of the bottleneck.
      dtype: compute type; logits are float32.
    """

    num_classes: Count = 48
    embedding: Count = 64
    width: Count = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits of the answer to each context; ValueError unless int [B, n]."""
        layers.check_rank('BottleneckLM', x, {2: 'contexts [B, n]'})
        embed = nn.Embed(self.num_classes, self.embedding, dtype=self.dtype, name='embed')
        y = embed(x).reshape(x.shape[0], -1)
        y = jnp.tanh(nn.Dense(self.width, dtype=self.dtype, name='bottleneck')(y))
        return layers.classifier(y, self.num_classes)


class TableLM(nn.Module):
    """A language model that is a table: int [B, T] to float32 logits [B, T, V].

    Logits of the next token by the two before; the first token of a row has a 0 before it.

    Attributes:
      num_classes: V. The parameter `table` is [V, V, V].
    """

    num_classes: Count = 32

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits after each token; ValueError unless int [B, T]."""
        layers.check_rank('TableLM', x, {2: 'tokens [B, T]'})
        table = self.param('table', nn.initializers.zeros, (self.num_classes,) * 3)
        before = jnp.pad(x, ((0, 0), (1, 0)))[:, :-1]
        return table[before, x].astype(jnp.float32)
