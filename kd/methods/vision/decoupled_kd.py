"""Decoupled knowledge distillation (Zhao et al. 2022, arXiv:2203.08679)."""

from __future__ import annotations

import jax

from kd.context import Context
from kd.data.transforms import augment
from kd.losses import classification
from kd.method import Method, Objective, minimize
from kd.methods import teacher
from kd.metrics import mean
from kd.ranges import Count, NonNegative, Positive, Size


def decoupled_kd(
    context: Context,
    *,
    alpha: NonNegative = 1.0,
    beta: NonNegative = 8.0,
    temperature: Positive = 4.0,
    hard_weight: NonNegative = 1.0,
    warmup_steps: Size = 0,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """Weights the target and the non-target part of the KL apart.

        loss = w CE(y, f(x)) + r T^2 (alpha TCKD + beta NCKD),   r = min(step / warmup_steps, 1)

    as in eq. 8 of the paper, with the linear warm-up and the T^2 of its official code.

    Args:
      context: the stage; needs a network, an optimiser, a teacher and integer labels.
      alpha, beta: weights of the target and the non-target part.
      temperature: T.
      hard_weight: w.
      warmup_steps: steps over which the distillation term is faded in; 0 for none.
      augmentation: for `kd.data.transforms.augment.augment`; not mixup, which leaves no single
        target.
      micro_batches: parts over which gradients are accumulated.
    """
    network = context.classifier

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=dropout_key)
        teacher_logits = teacher.teacher_logits(context, state, batch)
        hard = classification.cross_entropy(output.logits, batch['label'])
        soft = temperature**2 * classification.decoupled_kd(
            output.logits, teacher_logits, batch['label'],
            alpha=alpha, beta=beta, temperature=temperature,
        )  # fmt: skip
        ramp = jax.numpy.minimum(state.step / warmup_steps, 1.0) if warmup_steps else 1.0
        metrics = {'hard_loss': mean(hard), 'soft_loss': mean(soft)}
        return Objective(mean(hard_weight * hard + ramp * soft), metrics, output.mutables)

    return minimize(loss, context.tx, network.init, micro_batches=micro_batches)
