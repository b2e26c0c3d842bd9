"""Velocity functions of networks, for losses and samplers that know no networks."""

from __future__ import annotations

import jax

from kd.errors import UserError
from kd.losses.flow_map import VelocityFunction
from kd.network import Network
from kd.sampling.flow import guided
from kd.state import PyTree


def velocity_function(
    network: Network,
    variables: PyTree,
    label: jax.Array | None = None,
    *,
    guidance: float = 1.0,
    train: bool = False,
    key: jax.Array | None = None,
) -> VelocityFunction:
    """v(s, t, x) of a network with its variables and labels bound.

    Args:
      network: takes (s [B], t [B], x [B, ...]) and, if it has classes, the keyword `label`.
      variables: of the network.
      label: int [B], ignored by a network without classes; None is the null class.
      guidance: scale of classifier-free guidance, see `kd.sampling.flow.guided`; 1 for none.
      train: whether dropout acts; it then needs the key.
      key: of the dropout.
    """
    classes = num_classes(network)

    def conditional(s, t, x, label):
        known = {} if classes is None else {'label': label}
        return network.apply(variables, s, t, x, train=train, key=key, **known).logits

    if classes is None or label is None or guidance == 1.0:
        bound = None if classes is None else label
        return lambda s, t, x: conditional(s, t, x, bound)
    return guided(conditional, label, guidance, null_label=classes)


def num_classes(network: Network) -> int | None:
    """Classes that a velocity network is conditioned on; None for an unconditional one."""
    return getattr(network.module, 'num_classes', None)


def noise_scale(network: Network, given: float | None) -> float:
    """Standard deviation of the noise: `given`, or that of the data as the network knows it."""
    scale = getattr(network.module, 'data_scale', 1.0) if given is None else given
    if not scale > 0.0:
        raise UserError(f'noise_scale must be above 0, got {scale}.')
    return scale
