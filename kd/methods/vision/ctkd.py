"""CTKD: softened outputs at a temperature that is trained against the student.

Source: Li et al. 2022 (Curriculum Temperature), arXiv:2211.16231, the global temperature.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses import classification, divergence
from kd.method import Method, Objective, minimize
from kd.methods import teacher
from kd.metrics import mean
from kd.ranges import Count, Finite, NonNegative, Positive
from kd.state import NETWORK, PyTree

TEMPERATURE = 'temperature'


def reversed_gradient(x: jax.Array, scale: jax.typing.ArrayLike) -> jax.Array:
    """x, whose gradient is -`scale` times that of what follows (Ganin and Lempitsky 2015).

    `scale` gets no gradient.
    """
    scale = jax.lax.stop_gradient(jnp.asarray(scale))
    return jax.lax.stop_gradient((1 + scale) * x) - scale * x


def ctkd(
    context: Context,
    *,
    curriculum_steps: Count,
    low: Positive = 1.0,
    span: Positive = 20.0,
    start: Finite = 1.0,
    hard_weight: NonNegative = 0.1,
    soft_weight: NonNegative = 0.9,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """Labels, and softened outputs at the temperature that makes them hardest to match.

        loss = w CE(y, f(x)) + a T^2 KL_T(g || f),    T = low + span sigmoid(theta)

    The student descends; theta, by the same optimiser, ascends with lambda times its gradient,

        lambda = (1 - cos(pi min(n / curriculum_steps, 1))) / 2        in step n,

    so that what is asked grows with what is known. The release changes lambda by epochs, and holds
    it one epoch before 1; here it goes by steps, up to 1. An optimiser that divides by the
    gradient's size (Adam) takes most of lambda away again, but for its first steps.

    theta is the part `temperature` of the state; the stage's result is `network` alone.

    Args:
      context: the stage; needs a network, an optimiser, a teacher and integer labels.
      curriculum_steps: over which lambda grows; 10 epochs in the paper.
      low, span: of T, which lies in between low and low + span.
      start: of theta.
      hard_weight, soft_weight: w and a.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: a soft weight of 0, which trains no temperature.
    """
    network = context.classifier
    if not soft_weight:
        raise UserError('ctkd learns its temperature by the soft term; soft_weight must not be 0.')

    def init(key: jax.Array) -> PyTree:
        theta = {'params': {'theta': jnp.float32(start)}}
        return {NETWORK: network.init(key), TEMPERATURE: theta}

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        labels = batch['label']
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        output = network.apply(
            state.variables(part=NETWORK, params=params[NETWORK]), *network.of(batch),
            train=True, key=dropout_key,
        )  # fmt: skip
        said = teacher.teacher_logits(context, state, batch)
        share = jnp.minimum(state.step / curriculum_steps, 1.0)
        theta = params[TEMPERATURE]['theta']
        theta = reversed_gradient(theta, (1 - jnp.cos(jnp.pi * share)) / 2)
        temperature = low + span * jax.nn.sigmoid(theta)
        hard = classification.cross_entropy(output.logits, batch['label'])
        soft = temperature**2 * divergence.forward_kl(output.logits, said, temperature=temperature)
        metrics = {
            'hard_loss': mean(hard),
            'soft_loss': mean(soft),
            'temperature': mean(temperature[None]),
            'accuracy': mean(output.logits.argmax(-1) == labels),
        }
        total = mean(hard_weight * hard + soft_weight * soft)
        return Objective(total, metrics, {NETWORK: output.mutables})

    return minimize(loss, context.tx, init, micro_batches=micro_batches)
