"""What builders of data sources get to work with, and the splits of a recipe's data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kd import config as config_lib
from kd.config import Recipe
from kd.data import catalogue, sources
from kd.errors import UserError

# Keys of a recipe's data that are no splits.
_NOT_SPLITS = ('name', 'source')


@dataclasses.dataclass(frozen=True)
class SourceContext:
    """A split of a recipe's or a stage's data, seen by the function that makes its source.

    Attributes:
      split: what is asked for, such as 'train[:90%]'.
      recipe: the recipe.
      workdir: of the run, where earlier stages have left their files; None while a recipe is only
        checked, when a source's spec and length count alone.
    """

    split: str
    recipe: Recipe = dataclasses.field(default_factory=lambda: Recipe(stages={}, data={}))
    workdir: Path | None = None

    def load(self, name: str, split: str | None = None) -> sources.Source:
        """A split of a data set of the catalogue, this one by default."""
        folder = self.recipe.data_dir or None
        return catalogue.load(name, self.split if split is None else split, data_dir=folder)

    def recipe_data(self, split: str) -> sources.Source:
        """A split of the recipe's own data, written as in tfds: 'train[:90%]'."""
        data = {**self.recipe.data, 'this': split}
        return source_loader(data, self.recipe, self.workdir)('this')

    def locate(self, reference: str) -> Path:
        """Directory of a stage, by its name in the recipe or its path in another run."""
        return self.recipe.locate(reference, self.workdir)


def splits(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the splits of a recipe's or a stage's data."""
    return tuple(key for key in data if key not in _NOT_SPLITS)


def source_loader(
    data: Mapping[str, Any], recipe: Recipe, workdir: Path | None
) -> Callable[[str], sources.Source]:
    """`load(split)` for the splits named in `data`, each opened once.

    Data is named by `name`, for `kd.data.catalogue.load`; or by `source`, a block of a function
    `f(context, **arguments) -> Source` of a `SourceContext` that makes it, from the files of an
    earlier stage for example.
    """
    if 'name' not in data and 'source' not in data:
        raise UserError("config.data has no 'name' of a data set.")
    opened: dict[str, sources.Source] = {}

    def load(split: str) -> sources.Source:
        if split not in splits(data):
            raise UserError(f"config.data has no split '{split}', only {list(splits(data))}.")
        if split not in opened:
            context = SourceContext(data[split], recipe, workdir)
            if 'source' in data:
                opened[split] = config_lib.build(data['source'], context, where='data.source')
            else:
                opened[split] = context.load(data['name'])
        return opened[split]

    return load
