"""What a teacher was asked and said while it sampled (`kd.methods.sampled`), for later stages.

data = dict(source=dict(name='kd.data.sampled.states', stage='trajectories'),
                train='train_states')
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from kd import config as config_lib
from kd.config import Recipe
from kd.data import sources
from kd.data.context import SourceContext, source_loader
from kd.errors import UserError
from kd.io import cache, shards
from kd.ranges import StageName
from kd.references import split_reference

Kept = Literal['states', 'ends']
WRITER = 'kd.methods.sampled.trajectories'
WHAT = 'set of samples'
# Beside the fields of the data, of a row.
NOISE, SAMPLE = 'noise', 'sample'


class Form:
    """What a row is: a record of a fixed size.

    Args:
      source: of the examples, whose fields but `input` and `index` are those of conditions.
      keep, steps, dtype: as of `kd.methods.sampled.trajectories`.

    Attributes:
      shape: of an example.
      rows: for each example.
      dtype: of a record: what was asked (`input`), what the teacher said (`target`), when (`time`),
        the scale of its guidance, and the condition.
    """

    def __init__(self, source: sources.Source, keep: Kept, steps: int, dtype: str) -> None:
        self.shape, self.keep = source.spec['input'].shape, keep
        self.rows = steps if keep == 'states' else 1
        self.conditions = {
            name: x for name, x in source.spec.items() if name not in ('input', 'index')
        }
        kept = np.dtype(dtype).newbyteorder('<')
        self.dtype = np.dtype([
            ('input', kept, self.shape),
            ('target', kept, self.shape),
            ('time', '<f4'),
            ('guidance', '<f4'),
            *((name, x.dtype, x.shape) for name, x in self.conditions.items()),
        ])  # fmt: skip

    @property
    def spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Of a row as it is read: floats are float32."""
        wide = jax.ShapeDtypeStruct(self.shape, np.float32)
        one = jax.ShapeDtypeStruct((), np.float32)
        return {'input': wide, 'target': wide, 'time': one, 'guidance': one, **self.conditions}

    def manifest(self, examples: int, per_file: int, grid: np.ndarray) -> dict[str, Any]:
        """Of a folder, without what it was made of."""
        return {
            'examples': examples * self.rows,
            'per_file': per_file * self.rows,
            'keep': self.keep,
            'grid': [float(t) for t in grid],
        }

    def records(
        self,
        asked: np.ndarray,
        said: np.ndarray,
        grid: np.ndarray,
        guidance: np.ndarray,
        batch: Mapping[str, Any],
    ) -> list[bytes]:
        """The rows of B trajectories: those of one example follow each other.

        Args:
          asked, said: [N, B, ...].
          grid: [N].
          guidance: [B].
          batch: conditions, [B, ...].
        """
        if self.keep == 'ends':
            asked, said, grid = asked[:1], said[-1:], grid[:1]
        rows = np.zeros(asked.shape[1::-1], self.dtype)
        rows['input'], rows['target'] = asked.swapaxes(0, 1), said.swapaxes(0, 1)
        rows['time'] = grid
        for name, given in (('guidance', guidance), *((n, batch[n]) for n in self.conditions)):
            given = np.asarray(given)
            rows[name] = given.reshape(len(rows), 1, *given.shape[1:])
        return [row.tobytes() for row in rows.reshape(-1)]

    def read(self, records: Sequence[bytes]) -> sources.Batch:
        """Fields [B, ...] of records."""
        rows = np.frombuffer(b''.join(records), self.dtype)
        return {name: rows[name].astype(x.dtype) for name, x in self.spec.items()}


class _Written(NamedTuple):
    """Rows of a stage, and the source and the split of their examples."""

    form: Form
    source: sources.Source
    split: str


def folder(directory: Path, split: str) -> Path:
    """Where a stage keeps its samples for a split."""
    return directory / f'{split}_samples'


def fingerprints(
    recipe: Recipe, stage: str, source: sources.Source, locate: Callable[[str], Path] | None
) -> dict[str, str]:
    """What samples were made of, as far as a reader can tell: the teacher and the data."""
    found = {'data': sources.fingerprint(source)}
    if locate is not None:
        place = locate(split_reference(recipe.stages[stage].teacher)[0])
        found['training of the teacher'] = cache.training_fingerprint(place)
    return found


