"""What does a student give up of its teacher's law: its modes, its spread, its impossible tails?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.context import Context, Evaluator
from kd.losses import divergence, numerics, signal
from kd.losses.token import entropy
from kd.methods.lm import common
from kd.metrics import divide, mean
from kd.ranges import Count


def mass_on_top(student_logits: ArrayLike, teacher_logits: ArrayLike, count: int = 3) -> jax.Array:
    """Probability that the student gives to the teacher's `count` most probable outcomes, [...].

    Both logits [..., V]; of equally probable outcomes those of lower index count.
    """
    chosen = jax.lax.top_k(jnp.asarray(teacher_logits), count)[1]
    log_q = numerics.log_softmax(student_logits)
    return jnp.exp(jnp.take_along_axis(log_q, chosen, axis=-1)).sum(-1)


def law_metrics(
    student_logits: ArrayLike, teacher_logits: ArrayLike, *, top: int = 3
) -> dict[str, jax.Array]:
    """How two laws differ, by name, float32 [...] each; logits [..., V], in nats.

    valid: the student's mass on the teacher's `top` outcomes; entropy: the student's; tv:
    total variation; forward_kl: KL(teacher || student); reverse_kl: KL(student || teacher); score:
    the mean log-probability under the teacher of what the student says.
    """
    log_p, log_q = numerics.log_softmax(teacher_logits), numerics.log_softmax(student_logits)
    return {
        'valid': mass_on_top(student_logits, teacher_logits, top),
        'entropy': entropy(student_logits),
        'tv': divergence.total_variation(student_logits, teacher_logits),
        'forward_kl': divergence.forward_kl(student_logits, teacher_logits),
        'reverse_kl': divergence.reverse_kl(student_logits, teacher_logits),
        'score': jnp.where(log_q > -jnp.inf, jnp.exp(log_q) * log_p, 0.0).sum(-1),
    }


def coverage(context: Context, *, top: Count = 3) -> Evaluator:
    """`law_metrics` of the trained network against what the teacher says, by position."""
    network = context.network

    def update(state, batch):
        batch = common.rows(network, batch)
        student = network.apply(state.variables(), *network.of(batch)).logits
        teacher = common.teacher_signal(context, state, batch)
        values = law_metrics(student, signal.all_logits('coverage', teacher), top=top)
        return {name: mean(value, batch['mask']) for name, value in values.items()}

    return Evaluator(update, divide)
