"""Data sources: random access to the examples of a split, by batch.

Splits are written as in tfds: `train`, `train[:90%]`, `train[100:-50]`, `train+test`.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from kd.errors import UserError

# A decoded split up to this size is kept in memory, row by row as it is first read.
CACHE_BYTES = 1 << 30

Batch = dict[str, np.ndarray]
Reader = Callable[[np.ndarray], Batch]  # rows of a named split -> {'input': ..., 'label': ...}


class DataError(UserError):
    """A data set, split or batch size that cannot be had; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """All splits of a data set: `sizes[split]` examples, read by `reader(split)`."""

    name: str
    sizes: Mapping[str, int]
    reader: Callable[[str], Reader]
    spec: Mapping[str, jax.ShapeDtypeStruct]
    num_classes: int | None
    class_names: tuple[str, ...] | None = None


class Source:
    """Random access to the examples of one split, or of slices and sums of splits.

    Attributes:
      name: the name of the data set.
      split: the split as it was asked for, such as `train[:90%]`.
      num_classes: number of classes; None where the examples carry no class label.
      class_names: a name per class, or None.
      spec: shape and dtype of each field of one example, as delivered by `fetch`.
    """

    def __init__(self, data: DataSet, split: str):
        self.name = data.name
        self.split = split
        self.num_classes = data.num_classes
        self.class_names = data.class_names
        self.spec = {**data.spec, 'index': jax.ShapeDtypeStruct((), np.int32)}
        segments = parse_split(split, data.sizes, name=data.name)
        readers = {base: data.reader(base) for base in {base for base, _, _ in segments}}
        self._segments = [(readers[base], start) for base, start, _ in segments]
        self._ends = np.cumsum([stop - start for _, start, stop in segments])
        if len(self) == 0:
            raise DataError(f'split {split!r} of data set {data.name!r} has no examples')

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __repr__(self) -> str:
        return f'Source({self.name!r}, split={self.split!r}, {len(self)} examples)'

    def fetch(self, indices: Sequence[int] | np.ndarray) -> Batch:
        """The examples at positions `indices` (int [B], in 0..len-1, repeats allowed) of the split.

        Returns:
          {'input': f32 [B, ...], 'label': i32 [B], 'index': i32 [B]}; 'index' is the position in
          the split, and 'label' is absent where the data set has none. Images lie in [-1, 1], NHWC.

        Raises:
          IndexError: a position outside the split.
        """
        indices = np.asarray(indices, np.int64)
        if indices.size and not (indices.min() >= 0 and indices.max() < len(self)):
            raise IndexError(
                f'positions {indices.min()}..{indices.max()} reach outside {self!r}; '
                f'valid ones are 0..{len(self) - 1}'
            )
        if len(self._segments) == 1:
            reader, start = self._segments[0]
            batch = reader(indices + start)
        else:
            batch = self._gather(indices)
        batch['index'] = indices.astype(np.int32)
        return batch

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Images [N, ...] as `fetch` delivers them, around [-1, 1] as they can be shown."""
        return np.asarray(images)

    def _gather(self, indices: np.ndarray) -> Batch:
        """`fetch` over a sum of splits: each position is read from the summand it lies in."""
        batch = {
            key: np.empty((len(indices), *field.shape), field.dtype)
            for key, field in self.spec.items()
            if key != 'index'
        }
        segment_of = np.searchsorted(self._ends, indices, side='right')
        for segment in np.unique(segment_of):
            reader, start = self._segments[segment]
            offset = self._ends[segment - 1] if segment else 0
            at = np.flatnonzero(segment_of == segment)
            for key, rows in reader(indices[at] - offset + start).items():
                batch[key][at] = rows
        return batch


def default_data_dir(data_dir: str | os.PathLike | None = None) -> str:
    """`data_dir`, or TFDS_DATA_DIR, or ~/tensorflow_datasets, with ~ expanded."""
    chosen = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    return os.path.expanduser(os.fspath(chosen))


def in_memory(arrays: Batch) -> Reader:
    """A reader that gathers rows of whole-split arrays."""
    return lambda rows: {key: value[rows] for key, value in arrays.items()}


def example_spec(
    shape: tuple[int, ...], *, labelled: bool = True
) -> dict[str, jax.ShapeDtypeStruct]:
    """Spec of one example: 'input' f32 [shape], and 'label' i32 [] where there is one."""
    spec = {'input': jax.ShapeDtypeStruct(shape, np.float32)}
    if labelled:
        spec['label'] = jax.ShapeDtypeStruct((), np.int32)
    return spec


_SPLIT = re.compile(r'(?P<base>\w[\w-]*)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?')


def parse_split(
    split: str, sizes: Mapping[str, int], *, name: str = 'data set'
) -> list[tuple[str, int, int]]:
    """Resolves a tfds split to segments (named split, start, stop), in order, with stop >= start.

    `a[i:j]` slices like a Python list, `%` counts hundredths of the split rounded to the nearest
    example (halves to even), and `+` joins.

    Raises:
      DataError: a split that cannot be parsed, a name that is not in `sizes`, or, as in tfds, a
        bound beyond the ends of the split.
    """
    segments = []
    for part in split.replace(' ', '').split('+'):
        match = _SPLIT.fullmatch(part)
        if match is None or match['base'] not in sizes:
            have = ', '.join(f'{key!r} ({size:,} examples)' for key, size in sizes.items())
            raise DataError(
                f'data set {name!r} has no split {part!r}: it has {have}, and their slices, '
                "written like 'train[:90%]', 'train[100:-50]' or 'train+test'"
            )
        size = sizes[match['base']]
        start, stop = (
            default if text is None else _boundary(text, size)
            for text, default in ((match['start'], 0), (match['stop'], size))
        )
        if max(abs(start), abs(stop)) > size:
            raise DataError(
                f'split {part!r} of data set {name!r} reaches beyond its {size:,} examples'
            )
        start, stop = (bound + size if bound < 0 else bound for bound in (start, stop))
        segments.append((match['base'], start, max(start, stop)))
    return segments


def _boundary(text: str, size: int) -> int:
    return round(int(text[:-1]) * size / 100) if text.endswith('%') else int(text)
