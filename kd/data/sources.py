"""Data sources: random access to the examples of a split, by batch.

Splits are written as in tfds, whose reader of them is used: `train`, `train[:2.5%]`,
`train[100:-50]`, `train[:3shard]`, `train+test`, `all`.
"""

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence

import jax
import numpy as np

from kd import files
from kd.errors import UserError

# A decoded split up to this size is kept in memory, row by row as it is first read.
CACHE_BYTES = 1 << 30

Batch = dict[str, np.ndarray]
Reader = Callable[[np.ndarray], Batch]  # rows of a named split -> {'input': ..., 'label': ...}
# Field of a batch, bool, that says which positions of its labels count; all where it is absent.
MASK = 'response_mask'


class DataError(UserError):
    """A data set, split or batch size that cannot be had; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class DataSet:
    """All splits of a data set: `sizes[split]` examples, read by `reader(split)`.

    `shards[split]` are the examples in each file of a split, which slices by shard count; a split
    without an entry is one file.
    """

    name: str
    sizes: Mapping[str, int]
    reader: Callable[[str], Reader]
    spec: Mapping[str, jax.ShapeDtypeStruct]
    num_classes: int | None
    class_names: tuple[str, ...] | None = None
    shards: Mapping[str, Sequence[int]] = dataclasses.field(default_factory=dict)


class Source:
    """Random access to the examples of one split, or of slices and sums of splits.

    Attributes:
      name: the name of the data set.
      split: the split as it was asked for, such as `train[:90%]`.
      num_classes: number of classes; None where the examples carry no class label.
      class_names: a name per class, or None.
      spec: shape and dtype of each field of one example, as delivered by `fetch`.
      seen: how the inputs differ from those of the data set, in words: as standardised, resized;
        '' for not at all. A network knows inputs of this kind alone.
      pairs: whether an example is two answers, the preferred one first. Then every field but
        'index' has a leading axis of 2, below which is what a network sees.
    """

    seen = ''
    pairs = False

    @property
    def domain(self) -> str:
        """The data that a network has to know: the name up to a colon."""
        return self.name.partition(':')[0]

    def __init__(self, data: DataSet, split: str):
        self.name = data.name
        self.split = split
        self.num_classes = data.num_classes
        self.class_names = data.class_names
        self.spec = {**data.spec, 'index': jax.ShapeDtypeStruct((), np.int32)}
        segments = parse_split(split, data.sizes, name=data.name, shards=data.shards)
        readers = {base: data.reader(base) for base in {base for base, _, _ in segments}}
        self._segments = [(readers[base], start) for base, start, _ in segments]
        self._ends = np.cumsum([stop - start for _, start, stop in segments])
        if len(self) == 0:
            raise DataError(f'split {split!r} of data set {data.name!r} has no examples')
        for base, start, stop in segments:
            # What lies in memory is looked at before anything is trained on it.
            arrays = getattr(readers[base], 'arrays', {})
            self._check_labels({key: value[start:stop] for key, value in arrays.items()})

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
          DataError: a label that is none of 0 .. num_classes - 1.
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
        self._check_labels(batch)
        batch['index'] = indices.astype(np.int32)
        return batch

    def _check_labels(self, batch: Batch) -> None:
        """Refuses class labels that are none; positions that `MASK` leaves out have any."""
        labels = batch.get('label', np.zeros(0))
        if self.num_classes is None or not np.issubdtype(labels.dtype, np.integer):
            return
        outside = (labels < 0) | (labels >= self.num_classes)
        if not outside.any():
            return
        if MASK in batch:
            outside = outside & batch[MASK]
        if outside.any():
            raise DataError(
                f'split {self.split!r} of data set {self.name!r} has an example with label '
                f'{labels[outside][0]}, and its {self.num_classes} classes are '
                f'0..{self.num_classes - 1}; leave out what has no label, or correct the labels'
            )

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """Images [N, ...] as `fetch` delivers them, around [-1, 1] as they can be shown."""
        return np.asarray(images)

    def from_pixels(self, images: np.ndarray) -> np.ndarray:
        """Images [N, H, W, C] of the data set, in [-1, 1], as `fetch` delivers them."""
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


class Derived(Source):
    """Another source some of whose fields are others, or which has more of them.

    A subclass gives `fetch`. All else is the other source's, which is not opened again.

    Args:
      source: the other one.
      spec: of the fields that are not as there.
      seen: how inputs differ from its own, see `Source`.

    Attributes:
      tokenizer: of the other source, None where it has none.
    """

    def __init__(
        self, source: Source, spec: Mapping[str, jax.ShapeDtypeStruct], seen: str = ''
    ) -> None:
        self._source = source
        self.name, self.split = source.name, source.split
        self.num_classes, self.class_names = source.num_classes, source.class_names
        self.pairs = source.pairs
        self.seen = ', '.join(filter(None, (source.seen, seen)))
        self.spec = {**source.spec, **spec}
        self.tokenizer = getattr(source, 'tokenizer', None)

    @property
    def domain(self) -> str:
        return self._source.domain

    def __len__(self) -> int:
        return len(self._source)

    def to_pixels(self, images: np.ndarray) -> np.ndarray:
        """As the other source shows them."""
        return self._source.to_pixels(images)

    def from_pixels(self, images: np.ndarray) -> np.ndarray:
        """As the other source takes them."""
        return self._source.from_pixels(images)


def default_data_dir(data_dir: str | os.PathLike | None = None) -> str:
    """`data_dir`, or TFDS_DATA_DIR, or ~/tensorflow_datasets, with ~ expanded.

    A user without a home, as in many containers, has it in the folder for temporary files.

    Raises:
      kd.errors.UserError: the address of a bucket.
    """
    chosen = data_dir or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
    folder = os.path.expanduser(files.local(chosen, 'the data directory'))
    if folder.startswith('~'):
        return os.path.join(tempfile.gettempdir(), f'kd-{os.getuid()}', folder.partition('/')[2])
    return folder


def fingerprint(source: Source, examples: int = 64) -> str:
    """A digest of a split: its name, size and types, and some of its examples, evenly spread."""
    batch = source.fetch(np.unique(np.linspace(0, len(source) - 1, examples).astype(int)))
    digest = hashlib.sha256(f'{source.name} {source.split} {len(source)}'.encode())
    for name in sorted(batch):
        digest.update(f'{name} {batch[name].dtype} {batch[name].shape}'.encode())
        digest.update(np.ascontiguousarray(batch[name]).tobytes())
    return digest.hexdigest()[:16]


def tokenizer_fingerprint(source: Source) -> dict[str, str]:
    """{'tokenizer': fingerprint} of a source of text, {} of another."""
    tokenizer = getattr(source, 'tokenizer', None)
    return {} if tokenizer is None else {'tokenizer': tokenizer.fingerprint}


class InMemory:
    """A reader that gathers rows of whole-split `arrays`."""

    def __init__(self, arrays: Batch):
        self.arrays = arrays

    def __call__(self, rows: np.ndarray) -> Batch:
        return {key: value[rows] for key, value in self.arrays.items()}


def in_memory(arrays: Batch) -> Reader:
    """A reader that gathers rows of whole-split arrays."""
    return InMemory(arrays)


def example_spec(
    shape: tuple[int, ...], *, labelled: bool = True
) -> dict[str, jax.ShapeDtypeStruct]:
    """Spec of one example: 'input' f32 [shape], and 'label' i32 [] where there is one."""
    spec = {'input': jax.ShapeDtypeStruct(shape, np.float32)}
    if labelled:
        spec['label'] = jax.ShapeDtypeStruct((), np.int32)
    return spec


def parse_split(
    split: str,
    sizes: Mapping[str, int],
    *,
    name: str = 'data set',
    shards: Mapping[str, Sequence[int]] | None = None,
) -> list[tuple[str, int, int]]:
    """Resolves a tfds split to segments (named split, start, stop), in order, with stop >= start.

    Args:
      split: see https://www.tensorflow.org/datasets/splits: slices, sums, percent, shards, `all`.
      sizes: examples of each named split.
      name: of the data set, for messages.
      shards: examples in each file of a split; one file where there is no entry.

    Raises:
      DataError: what tfds refuses: a split that cannot be parsed, a name that is not in `sizes`, or
        a bound beyond the ends of the split.
    """
    if split in sizes:
        return [(split, 0, sizes[split])]
    # Takes most of a second to import: only for what needs it.
    import tensorflow_datasets as tfds

    lengths = {base: [size] for base, size in sizes.items()} | dict(shards or {})
    infos = {
        base: tfds.core.SplitInfo(name=base, shard_lengths=list(parts), num_bytes=0)
        for base, parts in lengths.items()
    }
    segments = []
    for part in split.replace(' ', '').split('+'):
        try:
            found = tfds.core.ReadInstruction.from_spec(part).to_absolute(infos)
        except (ValueError, NotImplementedError) as error:
            base = part.partition('[')[0]
            if base in sizes and 'incompatible' in str(error):
                raise DataError(
                    f'split {part!r} of data set {name!r} reaches beyond its {sizes[base]:,} '
                    'examples'
                ) from error
            have = ', '.join(f'{key!r} ({size:,} examples)' for key, size in sizes.items())
            raise DataError(
                f'data set {name!r} has no split {part!r}: it has {have}, and their slices, '
                "written as in tfds: 'train[:90%]', 'train[100:-50]', 'train+test' or 'all'"
            ) from error
        for one in found:
            start = one.from_ or 0
            stop = sizes[one.splitname] if one.to is None else one.to
            segments.append((one.splitname, start, max(start, stop)))
    return segments
