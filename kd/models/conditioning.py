"""What conditions a velocity network: two times and, optionally, a class."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.magnitude_preserving import MPDense, mp_silu, mp_sum

__all__ = [
    'TimeWeight',
    'class_features',
    'log_variance',
    'positional_embedding',
    'velocity_inputs',
]


def positional_embedding(t: jax.Array, size: int, *, max_period: float = 1e4) -> jax.Array:
    """sqrt(2) [cos(w_k t), sin(w_k t)], w_k = max_period^(-2k / size), [B] -> [B, size].

    Unit mean square. Times enter raw, in [0, 1]: a factor of 1000, usual for diffusion steps, would
    multiply the time derivatives that flow maps are trained on.
    """
    if size % 2:
        raise ValueError(f'positional_embedding: size={size}, expected an even number.')
    frequency = max_period ** (-jnp.arange(size // 2, dtype=t.dtype) / (size // 2))
    angle = t[:, None] * frequency
    return jnp.sqrt(2.0).astype(t.dtype) * jnp.concatenate(
        [jnp.cos(angle), jnp.sin(angle)], axis=-1
    )


def velocity_inputs(
    spec: Mapping[str, jax.ShapeDtypeStruct],
) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of (s [1], t [1], x [1, ...]): a batch of one for the velocity networks here."""
    x = spec['input']
    time = jax.ShapeDtypeStruct((1,), x.dtype)
    return time, time, jax.ShapeDtypeStruct((1, *x.shape), x.dtype)


def class_features(
    label: jax.Array | None, num_classes: int | None, batch: int, dtype: Dtype
) -> jax.Array | None:
    """One-hot classes of unit mean square, [B, num_classes + 1]; None for unconditional networks.

    The last column is the null class. Without a label a class-conditional network gets it, so that
    dropping the condition in training (label = num_classes) and guidance in sampling mean the same
    input.

    Raises:
      ValueError: a label for a network built without classes.
    """
    if num_classes is None:
        if label is not None:
            raise ValueError('a label was given to an unconditional network; set num_classes.')
        return None
    index = jnp.broadcast_to(jnp.asarray(num_classes if label is None else label), (batch,))
    return jax.nn.one_hot(index, num_classes + 1, dtype=dtype) * (num_classes + 1) ** 0.5


class TimeWeight(nn.Module):
    """The learned log-variance w(s, t), [B] -> [B], zero at initialisation.

    Raw times s and t, each through a positional embedding and its own linear layer; their
    magnitude-preserving sum through a SiLU and one linear layer to a scalar. Enters
    `kd.losses.flow_map.uncertainty_weight`. Always float32 or wider: it is tiny and exponentiated.
    Source: arXiv 2505.18825.
    """

    channels: int = 128

    @nn.compact
    def __call__(self, s: jax.Array, t: jax.Array) -> jax.Array:
        start, end = (
            MPDense(self.channels, dtype=time.dtype, name=name)(
                positional_embedding(time, self.channels)
            )
            for name, time in (('start', s), ('end', t))
        )
        hidden = mp_silu(mp_sum(start, end))
        return nn.Dense(1, dtype=s.dtype, kernel_init=nn.initializers.zeros, name='out')(hidden)[
            ..., 0
        ]


def log_variance(params: Mapping[str, Any], s: jax.Array, t: jax.Array) -> jax.Array:
    """w(s, t) [B] of a velocity network whose `time_weight` gives it a learned weight."""
    weight = params['time_weight']
    channels = weight['start']['mp_weight'].shape[-1]
    return jnp.asarray(TimeWeight(channels).apply({'params': weight}, s, t))
