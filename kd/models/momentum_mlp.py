"""A perceptron that says a velocity for a whole segment of time: the student of ArcFlow."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kd.losses.momentum import Momentum, mean_velocity
from kd.models.conditioning import with_fields
from kd.models.velocity_mlp import VelocityMLP
from kd.ranges import Count

__all__ = ['MomentumMLP']


class MomentumMLP(VelocityMLP):
    """v(s, t, x), the mean velocity between s and t of a mixture of momenta at (s, x).

    A flow map of one call and no solver: of a segment that begins at s the whole path. The layers
    are those of `VelocityMLP` at (s, s, x); heads for weights and rates stand beside `out`, which
    has a velocity for each mode and begins with a little noise in its biases. Rates begin evenly
    between log .2 and log 4, the same everywhere, weights equal (arXiv 2602.09014, as released).

    Attributes:
      modes: K.
    """

    modes: Count = 16

    @nn.compact
    def __call__(
        self,
        s: jax.Array,
        t: jax.Array,
        x: jax.Array,
        *,
        label: jax.Array | None = None,
        train: bool = False,
        momenta: bool = False,
        **told: Any,
    ) -> Any:
        """As of `VelocityMLP`; with `momenta` what is said of the segment, [B, K, ...]."""
        hidden = self._hidden(s, s, with_fields(self, x, self.beside, told), label)
        each = (len(x), -1) + (1,) * (x.ndim - 1)
        zeros, spread = nn.initializers.zeros, nn.initializers.normal(0.05)

        def head(name, size, bias_init):
            dense = nn.Dense(
                size, dtype=self.dtype, kernel_init=zeros, bias_init=bias_init, name=name
            )
            return dense(hidden).astype(x.dtype)

        out = self.data_scale * head('out', self.modes * x[0].size, spread)
        logits = head('weight', self.modes, zeros).reshape(each)
        rate = jnp.zeros((len(x), 0) + each[2:], x.dtype)
        if self.modes > 1:
            first = np.linspace(np.log(0.2), np.log(4.0), self.modes - 1)
            rate = head('rate', self.modes - 1, lambda *_: jnp.asarray(first, jnp.float32))
            rate = rate.reshape(each)
        m = Momentum(out.reshape(len(x), self.modes, *x.shape[1:]), logits, rate)
        return m if momenta else mean_velocity(m, s, s, t)
