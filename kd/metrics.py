"""Metrics as (sum, count) pairs.

A mean over examples is carried as its numerator and denominator until it is written. Pairs merge
by adding, so a metric does not depend on how a batch was cut into micro-batches, devices or hosts.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from jax.typing import ArrayLike


class Mean(NamedTuple):
    """A running mean: `total / count`, both float32 and of one shape (scalars as a rule)."""

    total: jax.Array
    count: jax.Array  # type: ignore[assignment]  # tuple.count, which nobody calls


Metrics = dict[str, Mean]


def mean(values: ArrayLike, where: ArrayLike | None = None) -> Mean:
    """Sums `values[...]` (any shape) and counts them, over the entries where `where` is true.

    Entries outside `where` may be NaN: they influence neither the sum nor its gradient. A mask with
    fewer axes than `values` is aligned with the leading ones: one entry per example.
    """
    values = jnp.asarray(values, jnp.float32)
    if where is None:
        return Mean(values.sum(), jnp.float32(values.size))
    mask = jnp.asarray(where)
    mask = mask.reshape(mask.shape + (1,) * (values.ndim - mask.ndim))
    counted = jnp.broadcast_to(mask, values.shape)
    return Mean(jnp.where(counted, values, 0.0).sum(), counted.sum(dtype=jnp.float32))


def scalar(value: jax.Array | float) -> Mean:
    """A value counted once per step, such as a gradient norm."""
    return Mean(jnp.asarray(value, jnp.float32), jnp.float32(1.0))


def best(values: Iterable[float | None], *, lower: bool = False) -> int | None:
    """The place of the best of some values: the first that is largest, or smallest if `lower`.

    What is absent (None) or not finite is never the best; None if nothing else is there.
    """
    found = [(i, float(v)) for i, v in enumerate(values) if v is not None and np.isfinite(v)]
    if not found:
        return None
    return (min if lower else max)(found, key=lambda pair: pair[1])[0]


def merge(first: Metrics, second: Metrics) -> Metrics:
    """Adds two sets of metrics of the same names."""
    return jax.tree.map(jnp.add, first, second)


def zeros_like(metrics: Metrics) -> Metrics:
    """The neutral element of `merge`; accepts abstract metrics."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), metrics)


def divide(metrics: Metrics) -> dict[str, float]:
    """Brings metrics to the host as floats; a metric that was never counted is left out."""
    host = jax.device_get(metrics)
    return {name: float(np.asarray(m.total) / m.count) for name, m in host.items() if m.count > 0}


def mean_interval(values: ArrayLike) -> tuple[float, float]:
    """Mean of at least two values, and half of its 95 % interval by Student's t distribution."""
    array = np.asarray(values, float)
    error = array.std(ddof=1) / np.sqrt(len(array))
    return float(array.mean()), float(scipy.special.stdtrit(len(array) - 1, 0.975) * error)
