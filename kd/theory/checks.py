"""Checks of the values of concrete arrays; inside jit, grad, vmap and scan they are skipped."""

from __future__ import annotations

import jax
import numpy as np
from jax.typing import ArrayLike


def concrete(*arrays: ArrayLike) -> bool:
    """Whether the values can be looked at, that is, none is traced."""
    return not any(isinstance(array, jax.core.Tracer) for array in arrays)


def in_range(name: str, value: ArrayLike, low: float, high: float, why: str = ''):
    """Raises ValueError unless every entry is in [low, high]."""
    if not concrete(value):
        return
    values = np.asarray(value)
    if values.size and not np.all((values >= low) & (values <= high)):
        because = f': {why}' if why else ''
        raise ValueError(f'{name} must be in [{low:g}, {high:g}]{because}, got {values}.')


def positive(name: str, value: ArrayLike):
    """Raises ValueError unless every entry is positive and finite."""
    if not concrete(value):
        return
    values = np.asarray(value)
    if not np.all((values > 0) & np.isfinite(values)):
        raise ValueError(f'{name} must be positive and finite, got {values}.')


def simplex_weights(name: str, weights: ArrayLike, axis: int = 0):
    """Raises ValueError unless the weights are non-negative and sum to one along `axis`."""
    if not concrete(weights):
        return
    values = np.asarray(weights)
    eps = np.finfo(values.dtype if values.dtype.kind == 'f' else np.float64).eps
    if np.any(values < 0) or not np.allclose(values.sum(axis), 1.0, rtol=0, atol=float(eps) ** 0.5):
        raise ValueError(f'{name} must be non-negative and sum to one, got {values}.')
