"""Multi-layer perceptron."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count, Size

ACTIVATIONS = ('relu', 'gelu', 'silu', 'tanh', 'elu', 'leaky_relu', 'sigmoid', 'softplus')


class MLP(nn.Module):
    """Dense layers on the flattened input: x -> act(W x + b) for each width, then a linear head.

    Attributes:
      widths: units of each hidden layer; () is multinomial logistic regression.
      num_classes: number of logits.
      activation: a name of `jax.nn`, one of `ACTIVATIONS`.
      dtype: compute type of the hidden layers.

    Features: `hidden0`, `hidden1`, ... before the activation, and `features`, the head's input.
    """

    widths: Sequence[Count] = (256, 256)
    num_classes: Count = 10
    activation: str = 'relu'
    dtype: Any = jnp.float32

    def __post_init__(self):
        layers.check_choice('activation', self.activation, ACTIVATIONS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Inputs [B, ...], flattened per example, to float32 logits [B, num_classes]."""
        del train  # The same in training and evaluation.
        activation = getattr(nn, self.activation)
        x = x.reshape(x.shape[0], -1).astype(self.dtype)
        for i, width in enumerate(self.widths):
            x = nn.Dense(
                width,
                dtype=self.dtype,
                kernel_init=nn.initializers.he_normal(),
                name=f'hidden{i}',
            )(x)
            x = activation(x)
        return layers.classifier(x, self.num_classes)


class ResidualMLP(nn.Module):
    """A dense layer, blocks x + relu(W x + b), and a linear head, on the flattened input.

    A unit whose weights in and out are 0 stays so under a gradient, and a block of zeros stays the
    identity: padded with zeros, a smaller network trains as itself in the shapes of a larger one.

    Attributes:
      width: units of every layer.
      depth: number of blocks.
      num_classes: number of logits.

    Features: `stem`, `block0`, ... before the activation, and `features`, the head's input.
    """

    width: Count = 64
    depth: Size = 2
    num_classes: Count = 10

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Inputs [B, ...], flattened per example, to float32 logits [B, num_classes]."""
        del train  # The same in training and evaluation.

        def dense(x: jax.Array, name: str) -> jax.Array:
            initial = nn.initializers.he_normal()
            return nn.relu(nn.Dense(self.width, kernel_init=initial, name=name)(x))

        x = dense(x.reshape(x.shape[0], -1).astype(jnp.float32), 'stem')
        for i in range(self.depth):
            x = x + dense(x, f'block{i}')
        return layers.classifier(x, self.num_classes)
