"""A stage in which a teacher makes samples, and what it was asked and said on the way is kept.

    config.trajectories = stage(
        teacher='teacher', steps=1, batch_size=250, method=dict(name='kd.methods.cache.nothing'),
        writers={'samples': dict(
            name='kd.methods.sampled.trajectories', steps=20, guidance=(1.0, 6.0))})

`kd.data.sampled` reads them: as states with what the teacher says of them, or as the noise and the
sample that came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.context import Writer as StageWriter
from kd.data import sampled
from kd.data.sources import Source
from kd.errors import UserError
from kd.io import shards
from kd.io.progress import say
from kd.methods import batches
from kd.parallel import distributed
from kd.ranges import Count, Finite
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.state import PyTree, State


def trajectories(
    context: Context,
    *,
    steps: Count,
    split: str = 'train',
    guidance: tuple[Finite, Finite] = (1.0, 1.0),
    sampler: str = 'ddim',
    keep: sampled.Kept = 'states',
    dtype: str = 'float32',
    per_file: Count = 1024,
) -> StageWriter:
    """Writes a trajectory of the teacher for each example to `DIRECTORY/SPLIT_samples/`.

    Noise and scale of a trajectory depend on the recipe's seed, the stage and the example's place
    alone. Files that are missing are made, complete ones are left alone.

    Args:
      context: the stage; its teacher is a denoiser or a flow.
      steps: N, of the grid that `kd.sampling.times.sampling` says, which is kept with them.
      split: of the stage's data, a trajectory for each of its examples.
      guidance: range of the scale, evenly, one for a trajectory; (1, 1) for none.
      sampler: one of `kd.sampling.diffusion.STEPS`.
      keep: 'states', N rows for each example, what is asked and said at every time; 'ends', one,
        the noise and the sample that comes of it.
      dtype: of what is kept; float16 takes half the room.
      per_file: examples of a file; rounded up to whole batches.

    Raises:
      UserError: another sampler.
    """
    if sampler not in diffusion.STEPS:
        raise UserError(f"sampler must be one of {list(diffusion.STEPS)}, got '{sampler}'.")
    network, move = context.teacher, diffusion.STEPS[sampler]()
    own = denoisers.of_network(network, context.trained_by.get('teacher'))
    path, grid = own.schedule, times.sampling(own.schedule, steps)
    form = sampled.Form(context.source(split), keep, steps, dtype)
    low, high = guidance

    def made(variables, batch, key):
        def drawn(index):
            of_noise, of_scale = jax.random.split(jax.random.fold_in(key, index))
            noise = jax.random.normal(of_noise, form.shape)
            return noise, jax.random.uniform(of_scale, minval=low, maxval=high)

        z, omega = jax.vmap(drawn)(batch['index'])
        scale = 1 if low == high == 1 else omega
        denoise = denoisers.guided(own, scale).bind(variables, denoisers.conditions(network, batch))
        begun = path.sigma(jnp.float32(grid[0])) * z
        asked, said = diffusion.recorded(path, denoise, begun, grid, key, step=move)
        return asked, said, omega, {name: batch[name] for name in form.conditions}

    whole = -(-per_file // context.batch_size) * context.batch_size

    def write(state: State, step: int, directory: Path) -> None:
        del step
        source, variables = context.source(split), state.frozen['teacher']
        manifest = form.manifest(len(source), whole, grid) | {
            'made_of': sampled.fingerprints(context.recipe, context.stage, source, context.locate)
        }
        writer = shards.Writer(sampled.folder(directory, split), manifest, sampled.WHAT)
        rows_of = _rows(context, made, source, variables, split)
        for file in distributed.from_first(writer.begin):
            records = [
                record
                for asked, said, omega, condition in rows_of(file * whole, (file + 1) * whole)
                for record in form.records(asked, said, grid, omega, condition)
            ]
            if file % jax.process_count() == jax.process_index():
                writer.write(file, records)
        distributed.agree(lambda: None)
        if distributed.is_first() and not writer.complete:
            size = writer.finish()['bytes_per_example']
            say(context.stage, f'{len(source) * form.rows:,} rows of {size:.0f} bytes on disk')

    return write


def _rows(
    context: Context, made: Callable[..., Any], source: Source, variables: PyTree, split: str
) -> Callable[[int, int], Iterator[tuple[Any, ...]]]:
    """(first, last + 1) of examples, the first of a batch -> their trajectories, by batches."""
    size, key = context.batch_size, batches.key_of(context, split)
    ask = batches.asking(made, variables, source, size)

    def rows_of(first: int, end: int) -> Iterator[tuple[Any, ...]]:
        end = min(end, len(source))
        for number in range(first // size, -(-end // size)):
            asked, said, omega, condition = ask(number, key)
            kept = min(size, end - number * size)
            fields = {name: x[:kept] for name, x in condition.items()}
            yield asked[:, :kept], said[:, :kept], omega[:kept], fields

    return rows_of
