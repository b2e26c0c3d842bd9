"""Recursive meta-distillation (Flouro, Chadwick 2026, arXiv:2601.13100).

Generations are stages. Generation t + 1 is trained on a meta-teacher made of generation t and of
one base teacher, which is the same for all. Without weight on the base teacher, what each
generation gets wrong adds up; with it the errors stay bounded.
"""

from __future__ import annotations

import jax

from kd.context import Context
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses import divergence, numerics
from kd.method import Method, Objective, minimize
from kd.methods import teacher
from kd.metrics import mean
from kd.ranges import Count, Fraction, Positive
from kd.theory import meta_distillation


def recursive_meta_distillation(
    context: Context,
    *,
    lam: Fraction = 0.3,
    power: Fraction = 1.0,
    temperature: Positive = 1.0,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """A generation trained on a meta-teacher anchored to the base teacher.

        loss = KL(sg[M] || S'),   M = ((1 - lam) S^power + lam T^power)^(1/power) / Z

    per example, or per position of a sequence. S is `references.student`, the generation before;
    T is the stage's `teacher`; both softened at `temperature`, as is S'. With power 1 the gradient
    is that of (1 - lam) KL(S || S') + lam KL(T || S').

    Args:
      context: the stage; needs a network, an optimiser and a teacher with logits [B, V] or
        [B, L, V], and below lam = 1 also `references.student`.
      lam: weight of the base teacher in [0, 1]; 0 is the recursion without an anchor, 1 plain
        distillation, as the first generation has it.
      power: 1 linear, 0 geometric, or between.
      temperature: T > 0; the loss is multiplied by T^2.
      augmentation: of images, for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.
    """
    if not 0 <= lam <= 1:
        raise UserError(f'lam is the weight of the base teacher, in [0, 1]; got {lam}.')
    if temperature <= 0:
        raise UserError(f'temperature must be positive, got {temperature}.')
    if lam < 1 and 'student' not in context.references:
        raise UserError(
            f'lam={lam} mixes in the generation before: set {context.stage}.references to '
            "{'student': its stage}, or lam=1 for the first generation."
        )
    network = context.network

    def soften(logits):
        return numerics.log_softmax(logits, temperature=temperature)

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=dropout_key)
        base = soften(teacher.teacher_logits(context, state, batch))
        target = base
        if lam < 1:
            previous = context.references['student']
            student = soften(previous.apply(state.frozen['student'], *previous.of(batch)).logits)
            target = meta_distillation.anchor(student, base, lam, power)
        student_log_p = soften(output.logits)
        losses = divergence.forward_kl(student_log_p, jax.lax.stop_gradient(target))
        metrics = {'kl_to_base': mean(divergence.forward_kl(student_log_p, base))}
        return Objective(mean(temperature**2 * losses), metrics, output.mutables)

    return minimize(loss, context.tx, network.init, micro_batches=micro_batches)
