"""A data set with what a teacher says about it, from the cache of an earlier stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kd.config import Recipe
from kd.data import sources
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.io import cache

_WRITER = 'kd.methods.cache.teacher_outputs'


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
        self.seen = source.seen
        self.spec = {**source.spec, **form.spec(shape)}
        self.signal_temperature = form.temperature

    def __len__(self) -> int:
        return len(self._source)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with the teacher's fields."""
        assert self._stored is not None
        batch = self._source.fetch(indices)
        return {**batch, **self._stored.fetch(batch['index'])}


def cached(context: SourceContext, *, stage: str = 'cache') -> sources.Source:
    """The recipe's data with a cached teacher; splits that are not in the cache stay as they are.

    For the key `source` of a stage's data.

    Args:
      context: a split of the recipe's data set.
      stage: the stage of this recipe that wrote the cache.

    Raises:
      UserError: no such stage, or a cache of other data, of another teacher or in another form.
    """
    recipe = context.recipe
    if stage not in recipe.stages:
        raise UserError(f"data.source.stage='{stage}' is no stage of {tuple(recipe.stages)}.")
    split, form = _written(recipe, stage)
    source = context.recipe_data(context.split)
    if recipe.data[split] != context.split:
        return source
    if context.workdir is None:
        if source.num_classes is None:
            raise UserError(f"data set '{source.name}' has no classes for a teacher to name.")
        return CachedSource(source, form, (source.num_classes,), None)
    made_of = {
        'data': sources.fingerprint(source),
        'training of the teacher': cache.training_fingerprint(
            context.locate(recipe.stages[stage].teacher)
        ),
    }
    stored = cache.Cache(context.locate(stage), form, made_of)
    return CachedSource(source, form, stored.shape, stored)


def _written(recipe: Recipe, stage: str) -> tuple[str, cache.Form]:
    """Name of the split that the stage's writer records, and in which form."""
    for block in recipe.stages[stage].writers.values():
        if block['name'] == _WRITER:
            fields = {field.name for field in dataclasses.fields(cache.Form)}
            form = {name: value for name, value in block.items() if name in fields - {'name'}}
            return block.get('split', 'train'), cache.Form(**form)
    raise UserError(f"stage '{stage}' has no writer {_WRITER}.")
