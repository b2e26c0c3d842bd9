"""A student that ends in its teacher's classifier (SimKD)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax

from kd import config as config_lib
from kd.models import layers, projectors
from kd.ranges import Count

POOLS = ('mean', 'flatten')


class ReusedHead(nn.Module):
    """head(pool(P(f(x)))): maps of a network, a projector, and the head of another network.

    The projector is `kd.models.projectors.Bottleneck`. The network's own head is computed by nobody
    and stays as it began.

    Attributes:
      inner: the network of the maps.
      width: channels of the teacher's maps.
      num_classes: number of logits.
      feature: name of the maps in `inner`, [B, *positions, C].
      pool: what the teacher's head sees of its maps: their 'mean' over positions, or all of them.
      factor, conv: of the projector.

    Features: those of `inner` under `inner/`, `projected`, `features`, the head's input.

    Source: Chen et al. 2022 (SimKD), arXiv 2203.14001.
    """

    inner: nn.Module
    width: Count
    num_classes: Count
    feature: str = 'map'
    pool: Literal['mean', 'flatten'] = 'mean'
    factor: Count = 2
    conv: str = 'direct'

    def __post_init__(self):
        layers.check_choice('pool', self.pool, POOLS)
        super().__post_init__()

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Logits [B, num_classes], float32.

        Raises:
          ValueError: `inner` has no such feature.
        """
        found, names, own = [], [], len(self.path) + 1

        def tap(next_call, args, kwargs, context):
            output = next_call(*args, **kwargs)
            if context.method_name == '__call__':
                names.append('/'.join(context.module.path[own:]))
                if names[-1] == self.feature:
                    found.append(output)
            return output

        with nn.intercept_methods(tap):
            self.inner(x, train=train)
        if not found:
            raise ValueError(
                f"{type(self.inner).__name__} has no feature '{self.feature}'; there are: "
                f'{", ".join(filter(None, names))}.'
            )
        projector = projectors.Bottleneck(self.width, self.factor, conv=self.conv, name='projected')
        maps = projector(found[0], train=train)
        if self.pool == 'mean':
            pooled = maps.mean(axis=tuple(range(1, maps.ndim - 1)))
        else:
            pooled = maps.reshape(maps.shape[0], -1)
        return layers.classifier(pooled, self.num_classes)


def reused_head(
    *,
    network: Mapping[str, Any],
    width: Count,
    num_classes: Count,
    feature: str = 'map',
    pool: Literal['mean', 'flatten'] = 'mean',
    factor: Count = 2,
) -> ReusedHead:
    """A `ReusedHead` over the network of a block; arguments as of its attributes."""
    block = {'num_classes': num_classes, **network}
    inner = config_lib.build(block, where='network.network')
    return ReusedHead(inner, width, num_classes, feature, pool, factor)
