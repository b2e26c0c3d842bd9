"""Matching of the gradients that synthetic and real examples give a network.

Source: Zhao et al. 2020, arXiv 2006.05929 (dataset condensation).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

PyTree = Any


def gradient_distance(synthetic: PyTree, real: PyTree, *, kind: str = 'units') -> jax.Array:
    """Distance between two gradients of one set of parameters.

        units:   sum over layers and their output units of 1 - cos(synthetic, real)
        cosine:  1 - cos of all leaves as one vector
        squared: squared Euclidean distance of all leaves

    Args:
      synthetic, real: pytrees of gradients. For `units`, a leaf of two or more axes is a layer
        whose last axis numbers its output units (kernels of Flax); biases and norms are left out.
      kind: one of the above.

    Returns:
      Scalar, float32 (float64 for float64 input), with finite gradient also at zero gradients.

    Raises:
      ValueError: on another kind.

    Source: arXiv 2006.05929, section 3.
    """
    leaves = zip(jax.tree.leaves(synthetic), jax.tree.leaves(real), strict=True)
    pairs = [(_accumulated(a), _accumulated(b)) for a, b in leaves]
    if kind == 'units':
        layers = [(_units(a), _units(b)) for a, b in pairs if a.ndim > 1]
        return jnp.sum(jnp.stack([_one_minus_cosine(a, b).sum() for a, b in layers]))
    if kind == 'cosine':
        a, b = (jnp.concatenate([x.reshape(-1) for x in side]) for side in zip(*pairs, strict=True))
        return _one_minus_cosine(a[:, None], b[:, None])[0]
    if kind == 'squared':
        return jnp.sum(jnp.stack([jnp.sum(jnp.square(a - b)) for a, b in pairs]))
    raise ValueError(f"The distance of gradients is 'units', 'cosine' or 'squared', got {kind!r}.")


def gradient_matching(
    loss: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    synthetic: PyTree,
    real: PyTree,
    *,
    kind: str = 'units',
) -> jax.Array:
    """`gradient_distance` between synthetic and real examples, class by class: [classes].

    Args:
      loss: `loss(params, examples) -> scalar`, examples being one class's slice.
      params: of the network at which gradients are compared.
      synthetic, real: pytrees with leading axis of classes; the examples of a class follow.
      kind: see `gradient_distance`.

    Returns:
      [classes], unreduced. The gradients of the real examples are stop-gradiented, and computed one
      class after another: they are most of the work, and side by side most of the memory.

    Source: arXiv 2006.05929, algorithm 1.
    """
    at, examples = jax.lax.stop_gradient((params, real))
    wanted = jax.lax.map(lambda of_class: jax.grad(loss)(at, of_class), examples)

    def one_class(synthetic, wanted):
        return gradient_distance(jax.grad(loss)(params, synthetic), wanted, kind=kind)

    return jax.vmap(one_class)(synthetic, wanted)


def _units(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _one_minus_cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Column by column of [n, units]; 1 where a column is zero."""
    # The constant is the paper's code's: it keeps vanishing gradients from counting in full.
    return 1.0 - jnp.sum(a * b, 0) / (_norms(a) * _norms(b) + 1e-6)


def _norms(x: jax.Array) -> jax.Array:
    squared = jnp.sum(jnp.square(x), 0)
    return jnp.where(squared > 0, jnp.sqrt(jnp.where(squared > 0, squared, 1.0)), 0.0)


def _accumulated(x: jax.Array) -> jax.Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))
