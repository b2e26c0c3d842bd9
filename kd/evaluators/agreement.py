"""How close is the student to its teacher?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.context import Context, Evaluator
from kd.evaluators.classification import negative_log_likelihood, predictor
from kd.losses import divergence
from kd.losses.token import entropy
from kd.metrics import divide, mean


def top_1_agreement(student_logits: jax.Array, teacher_logits: ArrayLike) -> jax.Array:
    """1 where both have the same argmax; logits [..., V], float32 [...]."""
    same = jnp.argmax(student_logits, -1) == jnp.argmax(teacher_logits, -1)
    return same.astype(jnp.float32)


def agreement(context: Context, *, weights: str = 'final') -> Evaluator:
    """Top-1 agreement, KL(teacher || student) at T = 1, both entropies, the teacher's own NLL.

    The teacher's NLL does not change over training; if it does, the frozen teacher is broken.
    """
    predict = predictor(context, weights)
    teacher = context.teacher

    def update(state, batch):
        student_logits = predict(state, batch)
        teacher_logits = teacher.apply(state.frozen['teacher'], *teacher.of(batch)).logits
        values = {
            'top_1': top_1_agreement(student_logits, teacher_logits),
            'kl': divergence.forward_kl(student_logits, teacher_logits),
            'student_entropy': entropy(student_logits),
            'teacher_entropy': entropy(teacher_logits),
            'teacher_nll': negative_log_likelihood(teacher_logits, batch['label']),
        }
        return {name: mean(value, batch['mask']) for name, value in values.items()}

    return Evaluator(update, divide)
