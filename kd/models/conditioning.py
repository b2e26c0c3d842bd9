"""What conditions a velocity network: two times and, optionally, a class."""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.magnitude_preserving import MPDense, mp_sum
from kd.ranges import Count

__all__ = [
    'TimeWeight',
    'class_features',
    'log_variance',
    'positional_embedding',
    'velocity_inputs',
    'with_fields',
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


def with_fields(
    module: nn.Module, x: jax.Array, names: Sequence[str], told: Mapping[str, jax.Array]
) -> jax.Array:
    """x [B, ..., C] and what is `told` beside it, like x each, as further channels, in order.

    A network that is initialised is told zeros.

    Args:
      module: the network.
      x: its input.
      names: of the fields that it is told.
      told: those fields.

    Raises:
      ValueError: one of them is missing, or there is another.
    """
    if unknown := set(told) - set(names):
        raise ValueError(
            f'{type(module).__name__} is told {list(names)}, not {sorted(unknown)[0]!r}.'
        )
    if module.is_initializing():
        told = {name: told.get(name, jnp.zeros_like(x)) for name in names}
    if missing := [name for name in names if name not in told]:
        raise ValueError(f'{type(module).__name__} is told {missing[0]!r}, which was not given.')
    return jnp.concatenate([x, *(told[name].astype(x.dtype) for name in names)], axis=-1)


def class_features(
    label: jax.Array | None, num_classes: int | None, batch: int, dtype: Dtype
) -> jax.Array | None:
    """One-hot classes of unit mean square, [B, num_classes + 1]; None for unconditional networks.

    The last column is the null class. Without a label a class-conditional network gets it, so that
    dropping the condition in training (label = num_classes) and guidance in sampling mean the same
    input. A label that is none of 0 .. num_classes is NaN.

    Raises:
      ValueError: a label for a network built without classes.
    """
    if num_classes is None:
        if label is not None:
            raise ValueError('a label was given to an unconditional network; set num_classes.')
        return None
    index = jnp.broadcast_to(jnp.asarray(num_classes if label is None else label), (batch,))
    features = jax.nn.one_hot(index, num_classes + 1, dtype=dtype) * (num_classes + 1) ** 0.5
    known = (index >= 0) & (index <= num_classes)
    return jnp.where(known[:, None], features, jnp.nan)


class TimeWeight(nn.Module):
    """The learned log-variance w(s, t), [B] -> [B]: `channels` weights of unit norm.

        w(s, t) = weights . mp_sum(embedding(s), embedding(t))

    A magnitude-preserving linear layer without bias on the positional embeddings of the raw times;
    its weights are normal at the start and projected back to their length after each step, so that
    |w| is at most sqrt(2 channels). Enters `kd.losses.flow_map.uncertainty_weight`. Always float32
    or wider: it is tiny and exponentiated. Source: arXiv 2505.18825, as released.
    """

    channels: Count = 128

    @nn.compact
    def __call__(self, s: jax.Array, t: jax.Array) -> jax.Array:
        start, end = (positional_embedding(time, self.channels) for time in (s, t))
        return MPDense(1, dtype=s.dtype, name='out')(mp_sum(start, end))[..., 0]


def log_variance(params: Mapping[str, Any], s: jax.Array, t: jax.Array) -> jax.Array:
    """w(s, t) [B] of a velocity network whose `time_weight` gives it a learned weight."""
    weight = params['time_weight']
    channels = len(weight['out']['mp_weight'])
    return jnp.asarray(TimeWeight(channels).apply({'params': weight}, s, t))
