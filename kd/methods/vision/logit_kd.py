"""Distillation from softened outputs (Hinton, Vinyals, Dean 2015, arXiv:1503.02531)."""

from __future__ import annotations

import jax

from kd import callables
from kd.context import Context
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses import check_micro_batches, classification, outcomes
from kd.method import Method, Objective, minimize
from kd.methods import teacher
from kd.metrics import mean
from kd.ranges import Count, Fraction, Positive


def logit_kd(
    context: Context,
    *,
    divergence: str = 'kd.losses.divergence.forward_kl',
    temperature: Positive = 4.0,
    soft_weight: Fraction = 0.9,
    label_smoothing: Fraction = 0.0,
    augmentation: tuple = (),
    micro_batches: Count = 1,
    **divergence_arguments,
) -> Method:
    """A mixture of the hard labels and of a divergence to the teacher's outputs.

        loss = (1 - a) CE(y, f(x)) + a T^2 D(f(x), g(x); T)

    The factor T^2 keeps the gradient of the soft term of one size as T grows (section 2.1 of the
    paper). The teacher g sees the same augmented input x as the student f.

    Args:
      context: the stage; needs a network, an optimiser, a teacher and labelled data.
      divergence: import path of `d(student_logits, teacher_logits, *, temperature) -> [B]`: one of
        `kd.losses.divergence`, or a function of your own.
      temperature: T.
      soft_weight: a in [0, 1].
      label_smoothing: of the hard term.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.
      **divergence_arguments: further keywords of the divergence (`beta` of generalized_jsd, ...).
    """
    network = context.classifier
    if not 0.0 <= soft_weight <= 1.0:
        raise UserError(f'soft_weight must lie in [0, 1], got {soft_weight}.')
    soft_loss = callables.resolve(divergence)
    check_micro_batches(soft_loss, micro_batches)
    callables.check_arguments(soft_loss, divergence_arguments, where=f'method ({divergence})')

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=dropout_key)
        teacher_logits = teacher.teacher_logits(context, state, batch)
        hard = classification.cross_entropy(
            output.logits, batch['label'], label_smoothing=label_smoothing
        )
        soft = temperature**2 * outcomes.per_position(
            soft_loss,
            output.logits,
            teacher_logits,
            temperature=temperature,
            **divergence_arguments,
        )
        losses = (1.0 - soft_weight) * hard + soft_weight * soft
        metrics = {'hard_loss': mean(hard), 'soft_loss': mean(soft)}
        return Objective(mean(losses), metrics, output.mutables)

    return minimize(loss, context.tx, network.init, micro_batches=micro_batches)
