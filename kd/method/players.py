"""Several players that move in turn."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from kd import metrics as metrics_lib
from kd.method.base import Batch, Change, Init, Loss, Method, initial
from kd.method.guard import advanced, combined, guarded, stepwise
from kd.method.single import Trainable, gradient, joined, reported, split, trained, updated
from kd.metrics import Metrics
from kd.state import PyTree, State

ROWS = ('split', 'same')


class Player(NamedTuple):
    """One of several objectives that are optimised in turn.

    Attributes:
      loss: `loss(params, state, batch, key)`; `params` is the tree of the part that the player
        moves, all others are in `state.params`.
      tx: this player's optimiser.
      of: the part that it moves; '' for that of the player's own name. Two may move one part.
      slot: name of the state of its optimiser; '' for the player's own. Two players of one part and
        one optimiser may share a slot, and with it the moments.
      repeats: moves in one step, each with its own key, in one loop. The batch has their number as
        `move`, int32.
      rows: of repeated moves: 'split', each has its own part of the batch, or 'same', all of it.
      unroll: the loop of repeated moves; for convolutions on CPU, whose gradients are tens of times
        slower in a loop.
      period, offset: the player moves at steps offset, offset + period, ... and rests at others. A
        gradient of convolutions is as slow under this condition, on CPU, as in a loop.
      micro_batches: of each move, as in `minimize`.
      trainable: leaves of the part that move, as in `minimize`.
    """

    loss: Loss
    tx: optax.GradientTransformation
    of: str = ''
    slot: str = ''
    repeats: int = 1
    rows: str = 'split'
    unroll: bool = False
    period: int = 1
    offset: int = 0
    micro_batches: int = 1
    trainable: Trainable = None


def alternate(players: Mapping[str, Player], init: Init) -> Method:
    """Lets several players move one after the other within a step.

    For adversarial and two-time-scale methods. A step is one move of the slowest player: let the
    others repeat theirs, and schedules, averages and logs tick with it. A player sees the players
    before it already moved, and what they computed before they moved, the `outputs` of their
    objectives, as constants in `batch['out/NAME']`. Metrics are prefixed with the player's name and
    counted only when the player moves.

    The guard leaves out the moves of all players that move once, or each repeated move by itself.

    Args:
      players: by name, in the order in which they move.
      init: `init(key)` or `init(key, frozen)`, the variables of each part by name:
        {'generator': {'params': ...}, ...}. Parts may be copies of a tree in `frozen`.
    """
    players = {
        name: player._replace(of=player.of or name, slot=player.slot or name)
        for name, player in players.items()
    }
    _check(players)
    # Those that move once go together, as one update; one that repeats its moves goes alone.
    groups = [
        dict(group)
        for _, group in itertools.groupby(
            players.items(), lambda item: item[0] if item[1].repeats > 1 else ''
        )
    ]
    index = {name: i for i, name in enumerate(players)}

    def propose(group: Mapping[str, Player], state: State, batch: Batch) -> _Proposal:
        metrics: Metrics = {}
        changes: list[Change] = []
        ahead = state  # With the moves of the players so far.
        for name, player in group.items():
            key = jax.random.fold_in(state.step_key(), index[name])
            change, of_player, outputs = _move(player, ahead, batch, key)
            ahead = change(ahead)
            changes.append(change)
            metrics |= _prefixed(name, of_player)
            batch = _with_outputs(batch, name, outputs)
        return _Proposal(lambda state: _all(changes, state), metrics, batch)

    if len(groups) == 1 and all(player.repeats == 1 for player in players.values()):
        return stepwise(
            _beginning(players, init), lambda state, batch: propose(players, state, batch)[:2]
        )

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        metrics: Metrics = {}
        for group in groups:
            name, player = next(iter(group.items()))
            if player.repeats > 1:
                key = jax.random.fold_in(state.step_key(), index[name])
                state, of_group, outputs = _repeated(name, player, state, batch, key)
                batch = _with_outputs(batch, name, outputs)
            else:
                change, of_group, batch = propose(group, state, batch)
                state, of_group = guarded(state, of_group, change)
            metrics = combined(metrics, of_group)
        return advanced(state), metrics

    return Method(_beginning(players, init), step)


def _beginning(players: Mapping[str, Player], init: Init) -> Callable[..., State]:
    """`init(key, frozen)` of the method."""

    def init_state(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        state = initial(init, key, frozen)
        parts, moved = set(state.params), {player.of for player in players.values()}
        if parts != moved:
            raise ValueError(
                f'init gives parts {sorted(parts)}, players are {sorted(moved)}; call them alike.'
            )
        opt_state = {
            player.slot: player.tx.init(trained(state.params[player.of], player.trainable))
            for player in players.values()
        }
        return state.replace(opt_state=opt_state)

    return init_state


class _Proposal(NamedTuple):
    change: Change
    metrics: Metrics
    batch: Batch


def _move(
    player: Player, state: State, batch: Batch, key: jax.Array
) -> tuple[Change, Metrics, dict[str, Any]]:
    """A player's change, which is none at the steps at which it rests, its metrics and outputs."""
    params = state.params[player.of]
    old = state.mutables.get(player.of, {})

    def computed():
        grads, objective = gradient(
            *(player.loss, params, state, batch, key, player.micro_batches),
            part=player.of,
            trainable=player.trainable,
        )
        mutables = objective.mutables.get(player.of, {})
        return grads, mutables, reported(objective, grads), objective.outputs

    # Traced once, for the step and for what a player at rest gives in its place.
    once = jax.jit(computed, inline=True)

    def rested():
        *nothing, outputs = jax.eval_shape(once)
        zeros = metrics_lib.zeros_like(nothing)
        # Only what is put out is computed, without gradient.
        made = player.loss(params, state, batch, key).outputs if outputs else outputs
        return *zeros, made

    always = player.period == 1 and player.offset == 0
    since = state.step - player.offset
    due = (since >= 0) & (since % player.period == 0)
    grads, mutables, metrics, outputs = computed() if always else jax.lax.cond(due, once, rested)

    def change(state: State) -> State:
        own = state.params[player.of], state.opt_state[player.slot]

        def update(params, opt_state):
            return *updated(player.tx, grads, opt_state, params, player.trainable), mutables

        def rest(params, opt_state):
            return params, opt_state, old

        params, opt_state, new = update(*own) if always else jax.lax.cond(due, update, rest, *own)
        return state.replace(
            params={**state.params, player.of: params},
            opt_state={**state.opt_state, player.slot: opt_state},
            mutables={**state.mutables, player.of: new} if new else state.mutables,
        )

    return change, metrics, outputs


