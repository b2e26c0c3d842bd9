"""Combinators that wrap any method."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from kd.method.base import Batch, Method
from kd.method.guard import NONFINITE, moved, stepwise
from kd.metrics import Metrics
from kd.state import PyTree, State


def with_ema(method: Method, decays: Mapping[str, float]) -> Method:
    """Keeps exponential moving averages of the parameters in `state.ema`.

        ema <- decay * ema + (1 - decay) * params      after every step

    Args:
      method: the method to wrap.
      decays: {name: decay}; several averages may be kept at once.
    """
    for name, decay in decays.items():
        if not 0.0 <= decay <= 1.0:
            raise ValueError(f'ema.{name} must lie in [0, 1], got {decay}.')

    def init(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        state = method.init(key, frozen)
        # Copies, so that no buffer is donated twice.
        return state.replace(ema={name: jax.tree.map(jnp.copy, state.params) for name in decays})

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = method.step(state, batch)
        ema = {
            name: optax.incremental_update(state.params, state.ema[name], 1.0 - decay)
            for name, decay in decays.items()
        }
        return state.replace(ema=ema), metrics

    return Method(init, step)


def with_collect(
    method: Method, collect: Callable[[State, Batch, jax.Array], Batch], name: str = 'collect'
) -> Method:
    """Enriches every batch with the current state before the step.

    `collect(state, batch, key) -> batch` is pure: rollouts of the current policy, outputs of a
    teacher, samples of a generator. It lies outside the differentiated loss, so what it returns
    is a constant to the gradient. Wrapped twice, each needs a `name` of its own, which decides its
    randomness.
    """
    fold = zlib.crc32(name.encode())

    def collected(state: State, batch: Batch) -> Batch:
        return collect(state, batch, jax.random.fold_in(state.step_key(), fold))

    if method.propose is not None:
        propose = method.propose
        return stepwise(method.init, lambda state, batch: propose(state, collected(state, batch)))
    return Method(method.init, lambda state, batch: method.step(state, collected(state, batch)))


def with_projection(method: Method, project: Callable[[PyTree], PyTree]) -> Method:
    """Applies `params <- project(params)` after every step (forced weight normalisation, say).

    A step of a single update has the projection as a part of it, and the guard checks both. One of
    several updates is projected at its end; to have each of them projected, wrap what is repeated.
    """

    def projected(state: State) -> State:
        return state.replace(params=project(state.params))

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = method.step(state, batch)
        if NONFINITE not in metrics:
            return projected(state), metrics
        params = jax.lax.cond(moved(metrics), project, lambda params: params, state.params)
        return state.replace(params=params), metrics

    if method.propose is None:
        return Method(method.init, step)
    inner = method.propose

    def propose(state: State, batch: Batch):
        change, metrics = inner(state, batch)
        return (lambda state: projected(change(state))), metrics

    return stepwise(method.init, propose)
