"""Pairs of answers with what a reference has said of them, from the files of an earlier stage."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np

from kd import config as config_lib
from kd.data import sources
from kd.data.context import SourceContext, source_loader
from kd.errors import UserError
from kd.io import cache, shards
from kd.ranges import StageName

# Field of a batch: sums of log-probabilities of both answers under the reference, float32 [B, 2].
ANCHOR = 'anchor_log_p'
FOLDER, WHAT = 'anchors', 'set of sums of a reference'
RECORD = np.dtype('<f4')
_WRITER = 'kd.methods.reference_sums.reference_sums'


class AnchoredSource(sources.Derived):
    """Another source, in pairs, whose batches bring `anchor_log_p`."""

    def __init__(self, source: sources.Source, stored: shards.Reader | None):
        super().__init__(source, {ANCHOR: jax.ShapeDtypeStruct((2,), np.float32)})
        self._stored = stored

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with the sums."""
        assert self._stored is not None
        batch, size = self._source.fetch(indices), 2 * RECORD.itemsize
        records = self._stored.records(batch['index'])
        for example, record in zip(batch['index'], records, strict=True):
            if len(record) != size:
                raise self._stored.refuse(example)
        sums = np.frombuffer(b''.join(records), RECORD).reshape(-1, 2)
        return {**batch, ANCHOR: sums.astype(np.float32)}


def anchored(context: SourceContext, *, stage: StageName = 'sums') -> sources.Source:
    """The pairs of a stage with the sums that it wrote; splits without any stay as they are.

    For the key `source` of a stage's data: the stage then holds no reference.

    Args:
      context: a split of that stage's data, which are in pairs.
      stage: the stage of this recipe with the writer `reference_sums`.

    Raises:
      UserError: no such stage, or sums of other data or another network.
    """
    recipe = context.recipe
    if stage not in recipe.stages:
        raise UserError(f"data.source.stage='{stage}' is no stage of {tuple(recipe.stages)}.")
    blocks = [b for b in recipe.stages[stage].writers.values() if b['name'] == _WRITER]
    if not blocks:
        raise UserError(f"stage '{stage}' has no writer {_WRITER}.")
    data = config_lib.data_of(recipe.data, recipe.stages[stage].data)
    source = source_loader({**data, 'this': context.split}, recipe, context.workdir)('this')
    if data[blocks[0].get('split', 'train')] != context.split:
        return source
    if context.workdir is None:
        return AnchoredSource(source, None)
    made_of = {
        **sources.tokenizer_fingerprint(source),
        'data': sources.fingerprint(source),
        'training of the teacher': cache.training_fingerprint(
            context.locate(recipe.stages[stage].teacher)
        ),
    }
    folder = context.locate(stage) / FOLDER
    return AnchoredSource(source, shards.Reader(folder, WHAT, made_of=made_of))
