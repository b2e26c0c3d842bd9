"""Columns of the examples of a split, for writers that compute them (`kd.io.columns`)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from kd import config as config_lib
from kd.context import Context
from kd.data import columns as data_columns
from kd.errors import UserError
from kd.io import columns
from kd.parallel import distributed


def check_split(context: Context, split: str) -> None:
    """Raises `UserError` unless the stage's split is the recipe's: there it is looked for again."""
    data, own = context.recipe.data, config_lib.data_of(context.recipe.data, context.config.data)
    if split not in own or own[split] != data.get(split):
        raise UserError(
            f"{context.stage}: columns are kept of a split of the recipe's own data, and its "
            f"'{split}' is {own.get(split)!r}, not {data.get(split)!r}."
        )


def missing(context: Context, directory: Path, split: str, spec: columns.Spec) -> bool:
    """Whether the columns of a split are still to be found.

    Raises:
      UserError: the directory holds columns of something else.
    """
    return distributed.from_first(lambda: not _writer(context, directory, split, spec).complete())


def write(
    context: Context,
    directory: Path,
    split: str,
    spec: columns.Spec,
    values: Mapping[str, np.ndarray],
) -> None:
    """Writes the columns [N, ...] of a split; the first process does, and all wait for it."""
    distributed.from_first(lambda: _writer(context, directory, split, spec).write(values))


def _writer(context: Context, directory: Path, split: str, spec: columns.Spec) -> columns.Writer:
    assert context.locate is not None
    source = context.recipe_source(split)
    made_of = data_columns.fingerprints(context.recipe, context.stage, source, context.locate)
    return columns.Writer(directory, spec, len(source), made_of)
