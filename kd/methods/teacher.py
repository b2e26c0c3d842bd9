"""What the teacher says about a batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from kd.context import Context
from kd.errors import UserError
from kd.io import cache
from kd.losses.signal import TeacherSignal
from kd.method import Batch
from kd.network import output_shape
from kd.state import State

# The source whose batches bring what the teacher of an earlier stage has said.
CACHED = 'kd.data.transforms.cached.cached'


def teacher_logits(context: Context, state: State, batch: Batch) -> jax.Array | TeacherSignal:
    """The frozen teacher's logits [B, V] for the batch.

    A batch that brings fields of a cache (`kd.data.transforms.cached`) is taken at its word, and no
    teacher is run; such a cache holds for inputs that are not augmented, which
    `kd.data.transforms.augment` sees to. One of top-k or sampled outputs gives a TeacherSignal,
    which divergences take in place of logits.

    Raises:
      UserError: a cache of another teacher than the stage's, or of other outcomes than the student
        has.
    """
    _check_cached(context)
    if cache.PREFIX + 'logits' in batch:
        return batch[cache.PREFIX + 'logits']
    if not is_cached(batch):
        teacher = context.teacher
        return teacher.apply(state.frozen['teacher'], *teacher.of(batch)).logits
    temperature = getattr(context.source('train'), 'signal_temperature', 1.0)
    signal = cache.signal_in(batch, temperature)
    assert signal is not None
    return signal


def is_cached(batch: Mapping[str, Any]) -> bool:
    """Whether a batch, or the spec of one, brings what a teacher has said."""
    return any(name.startswith(cache.PREFIX) for name in batch)


def _check_cached(context: Context) -> None:
    """Refuses data that bring what another teacher has said, or of other outcomes."""
    stage, source = context.config, context.config.data.get('source', {})
    if source.get('name') != CACHED:
        return
    name = source.get('stage', 'cache')
    cached = context.recipe.stages[name]
    if stage.teacher and cached.teacher != stage.teacher:
        raise UserError(
            f"{context.stage}.teacher is '{stage.teacher}', and its data bring what "
            f"'{cached.teacher}' has said; name one of them."
        )
    outcomes = getattr(context.source('train'), 'outcomes', None)
    if context.optional_network is None or outcomes is None:
        return
    ours = output_shape(context.optional_network)[-1]
    if ours != outcomes:
        cut = f", or the writer of '{name}' vocabulary={ours}" if ours < outcomes else ''
        raise UserError(
            f"{context.stage}.network has {ours:,} outputs, and '{name}' keeps what a teacher says "
            f'of {outcomes:,}; give the network num_classes={outcomes}{cut}.'
        )
