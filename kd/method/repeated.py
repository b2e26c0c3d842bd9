"""Several updates on one batch."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.method.base import Batch, Method
from kd.method.guard import advanced
from kd.method.single import split
from kd.metrics import Metrics
from kd.state import State


def repeat(
    method: Method, updates: int, *, parts: int = 1, group: int = 1, unroll: bool = False
) -> Method:
    """Makes several updates in one step, on one batch: one collected by `with_collect`, say.

    Each update has a key of its own. The step advances by one, and so does what counts steps:
    periods, averages around it, the loop. The optimiser counts updates: `context.tx_of(updates)`
    is the stage's, with its schedule as long as all of them.

    The guard leaves out each update by itself.

    Statistics of a group or a batch (advantages, denominators of means) belong in `with_collect`
    around this: a loss sees parts of the batch, and of these micro-batches that tear groups apart.

    Args:
      method: the method of a single update.
      updates: how many in a step.
      parts: update u is made on part u mod `parts` of the batch; divides `updates`, so that every
        example counts as often.
      group: this many rows that follow one another stay in one part: the answers to one question.
      unroll: the loop over updates; for convolutions on CPU, which are slow inside a loop.
    """
    if updates < 1 or parts < 1 or group < 1 or updates % parts:
        raise ValueError(
            f'{updates} updates on {parts} parts of groups of {group}: all must be positive and '
            'the updates a multiple of the parts.'
        )
    if updates == 1:
        return method

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        cut = split(batch, parts, 'parts; change batch_size or parts', group)

        def update(current: State, number: jax.Array):
            examples = jax.tree.map(lambda x: x[number % parts], cut)
            key = jax.random.fold_in(state.key, number)
            given = current.replace(step=state.step, key=key, frozen=state.frozen)
            new, metrics = method.step(given, examples)
            return new.replace(step=state.step, key=state.key, frozen={}), metrics

        start = state.replace(frozen={})
        new, metrics = jax.lax.scan(update, start, jnp.arange(updates), unroll=unroll)
        metrics = jax.tree.map(lambda x: x.sum(0), metrics)
        return advanced(new.replace(frozen=state.frozen)), metrics

    return Method(method.init, step)
