"""A network of one time as the velocity of a flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from kd import config as config_lib
from kd.models.conditioning import velocity_inputs
from kd.ranges import Count, Positive

__all__ = ['OneTime', 'one_time']


class OneTime(nn.Module):
    """v(s, t, x) = F(scale s, x), in the parameters of `inner`; see `one_time`.

    Attributes:
      inner: F.
      scale: of what F is told.
      backward: F runs the other way: v(s, t, x) = -F(scale (1 - s), x).
      data_scale: deviation of the noise.
    """

    inner: nn.Module
    scale: float = 1.0
    data_scale: float = 1.0
    backward: bool = False

    @property
    def valid(self) -> str:
        """The field of a batch that says which rows of an example there are; '' for all."""
        return getattr(self.inner, 'valid', '')

    @property
    def adapter(self) -> Any:
        """What is trained beside F; None where F is trained itself."""
        return getattr(self.inner, 'adapter', None)

    @property
    def num_classes(self) -> int | None:
        """Of the label; None without one."""
        return getattr(self.inner, 'num_classes', None)

    @property
    def conditions(self) -> tuple[str, ...]:
        """Fields of a batch that the network is told."""
        own = ('label',) if self.num_classes is not None else ()
        return tuple(getattr(self.inner, 'conditions', own))

    def setup(self) -> None:
        nn.share_scope(self, self.inner)

    def example_inputs(self, spec) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Shapes of a batch of one, from those of one example by name."""
        return velocity_inputs(spec)

    def __call__(
        self, s: jax.Array, t: jax.Array, x: jax.Array, *, train: bool = False, **condition: Any
    ) -> jax.Array:
        """Velocity [B, ...] like x from times [B] and points [B, ...]; the end t is not told."""
        del t
        told = self.scale * (1 - s if self.backward else s)
        said = self.inner(told, x, train=train, **condition).astype(x.dtype)
        return -said if self.backward else said


def one_time(
    *,
    network: Mapping[str, Any],
    scale: Positive = 1.0,
    data_scale: Positive = 1.0,
    backward: bool = False,
    num_classes: Count | None = None,
) -> OneTime:
    """A flow of one of the image networks of `kd.models.edm`, whose variables are its own.

    Args:
      network: block of F, `F(c [B], x, **condition)`.
      scale: what F is told is so many times the house's time, 0 at noise and 1 at data.
      data_scale: standard deviation of the noise.
      backward: F is of times that are 1 at noise and 0 at data, and says noise less data, as most
        released flows do.
      num_classes: of F; None for a network without classes.
    """
    given = {} if num_classes is None else {'num_classes': num_classes}
    inner = config_lib.build({**network, **given}, where='network.network')
    return OneTime(inner, scale, data_scale, backward)
