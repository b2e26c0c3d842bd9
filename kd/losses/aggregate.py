"""How losses of tokens become a loss: the one place that knows what is divided by what.

    weights = aggregate.weights(where, 'token_mean')           # of the whole batch, in `collect`
    rows = aggregate.per_row(losses, weights)                  # [B], then the mean over rows

A loss is the mean over the rows of a batch of sum_t w_t l_t. That mean is a (sum, count) pair, so
it is the same however the rows are spread over micro-batches, devices and hosts; the weights hold
every other denominator. These are of the whole batch: from a part of it they are other numbers.
"""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses import numerics

Mode = Literal['token_mean', 'sequence_mean', 'sequence_sum', 'constant']
MODES = ('token_mean', 'sequence_mean', 'sequence_sum', 'constant')
_BOOL = jnp.dtype(bool)


def weights(
    where: ArrayLike,
    mode: Mode,
    *,
    rows: ArrayLike | None = None,
    constant: float | None = None,
) -> jax.Array:
    """Weights of tokens, for which the mean over rows of sum_t w_t l_t is:

    | mode | loss | of |
    |---|---|---|
    | token_mean | sum l / number of tokens, over the whole batch | GKD, DistiLLM, TAID, DAPO |
    | sequence_mean | mean over sequences of their mean over tokens | GRPO, REDI, SimPO |
    | sequence_sum | mean over sequences of their sum over tokens | FIRST, DPO |
    | constant | mean over sequences of their sum over tokens / `constant` | Dr.GRPO |

    A sequence is a row with a token that counts: a row without one has weight 0 everywhere and is
    no part of any mean, so the loss is the same as without it. A batch of none but such rows is 0
    with zero gradient.

    Args:
      where: bool [B, R], the tokens that count.
      mode: see above.
      rows: bool [B], the rows that the caller's mean counts; None for all. The others count as
        empty: with `mean(rows_of_loss, batch['mask'])` this is `batch['mask']`.
      constant: positive, for the mode of this name and no other; the longest response, say.

    Returns:
      float32 [B, R], no gradient.

    Raises:
      ValueError: another mode, masks of other shapes, a constant missing, not positive or unused.
    """
    if mode not in MODES:
        raise ValueError(f'mode must be one of {", ".join(MODES)}; got {mode!r}.')
    if (constant is not None) != (mode == 'constant'):
        raise ValueError(f'constant goes with mode constant alone; got {constant} and mode {mode}.')
    where = jnp.asarray(where)
    rows = jnp.ones(where.shape[:1], bool) if rows is None else jnp.asarray(rows)
    if where.ndim != 2 or rows.shape != where.shape[:1] or {where.dtype, rows.dtype} != {_BOOL}:
        raise ValueError(
            f'where must be bool [B, R] and rows bool [B]; got {where.dtype} {where.shape} and '
            f'{rows.dtype} {rows.shape}.'
        )
    counted = (where & rows[:, None]).astype(jnp.float32)
    tokens = jnp.sum(counted, axis=1, keepdims=True)
    # What the mean over rows divides by, to be put right by what the mode divides by.
    divided = jnp.sum(rows, dtype=jnp.float32)
    if mode == 'token_mean':
        return counted * _over(divided, jnp.sum(tokens))
    scale = _over(divided, jnp.sum(tokens > 0, dtype=jnp.float32))
    if mode == 'sequence_mean':
        return counted * scale * _over(1.0, tokens)
    if constant is not None:
        numerics.check_positive('constant', constant)
        scale /= constant
    return counted * scale


def per_row(losses: ArrayLike, weights: ArrayLike) -> jax.Array:
    """sum_t w_t l_t of each row; tokens of weight 0 may hold anything.

    Args:
      losses: [..., R] of tokens.
      weights: [..., R] of `weights`.

    Returns:
      [...], float32 (float64 for float64 losses).
    """
    losses, weights = jnp.asarray(losses), jnp.asarray(weights)
    dtype = numerics.accumulation_dtype(losses)
    counts = weights != 0
    return jnp.sum(
        jnp.where(counts, weights, 0.0).astype(dtype)
        * jnp.where(counts, losses, 0.0).astype(dtype),
        axis=-1,
    )


def _over(a, b):
    """a / b, 0 where b is 0."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), 0.0)
