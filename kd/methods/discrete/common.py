"""What methods of masked diffusion share: noised batches and the weights of their tokens.

A batch has `input` int [B, L], the symbols, and where it is text `response_mask` bool [B, L], those
that may be hidden, with `positions` and `segments` (`kd.text.packing`). A `label` is not looked at.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import masked_diffusion as losses
from kd.method import Batch
from kd.network import Network
from kd.references import START
from kd.sampling import masked


class Noise(NamedTuple):
    """How symbols are hidden: by which schedule, and behind which id."""

    schedule: losses.Schedule
    mask: int

    def __call__(self, batch: Batch, uniform: jax.Array, t: jax.Array) -> Batch:
        """The batch at times t [B]: `input` with the mask in it, `label` the symbols, and
        `response_mask` the hidden ones."""
        tokens, counted = batch['input'], counting(batch)
        z = losses.corrupt(uniform, tokens, self.schedule.alpha(t), self.mask, where=counted)
        return {**batch, 'input': z, 'label': tokens, 'response_mask': counted & (z == self.mask)}


def noise(context: Context, schedule: losses.ScheduleName, mask: int | None) -> Noise:
    """The noise of a stage's network.

    Raises:
      UserError: a network that has no mask, or is causal.
    """
    return Noise(losses.schedule(schedule), mask_of(context, context.network, 'network', mask))


def mask_of(context: Context, network: Network, what: str, mask: int | None) -> int:
    """`kd.sampling.masked.mask_of`, which says of what in the config it complains."""
    try:
        return masked.mask_of(network, mask)
    except ValueError as error:
        raise UserError(f'{context.stage}.{what}: {error}') from error


def check_start(context: Context, schedule: losses.ScheduleName) -> None:
    """Refuses a start that has learnt to uncover by another schedule than `schedule`."""
    block = context.trained_by.get(START, {})
    other = block.get('schedule', 'log_linear')
    if block and other != schedule:
        raise UserError(
            f"{context.stage}.method.schedule='{schedule}', and references.{START} was trained "
            f"with '{other}'; give both the same."
        )


def counting(batch: Batch) -> jax.Array:
    """bool [B, L], the symbols that may be hidden."""
    where = batch.get('response_mask', jnp.ones(batch['input'].shape, bool))
    return where & (batch['segments'] > 0) if 'segments' in batch else where


def share(weights: jax.Array, counted: jax.Array) -> jax.Array:
    """Weights [B, L] divided by the number of `counted` symbols of their rows, 1 for none."""
    return weights / jnp.maximum(counted.sum(-1, keepdims=True), 1)
