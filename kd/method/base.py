"""What a method is."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax

from kd.metrics import Mean, Metrics
from kd.state import PyTree, State

Batch = dict[str, jax.Array]
# What a step does to a state once it is known that it may: cheap beside the gradient, as it is
# computed twice where it has to be checked first.
Change = Callable[[State], State]


class Method(NamedTuple):
    """A training step.

    Attributes:
      init: `init(key, frozen) -> State`.
      step: `step(state, batch) -> (State, Metrics)`.
      propose: where a step makes a single update, `propose(state, batch) -> (Change, Metrics)`,
        all of the step but the update; see `stepwise`.
    """

    init: Callable[..., State]
    step: Callable[[State, Batch], tuple[State, Metrics]]
    propose: Callable[[State, Batch], tuple[Change, Metrics]] | None = None


class Objective(NamedTuple):
    """What a loss returns.

    Attributes:
      loss: (sum, count) of the per-example losses; the gradient is that of sum / count over the
        whole batch, whatever the micro-batches.
      metrics: further (sum, count) pairs to log.
      mutables: updated variable collections (`batch_stats`), or {} to keep the old ones.
    """

    loss: Mean
    metrics: Metrics = {}  # noqa: RUF012
    mutables: PyTree = {}  # noqa: RUF012


Loss = Callable[[PyTree, State, Batch, jax.Array], Objective]
