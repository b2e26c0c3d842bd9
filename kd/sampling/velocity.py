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

# 'null_text' is what an empty text has in the place of 'text', a field of the data.
NULL = 'null_'


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
      guidance: scale of classifier-free guidance, see `kd.sampling.flow.guided`; 1 for none. What
        is compared with is the null class, and of other fields those that `told` has beside them
        as 'null_NAME'.
      train: whether dropout acts; it then needs the key.
      key: of the dropout.
    """
    classes, told = num_classes(network), told or {}
    condition = {name: x for name, x in told.items() if not name.startswith(NULL)}
    null = {name[len(NULL) :]: x for name, x in told.items() if name.startswith(NULL)}
    if classes is not None and label is not None:
        condition, null = {**condition, 'label': label}, {**null, 'label': classes}

    def conditional(s, t, x, condition):
        return network.apply(variables, s, t, x, train=train, key=key, **condition).logits

    if guidance == 1.0 or not condition:
        return lambda s, t, x: conditional(s, t, x, condition)
    if not null:
        raise UserError(
            'guidance compares with a network that is told nothing: give it num_classes, or data '
            'with the embedding of an empty text beside.'
        )
    return guided(conditional, condition, guidance, null=null)


def fields_of(network: Network, batch: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a batch, besides the label, that a velocity network is conditioned on, and
    those of a null condition.

    Raises:
      UserError: the data lack one.
    """
    named = [name for name in getattr(network.module, 'conditions', ()) if name != 'label']
    if missing := [name for name in named if name not in batch]:
        raise UserError(
            f'the network is conditioned on {missing[0]!r}, which the data do not have; they have '
            f'{sorted(batch)}.'
        )
    nulls = (f'{NULL}{name}' for name in named)
    return {name: batch[name] for name in (*named, *nulls) if name in batch}


def num_classes(network: Network) -> int | None:
    """Classes that a velocity network is conditioned on; None for an unconditional one."""
    return getattr(network.module, 'num_classes', None)


def noise_scale(network: Network, given: float | None) -> float:
    """Standard deviation of the noise: `given`, or that of the data as the network knows it."""
    scale = getattr(network.module, 'data_scale', 1.0) if given is None else given
    if not scale > 0.0:
        raise UserError(f'noise_scale must be above 0, got {scale}.')
    return scale
