"""Many independent runs of one method at once, for experiments that compare means over seeds.

The runs are vmapped and share the data, which lies on the device; each has its own key, order of
the data and, if asked for, hyperparameters. For networks so small that one run leaves the device
idle, ten runs cost little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd.config import Recipe, StageConfig
from kd.context import Context
from kd.method import Method
from kd.network import Network
from kd.state import State

# Steps per call of the compiled loop: long enough to hide the call, short enough to show progress.
_CHUNK = 100


def train(
    method: Method,
    data: Mapping[str, np.ndarray],
    seeds: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    frozen: Any = None,
    hyperparameters: Mapping[str, np.ndarray] | None = None,
    init: Callable[[jax.Array], State] | None = None,
) -> State:
    """Trains `len(seeds)` runs side by side.

    Args:
      method: its `init` and `step`; both are vmapped.
      data: arrays [N, ...] by name; a batch is the same rows of each.
      seeds: int [R]; run r is the same whatever the others are.
      steps: of every run.
      batch_size: of every run.
      frozen: read by all runs.
      hyperparameters: {name: [R]} to set in the state of `optax.inject_hyperparams`, which must be
        the method's outermost transformation.
      init: replaces `method.init` as `init(key) -> State`, to go on from earlier runs for example.

    Returns:
      The final state, each leaf with a leading axis [R], without frozen trees.
    """
    seeds = np.asarray(seeds)
    arrays = {name: jnp.asarray(value) for name, value in data.items()}
    size = len(next(iter(arrays.values())))
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    start = init or (lambda key: method.init(key, frozen).replace(frozen={}))
    state = jax.jit(jax.vmap(start))(keys)
    if hyperparameters:
        values = {name: jnp.asarray(v, jnp.float32) for name, v in hyperparameters.items()}
        unknown = set(values) - set(state.opt_state.hyperparams)
        if unknown:
            raise ValueError(f'The optimiser has no hyperparameter {sorted(unknown)}.')
        injected = {**state.opt_state.hyperparams, **values}
        state = state.replace(opt_state=state.opt_state._replace(hyperparams=injected))

    def one_step(state: State, rows: jax.Array) -> State:
        batch = {name: value[rows] for name, value in arrays.items()}
        return method.step(state.replace(frozen=frozen or {}), batch)[0].replace(frozen={})

    @jax.jit
    def chunk(state: State, rows: jax.Array) -> State:
        return jax.lax.scan(lambda s, r: (jax.vmap(one_step)(s, r), None), state, rows)[0]

    for first in range(0, steps, _CHUNK):
        count = min(_CHUNK, steps - first)
        rows = np.stack([_rows(int(seed), size, batch_size, first, count) for seed in seeds], 1)
        state = chunk(state, jnp.asarray(rows))
    return jax.block_until_ready(state)


def train_one(
    method: Method,
    data: Mapping[str, np.ndarray],
    seed: int,
    *,
    steps: int,
    batch_size: int,
    frozen: Any = None,
) -> State:
    """Trains one run with the step called from Python; arguments as of `train`.

    For networks with convolutions: inside a compiled loop these are many times slower on CPU.
    """
    arrays = {name: jnp.asarray(value) for name, value in data.items()}
    state = jax.jit(method.init)(jax.random.key(seed), frozen or {})
    step = jax.jit(lambda s, rows: method.step(s, {k: v[rows] for k, v in arrays.items()})[0])
    size = len(next(iter(arrays.values())))
    for rows in _rows(seed, size, batch_size, 0, steps):
        state = step(state, rows)
    return jax.block_until_ready(state.replace(frozen={}))


def context(
    *,
    network: Network | None = None,
    tx: optax.GradientTransformation | None = None,
    teacher: Network | None = None,
    num_classes: int | None = None,
    steps: int = 0,
    batch_size: int = 0,
) -> Context:
    """A context for a method's builder outside any recipe."""

    def nothing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError('A context made by hand has no data and no further optimisers.')

    return Context(
        stage='stage',
        optimizer=nothing,
        spec={},
        num_classes=num_classes,
        steps=steps,
        batch_size=batch_size,
        source=nothing,
        splits=(),
        recipe_source=nothing,
        locate=None,
        references={},
        config=StageConfig(method={}, steps=steps, batch_size=batch_size),
        recipe=Recipe(stages={}, data={}),
        optional_network=network,
        optional_teacher=teacher,
        optional_tx=tx,
    )


def _rows(seed: int, size: int, batch_size: int, first: int, count: int) -> np.ndarray:
    """Rows of the batches first .. first + count of a run, int32 [count, batch_size]."""
    begin, end = first * batch_size, (first + count) * batch_size
    epochs = range(begin // size, -(-end // size))
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(size) for e in epochs])
    offset = begin - epochs[0] * size
    return order[offset : offset + end - begin].reshape(count, batch_size).astype(np.int32)
