"""TAID: distillation from a teacher that moves away from the student (2025, arXiv:2501.16937).

The target interpolates between the student's own logits and the teacher's, softmax((1 - t) z_s +
t z_t), and t grows as fast as the student follows: between forward KL, which covers all modes of a
teacher that is too large, and reverse KL, which keeps one.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.context import Context
from kd.errors import UserError
from kd.losses import classification, signal, token
from kd.method import Method, Objective, minimize, with_extra
from kd.methods import start
from kd.methods.lm import common
from kd.metrics import mean, scalar
from kd.ranges import Count, Decay, Fraction, NonNegative

# Name of the schedule in `state.extra`.
SCHEDULE = 'taid'


class Schedule(NamedTuple):
    """What the interpolation goes by, each a float32 scalar.

    Attributes:
      t: weight of the teacher.
      loss: J of the step before; NaN before the first.
      momentum: running relative fall of J.
    """

    t: jax.Array
    loss: jax.Array
    momentum: jax.Array


def first(t_start: float) -> Schedule:
    """The schedule before the first step."""
    return Schedule(jnp.float32(t_start), jnp.float32(jnp.nan), jnp.float32(0))


def advance(
    schedule: Schedule,
    loss: ArrayLike,
    step: ArrayLike,
    steps: int,
    *,
    t_start: float = 0.4,
    t_end: float = 1.0,
    alpha: float = 5e-4,
    beta: float = 0.99,
) -> Schedule:
    """The schedule after a step (section 3.2 of the paper, and its released code).

        delta = (J' - J) / (J' + 1e-15),   m <- beta m + (1 - beta) delta
        t <- min(t_end, max(t_start + (t_end - t_start) n / N, t + alpha sigmoid(m) (1 - t)))

    with J' the loss of the step before; the first step only remembers its own. With alpha = 0, or
    for N below about 2 / alpha, t is the straight line.

    Args:
      schedule: before.
      loss: J, the mean loss of the whole batch at this step; a constant.
      step: n, the steps taken with this one.
      steps: N.
      t_start, t_end: where t begins and ends.
      alpha: the largest growth of t in a step.
      beta: momentum.
    """
    loss = jnp.asarray(jax.lax.stop_gradient(loss), jnp.float32)
    delta = (schedule.loss - loss) / (schedule.loss + 1e-15)
    momentum = beta * schedule.momentum + (1 - beta) * delta
    line = t_start + (t_end - t_start) * jnp.float32(step) / steps
    grown = schedule.t + alpha * jax.nn.sigmoid(momentum) * (1 - schedule.t)
    t = jnp.minimum(t_end, jnp.maximum(line, grown))
    begins = jnp.isnan(schedule.loss)
    return Schedule(
        jnp.where(begins, schedule.t, t), loss, jnp.where(begins, schedule.momentum, momentum)
    )


def taid(
    context: Context,
    *,
    t_start: Fraction = 0.4,
    t_end: Fraction = 1.0,
    alpha: NonNegative = 5e-4,
    beta: Decay = 0.99,
    hard_weight: Fraction = 0.0,
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Distils from a target between the student and its teacher.

        J = -sum_v p_t(v) log q(v) by token,   p_t = softmax((1 - t) sg[z_s] + t z_t)
        loss = (1 - hard_weight) J + hard_weight CE(y, q)

    averaged over the tokens of the batch that count. J keeps the entropy of p_t, as the schedule of
    the released code does: with the divergence in its place the relative falls would be noise.
    `state.extra['taid']` holds the schedule, see `advance`; it goes by J over the whole batch,
    whatever the micro-batches.

    Args:
      context: the stage; needs a network, an optimiser and a teacher, or `teacher_logits` in the
        batch; labels, or packed text (see `kd.methods.lm.common`). Starts from `references.start`,
        if there is one.
      t_start, t_end, alpha, beta: of the schedule.
      hard_weight: share of the cross-entropy with the labels.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
    """
    if t_start > t_end:
        raise UserError(f'{context.stage}.method: t_start={t_start} is above t_end={t_end}.')
    network = context.network

    def loss(params, state, batch, key) -> Objective:
        t = state.extra[SCHEDULE].t

        def of_token(logits, teacher, labels):
            target = token.interpolated_logits(logits, signal.all_logits('taid', teacher), t)
            soft = classification.cross_entropy(logits, jax.nn.softmax(target))
            hard = classification.cross_entropy(logits, labels)
            # A weight of 0 is exactly 0, also where a label is impossible.
            mixed = (1 - hard_weight) * soft + (hard_weight * hard if hard_weight else 0.0)
            return mixed, {'interpolated': soft}

        found = common.token_losses(
            network, state.variables(params=params), batch, of_token,
            teacher=common.teacher_signal(context, state, batch), key=key, chunk=chunk,
        )  # fmt: skip
        metrics = {
            'interpolated': mean(found.aux['interpolated'], found.where),
            't': scalar(t),
        }
        return Objective(mean(found.losses, found.where), metrics, found.mutables)

    def update(schedule, metrics, step):
        total, count = metrics['interpolated']
        return advance(
            schedule, total / count, step, context.steps,
            t_start=t_start, t_end=t_end, alpha=alpha, beta=beta,
        )  # fmt: skip

    init = start.from_reference(network.init, context)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    return with_extra(method, SCHEDULE, first(t_start), update)
