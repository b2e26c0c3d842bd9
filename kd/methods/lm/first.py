"""FIRST: a teacher's few most probable tokens, recalibrated (Shum et al. 2024, arXiv:2408.12168).

A fine-tuned teacher is too sure of itself, and a student of its probabilities is too. Almost all of
its mass is on five tokens: these alone are kept, recalibrated by a temperature that a validation
split has decided on (`kd.evaluators.temperature`), and learnt.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.io import finished
from kd.losses import calibration, divergence, numerics, signal
from kd.losses.signal import TeacherSignal, TopK
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start
from kd.methods.lm import common
from kd.metrics import mean
from kd.ranges import Count, Fraction, Positive, Size, StageName

Against = Literal['all', 'listed', 'other']
# The evaluator that fits temperatures.
EVALUATOR = 'kd.evaluators.temperature.temperature'


def first(
    context: Context,
    *,
    size: Count = 5,
    kind: calibration.Recalibration = 'logits',
    temperature: Positive = 1.0,
    calibrated: Literal[''] | StageName = '',
    smoothing: Fraction = 0.1,
    against: Against = 'all',
    mean_over: Literal['sequence_sum', 'sequence_mean', 'token_mean'] = 'sequence_sum',
    blocks: tuple[Size, ...] = (),
    chunk: Count = 256,
    micro_batches: Count = 1,
) -> Method:
    """Forward KL from the teacher's k most probable tokens, recalibrated to P.

        loss = 1/B sum_b sum_i sum_{j <= k} P_ij (log P_ij - log q_ij)

    over the tokens i of row b that count, with q the student's softmax over the whole vocabulary:
    the gradient of its logits is (q - P) / B. By summing over tokens the rate grows with the length
    of responses, as in the released code. `against` has two more readings of it:

    - 'listed': q is rescaled to sum to 1 on the k tokens, as there. Nothing is said of the
      student's mass on others: its calibration is lost.
    - 'other': `as_released`, the degenerate objective of the released `use_other_token`.

    Args:
      context: the stage; needs a network, an optimiser, and a teacher or what one has said in the
        batch, `top_k` of this size or logits; labels, or packed text (see `kd.methods.lm.common`).
        Starts from `references.start`, if there is one.
      size: k.
      kind: of recalibration, see `kd.losses.calibration.recalibrate`.
      temperature: c, if `calibrated` names nothing.
      calibrated: a stage with the evaluator `kd.evaluators.temperature.temperature`, whose c it is:
        fitted on validation data, since on what the teacher has learnt it looks calibrated.
      smoothing: delta, for the kind 'smoothing' alone.
      against: see above.
      mean_over: a mode of `kd.losses.aggregate.weights`.
      blocks: see `kd.methods.lm.distillation.distillation`.
      chunk: tokens at a time where logits are not formed whole.
      micro_batches: parts over which gradients are accumulated.
    """
    network = context.network
    if calibrated:
        temperature = fitted(context, calibrated, kind, size)

    def of_token(logits, teacher, labels, weight):
        del labels
        said = listed(teacher, size)
        if against == 'other':
            value = as_released(logits, said)
        else:
            target = calibration.recalibrated(
                said, kind, temperature=temperature, smoothing=smoothing
            )
            if against == 'listed':
                target = dataclasses.replace(target, rest='renormalised')
            value = divergence.forward_kl(logits, target)
        aux = {'divergence': value, 'kept': 1 - said.tail}
        return jnp.where(weight > 0, weight * value, 0.0), aux

    def loss(params, state, batch, key) -> Objective:
        found = common.token_losses(
            network, state.variables(params=params), batch, of_token,
            teacher=common.teacher_signal(context, state, batch), key=key,
            per_token=(batch[common.TOKEN_WEIGHT],), chunk=chunk,
        )  # fmt: skip
        return Objective(mean(found.sums), found.metrics, found.mutables)

    transform = common.cut(blocks, context) if blocks else None
    init = start.from_reference(network.init, context, transform=transform)
    method = minimize(loss, context.tx, init, micro_batches=micro_batches)
    return with_collect(method, lambda state, batch, key: common.aggregated(batch, mean_over))


def listed(teacher: TeacherSignal, size: int) -> TopK:
    """The teacher's `size` most probable tokens, unless it comes as such.

    Raises:
      UserError: it comes as another number of them.
    """
    if not isinstance(teacher, TopK):
        return signal.top_k(signal.all_logits('first', teacher), size)
    if (found := teacher.indices.shape[-1]) != size:
        raise UserError(f'first has size={size}, and the teacher comes as its top {found} tokens.')
    return teacher


def as_released(student_logits: jax.Array, teacher: TopK) -> jax.Array:
    """What `use_other_token` of the released code minimises, [...]: a control, and no divergence.

        sum_j exp(P_j) (P_j - Q_j)      over the k tokens and 'any other'

    probabilities where `kl_div` with `log_target` takes logarithms. It is linear in Q, and least
    where all of the student's mass is on the teacher's most probable outcome. P is not
    recalibrated.

    Args:
      student_logits: [..., V].
      teacher: of [...].
    """
    q = jnp.exp(numerics.log_softmax(student_logits))
    listed_q = jnp.take_along_axis(q, teacher.indices, axis=-1)
    outside = jnp.where(signal.outcome_mask(teacher.indices, q.shape[-1]), 0.0, q)
    every_q = jnp.concatenate([listed_q, outside.sum(-1, keepdims=True)], -1)
    every_p = jnp.concatenate([jnp.exp(teacher.log_probs), teacher.tail[..., None]], -1)
    return jnp.sum(jnp.exp(every_p) * (every_p - every_q), axis=-1)


def fitted(context: Context, stage: str, kind: str, size: int) -> float:
    """The temperature that the evaluator of a finished stage has found; 1 while a recipe is traced.

    Raises:
      UserError: the stage has no such evaluator, or one of another kind or size; nothing was found.
    """
    where = f'{context.stage}.method.calibrated'
    evaluators = context.recipe.stages[stage].evaluators if stage in context.recipe.stages else {}
    own = {label: block for label, block in evaluators.items() if block['name'] == EVALUATOR}
    if len(own) != 1:
        raise UserError(f"{where}: '{stage}' must be a stage with one evaluator {EVALUATOR}.")
    ((label, block),) = own.items()
    theirs = block.get('kind', 'logits'), block.get('size', 5)
    if theirs != (kind, size):
        raise UserError(
            f"{where}: '{stage}' fits a temperature for kind={theirs[0]!r} and size={theirs[1]}, "
            f'and the method has kind={kind!r} and size={size}; give both the same.'
        )
    if context.locate is None:
        return 1.0
    done = finished.read_done(context.locate(stage)) or {}
    if f'{label}/temperature' not in done.get('metrics', {}):
        raise UserError(f"{where}: '{stage}' is not done, and has found no temperature yet.")
    return done['metrics'][f'{label}/temperature']