def _repeated(
    name: str, player: Player, state: State, batch: Batch, key: jax.Array
) -> tuple[State, Metrics, dict[str, Any]]:
    """The state after all moves of a player, its metrics and outputs."""
    what = f"moves of '{name}'; change batch_size or its repeats, or set rows='same'"
    parts = split(batch, player.repeats, what) if player.rows == 'split' else {}

    def move(current: State, given):
        number, part = given
        examples = {**(part or batch), 'move': number}
        current = current.replace(frozen=state.frozen)
        move_key = jax.random.fold_in(key, number)
        change, metrics, outputs = _move(player, current, examples, move_key)
        current, metrics = guarded(current, _prefixed(name, metrics), change)
        return current.replace(frozen={}), (metrics, outputs)

    numbers = jnp.arange(player.repeats)
    moved, (metrics, outputs) = jax.lax.scan(
        move, state.replace(frozen={}), (numbers, parts), unroll=player.unroll
    )
    outputs = joined(outputs) if parts else jax.tree.map(lambda x: x[-1], outputs)
    metrics = jax.tree.map(lambda x: x.sum(0), metrics)
    return moved.replace(frozen=state.frozen), metrics, outputs


def _all(changes: Iterable[Change], state: State) -> State:
    for change in changes:
        state = change(state)
    return state


def _prefixed(name: str, metrics: Metrics) -> Metrics:
    return {f'{name}/{metric}': value for metric, value in metrics.items()}


def _with_outputs(batch: Batch, name: str, outputs: dict[str, Any]) -> Batch:
    constants = jax.tree.map(jax.lax.stop_gradient, outputs)
    return {**batch, f'out/{name}': constants} if outputs else batch


def _check(players: Mapping[str, Player]) -> None:
    slots: dict[str, Player] = {}
    for name, player in players.items():
        for field in ('repeats', 'period', 'micro_batches'):
            if getattr(player, field) < 1:
                raise ValueError(f"{field} of '{name}' must be at least 1.")
        if player.offset < 0:
            raise ValueError(f"offset of '{name}' must be at least 0.")
        if player.rows not in ROWS:
            raise ValueError(f"rows of '{name}' must be one of {ROWS}, got {player.rows!r}.")
        first = slots.setdefault(player.slot, player)
        shared = ('of', 'tx', 'trainable')
        if any(getattr(first, field) != getattr(player, field) for field in shared):
            raise ValueError(
                f"Players that share the slot '{player.slot}' must move the same leaves of one "
                'part with one optimiser.'
            )
