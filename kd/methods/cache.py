"""A stage that runs the teacher once over a split and keeps what it says on disk.

    config.cache = stage(
        teacher='teacher', steps=1, batch_size=256, method=dict(name='kd.methods.cache.nothing'),
        writers={'teacher': dict(name='kd.methods.cache.teacher_outputs', size=64)})

A later stage reads it with `data=dict(source=dict(name='kd.data.transforms.cached.cached'),
train=...)` and runs no teacher.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kd.context import Context
from kd.context import Writer as StageWriter
from kd.data import pipeline, sources
from kd.data.sources import Source
from kd.io import cache, checksums
from kd.io.progress import say
from kd.method import Batch, Method
from kd.metrics import Metrics, mean
from kd.parallel import distributed
from kd.parallel import mesh as mesh_lib
from kd.ranges import Count, Positive, Size
from kd.state import PyTree, State


def nothing(context: Context) -> Method:
    """A method that trains nothing, for stages that only write files."""
    del context

    def init(key: jax.Array, frozen=None) -> State:
        # Orbax saves no empty tree.
        return State.create(key, {'params': {'none': jnp.zeros(())}}, frozen=dict(frozen or {}))

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        examples = mean(jnp.zeros(len(jax.tree.leaves(batch)[0])))
        return state.replace(step=state.step + 1), {'loss': examples}

    return Method(init, step)


def teacher_outputs(
    context: Context,
    *,
    split: str = 'train',
    form: str = 'top_k',
    size: Size = 0,
    temperature: Positive = 1.0,
    proposal_temperature: Positive | None = None,
    dtype: str = 'float16',
    per_file: Count = 4096,
) -> StageWriter:
    """Writes the teacher's signal of every example of a split to `DIRECTORY/teacher/`.

    A cache that was cut off goes on with the first file that is missing; a complete one is left
    alone. In a run of several processes all run the teacher and the files are shared out.

    Args:
      context: the stage; needs a teacher.
      split: of the stage's data, read in its order and without augmentation.
      form, size, temperature, proposal_temperature, dtype: see `kd.io.cache.Form`.
      per_file: examples in a file; rounded up to whole batches.
    """
    kept = cache.Form(
        form=form,
        size=size,
        temperature=temperature,
        proposal_temperature=proposal_temperature,
        dtype=dtype,
    )
    batches_per_file = -(-per_file // context.batch_size)

    context.source(split)  # Raises where there is none.

    def write(state: State, step: int, directory: Path) -> None:
        del step
        source, variables = context.source(split), state.frozen['teacher']
        writer = _writer(
            context, kept, directory, source, variables, batches_per_file * context.batch_size
        )
        rows_of = _rows(context, kept, writer, source, variables)
        missing = distributed.from_first(writer.begin)
        for file in missing:
            rows = rows_of(range(file * batches_per_file, (file + 1) * batches_per_file))
            if file % jax.process_count() == jax.process_index():
                writer.write(file, rows)
        distributed.agree(lambda: None)
        if distributed.is_first() and not writer.complete:
            sizes = writer.finish()
            say(
                context.stage,
                f'{len(source):,} examples of {sizes["record_bytes"]} bytes, '
                f'{sizes["bytes_per_example"]:.0f} on disk; dense float32 would be '
                f'{sizes["dense_bytes_per_example"]}',
            )

    return write


def _writer(
    context: Context,
    kept: cache.Form,
    directory: Path,
    source: Source,
    variables: PyTree,
    per_file: int,
) -> cache.Writer:
    """A writer whose manifest names the teacher, its training and the data."""
    teacher = context.teacher
    assert context.locate is not None
    located = context.locate(context.config.teacher)
    logits = jax.eval_shape(lambda v, *x: teacher.apply(v, *x).logits, variables, *teacher.inputs)
    return cache.Writer(
        directory,
        kept,
        logits.shape[1:],
        examples=len(source),
        per_file=per_file,
        made_of={
            'teacher': checksums.fingerprint(variables),
            'training of the teacher': cache.training_fingerprint(located),
            'data': sources.fingerprint(source),
        },
    )


def _rows(
    context: Context, kept: cache.Form, writer: cache.Writer, source: Source, variables: PyTree
) -> Callable[[Iterable[int]], dict[str, np.ndarray]]:
    """Numbers of batches (those past the end are left out) -> what is stored of their examples."""
    teacher, size = context.teacher, context.batch_size
    mesh = jax.tree.leaves(variables)[0].sharding.mesh
    everywhere = NamedSharding(mesh, PartitionSpec())

    def outputs(variables, batch, key):
        return kept.signal(teacher.apply(variables, *teacher.of(batch)).logits, key)

    compute = jax.jit(outputs, out_shardings=everywhere)
    part, parts = mesh_lib.batch_part(mesh)
    batches = pipeline.eval_batches(source, size, host_index=part, host_count=parts)

    def rows_of(numbers: Iterable[int]) -> dict[str, np.ndarray]:
        rows: dict[str, list[np.ndarray]] = {}
        for number in numbers:
            if number >= len(batches):
                break
            batch = {name: batches[number][name] for name in teacher.fields}
            batch = mesh_lib.put_batch(batch, mesh_lib.batch_sharding(mesh))
            # By position, so that a cache that was cut off has the draws of one that was not.
            key = jax.random.fold_in(jax.random.key(context.recipe.seed), number)
            found = jax.device_get(compute(variables, batch, key))
            count = min(size, len(source) - number * size)
            for name in writer.record.names or ():
                rows.setdefault(name, []).append(getattr(found, name)[:count])
        return {name: np.concatenate(parts) for name, parts in rows.items()}

    return rows_of
