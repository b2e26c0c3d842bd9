"""Networks of restoration as denoisers of residuals (ResShift, arXiv:2307.12348)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from kd import config as config_lib
from kd.losses.schedule import Schedule
from kd.models.latent_parts import timestep_features
from kd.models.layers import Features
from kd.ranges import Count

__all__ = ['ANCHOR', 'LOW', 'Shifted', 'ShiftedMLP', 'shifted']

# Fields of a batch: the picture to be restored, and y where it is not this.
LOW, ANCHOR = 'low', 'anchor'


class Shifted(nn.Module):
    """E[r | r_t] = F(t, (r_t + y) / sqrt(sigma_t^2 + 1), low) - y, in the parameters of `inner`.

    Attributes:
      inner: F, `F(t [B], x [B, ...], low [B, ...])`, which says what the picture is.
      schedule: of the noise of residuals, see `kd.losses.schedule.residual_shift`.
      anchored: y is the field `anchor`, such as latents of an enlarged picture; else it is `low`.
    """

    inner: nn.Module
    schedule: Schedule
    anchored: bool = False

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        return (LOW, ANCHOR) if self.anchored else (LOW,)

    def setup(self) -> None:
        nn.share_scope(self, self.inner)

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (t [1], r [1, ...]) and of what it is told, a batch of one."""
        one = [
            jax.ShapeDtypeStruct((1, *spec[name].shape), spec[name].dtype)
            for name in ('input', *self.conditions)
        ]
        return jax.ShapeDtypeStruct((1,), one[0].dtype), *one

    def __call__(
        self,
        t: jax.Array,
        x: jax.Array,
        low: jax.Array,
        anchor: jax.Array | None = None,
        *,
        train: bool = False,
    ) -> jax.Array:
        """E[r | r_t] of times [B] and noised residuals [B, ...], float32 at least."""
        y = low if anchor is None else anchor
        _, sigma = self.schedule.coefficients(t, x)
        seen = ((x + y) / jnp.sqrt(sigma**2 + 1)).astype(x.dtype)
        said = self.inner(self.schedule.condition(t).astype(x.dtype), seen, low, train=train)
        return said.astype(jnp.promote_types(x.dtype, jnp.float32)) - y


class ShiftedMLP(nn.Module):
    """F(t, x, low) like x of a perceptron, for patches of pictures; `low` itself at the start.

    Features: `feature0`, `feature1`, ..., what its hidden layers say.

    Attributes:
      width: of a hidden layer.
      depth: hidden layers.
      waves: features of the time.
      dtype: compute type; parameters are float32.
    """

    width: Count = 256
    depth: Count = 3
    waves: Count = 32
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(
        self, t: jax.Array, x: jax.Array, low: jax.Array, *, train: bool = False
    ) -> jax.Array:
        """What the picture is, of times [B], noised pictures [B, ...] and low ones like them."""
        del train
        seen = [y.reshape(len(x), -1) for y in (x, low)]
        hidden = jnp.concatenate([*seen, timestep_features(t, self.waves)], axis=1)
        hidden = hidden.astype(self.dtype)
        for layer in range(self.depth):
            hidden = nn.Dense(self.width, dtype=self.dtype, name=f'hidden{layer}')(hidden)
            hidden = Features(name=f'feature{layer}')(nn.silu(hidden))
        out = nn.Dense(x[0].size, dtype=self.dtype, kernel_init=nn.initializers.zeros, name='out')
        return low + out(hidden).astype(x.dtype).reshape(x.shape)


def shifted(
    *, network: Mapping[str, Any], schedule: Mapping[str, Any], anchored: bool = False
) -> Shifted:
    """A network of restoration as a denoiser of residuals.

    Args:
      network: block of F, such as `kd.models.swin_unet.SwinUNet`.
      schedule: block of `kd.losses.schedule.residual_shift`.
      anchored: see `Shifted`.
    """
    inner = config_lib.build(network, where='network.network')
    return Shifted(inner, config_lib.build(schedule, where='network.schedule'), anchored)
