"""Methods: one training step as a pair of pure functions, and the combinators that make them.

A method is `Method(init, step)`, the way an optax transformation is `(init, update)`:

    init(key, frozen) -> State              frozen: {'teacher': variables, ...}, possibly empty
    step(state, batch) -> (State, Metrics)  pure and jit-able; metrics are (sum, count) pairs

Most methods are `minimize(loss, tx, init)` for a loss of the form

    loss(params, state, batch, key) -> Objective(mean(per_example_values))

where `params` is differentiated, `state` gives everything else (`state.frozen['teacher']`,
`state.mutables`), `batch` is a dict of arrays and `key` is new at every step. The combinators
below wrap a method into a richer one; none of them knows about devices, data or logging.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd import metrics as metrics_lib
from kd.metrics import Mean, Metrics
from kd.state import PyTree, State

Batch = dict[str, jax.Array]


class Method(NamedTuple):
    """A training step: `init(key, frozen) -> State`, `step(state, batch) -> (State, Metrics)`."""

    init: Callable[..., State]
    step: Callable[[State, Batch], tuple[State, Metrics]]


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


def minimize(
    loss: Loss,
    tx: optax.GradientTransformation,
    init: Callable[[jax.Array], PyTree],
    *,
    micro_batches: int = 1,
) -> Method:
    """Minimises `loss` with the optax transformation `tx`.

    Args:
      loss: see the module's docstring.
      tx: the optimiser.
      init: `init(key) -> {'params': ..., **mutables}`, the variables to start from.
      micro_batches: gradients are accumulated over this many equal parts of the batch before the
        one update. Sums and counts are accumulated apart, so the gradient is that of the whole
        batch also when masks leave the parts with different counts.
    """

    def init_state(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        network_key, run_key = jax.random.split(key)
        mutables = dict(init(network_key))
        params = mutables.pop('params')
        return State.create(
            run_key, params, tx.init(params), mutables=mutables, frozen=dict(frozen or {})
        )

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = state.step_key()
        grads, objective = gradient(loss, state.params, state, batch, key, micro_batches)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        state = state.replace(
            step=state.step + 1,
            params=optax.apply_updates(state.params, updates),
            opt_state=opt_state,
            mutables=objective.mutables or state.mutables,
        )
        return state, _reported(objective, grads)

    return Method(init_state, step)


class Player(NamedTuple):
    """One of several objectives that are optimised in turn.

    Attributes:
      loss: `loss(params, state, batch, key)`; `params` is this player's own tree, the others are
        in `state.params[name]`.
      tx: this player's optimiser.
      period: the player moves at the steps divisible by its period.
    """

    loss: Loss
    tx: optax.GradientTransformation
    period: int = 1


def alternate(players: Mapping[str, Player], init: Callable[[jax.Array], PyTree]) -> Method:
    """Lets several players move one after the other within a step.

    For adversarial and two-time-scale methods. A player sees the players before it already moved.
    Metrics are prefixed with the player's name and counted only when the player moves.

    Args:
      players: by name, in the order in which they move.
      init: `init(key) -> {'params': {name: tree}, **mutables}`.
    """

    def init_state(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        network_key, run_key = jax.random.split(key)
        mutables = dict(init(network_key))
        params = mutables.pop('params')
        if set(params) != set(players):
            raise ValueError(
                f'init gives parameters of {sorted(params)}, players are {sorted(players)}.'
            )
        opt_state = {name: player.tx.init(params[name]) for name, player in players.items()}
        return State.create(
            run_key, params, opt_state, mutables=mutables, frozen=dict(frozen or {})
        )

    def move(name: str, player: Player, state: State, batch: Batch, key: jax.Array):
        grads, objective = gradient(player.loss, state.params[name], state, batch, key)
        updates, opt_state = player.tx.update(grads, state.opt_state[name], state.params[name])
        params = optax.apply_updates(state.params[name], updates)
        state = state.replace(
            params={**state.params, name: params},
            opt_state={**state.opt_state, name: opt_state},
            mutables=objective.mutables or state.mutables,
        )
        reported = _reported(objective, grads)
        return state, {f'{name}/{metric}': value for metric, value in reported.items()}

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        metrics: Metrics = {}
        for index, (name, player) in enumerate(players.items()):
            key = jax.random.fold_in(state.step_key(), index)

            def moved(state, key=key, name=name, player=player):
                return move(name, player, state, batch, key)

            def rested(state, moved=moved):
                return state, metrics_lib.zeros_like(jax.eval_shape(moved, state)[1])

            if player.period == 1:
                state, of_player = moved(state)
            else:
                due = state.step % player.period == 0
                state, of_player = jax.lax.cond(due, moved, rested, state)
            metrics |= of_player
        return state.replace(step=state.step + 1), metrics

    return Method(init_state, step)


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

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.step_key(), fold)
        return method.step(state, collect(state, batch, key))

    return Method(method.init, step)


def with_projection(method: Method, project: Callable[[PyTree], PyTree]) -> Method:
    """Applies `params <- project(params)` after every step (forced weight normalisation, say)."""

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = method.step(state, batch)
        return state.replace(params=project(state.params)), metrics

    return Method(method.init, step)


def with_nonfinite_guard(method: Method, mode: str) -> Method:
    """Keeps a step with a non-finite metric or parameter from touching the state.

    Every method reports its losses and gradient norms, so a non-finite one shows in the metrics;
    an update that overflows on its own shows in the parameters. Such a step is counted in the
    metric `nonfinite` and its other metrics are left out.

    Args:
      method: the method to wrap.
      mode: 'skip' leaves the update out and moves on to the next batch; 'stop' leaves the state
        as it was before the bad step, whatever batches follow, until the loop takes notice.
    """
    if mode not in ('skip', 'stop'):
        raise ValueError(f"on_nonfinite must be 'stop' or 'skip', got {mode!r}.")

    def init(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        state = method.init(key, frozen)
        return state.replace(extra={**state.extra, 'halted': jnp.zeros((), bool)})

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        halted = state.extra['halted']
        new, metrics = method.step(state, batch)
        checked = [*(m.total for m in metrics.values()), *jax.tree.leaves(new.params)]
        finite = jnp.all(jnp.stack([jnp.isfinite(x).all() for x in checked]))
        good = finite & ~halted

        def select(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        kept = state.replace(
            step=new.step if mode == 'skip' else select(new.step, state.step),
            **{
                name: select(getattr(new, name), getattr(state, name))
                for name in ('params', 'opt_state', 'mutables', 'ema', 'extra')
            },
        )
        kept.extra['halted'] = halted | ~finite if mode == 'stop' else halted
        metrics = jax.tree.map(lambda x: jnp.where(good, x, 0.0), metrics)
        metrics['nonfinite'] = Mean(jnp.where(finite, 0.0, 1.0), jnp.float32(1.0))
        return kept, metrics

    return Method(init, step)


def gradient(
    loss: Loss,
    params: PyTree,
    state: State,
    batch: Batch,
    key: jax.Array,
    micro_batches: int = 1,
) -> tuple[PyTree, Objective]:
    """Gradient of the mean loss over the batch, and what the loss returned, summed up."""

    def summed(params, mutables, batch, key):
        objective = loss(params, state.replace(mutables=mutables), batch, key)
        return objective.loss.total, objective

    differentiate = jax.grad(summed, has_aux=True)
    if micro_batches == 1:
        grads, objective = differentiate(params, state.mutables, batch, key)
    else:
        grads, objective = _accumulate(differentiate, params, state, batch, key, micro_batches)
    count = jnp.maximum(objective.loss.count, 1e-12)
    return jax.tree.map(lambda g: (g / count).astype(g.dtype), grads), objective


def _accumulate(differentiate, params, state, batch, key, micro_batches):
    parts = jax.tree.map(lambda x: _split(x, micro_batches), batch)

    def body(carry, part):
        grads, sums, mutables = carry
        index, examples = part
        part_key = jax.random.fold_in(key, index)
        new_grads, objective = differentiate(params, mutables, examples, part_key)
        new_sums = (objective.loss, objective.metrics)
        mutables = objective.mutables or mutables
        add = lambda a, b: jax.tree.map(jnp.add, a, b)  # noqa: E731
        return (add(grads, new_grads), add(sums, new_sums), mutables), None

    first = jax.tree.map(lambda x: x[0], parts)
    grads, objective = jax.eval_shape(differentiate, params, state.mutables, first, key)
    zeros = jax.tree.map(
        lambda x: jnp.zeros(x.shape, x.dtype), (grads, (objective.loss, objective.metrics))
    )
    carry, _ = jax.lax.scan(body, (*zeros, state.mutables), (jnp.arange(micro_batches), parts))
    grads, (total, metrics), mutables = carry
    return grads, Objective(total, metrics, mutables)


def _split(x: jax.Array, parts: int) -> jax.Array:
    if x.shape[0] % parts:
        raise ValueError(
            f'A batch of {x.shape[0]} does not divide into {parts} micro-batches; '
            'change batch_size or micro_batches.'
        )
    # Strided, so that each part takes an equal share of every device's examples.
    return jnp.swapaxes(x.reshape(x.shape[0] // parts, parts, *x.shape[1:]), 0, 1)


def _reported(objective: Objective, grads: PyTree) -> Metrics:
    norm = metrics_lib.scalar(optax.tree.norm(grads))
    return {'loss': objective.loss, 'grad_norm': norm, **objective.metrics}
