"""Data sets with wrong labels or wrong teachers, for studies of what a method does with them."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from kd import config as config_lib
from kd.data import sources
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.ranges import Fraction, Seed


def noisy_labels(
    context: SourceContext,
    *,
    dataset: str,
    fraction: Fraction,
    seed: Seed = 0,
    clean: tuple[str, ...] = ('test',),
) -> sources.Source:
    """A split in which labels are replaced by uniformly drawn ones.

    For the key `source` of a recipe's data. Which labels are replaced depends on the text of the
    split, its length and the seed, so every stage sees the same wrong labels.

    Args:
      context: of a split of `dataset`, such as 'train[:80%]'.
      dataset: name for `kd.data.catalogue.load`.
      fraction: probability in [0, 1] that a label is drawn anew; of these 1 / K are right again.
      seed: of the noise.
      clean: splits, as written in the recipe, that keep their labels.

    Raises:
      DataError: a fraction outside [0, 1], or data without labels.
    """
    if not 0 <= fraction <= 1:
        raise sources.DataError(f'label noise: fraction must lie in [0, 1], got {fraction}')
    source = context.load(dataset)
    if source.num_classes is None:
        raise sources.DataError(f'label noise: data set {dataset!r} has no labels')
    split = context.split
    if split in clean:
        return source
    rng = np.random.default_rng([seed, zlib.crc32(split.encode())])
    drawn = rng.integers(source.num_classes, size=len(source)).astype(np.int32)
    replaced = rng.random(len(source)) < fraction

    def read(rows: np.ndarray) -> sources.Batch:
        batch = source.fetch(rows)
        del batch['index']
        return batch | {'label': np.where(replaced[rows], drawn[rows], batch['label'])}

    spec = {name: field for name, field in source.spec.items() if name != 'index'}
    data = sources.DataSet(
        dataset, {'noisy': len(source)}, lambda _: read, spec, source.num_classes,
        source.class_names,
    )  # fmt: skip
    noisy = sources.Source(data, 'noisy')
    noisy.split = f'{split} with {fraction:.0%} of the labels drawn anew'
    return noisy


def wrong_outputs(
    context: SourceContext, *, of: Mapping[str, Any], fraction: Fraction, seed: Seed = 0
) -> sources.Source:
    """A cached teacher that is wrong about some examples: its outcomes are rolled around.

    For the key `source` of a stage's data, around `kd.data.transforms.cached.cached` of a dense
    cache. Splits without a cache stay as they are. Batches bring `wrong` too, whether the teacher's
    class is not the label, by its own error or by this one; nothing is to learn from it.

    Args:
      context: a split of the recipe's data.
      of: block of the source.
      fraction: probability that an example's outcomes are rolled, by 1 .. K - 1 places.
      seed: of the choice, which depends on nothing else but the length of the split.

    Raises:
      UserError: outputs that are not dense.
    """
    source = config_lib.build(of, context, where='data.source.of')
    if not any(name.startswith('teacher_') for name in source.spec):
        return source
    if 'teacher_logits' not in source.spec:
        raise UserError("data.source: outputs are rolled of a cache of form='dense'.")
    return _Rolled(source, fraction, seed)


class _Rolled(sources.Derived):
    def __init__(self, source: sources.Source, fraction: float, seed: int) -> None:
        super().__init__(source, {'wrong': jax.ShapeDtypeStruct((), np.bool_)})
        self.signal_temperature = getattr(source, 'signal_temperature', 1.0)
        rng, count = np.random.default_rng(seed), len(source)
        places = rng.integers(1, source.num_classes or 2, count)
        self._places = np.where(rng.random(count) < fraction, places, 0)

    def fetch(self, indices: Sequence[int] | np.ndarray) -> sources.Batch:
        """As `Source.fetch`, with the outcomes rolled."""
        batch = self._source.fetch(indices)
        logits = rolled(batch['teacher_logits'], self._places[np.asarray(indices)])
        return {**batch, 'teacher_logits': logits, 'wrong': logits.argmax(-1) != batch['label']}


def rolled(outcomes: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Rows [N, K], each rolled by `places` [N]: what was said of class c is said of c + places."""
    size = outcomes.shape[-1]
    at = (np.arange(size) - places[:, None]) % size
    return np.take_along_axis(outcomes, at, axis=-1)