def states(context: SourceContext, *, stage: StageName) -> sources.Source:
    """States on the trajectories of a stage, with what its teacher says of them.

    Rows have `input` x_t, `target` E[x0 | x_t] of the guided teacher, `time`, `guidance` and the
    condition. Of a split that the stage has written, 'train', they are the split 'train_states' or
    slices of it; other splits are those of the recipe's own data.

    Args:
      context: a split.
      stage: that has written them, with keep='states'.

    Raises:
      UserError: no such stage, samples of other data or another teacher, ends alone.
    """
    written = _written(context, stage, 'states')
    form, source, split = written.form, written.source, f'{written.split}_states'
    if context.split.partition('[')[0] != split:
        return context.recipe_data(context.split)
    if context.workdir is None:
        size = len(source) * form.rows
        data = _data(source, split, size, lambda _: sources.in_memory({}), form.spec)
        return sources.Source(data, context.split)
    stored = _stored(context, stage, written)

    def read(rows: np.ndarray) -> sources.Batch:
        return form.read(stored.records(rows))

    data = _data(source, split, len(stored), lambda _: read, form.spec)
    return sources.Source(data, context.split)


class Paired(sources.Derived):
    """Examples with a `noise` and the `sample` that a teacher made of it, for their condition.

    Attributes:
      grid: times of the sampler; the noise is at the first of them.
    """

    def __init__(
        self,
        source: sources.Source,
        form: Form,
        stored: shards.Reader | None,
        grid: tuple[float, ...] | None,
    ) -> None:
        wide = form.spec['input']
        super().__init__(source, {NOISE: wide, SAMPLE: wide})
        self._form, self._stored, self.grid = form, stored, grid

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with the pairs."""
        assert self._stored is not None
        batch = self._source.fetch(indices)
        rows = self._form.read(self._stored.records(batch['index']))
        return {**batch, NOISE: rows['input'], SAMPLE: rows['target']}


def pairs(context: SourceContext, *, stage: StageName) -> sources.Source:
    """The data of a stage, with a noise and the sample that its teacher made of it.

    A split that the stage has not written stays as it is.

    Args:
      context: a split.
      stage: that has written them, with keep='ends'.

    Raises:
      UserError: as of `states`.
    """
    written = _written(context, stage, 'ends')
    data = config_lib.data_of(context.recipe.data, context.recipe.stages[stage].data)
    source = source_loader({**data, 'this': context.split}, context.recipe, context.workdir)('this')
    if data[written.split] != context.split:
        return source
    if context.workdir is None:
        return Paired(source, written.form, None, None)
    stored = _stored(context, stage, written)
    return Paired(source, written.form, stored, tuple(stored.manifest['grid']))


def _written(context: SourceContext, stage: str, keep: Kept) -> _Written:
    recipe = context.recipe
    if stage not in recipe.stages:
        raise UserError(f"data.source names the stage '{stage}', of {tuple(recipe.stages)}.")
    blocks = [b for b in recipe.stages[stage].writers.values() if b['name'] == WRITER]
    if not blocks:
        raise UserError(f"stage '{stage}' has no writer {WRITER}.")
    block = blocks[0]
    if block.get('keep', 'states') != keep:
        raise UserError(f"stage '{stage}' keeps no {keep} of its samples; give it keep='{keep}'.")
    split = block.get('split', 'train')
    data = config_lib.data_of(recipe.data, recipe.stages[stage].data)
    source = source_loader(data, recipe, context.workdir)(split)
    form = Form(source, keep, block['steps'], block.get('dtype', 'float32'))
    return _Written(form, source, split)


def _stored(context: SourceContext, stage: str, written: _Written) -> shards.Reader:
    made_of = fingerprints(context.recipe, stage, written.source, context.locate)
    place = folder(context.locate(stage), written.split)
    return shards.Reader(
        place, WHAT, keys=('grid',), made_of=made_of, expected={'keep': written.form.keep}
    )


def _data(source, split, size, reader, spec) -> sources.DataSet:
    return sources.DataSet(
        source.name, {split: size}, reader, spec, source.num_classes, source.class_names
    )
