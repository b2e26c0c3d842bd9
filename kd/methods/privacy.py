"""Differential privacy of a stage: how much noise its budget asks for, and what has been spent.

    privately(context, loss, init, epsilon=2.0, clip_norm=0.5)

is `minimize(loss, context.tx, init)` for records that nobody shall find out about. A record is a
row of the training data; the guarantee is for adding or removing one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from scipy import stats

from kd.context import Context
from kd.errors import UserError
from kd.method import Batch, Init, Loss, Method, Privacy, minimize, private, with_extra
from kd.metrics import Metrics, scalar
from kd.ranges import Count, Fraction, Positive
from kd.state import State
from kd.theory import privacy

# Name in `state.extra` of the Renyi divergences spent so far, float32 [orders].
SPENT = 'privacy'
# At most this share of delta may go to batches that do not fit their rows.
_OVERFLOW = 0.01


class Guarantee(NamedTuple):
    """What a stage promises, and what follows.

    Attributes:
      epsilon, delta: of the whole stage.
      noise_multiplier: sigma of every step.
      left: delta without the share of batches that do not fit their rows.
      divergences: of a step, float64, by the orders of `kd.theory.privacy.ORDERS`.
    """

    epsilon: float
    delta: float
    noise_multiplier: float
    left: float
    divergences: np.ndarray


def guarantee(context: Context, epsilon: float, delta: float = 0.0) -> Guarantee:
    """The noise that makes all steps of a stage (epsilon, delta)-private.

    Args:
      context: the stage; its data and `poisson` give the rate, its `steps` the rest.
      epsilon: of the whole stage.
      delta: of the whole stage; 0 for N^-1.1 of N records.

    Raises:
      UserError: batches that are not taken by coins, too few rows for them, or an epsilon that no
        noise reaches.
    """
    stage, config = context.stage, context.config
    records, expected, rows = len(context.source('train')), config.poisson, config.batch_size
    if not expected:
        raise UserError(
            f'{stage}: privacy is accounted for batches that coins decide; set {stage}.poisson to '
            f'the expected number of records of a batch, and {stage}.batch_size to some more.'
        )
    if expected > records:
        raise UserError(f'{stage}.poisson={expected} exceeds the {records:,} records there are.')
    rate, delta = expected / records, delta or records**-1.1
    lost = (1 + math.exp(epsilon)) * privacy.overflow(records, rate, rows, config.steps)
    if lost > _OVERFLOW * delta:
        rare = _OVERFLOW * delta / (1 + math.exp(epsilon)) / config.steps
        raise UserError(
            f'{stage}.batch_size={rows} is too few rows for {expected} expected records, of which '
            f'more come too often; take {int(stats.binom.isf(rare, records, rate))} or more.'
        )
    try:
        sigma = privacy.noise_multiplier(epsilon, delta - lost, rate, config.steps)
    except ValueError as error:
        raise UserError(f'{stage}.method: {error}') from error
    divergences = privacy.renyi_divergence(rate, sigma)
    return Guarantee(epsilon, delta, sigma, delta - lost, divergences)


def privately(
    context: Context,
    loss: Loss,
    init: Init,
    *,
    epsilon: Positive,
    clip_norm: Positive,
    delta: Fraction = 0.0,
    micro_batches: Count = 1,
) -> Method:
    """Minimises a loss of records without giving any of them away, see `kd.method.private`.

    What is private are the parameters of every step. The metrics of the training, the checkpoints'
    data and the choice of settings by results on private records are not; nor is what else has
    seen the records, such as a teacher that was trained on them.

    The metric `epsilon` is what the steps so far have spent by the accountant, at the stage's
    delta; it is the promised one at the stage's last step, and more beyond. (A line of metrics has
    the mean over its steps.)

    Args:
      context: the stage, with `poisson` set.
      loss, init, micro_batches: as of `minimize`.
      epsilon, delta: see `guarantee`.
      clip_norm: C.
    """
    promised = guarantee(context, epsilon, delta)
    made = Privacy(clip_norm, promised.noise_multiplier, context.config.poisson)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches, along=private(made))
    return accounted(method, promised)


def accounted(method: Method, promised: Guarantee) -> Method:
    """Keeps what has been spent in `state.extra`, and logs it as `epsilon`."""
    each = jnp.asarray(promised.divergences, jnp.float32)
    surcharges = jnp.asarray(privacy.surcharges(promised.left), jnp.float32)
    counting = with_extra(method, SPENT, jnp.zeros_like(each), lambda x, metrics, step: x + each)

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        state, metrics = counting.step(state, batch)
        epsilon = jnp.min(state.extra[SPENT] + surcharges)
        return state, {**metrics, 'epsilon': scalar(epsilon)}

    return Method(counting.init, step)
