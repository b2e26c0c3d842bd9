"""Multi-layer perceptron."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from kd.models import layers
from kd.ranges import Count

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
