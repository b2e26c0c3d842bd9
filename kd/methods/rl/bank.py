"""Summaries of what was tried before, a few of each task, kept in `state.extra`.

    slot, there = select(bank, task, explore)          # before a task is tried
    bank = credit(bank, task, slot, there, reward)     # what came of it
    bank = insert(bank, task, summaries)               # for the next time

All are pure, and of fixed shapes: N tasks, K slots for each, L tokens in a slot.
"""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Bank:
    """Summaries and what came of them.

    Attributes:
      tokens: int32 [N, K, L].
      there: bool [N, K], the slots that hold one.
      uses: float32 [N, K], how often it was given to somebody.
      total: float32 [N, K], the sum of the rewards of these times.
      written: int32 [N], how many there have been of a task; the next goes into the slot
        `written` mod K, the oldest.
    """

    tokens: jax.Array
    there: jax.Array
    uses: jax.Array
    total: jax.Array
    written: jax.Array


def empty(tasks: int, slots: int, length: int) -> Bank:
    """A bank without any."""
    shape = tasks, slots
    return Bank(
        tokens=jnp.zeros((*shape, length), jnp.int32),
        there=jnp.zeros(shape, bool),
        uses=jnp.zeros(shape),
        total=jnp.zeros(shape),
        written=jnp.zeros(tasks, jnp.int32),
    )


def select(bank: Bank, task: jax.Array, explore: float = 1.0) -> tuple[jax.Array, jax.Array]:
    """The summary to be tried next, by the upper bound of what it may be worth.

        never used ones first, then argmax  mean reward + explore sqrt(ln N_x / n)

    n is how often it was used, N_x how often those of the task in the bank were.

    Args:
      bank: of N tasks.
      task: int [B].
      explore: 0 for the best mean.

    Returns:
      The slot, int32 [B], and whether the task has any, bool [B].

    Source: Skill-SD, arXiv 2604.10674, which gives no `explore`; UCB1, Auer et al. 2002.
    """
    there, uses, total = bank.there[task], bank.uses[task], bank.total[task]
    count = jnp.maximum(uses, 1)
    tries = jnp.maximum(uses.sum(-1, keepdims=True), 1)
    bound = total / count + explore * jnp.sqrt(jnp.log(tries) / count)
    bound = jnp.where(there, jnp.where(uses == 0, jnp.inf, bound), -jnp.inf)
    return bound.argmax(-1).astype(jnp.int32), there.any(-1)


def credit(
    bank: Bank, task: jax.Array, slot: jax.Array, there: jax.Array, reward: jax.Array
) -> Bank:
    """The bank after these were used: all [B], `reward` what came of it; nothing unless `there`."""
    counted = there.astype(jnp.float32)
    return dataclasses.replace(
        bank,
        uses=bank.uses.at[task, slot].add(counted),
        total=bank.total.at[task, slot].add(counted * reward),
    )


def insert(bank: Bank, task: jax.Array, tokens: jax.Array) -> Bank:
    """The bank with a further summary int32 [B, L] of each of these tasks [B], in the place of the
    oldest if it is full."""
    slot = bank.written[task] % bank.there.shape[1]
    return dataclasses.replace(
        bank,
        tokens=bank.tokens.at[task, slot].set(tokens),
        there=bank.there.at[task, slot].set(True),
        uses=bank.uses.at[task, slot].set(0.0),
        total=bank.total.at[task, slot].set(0.0),
        written=bank.written.at[task].add(1),
    )
