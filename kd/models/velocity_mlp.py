"""Two-time velocity network for low-dimensional data: a GELU MLP."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd.models.conditioning import TimeWeight, class_features, velocity_inputs, with_fields
from kd.ranges import Count, Positive, Size

__all__ = ['VelocityMLP']


class VelocityMLP(nn.Module):
    """v(s, t, x) of Boffi et al., arXiv 2505.18825, for points; zero at initialisation.

    Input [s, t, x / data_scale], `depth` hidden GELU layers of `width`, output times `data_scale`.
    With `frequencies` the input is instead [s, t - s, x / data_scale] and sines and cosines of
    pi k x for each k, of pi s and of pi (t - s): a small network needs them to learn densities
    with edges (4 layers of 128 learn a checkerboard in minutes on a CPU).

    Attributes:
      width: units of a hidden layer.
      depth: hidden layers.
      data_scale: standard deviation of the data, which is also that of the noise.
      frequencies: k of the Fourier features of x, for data in about [-1, 1]; empty for none.
      beside: fields of a batch, like x, that are seen beside it.
      num_classes: None for unconditional networks.
      time_weight: channels of the learned log-variance w(s, t) that is initialised beside the
        network (see `kd.models.conditioning.log_variance`); 0 for none.
      dtype: compute type; parameters are float32.
    """

    width: Count = 512
    depth: Count = 5
    data_scale: Positive = 1.0
    frequencies: tuple[Positive, ...] = ()
    beside: tuple[str, ...] = ()
    num_classes: Count | None = None
    time_weight: Size = 0
    dtype: Dtype = jnp.float32

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        return (*self.beside, *(('label',) if self.num_classes is not None else ()))

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of a batch of one, from those of one example by name."""
        return velocity_inputs(spec)

    @nn.compact
    def __call__(
        self,
        s: jax.Array,
        t: jax.Array,
        x: jax.Array,
        *,
        label: jax.Array | None = None,
        train: bool = False,
        **told: Any,
    ) -> jax.Array:
        """Velocity [B, ...] like x from times [B], points [B, ...], labels int [B] and fields."""
        if self.time_weight and self.is_initializing():
            TimeWeight(self.time_weight, name='time_weight')(s, t)
        hidden = self._hidden(s, t, with_fields(self, x, self.beside, told), label)
        out = nn.Dense(x[0].size, dtype=self.dtype, kernel_init=nn.initializers.zeros, name='out')(
            hidden
        )
        return (self.data_scale * out).astype(x.dtype).reshape(x.shape)

    @nn.nowrap
    def _hidden(
        self, s: jax.Array, t: jax.Array, x: jax.Array, label: jax.Array | None
    ) -> jax.Array:
        """The last hidden layer, [B, width]."""
        flat = x.reshape(x.shape[0], -1)
        hidden = self._features(s[:, None], t[:, None], flat).astype(self.dtype)
        classes = class_features(label, self.num_classes, len(x), self.dtype)
        for layer in range(self.depth):
            hidden = nn.Dense(self.width, dtype=self.dtype, name=f'hidden{layer}')(hidden)
            if layer == 0 and classes is not None:
                embed = nn.Dense(self.width, use_bias=False, dtype=self.dtype, name='label')
                hidden = hidden + embed(classes)
            hidden = nn.gelu(hidden)
        return hidden

    @nn.nowrap
    def _features(self, s: jax.Array, t: jax.Array, x: jax.Array) -> jax.Array:
        if not self.frequencies:
            return jnp.concatenate([s, t, x / self.data_scale], axis=1)
        angles = jnp.pi * jnp.concatenate([k * x for k in self.frequencies] + [s, t - s], axis=1)
        return jnp.concatenate(
            [s, t - s, x / self.data_scale, jnp.sin(angles), jnp.cos(angles)], axis=1
        )
