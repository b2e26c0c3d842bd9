"""Velocity functions of networks, for losses and samplers that know no networks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

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
    told: Mapping[str, Any] | None = None,
    guidance: float = 1.0,
    train: bool = False,
    key: jax.Array | None = None,
) -> VelocityFunction:
    """v(s, t, x) of a network with its variables and conditions bound.

    Args:
      network: takes (s [B], t [B], x [B, ...]) and, if it has classes, the keyword `label`.
      variables: of the network.
      label: int [B], ignored by a network without classes; None is the null class.
      told: other fields of a batch that the network is conditioned on, by name, see `fields_of`.
      guidance: scale of classifier-free guidance, see `kd.sampling.flow.guided`; 1 for none.
      train: whether dropout acts; it then needs the key.
      key: of the dropout.
    """
    classes = num_classes(network)

    def conditional(s, t, x, label):
        known = dict(told or {}) if classes is None else {**(told or {}), 'label': label}
        return network.apply(variables, s, t, x, train=train, key=key, **known).logits

    if told and guidance != 1.0:
        raise UserError('Guidance is of networks that are told a class alone.')
    if classes is None or label is None or guidance == 1.0:
        bound = None if classes is None else label
        return lambda s, t, x: conditional(s, t, x, bound)
    return guided(conditional, label, guidance, null_label=classes)


def fields_of(network: Network, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a batch, besides the label, that a velocity network is conditioned on.

    Raises:
      UserError: the data lack one.
    """
    named = [name for name in getattr(network.module, 'conditions', ()) if name != 'label']
    if missing := [name for name in named if name not in batch]:
        raise UserError(
            f'the network is conditioned on {missing[0]!r}, which the data do not have; they have '
            f'{sorted(batch)}.'
        )
    return {name: batch[name] for name in named}


def num_classes(network: Network) -> int | None:
    """Classes that a velocity network is conditioned on; None for an unconditional one."""
    return getattr(network.module, 'num_classes', None)


def noise_scale(network: Network, given: float | None) -> float:
    """Standard deviation of the noise: `given`, or that of the data as the network knows it."""
    scale = getattr(network.module, 'data_scale', 1.0) if given is None else given
    if not scale > 0.0:
        raise UserError(f'noise_scale must be above 0, got {scale}.')
    return scale
