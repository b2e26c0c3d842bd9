"""The guard against non-finite steps: it decides before an update is made.

A step computes its gradient and says what it would do with it, a `Change`. Under the guard the
change is first computed for the sake of one bit, whether the parameters after it are finite, and
then made under a condition, in place. Beside the gradients nothing is kept twice.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd.method.base import Batch, Change, Method
from kd.metrics import Mean, Metrics
from kd.state import PyTree, State

MODES = ('stop', 'skip')
# Counts updates that were not finite among those tried; there if the guard has decided.
NONFINITE = 'nonfinite'
# What a change changes.
_CHANGED = ('params', 'opt_state', 'mutables')


def guarded(state: State, metrics: Metrics, change: Change) -> tuple[State, Metrics]:
    """Makes an update, unless the guard finds it not finite.

    Args:
      state: before the update; `state.guard` says if there is a guard.
      metrics: of the step so far. Losses and gradient norms are among them, so that a non-finite
        one shows; an update that overflows on its own shows in the parameters.
      change: the update; changes `params`, `opt_state` and `mutables` alone.

    Returns:
      The state after the update, its step not yet advanced, and the metrics. Under a guard the
      metrics of an update that is left out are 0 of 0, and `nonfinite` counts it.
    """
    new = change(state)
    if not state.guard:
        return new, metrics
    before, after = _changeable(state), _changeable(new)
    # Leaves that the change passes on as they are, frozen ones for example, are left in peace.
    touched = [old is not new for old, new in zip(before, after, strict=True)]
    moved = zip(jax.tree.leaves(state.params), jax.tree.leaves(new.params), strict=True)
    halted = state.extra['halted']
    finite = _finite([*metrics.values(), *(new for old, new in moved if old is not new)])
    good = finite & ~halted

    def made():
        return [x for x, is_new in zip(_changeable(change(state)), touched, strict=True) if is_new]

    def left_out():
        return [x for x, is_new in zip(before, touched, strict=True) if is_new]

    chosen = iter(jax.lax.cond(good, made, left_out))
    leaves = [next(chosen) if is_new else x for x, is_new in zip(before, touched, strict=True)]
    structure = jax.tree.structure([getattr(new, name) for name in _CHANGED])
    values = jax.tree.unflatten(structure, leaves)
    extra = {**state.extra, 'halted': halted | ~finite if state.guard == 'stop' else halted}
    state = state.replace(**dict(zip(_CHANGED, values, strict=True)), extra=extra)
    metrics = jax.tree.map(lambda x: jnp.where(good, x, 0.0), metrics)
    bad, tried = ~finite & ~halted, ~halted
    metrics[NONFINITE] = Mean(bad.astype(jnp.float32), tried.astype(jnp.float32))
    return state, metrics


def advanced(state: State) -> State:
    """The state at the next step; a halted one stays where it is."""
    go_on = ~state.extra['halted'] if state.guard == 'stop' else 1
    return state.replace(step=state.step + go_on)


def stepwise(
    init: Callable[..., State],
    propose: Callable[[State, Batch], tuple[Change, Metrics]],
) -> Method:
    """A method whose step is one update."""

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        change, metrics = propose(state, batch)
        state, metrics = guarded(state, metrics, change)
        return advanced(state), metrics

    return Method(init, step, propose)


def combined(first: Metrics, second: Metrics) -> Metrics:
    """Metrics of different names, and the sum of what the guard counted."""
    both = {**first, **second}
    if NONFINITE in first and NONFINITE in second:
        both[NONFINITE] = jax.tree.map(jnp.add, first[NONFINITE], second[NONFINITE])
    return both


def moved(metrics: Metrics) -> jax.Array:
    """Whether a step, under the guard, has made an update."""
    return metrics[NONFINITE].count > metrics[NONFINITE].total


def with_nonfinite_guard(method: Method, mode: str) -> Method:
    """Keeps an update with a non-finite metric or parameter from touching the state.

    Such an update is counted in the metric `nonfinite` and its other metrics are left out. It costs
    the memory of the gradients, and the time of a second update that is not written. A step that
    does not make its update through `guarded`, one written by hand, is chosen or not as a whole,
    which costs a second state.

    Args:
      method: the method to wrap.
      mode: 'skip' leaves the update out and moves on to the next batch; 'stop' leaves the state
        as it was before the bad update, whatever batches follow, until the loop takes notice. In a
        step of several updates those before the bad one stay made, as undoing them would cost a
        second state: `extra['partial']` says so, and the step must not be begun anew from there.
    """
    if mode not in MODES:
        raise ValueError(f"on_nonfinite must be 'stop' or 'skip', got {mode!r}.")

    def init(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        state = method.init(key, frozen)
        flags = {'halted': jnp.zeros((), bool), 'partial': jnp.zeros((), bool)}
        return state.replace(extra={**state.extra, **flags}, guard=mode)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        new, metrics = method.step(state, batch)
        if NONFINITE not in metrics:
            given = new
            new, metrics = guarded(state, metrics, lambda _: given)
            halted = new.extra['halted'] | given.extra['halted']
            rest = {**given.extra, 'halted': halted}
            new = advanced(new.replace(ema=given.ema, extra=rest))
        good = moved(metrics)

        def kept(new: PyTree, old: PyTree) -> PyTree:
            return jax.tree.map(lambda n, o: jnp.where(good, n, o), new, old)

        extra = kept(new.extra, state.extra)
        extra['halted'] = new.extra['halted']
        extra['partial'] = state.extra['partial'] | (
            good & new.extra['halted'] & ~state.extra['halted']
        )
        return new.replace(ema=kept(new.ema, state.ema), extra=extra), metrics

    return Method(init, step)


def _changeable(state: State) -> list[Any]:
    return jax.tree.leaves([getattr(state, name) for name in _CHANGED])


def _finite(values: list[Any]) -> jax.Array:
    totals = [x.total if isinstance(x, Mean) else x for x in values]
    return jnp.all(jnp.stack([jnp.isfinite(x).all() for x in totals]))
