"""Statistics of what enters the batch normalisation of a network."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax

from kd.losses.batch_statistics import LayerStatistics, statistics_of


def with_batch_statistics(
    apply: Callable[..., Any], variables: Any, *inputs: jax.Array
) -> tuple[Any, list[LayerStatistics]]:
    """Runs a network and records the batch statistics at the input of every `nn.BatchNorm`.

    Args:
      apply: `apply(variables, *inputs)`, evaluating a linen network with its running averages.
      variables: with the collection `batch_stats`.
      *inputs: a batch.

    Returns:
      What `apply` returns, and the statistics in the order of computation.

    Raises:
      ValueError: if the network has no batch normalisation.
    """
    layers: list[LayerStatistics] = []

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == '__call__':
            seen = variables['batch_stats']
            for name in context.module.path:
                seen = seen[name]
            layers.append(LayerStatistics(*statistics_of(args[0]), seen['mean'], seen['var']))
        return next_function(*args, **kwargs)

    with nn.intercept_methods(record):
        outputs = apply(variables, *inputs)
    if not layers:
        raise ValueError('The network has no batch normalisation, so there is nothing to record.')
    return outputs, layers
