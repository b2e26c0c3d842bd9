"""Flux and Qwen-Image as flows that say a mixture of momenta for a whole segment: ArcFlow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from kd import config as config_lib
from kd.errors import UserError
from kd.losses.momentum import Momentum, mean_velocity
from kd.models.conditioning import velocity_inputs
from kd.models.latent_parts import Modulation, layer_norm, modulated, unpatched
from kd.models.mmdit import MMDiT
from kd.models.mmdit_parts import EPSILON, PATCH
from kd.ranges import Count

__all__ = ['MomentumMMDiT', 'copied_head', 'momentum_mmdit']

_PIXELS = PATCH[0] * PATCH[1]


class Momenta(nn.Module):
    """What is said of a segment, by its tokens [B, N, D] and the condition [B, D].

    Velocities [B, K, H, W, C]; weights and rates of each pixel, [B, K, H, W, 1] and one less. Heads
    compute in float32.
    """

    modes: int
    dtype: Dtype

    @nn.compact
    def __call__(self, y: jax.Array, condition: jax.Array, x: jax.Array) -> Momentum:
        scale, shift = Modulation(2, y.shape[-1], self.dtype, name='norm_out')(condition)
        y = modulated(layer_norm(y, EPSILON, self.dtype), shift, scale).astype(jnp.float32)
        zeros, channels = nn.initializers.zeros, x.shape[-1]

        def spread(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            # One number for all pixels of a patch.
            drawn = 0.05 * jax.random.normal(key, (self.modes, channels, 1), dtype)
            return jnp.broadcast_to(drawn, (self.modes, channels, _PIXELS)).reshape(shape)

        def growing(key: jax.Array, shape: tuple[int, ...], dtype: Any = jnp.float32) -> jax.Array:
            first = np.linspace(np.log(0.2), np.log(4.0), self.modes - 1)
            return jnp.repeat(jnp.asarray(first, dtype), _PIXELS).reshape(shape)

        def head(name: str, count: int, each: int, bias_init: Any) -> jax.Array:
            size = count * each * _PIXELS
            said = nn.Dense(size, kernel_init=zeros, bias_init=bias_init, name=name)(y)
            said = said.reshape(*y.shape[:2], count, each, _PIXELS).transpose(0, 1, 4, 2, 3)
            sides = [side // step for side, step in zip(x.shape[1:3], PATCH, strict=True)]
            grid = unpatched(said.reshape(*y.shape[:2], -1), sides, PATCH)
            return jnp.moveaxis(grid.reshape(*grid.shape[:3], count, each), 3, 1)

        # The network says noise less data, and a flow here runs to the data.
        velocity = -head('proj_out', self.modes, channels, spread)
        logits = head('weight', self.modes, 1, zeros)
        rate = logits[:, :0]
        if self.modes > 1:
            rate = head('rate', self.modes - 1, 1, growing)
        return Momentum(velocity, logits, rate)


class MomentumMMDiT(nn.Module):
    """v(s, t, x), the mean velocity between s and t of a mixture of momenta at (s, x).

    Blocks are those of the network F(1000 (1 - s), x, ...), in its parameters; beside its last
    layers, which are not used, `momentum` has copies of its modulation and, for each mode, of its
    head, see `copied_head`, and heads for weights and rates (arXiv 2602.09014, as released).

    Attributes:
      inner: the network, without a table of places, as Flux and Qwen-Image are.
      modes: K.
    """

    inner: MMDiT
    modes: Count = 16

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        return self.inner.conditions

    def example_inputs(self, spec: Mapping[str, Any]) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of (s [1], t [1], x [1, ...])."""
        return velocity_inputs(spec)

    def setup(self) -> None:
        nn.share_scope(self, self.inner)
        self.momentum = Momenta(self.modes, self.inner.dtype)

    def __call__(
        self,
        s: jax.Array,
        t: jax.Array,
        x: jax.Array,
        *,
        train: bool = False,
        momenta: bool = False,
        **told: Any,
    ) -> Any:
        """Like x, from times [B], latents [B, H, W, C] and what the network is told.

        With `momenta` what is said of the segment that begins at s.
        """
        del train
        of: Any = self.inner
        carry, context = of.embedded(1000 * (1 - s), x, **told)
        carry = of.through(carry, context)
        if self.is_initializing():
            of.said(carry, context)
        m = self.momentum(of.tokens(carry, x), context[0], x)
        return m if momenta else mean_velocity(m, s, s, t).astype(x.dtype)


def momentum_mmdit(*, network: Mapping[str, Any], modes: Count = 16) -> MomentumMMDiT:
    """The network of a block of `kd.models.mmdit` as a flow of momenta.

    Raises:
      UserError: another network, or one with a table of places.
    """
    inner = config_lib.build(network, where='network.network')
    if not isinstance(inner, MMDiT) or inner.table:
        raise UserError(
            'network.network: momenta are of an MMDiT without a table of places, such as flux_dev '
            'and qwen_image.'
        )
    return MomentumMMDiT(inner, modes)


def copied_head(reference: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What `momentum` begins with: the network's modulation, and its head once for each mode.

    The biases of the modes differ by the noise that is there. `reference` has the network's
    parameters, `own` those of `momentum`.
    """

    def modes(theirs: jax.Array, ours: jax.Array) -> jax.Array:
        return ours + jnp.tile(theirs, ours.shape[-1] // theirs.shape[-1])

    head = jax.tree.map(modes, dict(reference['proj_out']), dict(own['proj_out']))
    return {**own, 'norm_out': reference['norm_out'], 'proj_out': head}
