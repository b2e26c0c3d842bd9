"""Runs of blocks that a linear map would do for: probes, similarities, and where they break off.

States are those after each block on some examples, [blocks + 1, N, D], the first before any. A run
[u, v] are the blocks u .. v, inclusive.

Source: PPCL 2025, arXiv:2511.16156.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd.errors import UserError
from kd.losses.feature import linear_cka
from kd.models.stack import inner_of

__all__ = ['cka_deltas', 'contiguous_runs', 'probes', 'residual_probe', 'runs_of', 'without_runs']

# Of differences of similarities: less is a tie.
TIE = 1e-6


def residual_probe(
    x: jax.Array, y: jax.Array, ridge: float = 1e-6, *, where: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """(W, b) of least squares, x + x W + b = y; the ridge is in units of the variance of x.

    It is the minimum that refining by gradients would come to on the same examples.

    Args:
      x, y: [N, D], in float32.
      ridge: weight of |W|^2.
      where: bool [N], or 0 and 1, what counts; all by default.
    """
    x, y = (jnp.asarray(z, jnp.float32) for z in (x, y))
    there = jnp.ones((len(x), 1), bool) if where is None else jnp.asarray(where, bool)[:, None]
    mean_x, mean_y = (jnp.mean(z, 0, where=there) for z in (x, y - x))
    centred, target = (jnp.where(there, z, 0.0) for z in (x - mean_x, y - x - mean_y))
    gram = jnp.matmul(centred.T, centred, precision='highest')
    gram = gram + ridge * jnp.trace(gram) / len(gram) * jnp.eye(len(gram))
    w = jnp.linalg.solve(gram, jnp.matmul(centred.T, target, precision='highest'))
    return w, mean_y - mean_x @ w


def probes(states: jax.Array, ridge: float = 1e-6) -> tuple[jax.Array, jax.Array]:
    """([blocks, D, D], [blocks, D]): a probe for each block, of the input that it has."""
    return jax.lax.map(lambda xy: residual_probe(xy[0], xy[1], ridge), (states[:-1], states[1:]))


def cka_deltas(
    fitted: tuple[jax.Array, jax.Array], states: jax.Array, first: int, count: int
) -> np.ndarray:
    """How much similarity each further probe costs, [count].

        Delta(u, k) = cka(u, k - 1) - cka(u, k),   k = u + 1 .. u + count,   cka(u, u) = 1,

    with cka(u, k) that of the state after block u, sent through the probes u + 1 .. k, to the state
    after block k.

    Args:
      fitted: see `probes`.
      states: [blocks + 1, N, D].
      first: u.
      count: of blocks after it.
    """
    weights, biases = fitted
    z, before, found = states[first + 1], 1.0, []
    for k in range(first + 1, first + 1 + count):
        z = z + jnp.matmul(z, weights[k], precision='highest') + biases[k]
        similarity = float(linear_cka(z, states[k + 1]))
        found.append(before - similarity)
        before = similarity
    return np.array(found)


def contiguous_runs(
    deltas: Callable[[int], Sequence[float]], blocks: int, longest: int
) -> list[tuple[int, int]]:
    """Runs [u, v], each up to the last block before similarity begins to fall faster again.

        v = min {k > u: Delta(u, k + 1) > Delta(u, k)},   the next run begins at v + 1

    Args:
      deltas: of u, Delta(u, u + 1), Delta(u, u + 2), ..
      blocks: how many there are.
      longest: blocks of a run at most, 2 or more.
    """
    runs, u = [], 0
    while u < blocks - 1:
        last = min(u + longest, blocks) - 1
        found = list(deltas(u))
        v = next((k for k in range(u + 1, last) if found[k - u] > found[k - u - 1] + TIE), last)
        runs.append((u, v))
        u = v + 1
    return runs


def without_runs(names: Sequence[str], runs: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Names of the blocks that runs make superfluous, all but the first of each."""
    return tuple(names[i] for u, v in runs for i in range(u + 1, v + 1))


def runs_of(module: Any, where: str = 'network') -> list[tuple[str, str]]:
    """(first, last) blocks of the runs that a network has in one, by what is dropped of it.

    Raises:
      UserError: the very first block is dropped, or branches alone.
    """
    inner = inner_of(module)
    names, gone = list(inner.blocks), set(inner.dropped)
    if gone - set(names) or (names and names[0] in gone):
        raise UserError(
            f'{where}.dropped: a run is replaced by its first block; drop whole blocks after it, '
            f'got {", ".join(inner.dropped)}.'
        )
    runs: list[tuple[str, str]] = []
    for before, name in itertools.pairwise(names):
        if name in gone:
            first = runs.pop()[0] if before in gone else before
            runs.append((first, name))
    return runs
