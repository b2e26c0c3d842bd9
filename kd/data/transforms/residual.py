"""Images less the pictures that they are restored from: what residual shifting is a diffusion of.

    data=dict(source=dict(name='kd.data.transforms.residual.residual', of=dict(
                  name='kd.data.transforms.low_resolution.low_resolution', ...)),
              train='train', validation='test')

`kd.losses.schedule.residual_shift` noises them, `kd.models.shifted` says what they are.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kd import config as config_lib
from kd.config import Block
from kd.data import sources
from kd.data.context import SourceContext
from kd.data.patches import LOW
from kd.errors import UserError


class Residual(sources.Derived):
    """A source whose `input` is less another of its fields."""

    def __init__(self, source: sources.Source, anchor: str) -> None:
        super().__init__(source, {}, f'less {anchor!r}')
        self.anchor = anchor

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, the input less its anchor."""
        batch = self._source.fetch(indices)
        return {**batch, 'input': batch['input'] - batch[self.anchor]}


def residual(context: SourceContext, *, of: Block, anchor: str = LOW) -> Residual:
    """The examples of a source, `input` less the field that `anchor` names.

    Args:
      context: of a split.
      of: block of the source.
      anchor: a field of the shape of the input: y of x_t = x0 + eta_t (y - x0) + noise.

    Raises:
      UserError: no such field, or one of another shape.
    """
    source = config_lib.build(of, context, where='data.source.of')
    shapes = {name: x.shape for name, x in source.spec.items()}
    if 'input' not in shapes or shapes.get(anchor) != shapes['input']:
        raise UserError(
            f"data.source.anchor='{anchor}' must be a field of the shape of 'input'; the data have "
            f'{shapes}.'
        )
    return Residual(source, anchor)
