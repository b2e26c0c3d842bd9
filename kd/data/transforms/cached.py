"""A data set with what a teacher says about it, from the cache of an earlier stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from kd import networks
from kd.config import Recipe
from kd.data import sources
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.io import cache
from kd.network import output_shape
from kd.text import packing

_WRITER = 'kd.methods.cache.teacher_outputs'


class CachedSource(sources.Derived):
    """Another source whose batches bring the fields of a cache, `teacher_...`.

    Rows of text have them at the positions that count, by which they predict the next token.

    Attributes:
      signal_temperature: at which the signals were recorded.
      outcomes: how many the teacher knows.
    """

    def __init__(
        self,
        source: sources.Source,
        form: cache.Form,
        shape: tuple[int, ...],
        stored: cache.Cache | None,
    ):
        super().__init__(source, form.spec(shape))
        self._stored = stored
        self.signal_temperature, self.outcomes = form.temperature, shape[-1]

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with the teacher's fields."""
        assert self._stored is not None
        batch = self._source.fetch(indices)
        where = packing.targets(batch)[1] if self._stored.ragged else None
        return {**batch, **self._stored.fetch(batch['index'], where)}


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
    split, form, vocabulary = _written(recipe, stage)
    source = context.recipe_data(context.split)
    if recipe.data[split] != context.split:
        return source
    if context.workdir is None:
        where, reference = f'{stage}.teacher', recipe.stages[stage].teacher
        teacher = networks.described_network(recipe, reference, None, source, where=where)
        *positions, outcomes = output_shape(teacher)[1:]
        return CachedSource(source, form, (*positions, vocabulary or outcomes), None)
    made_of = {
        **sources.tokenizer_fingerprint(source),
        'data': sources.fingerprint(source),
        'training of the teacher': cache.training_fingerprint(
            context.locate(recipe.stages[stage].teacher)
        ),
    }
    stored = cache.Cache(context.locate(stage), form, made_of)
    return CachedSource(source, form, stored.shape, stored)


def _written(recipe: Recipe, stage: str) -> tuple[str, cache.Form, int]:
    """Name of the split that the stage's writer records, in which form, and its `vocabulary`."""
    for block in recipe.stages[stage].writers.values():
        if block['name'] == _WRITER:
            fields = {field.name for field in dataclasses.fields(cache.Form)}
            form = {name: value for name, value in block.items() if name in fields - {'name'}}
            return block.get('split', 'train'), cache.Form(**form), block.get('vocabulary', 0)
    raise UserError(f"stage '{stage}' has no writer {_WRITER}.")
