"""What the teacher says about a batch."""

from __future__ import annotations

import jax

from kd.context import Context
from kd.method import Batch
from kd.state import State


def teacher_logits(context: Context, state: State, batch: Batch) -> jax.Array:
    """The frozen teacher's logits [B, V] for `batch['input']`.

    A batch that brings `teacher_logits` (from a cache) is taken at its word, and no teacher is
    run; such a cache holds for inputs that are not augmented.
    """
    if 'teacher_logits' in batch:
        return batch['teacher_logits']
    return context.teacher.apply(state.frozen['teacher'], batch['input']).logits
