"""What a method is."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd.metrics import Mean, Metrics
from kd.state import PyTree, State

Batch = dict[str, Any]
# What a step does to a state once it is known that it may: cheap beside the gradient, as it is
# computed twice where it has to be checked first.
Change = Callable[[State], State]
# `init(key)` or `init(key, frozen)` -> variables of one network, or of each part by name.
Init = Callable[..., PyTree]


class Method(NamedTuple):
    """A training step.

    Attributes:
      init: `init(key, frozen) -> State`.
      step: `step(state, batch) -> (State, Metrics)`.
      propose: where a step makes a single update, `propose(state, batch) -> (Change, Metrics)`,
        all of the step but the update; see `kd.method.guard.stepwise`.
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
      mutables: updated variable collections (`batch_stats`), or {} to keep the old ones; by part
        where the loss has several.
      outputs: arrays [B, ...] by name for the players that move later in the step.
    """

    loss: Mean
    metrics: Metrics = {}  # noqa: RUF012
    mutables: PyTree = {}  # noqa: RUF012
    outputs: dict[str, jax.Array] = {}  # noqa: RUF012


Loss = Callable[[PyTree, State, Batch, jax.Array], Objective]


def call_init(init: Init, key: jax.Array, frozen: Mapping[str, PyTree]) -> PyTree:
    """What `init(key)` or `init(key, frozen)` returns."""
    return init(key, frozen) if len(inspect.signature(init).parameters) > 1 else init(key)


def initial(init: Init, key: jax.Array, frozen: Mapping[str, PyTree] | None) -> State:
    """The state that begins with what `init` returns; its optimiser is yet to be added."""
    init_key, run_key = jax.random.split(key)
    frozen = dict(frozen or {})
    # Copies, as what comes from a frozen tree must not be donated.
    variables = jax.tree.map(jnp.copy, call_init(init, init_key, frozen))
    return State.create(run_key, variables, frozen=frozen)
