"""Exponential moving averages of what is trained."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from kd import ranges
from kd.errors import UserError, did_you_mean
from kd.method.base import Batch, Method
from kd.metrics import Metrics
from kd.ranges import Count, Fraction, Positive, Size
from kd.state import PyTree, State


@dataclasses.dataclass(frozen=True)
class Average:
    """How an average is taken; n counts the steps since `start`.

    Attributes:
      decay: d.
      halflife: steps h after which a value weighs half, in place of d = 2^(-1 / h).
      ramp: the half-life is at most `ramp` n, so that the start is forgotten; None for none.
      start: the average is the parameters themselves until this many steps have been taken.
      every: it is taken after every so many steps, and stays as it is between: `decay` is that of a
        taking, the half-life still one of steps.
      of: the parts; () for the result.
    """

    decay: Fraction | None = None
    halflife: Positive | None = None
    ramp: Positive | None = None
    start: Size = 0
    every: Count = 1
    of: tuple[str, ...] = ()


def with_ema(method: Method, averages: Mapping[str, float | Mapping[str, Any]]) -> Method:
    """Keeps exponential moving averages of parts of the parameters in `state.ema`.

        ema <- d_n ema + (1 - d_n) params      after every step, or every so many

    A loss that reads an average, by `state.variables('slow')`, sees the one before the step.

    Args:
      method: the method to wrap.
      averages: {name: decay}, or {name: fields of `Average`}; several may be kept at once.

    Raises:
      UserError: an average without a part, or one that the method does not have.
    """
    kept = {name: _average(name, given) for name, given in averages.items()}

    def init(key: jax.Array, frozen: Mapping[str, PyTree] | None = None) -> State:
        state = method.init(key, frozen)
        for name, average in kept.items():
            missing = set(_parts(average, state)) - set(state.params)
            if missing:
                raise UserError(
                    f'ema.{name} is of {sorted(missing)}; the method trains {sorted(state.params)}.'
                )
        # Copies, so that no buffer is donated twice.
        ema = {
            name: {part: jax.tree.map(jnp.copy, state.params[part]) for part in _parts(kind, state)}
            for name, kind in kept.items()
        }
        return state.replace(ema={**state.ema, **ema})

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        taken = state.step
        state, metrics = method.step(state, batch)
        ema = {}
        for name, average in kept.items():
            new = {part: state.params[part] for part in _parts(average, state)}
            ema[name] = _taken(average, new, state.ema[name], taken)
        return state.replace(ema={**state.ema, **ema}), metrics

    return Method(init, step)


def _average(name: str, given: float | Mapping[str, Any]) -> Average:
    fields: dict[str, Any] = dict(given) if isinstance(given, Mapping) else {}
    if not isinstance(given, Mapping):
        ranges.check_value(Fraction, given, where=f'ema.{name}')
        fields = {'decay': given}
    known = [field.name for field in dataclasses.fields(Average)]
    for key in fields:
        if key not in known:
            raise UserError(f"ema.{name} has no '{key}'.{did_you_mean(key, known)}")
    ranges.check(Average, fields, where=f'ema.{name}')
    of = fields.get('of', ())
    average = Average(**{**fields, 'of': (of,) if isinstance(of, str) else tuple(of)})
    if (average.decay is None) == (average.halflife is None):
        raise UserError(f'ema.{name} needs either a decay or a halflife.')
    return average


def _parts(average: Average, state: State) -> tuple[str, ...]:
    return average.of or (state.result,)


def _taken(average: Average, new: PyTree, old: PyTree, taken: jax.Array) -> PyTree:
    """The average after a step before which `taken` had been taken."""
    weight = _weight(average, taken)
    if average.every == 1:
        return _mixed(new, old, weight)
    due = ((taken + 1) % average.every == 0) | (taken < average.start)
    return jax.lax.cond(due, lambda: _mixed(new, old, weight), lambda: old)


def _weight(average: Average, taken: jax.Array) -> float | jax.Array:
    """1 - d_n, the weight of the parameters after a step before which `taken` had been taken."""
    every = average.every
    if average.halflife is not None:
        longest = average.halflife
        weight = -math.expm1(-math.log(2) * every / longest)
    else:
        assert average.decay is not None
        weight = 1.0 - average.decay
        longest = math.inf if average.decay else 0.0
        if 0 < average.decay < 1:
            longest = every * math.log(2) / -math.log(average.decay)
    if average.ramp is None and not average.start:
        return weight
    since = jnp.float32(taken - average.start)
    now = jnp.float32(weight)
    if average.ramp is not None:
        halflife = average.ramp * jnp.maximum(since, 1e-6)
        now = jnp.where(halflife < longest, -jnp.expm1(-math.log(2) * every / halflife), now)
    return jnp.where(since < 0, 1.0, now)


def _mixed(new: PyTree, old: PyTree, weight: float | jax.Array) -> PyTree:
    mixed = optax.incremental_update(new, old, weight)
    return jax.tree.map(lambda x, y: x.astype(y.dtype), mixed, old)
