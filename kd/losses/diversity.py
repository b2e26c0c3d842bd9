"""How far texts lie apart, which of them lie farthest, and how far a network has moved.

What data-efficient distillation (DED, arXiv 2508.09883) selects its corpus by.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from kd.losses import numerics


def levenshtein(
    first: ArrayLike, second: ArrayLike, first_length: ArrayLike, second_length: ArrayLike
) -> jax.Array:
    """The least number of insertions, deletions and substitutions between two texts.

        D[i, j] = min(D[i-1, j] + 1, D[i, j-1] + 1, D[i-1, j-1] + [a_i != b_j])

    A row at a time: with t_j the least of the first and last of these, D[i, j] = j + min_{k <= j}
    (t_k - k). La steps of a scan, each over all of b and all texts at once.

    Args:
      first: int [..., La] tokens.
      second: int [..., Lb]; leading axes broadcast against those of `first`.
      first_length, second_length: int [...], of the texts; what stands beyond does not matter.

    Returns:
      int32 [...].

    Source: Levenshtein 1966; by cumulative minima as in DED's card of arXiv 2508.09883.
    """
    first, second = jnp.asarray(first), jnp.asarray(second)
    first_length, second_length = jnp.asarray(first_length), jnp.asarray(second_length)
    leading = jnp.broadcast_shapes(
        first.shape[:-1], second.shape[:-1], first_length.shape, second_length.shape
    )
    first = jnp.broadcast_to(first, (*leading, first.shape[-1]))
    second = jnp.broadcast_to(second, (*leading, second.shape[-1]))
    places = jnp.arange(second.shape[-1] + 1)
    row = jnp.broadcast_to(places, (*leading, len(places)))

    def step(row, symbol):
        i, token = symbol
        substituted = row[..., :-1] + (second != token[..., None])
        least = jnp.minimum(row[..., 1:] + 1, substituted)
        begins = jnp.full((*leading, 1), i)
        least = jnp.concatenate([begins, least], axis=-1)
        new = places + lax.cummin(least - places, axis=least.ndim - 1)
        return jnp.where((i <= first_length)[..., None], new, row), None

    symbols = jnp.arange(1, first.shape[-1] + 1), jnp.moveaxis(first, -1, 0)
    row, _ = lax.scan(step, row, symbols)
    last = jnp.broadcast_to(second_length, leading)[..., None]
    return jnp.take_along_axis(row, last, axis=-1)[..., 0].astype(jnp.int32)


def farthest_subset(distances: ArrayLike, valid: ArrayLike, count: int) -> jax.Array:
    """Members of a set that lie far from one another, greedily: the pair that lies farthest apart,
    then again and again the one whose nearest neighbour among those taken is farthest.

    The least distance between members is at least half of what any choice has.

    Args:
      distances: [M, M], symmetric; divided by lengths, if long texts shall not be preferred.
      valid: bool [M], which may be taken: correct ones, as wrong ones are always far away.
      count: P >= 1.

    Returns:
      int32 [P]; of equals the first is taken. -1 where there are no more valid ones.

    Raises:
      ValueError: a count below 1, arrays of other shapes.

    Source: DED, arXiv 2508.09883, "farthest" trajectories; that it is greedy is a reconstruction
    (Gonzalez 1985).
    """
    distances, valid = jnp.asarray(distances, jnp.float32), jnp.asarray(valid, bool)
    size = valid.shape[0] if valid.ndim == 1 else -1
    if distances.shape != (size, size) or count < 1:
        raise ValueError(
            f'distances must be [M, M], valid [M] and count at least 1; got {distances.shape}, '
            f'{valid.shape} and {count}.'
        )
    apart = valid[:, None] & valid & ~jnp.eye(size, dtype=bool)
    pair = jnp.where(apart, distances, -jnp.inf).argmax()
    first = jnp.where(apart.any(), pair // size, valid.argmax())
    taken = [jnp.where(valid.any(), first, -1)]
    free, nearest = valid.at[first].set(False), distances[first]
    for _ in range(count - 1):
        new = jnp.where(free, nearest, -jnp.inf).argmax()
        taken.append(jnp.where(free.any(), new, -1))
        nearest = jnp.minimum(nearest, distances[new])
        free = free.at[new].set(False)
    return jnp.stack(taken).astype(jnp.int32)


def latent_shift(before: ArrayLike, after: ArrayLike, components: int = 2) -> jax.Array:
    """How far the mean of hidden states has moved, in the directions of most variance.

    || V^T (mean after - mean before) || with V the first principal components of all rows of both.

    Args:
      before, after: [N, D] hidden states of two networks for the same inputs.
      components: how many directions.

    Source: DED, arXiv 2508.09883, shift of the student's representations.
    """
    before, after = jnp.asarray(before), jnp.asarray(after)
    dtype = numerics.accumulation_dtype(before, after)
    both = jnp.concatenate([before, after]).astype(dtype)
    _, _, directions = jnp.linalg.svd(both - both.mean(0), full_matrices=False)
    moved = after.astype(dtype).mean(0) - before.astype(dtype).mean(0)
    return jnp.linalg.norm(directions[:components] @ moved)
