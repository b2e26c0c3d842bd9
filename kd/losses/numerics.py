"""Softmax arithmetic that stays finite where a logit is -inf or a row is empty.

The rule behind every function here is the double `where`: an entry that must not count is replaced
*before* the arithmetic that would make it NaN, and selected away again after it, so that neither
the value nor the gradient sees it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike


def accumulation_dtype(*arrays: ArrayLike) -> jnp.dtype:
    """The dtype in which losses compute: float32, or float64 if an input is float64."""
    return jnp.promote_types(jnp.result_type(*arrays), jnp.float32)


def wide(x: ArrayLike) -> jax.Array:
    """x in float32 at least, the dtype of `accumulation_dtype`."""
    return jnp.asarray(x).astype(accumulation_dtype(x))


def log_softmax(
    logits: ArrayLike,
    *,
    temperature: ArrayLike = 1.0,
    axis: int = -1,
    where: ArrayLike | None = None,
) -> jax.Array:
    """log softmax(logits / temperature), with impossible outcomes at exactly -inf.

    Args:
      logits: [..., V], any float dtype; -inf marks an impossible outcome.
      temperature: positive; a scalar, or an array that broadcasts against `logits`.
      axis: the axis of outcomes.
      where: bool, broadcasts against `logits`; an outcome with False is impossible.

    Returns:
      [..., V] log-probabilities in nats, float32 (float64 for float64 input). The gradient is
      exactly 0 at impossible outcomes, and a row in which all are impossible is all -inf with zero
      gradient.

    Raises:
      ValueError: a concrete temperature that is not positive.
    """
    check_positive('temperature', temperature)
    logits = jnp.asarray(logits)
    logits = logits.astype(accumulation_dtype(logits))
    possible = logits != -jnp.inf
    if where is not None:
        possible = jnp.logical_and(possible, where)
        logits = jnp.broadcast_to(logits, possible.shape)
    # Masked before the division: -inf / temperature would give the temperature a NaN gradient.
    scaled = jnp.where(possible, logits, 0.0) / jnp.asarray(temperature, logits.dtype)
    scaled = jnp.where(possible, scaled, -jnp.inf)
    # Against the peak, and never back: adding a peak of 1e4 would cost three of seven digits.
    shifted = scaled - _finite_peak(scaled, axis)
    total = jnp.sum(jnp.exp(shifted), axis=axis, keepdims=True)
    return jnp.where(possible, shifted - jnp.log(jnp.where(total > 0, total, 1.0)), -jnp.inf)


def log_sum_exp(x: jax.Array, *, axis: int, keepdims: bool = False) -> jax.Array:
    """log sum exp(x), safe for rows that are all -inf: there -inf with zero gradient, not NaN."""
    peak = _finite_peak(x, axis)
    total = jnp.sum(jnp.exp(x - peak), axis=axis, keepdims=True)
    log_total = jnp.where(total > 0, jnp.log(jnp.where(total > 0, total, 1.0)) + peak, -jnp.inf)
    return log_total if keepdims else jnp.squeeze(log_total, axis)


def _finite_peak(x, axis):
    peak = lax.stop_gradient(jnp.max(x, axis=axis, keepdims=True))
    return jnp.where(jnp.isfinite(peak), peak, 0.0)


def log_mixture(log_a: jax.Array, log_b: jax.Array, weight: float) -> jax.Array:
    """log(weight a + (1 - weight) b) from log a and log b, elementwise; -inf where both are.

    Formed by logaddexp: the logarithm of the mixed probabilities would underflow in float32 where
    both lie below e^-87. `weight` is a Python number in [0, 1].
    """
    if weight in (0, 1):
        return log_a if weight == 1 else log_b
    possible = jnp.maximum(log_a, log_b) > -jnp.inf
    log_weights = jnp.log(jnp.array([weight, 1 - weight], log_a.dtype))
    mixed = jnp.logaddexp(
        jnp.where(possible, log_a, 0.0) + log_weights[0],
        jnp.where(possible, log_b, 0.0) + log_weights[1],
    )
    return jnp.where(possible, mixed, -jnp.inf)


def relative_entropy_term(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    """a (log a - log b) elementwise: 0 where a is 0 or underflows, +inf where only b is 0."""
    a = jnp.exp(log_a)
    log_ratio = jnp.where(a > 0, log_a, 0.0) - jnp.where(a > 0, log_b, 0.0)
    return a * log_ratio


def is_outcome(indices: ArrayLike, size: int) -> jax.Array:
    """Whether int indices [...] name one of the outcomes 0 .. size - 1, bool [...]."""
    indices = jnp.asarray(indices)
    return (indices >= 0) & (indices < size)


def one_hot(labels: ArrayLike, size: int) -> jax.Array:
    """Labels int [...] as float32 [..., size]; NaN where one is none of 0 .. size - 1.

    Raises:
      TypeError: labels that are no integers, such as those that mixup has made soft.
    """
    labels = jnp.asarray(labels)
    if not jnp.issubdtype(labels.dtype, jnp.integer):
        raise TypeError(f'integer labels are needed, got {labels.dtype} {labels.shape}.')
    known = is_outcome(labels, size)[..., None]
    return jnp.where(known, jax.nn.one_hot(labels, size, dtype=jnp.float32), jnp.nan)


def take_outcomes(values: jax.Array, indices: ArrayLike, missing: float) -> jax.Array:
    """values[..., indices] on the last axis, [..., V] and int [..., k] -> [..., k].

    `missing` where an index is none of 0 .. V - 1: indexing as such would count a negative one from
    the end and fill in NaN for one from V on.
    """
    inside = is_outcome(indices, values.shape[-1])
    taken = jnp.take_along_axis(values, jnp.where(inside, indices, 0), axis=-1)
    return jnp.where(inside, taken, missing)


def norm(x: jax.Array, *, axis: int | tuple[int, ...], keepdims: bool = False) -> jax.Array:
    """The Euclidean norm, with gradient 0 (not NaN) at 0."""
    squares = jnp.sum(x * x, axis=axis, keepdims=keepdims)
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)


def tree_dot(a: Any, b: Any) -> jax.Array:
    """<a, b> of two trees of one form, over all of their leaves, float32 at least."""
    parts = jax.tree.map(lambda x, y: jnp.sum(wide(x) * wide(y)), a, b)
    return sum(jax.tree.leaves(parts), start=jnp.float32(0.0))


def unit(x: jax.Array) -> jax.Array:
    """Rows [..., D] over their norms; a row of zeros stays."""
    length = norm(x, axis=-1, keepdims=True)
    return x / jnp.where(length > 0, length, 1.0)


def number_in(name: str, value: float, low: float, high: float) -> float:
    """`value`, checked to be a Python number in [low, high]; for options that select a formula.

    Raises:
      ValueError: it is an array, or out of range.
    """
    if not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f'{name} must be a Python number in [{low}, {high}], got {value!r}.')
    return float(value)


def check_positive(name: str, value: ArrayLike) -> None:
    """Raises ValueError unless a concrete number or array is positive; traced ones pass."""
    # NumPy: under a jit trace even an operation on concrete arrays returns a traced one.
    if not isinstance(value, jax.core.Tracer) and not np.all(np.asarray(value) > 0):
        raise ValueError(f'{name} must be positive, got {value}.')
