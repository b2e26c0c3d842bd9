"""Many independent runs of one method at once, for experiments that compare means over seeds.

The runs are vmapped and share the data, which lies on the device; each has its own key, order of
the data and, if asked for, hyperparameters, data and teachers. For networks so small that one run
leaves the device idle, ten runs cost little more than one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd.config import Recipe, StageConfig
from kd.context import Context
from kd.data import pipeline, sources
from kd.method import Method
from kd.network import Network
from kd.state import PyTree, State
from kd.training import optimizer as optim

# Steps per call of the compiled loop: long enough to hide the call, short enough to show progress.
_CHUNK = 100


def train(
    method: Method,
    data: Mapping[str, np.ndarray],
    seeds: np.ndarray,
    *,
    steps: int,
    batch_size: int,
    poisson: int = 0,
    per_run: Mapping[str, np.ndarray] | None = None,
    frozen: Mapping[str, PyTree] | None = None,
    frozen_per_run: Mapping[str, PyTree] | None = None,
    hyperparameters: Mapping[str, np.ndarray] | None = None,
    init: Callable[[jax.Array], State] | None = None,
    watch: Callable[[State], None] | None = None,
    watched: int = _CHUNK,
) -> State:
    """Trains `len(seeds)` runs side by side.

    The number of the step is one for all runs: vmapped over steps of their own, a condition on the
    step would compute both of its branches at every step.

    Args:
      method: its `init` and `step`; both are vmapped.
      data: arrays [N, ...] by name; a batch is the same rows of each.
      seeds: int [R]; run r is the same whatever the others are.
      steps: of every run.
      batch_size: of every run.
      poisson: as of a stage: the expected number of examples in a batch whose rows they fill by
        coins; `mask` says which rows they fill.
      per_run: further arrays [R, N, ...], of which a run sees its own.
      frozen: read by all runs.
      frozen_per_run: trees whose leaves have a leading axis [R], of which a run reads its own.
      hyperparameters: {name: [R]} to set in the state of `optax.inject_hyperparams`, which must be
        the method's outermost transformation.
      init: replaces `method.init` as `init(key) -> State`, to go on from earlier runs for example;
        its step does not depend on the key.
      watch: is shown the state after every `watched` steps, without frozen trees.
      watched: as above.

    Returns:
      The final state, each leaf with a leading axis [R], without frozen trees.
    """
    seeds = np.asarray(seeds)
    arrays = {name: jnp.asarray(value) for name, value in data.items()}
    own_arrays = {name: jnp.asarray(value) for name, value in (per_run or {}).items()}
    size = len(next(iter(arrays.values()))) if arrays else next(iter(own_arrays.values())).shape[1]
    shared, own_frozen = dict(frozen or {}), dict(frozen_per_run or {})

    def start(key: jax.Array, own: PyTree) -> State:
        state = init(key) if init else method.init(key, {**shared, **own})
        return state.replace(frozen={})

    state, axes = _begun(start, seeds, own_frozen)
    if hyperparameters:
        state = state.replace(opt_state=_injected(state.opt_state, hyperparameters))

    def one_step(state: State, taken: PyTree, own: PyTree, own_arrays: PyTree) -> State:
        rows, mask = taken
        batch = {name: value[rows] for name, value in {**arrays, **own_arrays}.items()}
        batch |= mask
        state = state.replace(frozen={**shared, **own})
        return method.step(state, batch)[0].replace(frozen={})

    together = jax.vmap(one_step, in_axes=(axes, 0, 0, 0), out_axes=axes)

    @jax.jit
    def chunk(state: State, taken: PyTree, own: PyTree, own_arrays: PyTree) -> State:
        return jax.lax.scan(lambda s, r: (together(s, r, own, own_arrays), None), state, taken)[0]

    for first in range(0, steps, watched):
        count = min(watched, steps - first)
        each = [_taken(int(seed), size, batch_size, poisson, first, count) for seed in seeds]
        taken = jax.tree.map(lambda *runs: np.stack(runs, 1), *each)
        state = chunk(state, taken, own_frozen, own_arrays)
        if watch is not None:
            watch(state)
    state = state.replace(step=jnp.broadcast_to(state.step, seeds.shape))
    return jax.block_until_ready(state)


def _begun(start: Callable[..., State], seeds: np.ndarray, own: PyTree) -> tuple[State, Any]:
    """States of all runs, and their axes: every leaf but the step has one for the runs."""
    keys = jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))
    abstract_own = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), own)
    abstract = jax.eval_shape(start, jax.random.key(0), abstract_own)
    axes: Any = jax.tree.map(lambda _: 0, abstract).replace(step=None)
    return jax.jit(jax.vmap(start, out_axes=axes))(keys, own), axes


def _injected(opt_state: Any, hyperparameters: Mapping[str, np.ndarray]) -> Any:
    values = {name: jnp.asarray(v, jnp.float32) for name, v in hyperparameters.items()}
    unknown = set(values) - set(opt_state.hyperparams)
    if unknown:
        raise ValueError(f'The optimiser has no hyperparameter {sorted(unknown)}.')
    return opt_state._replace(hyperparams={**opt_state.hyperparams, **values})


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
    options: dict[str, Any] = dict(steps=steps, batch_size=batch_size, frozen=frozen)
    return next(train_each(method, data, [seed], **options))


def train_each(
    method: Method,
    data: Mapping[str, np.ndarray],
    seeds: Sequence[int] | np.ndarray,
    *,
    steps: int,
    batch_size: int,
    frozen: Any = None,
) -> Iterator[State]:
    """`train_one` with one seed after the other, by one program; a state for each."""
    arrays = {name: jnp.asarray(value) for name, value in data.items()}
    init = jax.jit(method.init)
    step = jax.jit(lambda s, rows: method.step(s, {k: v[rows] for k, v in arrays.items()})[0])
    size = len(next(iter(arrays.values())))
    for seed in map(int, seeds):
        state = init(jax.random.key(seed), frozen or {})
        for rows in _rows(seed, size, batch_size, 0, steps):
            state = step(state, rows)
        yield jax.block_until_ready(state.replace(frozen={}))


def context(
    *,
    network: Network | None = None,
    tx: optax.GradientTransformation | None = None,
    teacher: Network | None = None,
    references: Mapping[str, Network] | None = None,
    num_classes: int | None = None,
    steps: int = 0,
    batch_size: int = 0,
    poisson: int = 0,
    spec: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    source: Callable[[str], sources.Source] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    ema: Mapping[str, float] | None = None,
) -> Context:
    """A context for a method's builder outside any recipe.

    Args:
      network, teacher, references: of the stage; variables of the latter two are given as `frozen`.
      tx: the stage's optimiser.
      num_classes, steps, batch_size, poisson, spec: of the data and of the runs.
      source: loads a split, for methods that ask for one.
      optimizer: arguments of `kd.training.optimizer.optimizer`, in place of `tx`.
      ema: averages that the stage says it keeps; whoever trains wraps the method.

    Further optimisers, `context.optimizer(lr=...)`, are made for `steps` steps.
    """

    def nothing(*_: Any, **__: Any) -> Any:
        raise NotImplementedError('A context made by hand has no data.')

    def further(**arguments: Any) -> optax.GradientTransformation:
        if steps < 1:
            raise ValueError('Optimisers are made for a number of steps: give the context `steps`.')
        return optim.optimizer(steps, **arguments)

    config = StageConfig(
        method={},
        steps=steps,
        batch_size=batch_size,
        poisson=poisson,
        optimizer=dict(optimizer or {}),
        ema=dict(ema or {}),
    )
    return Context(
        stage='stage',
        optimizer=further,
        spec=dict(spec or {}),
        num_classes=num_classes,
        steps=steps,
        batch_size=batch_size,
        source=source or nothing,
        splits=(),
        recipe_source=nothing,
        locate=None,
        references=dict(references or {}),
        config=config,
        recipe=Recipe(stages={}, data={}),
        optional_network=network,
        optional_teacher=teacher,
        optional_tx=further(**optimizer) if optimizer else tx,
    )


def _taken(seed: int, size: int, batch_size: int, poisson: int, first: int, count: int):
    """Rows of the batches first .. first + count of a run, and {'mask': ...} where coins decide."""
    if not poisson:
        return _rows(seed, size, batch_size, first, count), {}
    coins = pipeline.CoinIndices(size, batch_size, poisson, seed=seed, host_index=0, host_count=1)
    rows, mask = zip(*(coins[i] for i in range(first, first + count)), strict=True)
    return np.stack(rows).astype(np.int32), {'mask': np.stack(mask)}


def _rows(seed: int, size: int, batch_size: int, first: int, count: int) -> np.ndarray:
    """Rows of the batches first .. first + count of a run, int32 [count, batch_size]."""
    begin, end = first * batch_size, (first + count) * batch_size
    epochs = range(begin // size, -(-end // size))
    order = np.concatenate([np.random.default_rng([seed, e]).permutation(size) for e in epochs])
    offset = begin - epochs[0] * size
    return order[offset : offset + end - begin].reshape(count, batch_size).astype(np.int32)
