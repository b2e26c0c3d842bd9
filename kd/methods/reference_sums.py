"""A stage in which a reference scores pairs of answers once, for a later one that then needs none.

    config.sums = stage(
        teacher='tuned', steps=1, batch_size=64, method=dict(name='kd.methods.cache.nothing'),
        writers={'sums': dict(name='kd.methods.reference_sums.reference_sums')})

The later one reads them with `data=dict(source=dict(name='kd.data.transforms.anchored.anchored'),
train=...)`: half the networks, and half the forward passes of its steps.
"""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np

from kd.context import Context
from kd.context import Writer as StageWriter
from kd.data import sources
from kd.data.transforms import anchored
from kd.errors import UserError
from kd.io import cache, checksums, shards
from kd.io.progress import say
from kd.methods import batches
from kd.methods.lm import preference
from kd.parallel import distributed
from kd.ranges import Count
from kd.state import State


def reference_sums(
    context: Context, *, split: str = 'train', per_file: Count = 4096, chunk: Count = 256
) -> StageWriter:
    """Writes the teacher's sums of log-probabilities [2] of every pair to `DIRECTORY/anchors/`.

    A folder that was cut off goes on with the first file that is missing.

    Args:
      context: the stage; its teacher is the reference, and its data are in pairs.
      split: of the stage's data, read in its order.
      per_file: pairs in a file; rounded up to whole batches.
      chunk: tokens at a time where logits are not formed whole.

    Raises:
      UserError: data that are not in pairs.
    """
    source, teacher, size = context.source(split), context.teacher, context.batch_size
    if not source.pairs:
        raise UserError(
            f'{context.stage}: sums are of pairs of answers, and {source.name} is not in pairs; '
            'see kd.data.text.preferences and kd.data.generated.pairs.'
        )
    per_file = -(-per_file // size) * size

    def write(state: State, step: int, directory: Path) -> None:
        del step
        variables = state.frozen['teacher']
        assert context.locate is not None
        made_of = {
            **sources.tokenizer_fingerprint(source),
            'teacher': checksums.fingerprint(variables),
            'training of the teacher': cache.training_fingerprint(
                context.locate(context.config.teacher)
            ),
            'data': sources.fingerprint(source),
        }
        manifest = {'examples': len(source), 'per_file': per_file, 'made_of': made_of}
        writer = shards.Writer(directory / anchored.FOLDER, manifest, anchored.WHAT)

        def log_p(variables, batch):
            return preference.score(teacher, variables, batch, chunk=chunk).log_p

        ask = batches.asking(log_p, variables, source, size)

        for file in distributed.from_first(writer.begin):
            first = file * per_file // size
            last = min(first + per_file // size, -(-len(source) // size))
            sums = [np.asarray(ask(number), anchored.RECORD) for number in range(first, last)]
            found = np.concatenate(sums)
            if file % jax.process_count() == jax.process_index():
                writer.write(file, [row.tobytes() for row in found[: writer.count(file)]])
        distributed.agree(lambda: None)
        if distributed.is_first() and not writer.complete:
            writer.finish()
            say(context.stage, f'sums of {len(source):,} pairs')

    return write
