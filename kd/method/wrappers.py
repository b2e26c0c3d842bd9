"""Combinators that wrap any method."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp

from kd.errors import UserError
from kd.method.base import Batch, Method
from kd.method.guard import NONFINITE, moved, stepwise
from kd.metrics import Metrics
from kd.state import PyTree, State, alone, paths


def with_collect(
    method: Method, collect: Callable[[State, Batch, jax.Array], Batch], name: str = 'collect'
) -> Method:
    """Enriches every batch with the current state before the step.

    `collect(state, batch, key) -> batch` is pure: rollouts of the current policy, outputs of a
    teacher, samples of a generator. It lies outside the differentiated loss, so what it returns
    is a constant to the gradient. It has the whole batch, whatever the micro-batches: this is the
    place for statistics over a batch or a group. Wrapped twice, each needs a `name` of its own,
    which decides its randomness.
    """
    fold = zlib.crc32(name.encode())

    def collected(state: State, batch: Batch) -> Batch:
        return collect(state, batch, jax.random.fold_in(state.step_key(), fold))

    if method.propose is not None:
        propose = method.propose
        return stepwise(method.init, lambda state, batch: propose(state, collected(state, batch)))
    return Method(method.init, lambda state, batch: method.step(state, collected(state, batch)))


def with_memory(
    method: Method,
    name: str,
    first: PyTree,
    collect: Callable[[State, Batch, jax.Array], tuple[Batch, PyTree]],
) -> Method:
    """`with_collect` that keeps something of what it has collected: a bank of examples, say.

        batch, state.extra[name] <- collect(state, batch, key)

    `collect` reads in `state.extra[name]` what earlier steps have left there, and has the key that
    `with_collect` would give it. A step that a guard leaves out leaves the memory as it was.

    Args:
      method: the method to wrap.
      name: of the value in `state.extra`.
      first: the value before the first step, a tree of arrays.
      collect: see above; pure.
    """
    fold = zlib.crc32(b'collect')

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        batch, value = collect(state, batch, jax.random.fold_in(state.step_key(), fold))
        state, metrics = method.step(state, batch)
        return state.replace(extra={**state.extra, name: value}), metrics

    return Method(_beginning(method, name, first), step)


def with_extra(
    method: Method,
    name: str,
    first: PyTree,
    update: Callable[[PyTree, Metrics, jax.Array], PyTree],
) -> Method:
    """Keeps a value of a method's own, such as a schedule that goes by the loss.

        state.extra[name] <- update(state.extra[name], metrics, steps)     after every step

    The step itself reads the value from before it. A step that a guard leaves out leaves it too.

    Args:
      method: the method to wrap.
      name: of the value in `state.extra`.
      first: the value before the first step, a tree of numbers or arrays.
      update: of the value, the step's metrics and the number of steps taken with this one.
    """

    def renewed(state: State, metrics: Metrics, steps: jax.Array) -> State:
        value = update(state.extra[name], metrics, steps)
        return state.replace(extra={**state.extra, name: value})

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = method.step(state, batch)
        if NONFINITE not in metrics:
            return renewed(state, metrics, state.step), metrics
        extra = jax.lax.cond(
            moved(metrics),
            lambda state: renewed(state, metrics, state.step).extra,
            lambda state: state.extra,
            state,
        )
        return state.replace(extra=extra), metrics

    return Method(_beginning(method, name, first), step)


def with_projection(method: Method, project: Callable[[PyTree], PyTree]) -> Method:
    """Applies `params <- project(params)` after every step (forced weight normalisation, say).

    `params` are the network's, or {part: tree} of several parts. A step of a single update has the
    projection as a part of it, and the guard checks both. One of several updates is projected at
    its end; to have each of them projected, wrap what is repeated.
    """

    def projected(params: dict[str, PyTree]) -> dict[str, PyTree]:
        new = project(alone(params))
        return new if len(params) > 1 else dict.fromkeys(params, new)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = method.step(state, batch)
        if NONFINITE not in metrics:
            return state.replace(params=projected(state.params)), metrics
        params = jax.lax.cond(moved(metrics), projected, lambda params: params, state.params)
        return state.replace(params=params), metrics

    if method.propose is None:
        return Method(method.init, step)
    inner = method.propose

    def propose(state: State, batch: Batch):
        change, metrics = inner(state, batch)

        def with_it(state: State) -> State:
            state = change(state)
            return state.replace(params=projected(state.params))

        return with_it, metrics

    return stepwise(method.init, propose)


def with_base(method: Method, name: str, where: str = 'network') -> Method:
    """Names the frozen tree that the result, which has adapters, stands beside."""

    def init(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        state = method.init(key, frozen)
        own, base = state.params[state.result], (frozen or {})[name]['params']
        if set(paths(own)) & set(paths(base)):
            raise UserError(
                f'{where} has adapters, and the method trains the network whole; take one that '
                'starts from `references.start`.'
            )
        return state.replace(base=name)

    return method._replace(init=init)


def with_result(method: Method, part: str, where: str = 'result') -> Method:
    """Names the part that is the result; `where` is the place in the config, for the message."""

    def init(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        state = method.init(key, frozen)
        if part not in state.params:
            raise UserError(
                f"{where} is '{part}', but the method trains {sorted(state.params)}; "
                f'set {where} to one of them, or have the method call it so.'
            )
        return state.replace(result=part)

    return method._replace(init=init)


def _beginning(method: Method, name: str, first: PyTree) -> Callable[..., State]:
    """The method's `init`, with a value in `state.extra`."""

    def init(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        state = method.init(key, frozen)
        value = jax.tree.map(jnp.array, first)
        return state.replace(extra={**state.extra, name: value})

    return init
