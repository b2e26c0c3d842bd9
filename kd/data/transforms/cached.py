"""A data set with what a teacher says about it, from the cache of an earlier stage."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd import config as config_lib
from kd.data import sources
from kd.errors import UserError
from kd.io import cache
from kd.methods import cache as cache_method
from kd.training import stage as stage_lib


class CachedSource(sources.Source):
    """Another source whose batches bring the fields of a cache, `teacher_...`.

    Attributes:
      signal_temperature: at which the signals were recorded.
    """

    def __init__(
        self,
        source: sources.Source,
        form: cache.Form,
        shape: tuple[int, ...],
        stored: cache.Cache | None,
    ):
        # Everything else is the source's; its own initialisation would open it again.
        self._source, self._stored = source, stored
        self.name, self.split = source.name, source.split
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.spec = {**source.spec, **form.spec(shape)}
        self.signal_temperature = form.temperature

    def __len__(self) -> int:
        return len(self._source)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with the teacher's fields."""
        assert self._stored is not None
        batch = self._source.fetch(indices)
        return {**batch, **self._stored.fetch(batch['index'])}


def cached(
    split: str,
    config: config_lib.ConfigDict,
    workdir: Path | None,
    *,
    stage: str = 'cache',
) -> sources.Source:
    """The recipe's data with a cached teacher; splits that are not in the cache stay as they are.

    For the key `source` of a stage's data.

    Args:
      split: of the recipe's data set.
      config: the recipe.
      workdir: of the run; None while the recipe is only checked.
      stage: the stage of this recipe that wrote the cache.

    Raises:
      UserError: no such stage, or a cache of other data, of another teacher or in another form.
    """
    if stage not in config.stages:
        raise UserError(f"data.source.stage='{stage}' is no stage of {tuple(config.stages)}.")
    arguments = _arguments(config, stage)
    data = config_lib.to_plain(config.data)
    source = stage_lib.source_loader({**data, 'this': split}, config, workdir)('this')
    if data[arguments.pop('split')] != split:
        return source
    arguments.pop('per_file')
    form = cache.Form(**arguments)
    if workdir is None:
        if source.num_classes is None:
            raise UserError(f"data set '{source.name}' has no classes for a teacher to name.")
        return CachedSource(source, form, (source.num_classes,), None)
    directory = stage_lib.locate(config, stage, workdir)
    teacher = stage_lib.locate(config, config[stage].teacher, workdir)
    made_of = {
        'data': cache.source_fingerprint(source),
        'training of the teacher': cache.training_fingerprint(teacher),
    }
    stored = cache.Cache(directory, form, made_of)
    return CachedSource(source, form, stored.shape, stored)


def _arguments(config: config_lib.ConfigDict, stage: str) -> dict:
    """The keywords of the stage's writer, with its defaults."""
    for block in config_lib.to_plain(config[stage].writers).values():
        if config_lib.resolve(block['name']) is cache_method.teacher_outputs:
            parameters = inspect.signature(cache_method.teacher_outputs).parameters
            return {
                name: block.get(name, parameter.default)
                for name, parameter in parameters.items()
                if name != 'context'
            }
    raise UserError(f"stage '{stage}' has no writer kd.methods.cache.teacher_outputs.")
