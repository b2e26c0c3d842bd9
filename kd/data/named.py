"""Several sets of data in one recipe, of which a split names one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from kd import config as config_lib
from kd.config import Block
from kd.data import sources
from kd.data.context import SourceContext


def named(context: SourceContext, *, sets: Mapping[str, Block]) -> sources.Source:
    """One of several sources, for recipes whose stages learn from, or are asked, different things.

        data = dict(source=dict(name='kd.data.named.named', sets=dict(math=..., code=...)),
                    train='math:train', validation='code:validation[:400]')

    Args:
      context: whose split is 'SET:SPLIT'.
      sets: blocks of sources by name.

    Raises:
      DataError: a split that names none of them.
    """
    name, colon, split = context.split.partition(':')
    if not colon or name not in sets:
        raise sources.DataError(
            f'a split of several sets names one first, such as {next(iter(sets))}:train; they are '
            f'{list(sets)}, and the split is {context.split!r}'
        )
    inside = dataclasses.replace(context, split=split)
    return config_lib.build(sets[name], inside, where=f'data.source.sets.{name}')
