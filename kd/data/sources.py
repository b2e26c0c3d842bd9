"""Data sources: `load(name, split)` gives random access to the examples of a split, by batch.

Names are `digits`, `mnist1d`, `stdlib_characters`, the two-dimensional toys of
`kd.data.builders.toys`, and every tfds data set with an array_record copy. Splits are written as
in tfds: `train`, `train[:90%]`, `train[100:-50]`, `train+test`.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from kd.data.builders import characters, mnist1d, toys
from kd.errors import UserError

# A decoded split up to this size is kept in memory, row by row as it is first read.
CACHE_BYTES = 1 << 30

# The data directory of data sets that are known by their shapes and cannot be read.
DESCRIBED = ':described:'
# Data sets that need no directory, besides the toys.
GENERATED = ('mnist1d', 'stdlib_characters')

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


def load(name: str, split: str, *, data_dir: str | os.PathLike | None = None) -> Source:
    """Opens a split of a data set.

    Args:
      name: `digits`, `mnist1d`, `stdlib_characters`, a toy (`checkerboard`, `two_moons`,
        `gaussian_mixture`, `rings`), or a tfds name (`mnist`, `cifar10`,
        `imagenet_resized/32x32`, `mnist:3.0.1`) whose array_record copy lies under `data_dir`.
      split: a tfds split: `train`, `train[:90%]`, `test[100:]`, `train+test`.
      data_dir: where tfds data lies; defaults to TFDS_DATA_DIR, then ~/tensorflow_datasets.
        `digits` is written there on its first use. `DESCRIBED` reads nothing: the source has the
        shapes of the data set and any number of examples, for ahead-of-time compilation.

    Raises:
      DataError: unknown name, missing or unreadable data, or a wrong split.
    """
    if data_dir == DESCRIBED and name not in GENERATED and name not in toys.TOYS:
        # Imports tfds, which takes most of a second: only where it is asked for.
        from kd.data import described

        return described.source(name, split)
    return Source(_open(name, data_dir), split)


def default_data_dir(data_dir: str | os.PathLike | None = None) -> str:
    """`data_dir`, or TFDS_DATA_DIR, or ~/tensorflow_datasets, with ~ expanded."""
    chosen = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    return os.path.expanduser(os.fspath(chosen))


def _open(name: str, data_dir: str | os.PathLike | None) -> DataSet:
    if name in toys.TOYS:
        return _toy(name)
    if name == 'mnist1d':
        return _mnist1d()
    if name == 'stdlib_characters':
        return _characters()
    root = default_data_dir(data_dir)
    # tfds takes most of a second to import: only where its data is asked for.
    from kd.data.builders import prepared

    return prepared.open_dataset(name, root)


def _toy(name: str) -> DataSet:
    return DataSet(
        name=name,
        sizes=toys.SIZES,
        reader=lambda split: in_memory(toys.make(name, split)),
        spec=example_spec((2,)),
        num_classes=toys.TOYS[name][1],
    )


def _mnist1d() -> DataSet:
    def reader(split: str) -> Reader:
        try:
            return in_memory(mnist1d.make()[split])
        except ImportError as error:
            raise DataError(
                "data set 'mnist1d' is generated by the package mnist1d, which is not installed: "
                "pip install mnist1d (or pip install -e '.[test]')"
            ) from error

    return DataSet(
        name='mnist1d',
        sizes=mnist1d.SIZES,
        reader=reader,
        spec=example_spec((40, 1)),
        num_classes=mnist1d.NUM_CLASSES,
    )


def _characters() -> DataSet:
    try:
        splits = characters.make()
    except FileNotFoundError as error:
        raise DataError(f"data set 'stdlib_characters': {error}") from error
    window = jax.ShapeDtypeStruct((characters.LENGTH,), np.int32)
    return DataSet(
        name='stdlib_characters',
        sizes={split: len(arrays['input']) for split, arrays in splits.items()},
        reader=lambda split: in_memory(splits[split]),
        spec={'input': window, 'label': window},
        num_classes=len(characters.SYMBOLS),
        class_names=tuple(characters.SYMBOLS),
    )


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
