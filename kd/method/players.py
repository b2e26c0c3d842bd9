"""Several players that move in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import optax

from kd import metrics as metrics_lib
from kd.method.base import Batch, Change, Loss, Method
from kd.method.guard import stepwise
from kd.method.single import gradient, reported
from kd.metrics import Metrics
from kd.state import PyTree, State


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

    def propose(state: State, batch: Batch) -> tuple[Change, Metrics]:
        metrics: Metrics = {}
        changes = []
        ahead = state  # With the moves of the players so far.
        for index, (name, player) in enumerate(players.items()):
            key = jax.random.fold_in(state.step_key(), index)
            change, of_player = _move(name, player, ahead, batch, key)
            ahead = change(ahead)
            changes.append(change)
            metrics |= {f'{name}/{metric}': value for metric, value in of_player.items()}

        def all_of_them(state: State) -> State:
            for change in changes:
                state = change(state)
            return state

        return all_of_them, metrics

    return stepwise(init_state, propose)


def _move(
    name: str, player: Player, state: State, batch: Batch, key: jax.Array
) -> tuple[Change, Metrics]:
    """A player's change, which is none at the steps at which it rests, and its metrics."""

    def computed():
        grads, objective = gradient(player.loss, state.params[name], state, batch, key)
        return grads, objective.mutables, reported(objective, grads)

    def rested():
        return metrics_lib.zeros_like(jax.eval_shape(computed))

    always = player.period == 1
    due = state.step % player.period == 0
    grads, mutables, metrics = computed() if always else jax.lax.cond(due, computed, rested)

    def change(state: State) -> State:
        own = state.params[name], state.opt_state[name], state.mutables

        def update(params, opt_state, old):
            updates, opt_state = player.tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state, mutables or old

        if not always:
            params, opt_state, new = jax.lax.cond(due, update, lambda *own: own, *own)
        else:
            params, opt_state, new = update(*own)
        return state.replace(
            params={**state.params, name: params},
            opt_state={**state.opt_state, name: opt_state},
            mutables=new,
        )

    return change, metrics
