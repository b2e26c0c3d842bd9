"""How sure may one be of a network's first answer: its error, and the temperature that mends it."""

from __future__ import annotations

from typing import Literal

import jax.numpy as jnp
import numpy as np

from kd.context import Context, Evaluator
from kd.losses import calibration
from kd.methods.lm import common
from kd.metrics import divide, mean
from kd.ranges import Count
from kd.text.packing import targets


def temperature(
    context: Context,
    *,
    of: Literal['teacher', 'network'] = 'teacher',
    size: Count = 5,
    kind: Literal['logits', 'probabilities'] = 'logits',
    bins: Count = 10,
    chunk: Count = 256,
) -> Evaluator:
    """Fits the temperature of `kd.losses.calibration.recalibrate` on a split.

    `temperature`, the one of the grid `GRIDS[kind]` at which the k most probable outcomes, so
    recalibrated, have the least calibration error, and that error, `recalibrated`; `ece` and
    `accuracy` of the network as it is; `kept`, its mean mass on the k outcomes. Over all tokens
    that count, see `kd.methods.lm.common`.

    Args:
      context: the stage.
      of: the frozen teacher, or the network that is trained.
      size: k.
      kind: see `recalibrate`.
      bins: of the calibration errors.
      chunk: tokens at a time where logits are not formed whole.
    """
    network = context.teacher if of == 'teacher' else context.network
    grid = calibration.GRIDS[kind]

    def update(state, batch):
        variables = state.frozen['teacher'] if of == 'teacher' else state.variables()
        said = common.top_k(network, variables, batch, size, chunk=chunk)
        labels, where = targets(batch)
        where = common.examples_only(where, batch)
        right = said.indices[..., 0] == labels
        means = {'accuracy': mean(right, where), 'kept': mean(1 - said.tail, where)}
        own = calibration.binned(jnp.exp(said.log_probs[..., 0]), right, bins, where)
        every = calibration.bins_by_temperature(
            said.log_probs, said.indices, labels, kind, grid=grid, bins=bins, where=where
        )
        return means, own, every

    def finish(sums) -> dict[str, float]:
        means, own, every = sums
        found = {**divide(means), 'ece': calibration.expected_calibration_error(own)}
        errors = calibration.errors_by_temperature(every)
        best = int(np.argmin(errors))
        return {**found, 'temperature': grid[best], 'recalibrated': errors[best]}

    return Evaluator(update, finish)
