"""A stage that runs the teacher once over a split and keeps what it says on disk.

    config.cache = stage(
        teacher='teacher', steps=1, batch_size=256, method=dict(name='kd.methods.cache.nothing'),
        writers={'teacher': dict(name='kd.methods.cache.teacher_outputs', size=64)})

A later stage reads it with `data=dict(source=dict(name='kd.data.cached.cached'), train=...)` and
runs no teacher.
"""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from kd.context import Context
from kd.context import Writer as StageWriter
from kd.data import pipeline
from kd.io import cache
from kd.io.progress import say
from kd.method import Batch, Method
from kd.metrics import Metrics, mean
from kd.parallel import distributed
from kd.parallel import mesh as mesh_lib
from kd.state import State


def nothing(context: Context) -> Method:
    """A method that trains nothing, for stages that only write files."""
    del context

    def init(key: jax.Array, frozen=None) -> State:
        # Orbax saves no empty tree.
        return State.create(key, {'none': jnp.zeros(())}, (), frozen=dict(frozen or {}))

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        examples = mean(jnp.zeros(batch['input'].shape[0]))
        return state.replace(step=state.step + 1), {'loss': examples}

    return Method(init, step)


def teacher_outputs(
    context: Context,
    *,
    split: str = 'train',
    form: str = 'top_k',
    size: int = 0,
    temperature: float = 1.0,
    proposal_temperature: float | None = None,
    dtype: str = 'float16',
    per_file: int = 4096,
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
    teacher = context.teacher
    batches_per_file = -(-per_file // context.batch_size)

    def write(state: State, step: int, directory: Path) -> None:
        del step
        source = context.source(split)
        variables = state.frozen['teacher']
        mesh = jax.tree.leaves(variables)[0].sharding.mesh
        assert context.locate is not None
        located = context.locate(context.config[context.stage].teacher)
        everywhere = NamedSharding(mesh, PartitionSpec())

        def outputs(variables, inputs, key):
            return kept.signal(teacher.apply(variables, inputs).logits, key)

        compute = jax.jit(outputs, out_shardings=everywhere)
        shape = jax.eval_shape(
            lambda v, x: teacher.apply(v, x).logits, variables, *teacher.inputs
        ).shape[1:]
        writer = cache.Writer(
            directory,
            kept,
            shape,
            examples=len(source),
            per_file=batches_per_file * context.batch_size,
            made_of={
                'teacher': cache.tree_fingerprint(variables),
                'training of the teacher': cache.training_fingerprint(located),
                'data': cache.source_fingerprint(source),
            },
        )
        part, parts = mesh_lib.batch_part(mesh)
        batches = pipeline.eval_batches(
            source, context.batch_size, host_index=part, host_count=parts
        )
        missing = distributed.from_first(writer.begin)
        for file in missing:
            rows: dict[str, list[np.ndarray]] = {}
            begin = file * batches_per_file
            for index in range(begin, min(begin + batches_per_file, len(batches))):
                batch = mesh_lib.put_batch(
                    {'input': batches[index]['input']}, mesh_lib.batch_sharding(mesh)
                )
                # By position, so that a cache that was cut off has the draws of one that was not.
                key = jax.random.fold_in(jax.random.key(context.config.seed), index)
                found = jax.device_get(compute(variables, batch['input'], key))
                count = min(context.batch_size, len(source) - index * context.batch_size)
                for name in writer.record.names or ():
                    rows.setdefault(name, []).append(getattr(found, name)[:count])
            if file % jax.process_count() == jax.process_index():
                writer.write(file, {name: np.concatenate(x) for name, x in rows.items()})
        distributed.agree(lambda: None)
        if missing and distributed.is_first():
            sizes = writer.finish()
            say(
                context.stage,
                f'{len(source):,} examples of {sizes["record_bytes"]} bytes, '
                f'{sizes["bytes_per_example"]:.0f} on disk; dense float32 would be '
                f'{sizes["dense_bytes_per_example"]}',
            )

    return write
