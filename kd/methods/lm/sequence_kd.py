"""Distillation through a teacher's answers: the student learns them as if they were right.

Sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947) where the symbols of an answer are
independent given the instruction; it is how bias passes from a teacher to its students without
anything but text (arXiv:2505.24842).

A language model's answers are written by a stage (`kd.methods.generate.responses`), and learnt by
`kd.methods.lm.distillation` with soft_weight=0 from `kd.data.generated.teacher_text`.
"""

from __future__ import annotations

import jax

from kd.context import Context
from kd.errors import UserError
from kd.losses import classification, signal
from kd.method import Method, Objective, minimize, with_collect
from kd.methods import start, teacher
from kd.metrics import mean
from kd.ranges import Count
from kd.theory.propagation import DECODINGS


def sequence_kd(context: Context, *, decoding: str = 'sampled', micro_batches: Count = 1) -> Method:
    """Cross-entropy with one answer of the teacher to every instruction.

        loss(x) = -1/L sum_l log softmax(f(x)_l)_{y_l},   y ~ softmax(g(x)) or y = argmax g(x)

    An instruction has the same answer at every pass over the data, as in a data set that the
    teacher has written: draws depend on the run and on the example's `index` alone.

    Args:
      context: the stage; needs a network with logits [B, V] or [B, L, V], an optimiser, and a
        teacher or `teacher_logits` in the batch. Labels are not looked at. Starts from
        `references.start`, if there is one.
      decoding: 'sampled' or 'greedy', of the teacher's answers.
      micro_batches: parts over which gradients are accumulated.
    """
    if decoding not in DECODINGS:
        raise UserError(f'decoding must be one of {DECODINGS}, got {decoding!r}.')
    network = context.classifier

    def collect(state, batch, key):
        del key  # Another one at every step.
        said = signal.as_signal(teacher.teacher_logits(context, state, batch))
        if not isinstance(said, signal.Dense):
            raise UserError(
                f'sequence_kd draws from the logits of a teacher, not from {type(said).__name__}.'
            )
        return {**batch, 'answer': answers(state.key, batch['index'], said.logits, decoding)}

    def loss(params, state, batch, key) -> Objective:
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=key)
        losses = classification.cross_entropy(output.logits, batch['answer'])
        agreement = mean(output.logits.argmax(-1) == batch['answer'])
        return Objective(mean(losses), {'agreement': agreement}, output.mutables)

    init = start.from_reference(network.init, context)
    return with_collect(minimize(loss, context.tx, init, micro_batches=micro_batches), collect)


def answers(
    key: jax.Array, index: jax.Array, logits: jax.Array, decoding: str = 'sampled'
) -> jax.Array:
    """A teacher's answers, int32 [B, ...]; each depends on its own logits and index alone.

    Args:
      key: of the run.
      index: int [B], which examples these are.
      logits: [B, ..., V] of symbols that are independent.
      decoding: 'sampled' or 'greedy'.
    """
    if decoding == 'greedy':
        return logits.argmax(-1)
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(index)
    return jax.vmap(jax.random.categorical)(keys, logits)
