"""A data set with columns that an earlier stage has found of its examples (`kd.io.columns`).

data = dict(source=dict(name='kd.data.columns.joined', stage='weights', names=('weight',)),
            train='train[:600]', ...)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kd import callables
from kd import config as config_lib
from kd.config import Recipe
from kd.data import sources
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.io import cache, columns
from kd.ranges import SplitName, StageName
from kd.references import is_foreign, split_reference

# What `kd.data.transforms.cached` knows of a cache, for methods that ask a source for it.
_KNOWN = ('signal_temperature', 'outcomes')


class Joined(sources.Derived):
    """Another source whose batches bring columns, by the `index` of the example."""

    def __init__(
        self, source: sources.Source, spec: columns.Spec, stored: columns.Columns | None
    ) -> None:
        super().__init__(source, spec)
        self._names, self._stored = tuple(spec), stored
        for name in _KNOWN:
            if hasattr(source, name):
                setattr(self, name, getattr(source, name))

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with the columns."""
        assert self._stored is not None
        batch = self._source.fetch(indices)
        found = self._stored.fetch(batch['index'])
        return {**batch, **{name: found[name] for name in self._names}}


class Rows(sources.Derived):
    """Some examples of another source; their `index` stays that in the other one.

    Args:
      source: the other one.
      rows: int [N], which.
      split: their name.
    """

    def __init__(self, source: sources.Source, rows: np.ndarray, split: str) -> None:
        super().__init__(source, {})
        self._rows = np.asarray(rows)
        self.split = split

    def __len__(self) -> int:
        return len(self._rows)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`."""
        return self._source.fetch(self._rows[np.asarray(indices)])


class Written(NamedTuple):
    """Columns of a stage: of which split, their shapes, and they themselves, if there are any."""

    split: str
    spec: columns.Spec
    stored: columns.Columns | None


def joined(
    context: SourceContext,
    *,
    stage: StageName,
    names: tuple[str, ...] = (),
    of: Mapping[str, Any] | None = None,
    keep: str = '',
) -> sources.Source:
    """The recipe's data with columns of a stage; splits that it did not write stay as they are.

    For the key `source` of a stage's data.

    Args:
      context: a split of the recipe's data set.
      stage: the stage of this recipe that wrote them.
      names: of the columns; () for all.
      of: block of a source that has the same examples, in place of the recipe's data.
      keep: a column of truth values: examples of which it is false are left out. `index` stays that
        of all examples.

    Raises:
      UserError: no such stage or column, or columns of other data or another network.
    """
    found = _written(context, stage)
    source = inner(context, of)
    if found.split != context.split:
        return source
    where = 'data.source'
    columns.check_names(names, found.spec, f'{where}.names')
    spec = {name: found.spec[name] for name in names or found.spec}
    made = Joined(source, spec, found.stored)
    if not keep:
        return made
    columns.check_names((keep,), found.spec, f'{where}.keep')
    if found.stored is None:
        return made  # As many as there may be.
    rows = np.flatnonzero(found.stored.all()[keep])
    if not len(rows):
        raise UserError(f"{where}: no example of stage '{stage}' has '{keep}'.")
    return Rows(made, rows, f'{context.split} where {keep}')


def inner(context: SourceContext, block: Mapping[str, Any] | None) -> sources.Source:
    """The source of a block, or a split of the recipe's own data."""
    if not block:
        return context.recipe_data(context.split)
    return config_lib.build(block, context, where='data.source.of')


def written(
    recipe: Recipe,
    stage: str,
    load: Callable[[str], sources.Source],
    locate: Callable[[str], Path] | None,
) -> Written:
    """The columns of a stage.

    Args:
      recipe: the recipe.
      stage: its name.
      load: a split of the recipe's own data, as it is written there.
      locate: directory of a stage; None where there are no files yet.

    Raises:
      UserError: as of `joined`.
    """
    if stage not in recipe.stages:
        raise UserError(f"data.source.stage='{stage}' is no stage of {tuple(recipe.stages)}.")
    for block in recipe.stages[stage].writers.values():
        split = recipe.data[block.get('split', 'train')]
        source = load(split)
        spec = columns.spec_of(callables.resolve(block['name']), source)
        if spec is None:
            continue
        if locate is None:
            return Written(split, spec, None)
        made_of = fingerprints(recipe, stage, source, locate)
        return Written(split, spec, columns.Columns(locate(stage), spec, made_of))
    raise UserError(f"stage '{stage}' has no writer of columns.")


def _written(context: SourceContext, stage: str) -> Written:
    locate = None if context.workdir is None else context.locate
    return written(context.recipe, stage, context.recipe_data, locate)


def fingerprints(
    recipe: Recipe, stage: str, source: sources.Source, locate: Callable[[str], Path]
) -> dict[str, str]:
    """What columns were made of: the data, and how the networks that the stage names were trained.

    Args:
      recipe: the recipe.
      stage: that writes the columns.
      source: the split, of the recipe's own data.
      locate: directory of a stage.
    """
    config = recipe.stages[stage]
    named = {**config.references, **({'teacher': config.teacher} if config.teacher else {})}
    found = {'data': sources.fingerprint(source)}
    for label, reference in sorted(named.items()):
        name = reference if is_foreign(reference) else split_reference(reference)[0]
        found[f'training of {label}'] = cache.training_fingerprint(locate(name))
    return found


def acquired(
    context: SourceContext, *, stage: StageName, labelled: SplitName = 'labelled'
) -> sources.Source:
    """Labelled examples, and those that a teacher was asked about: `queried` tells them apart.

    The latter have the logits of an `answer`, and its class for a label; of the rest of the split
    nothing is read. Other splits stay as they are.

    Args:
      context: a split of the recipe's data set.
      stage: with the writer `kd.methods.vision.robust_active_distillation.query`.
      labelled: split of the recipe's data, none of whose examples is in that of the stage.

    Raises:
      UserError: as of `joined`.
    """
    found = _written(context, stage)
    source = context.recipe_data(context.split)
    if found.split != context.split:
        return source
    columns.check_names(('queried', 'answer'), found.spec, 'data.source')
    rows = np.arange(len(source))
    if found.stored is not None:
        rows = np.flatnonzero(found.stored.all()['queried'])
    own = context.recipe_data(context.recipe.data[labelled])
    return _Acquired(own, Rows(Joined(source, found.spec, found.stored), rows, context.split))


class _Acquired(sources.Derived):
    """The examples of one source, then those of another that brings more fields."""

    def __init__(self, first: sources.Source, second: sources.Source) -> None:
        more = {name: x for name, x in second.spec.items() if name not in first.spec}
        super().__init__(first, more)
        self._second, self._more = second, more

    def __len__(self) -> int:
        return len(self._source) + len(self._second)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`."""
        indices = np.asarray(indices)
        later = indices >= len(self._source)
        batch = {name: np.zeros((len(indices), *x.shape), x.dtype) for name, x in self.spec.items()}
        for at, source, start in (
            (~later, self._source, 0),
            (later, self._second, len(self._source)),
        ):
            for name, value in source.fetch(indices[at] - start).items() if at.any() else ():
                batch[name][at] = value
        # What the labels of these are is not known.
        batch['label'][later] = batch['answer'][later].argmax(-1)
        batch['index'] = indices.astype(np.int32)
        return batch


def beside(
    context: SourceContext,
    *,
    split: str,
    of: Mapping[str, Any] | None = None,
    prefix: str = 'labelled_',
) -> sources.Source:
    """The recipe's data, each example with one of another split: labelled beside unlabelled.

    The other's fields bear the prefix. Example i is met by example i mod M of the other split; over
    shuffled epochs every batch has about as many of each.

    Args:
      context: a split of the recipe's data set; only `train` has company, other splits stay.
      split: of the recipe's data, as written in the recipe: 'train[:4000]'.
      of: block of a source in place of the recipe's data.
      prefix: of the other's fields.
    """
    source = inner(context, of)
    if context.split != context.recipe.data.get('train'):
        return source
    return _Beside(source, context.recipe_data(split), prefix)


class _Beside(sources.Derived):
    def __init__(self, source: sources.Source, other: sources.Source, prefix: str) -> None:
        spec = {prefix + name: x for name, x in other.spec.items()}
        super().__init__(source, spec)
        self._other, self._prefix = other, prefix

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with the other split's fields."""
        batch = self._source.fetch(indices)
        met = self._other.fetch(np.asarray(indices) % len(self._other))
        return {**batch, **{self._prefix + name: x for name, x in met.items()}}
