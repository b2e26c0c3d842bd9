"""Data sets that tfds reads: prepared array_record copies on disk, and our own `digits`."""

import difflib
import os
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from kd.data import sources
from kd.data.builders import digits, toys
from kd.errors import reason

_VERSION = re.compile(r'\d+\.\d+\.\d+')
# What to do about a folder of data.
_AGAIN = 'delete {} and prepare the data set again, or bring back a copy'
# Largest pixel value of integer images; the rest go up to 255.
_WHITE = {'digits': 16.0}


def open_dataset(name: str, data_dir: str) -> sources.DataSet:
    """Opens the array_record copy of a data set under `data_dir`; prepares `digits` if need be.

    Raises:
      kd.data.sources.DataError: unknown name, no copy, a copy in another format, or features other
        than a fixed-shape `image` (and `label`).
    """
    if name == 'digits':
        try:
            folder = digits.prepare(data_dir)
        except OSError as error:
            raise sources.DataError(
                f"data set 'digits' cannot be written under {data_dir} ({error.strerror}): name a "
                'writable folder with --data_dir or TFDS_DATA_DIR'
            ) from error
    else:
        folder = _find(name, data_dir)
    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # Whatever the parsers of its files raise.
        raise sources.DataError(
            f'the description of data set {name!r} in {folder} (dataset_info.json, features.json) '
            f'cannot be read: {reason(error)}; if it is damaged, {_AGAIN.format(folder)}'
        ) from error
    _check_format(name, builder, folder)
    return describe(name, builder)


def describe(name: str, builder: tfds.core.DatasetBuilder) -> sources.DataSet:
    """The data set of a builder, prepared or not; nothing is read.

    Raises:
      kd.data.sources.DataError: features other than a fixed-shape `image` (and `label`).
    """
    features = dict(builder.info.features)
    image = features.get('image')
    if not isinstance(image, tfds.features.Image):
        raise sources.DataError(
            f"data set {name!r} has no feature 'image'; it has {', '.join(sorted(features))}. "
            'Only image data sets are read here'
        )
    if None in image.shape:
        raise sources.DataError(
            f'images of data set {name!r} vary in size (shape {image.shape}); use a resized '
            "variant, such as 'imagenet_resized/64x64'"
        )
    label = features.get('label')
    classes = label if isinstance(label, tfds.features.ClassLabel) else None
    return sources.DataSet(
        name=name,
        sizes={split: info.num_examples for split, info in builder.info.splits.items()},
        reader=lambda split: RecordReader(
            builder.as_data_source(split),
            image,
            labelled=classes is not None,
            white=_WHITE.get(name),
            shards=_shards(builder, split),
        ),
        spec=sources.example_spec(image.shape, labelled=classes is not None),
        num_classes=classes.num_classes if classes else None,
        class_names=tuple(classes.names) if classes else None,
        shards={split: info.shard_lengths for split, info in builder.info.splits.items()},
    )


class RecordReader:
    """Reads rows of a random-access record source, and keeps them decoded while they fit.

    The first visit of a row decodes it; later visits gather it from memory. A split whose decoded
    images exceed `sources.CACHE_BYTES` is decoded anew on each visit. Threads may share a reader:
    a row is marked as kept only after it is written, and a row written twice gets the same values.

    `records` is what `tfds.data_source` returns; pixels 0..`white` become -1..1. `shards` are the
    files and how many records each has, to name one that is damaged.
    """

    def __init__(
        self,
        records: Any,
        image: tfds.features.Image,
        *,
        labelled: bool,
        white: float | None,
        shards: Sequence[tuple[str, int]] = (),
    ):
        self._records, self._shards = records, shards
        self._shape = image.shape
        self._dtype = np.dtype(image.np_dtype)
        self._labelled = labelled
        # A float image is delivered as it is.
        integer = np.issubdtype(self._dtype, np.integer)
        self._half = (white or float(np.iinfo(self._dtype).max)) / 2 if integer else None
        size = len(records)
        fits = size * int(np.prod(self._shape)) * self._dtype.itemsize <= sources.CACHE_BYTES
        # Pages of an empty array cost memory only once they are written.
        self._images = np.empty((size, *self._shape), self._dtype) if fits else None
        self._labels = np.empty(size, np.int32)
        self._kept = np.zeros(size, bool)

    def __call__(self, rows: np.ndarray) -> sources.Batch:
        if self._images is None:
            images, labels = self._decode(rows)
        else:
            missing = np.unique(rows[~self._kept[rows]])
            if missing.size:
                self._images[missing], self._labels[missing] = self._decode(missing)
                self._kept[missing] = True
            images, labels = self._images[rows], self._labels[rows]
        batch = {'input': self._scale(images)}
        if self._labelled:
            batch['label'] = labels
        return batch

    def _decode(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        try:
            examples = self._records.__getitems__(rows.tolist())
        except Exception as error:  # RuntimeError as a rule; decoders have their own.
            raise sources.DataError(self._damage(rows, error)) from error
        images = np.array([example['image'] for example in examples], self._dtype)
        labels = np.array(
            [example['label'] if self._labelled else 0 for example in examples], np.int32
        )
        return images.reshape(len(rows), *self._shape), labels

    def _damage(self, rows: np.ndarray, error: Exception) -> str:
        """Which file it is that cannot be read."""
        ends = np.cumsum([count for _, count in self._shards])
        for row in rows.tolist():
            try:
                self._records.__getitems__([row])
            except Exception as own:  # As in `_decode`.
                place = int(np.searchsorted(ends, row, side='right'))
                file = self._shards[place][0] if place < len(self._shards) else 'a file'
                folder = os.path.dirname(file)
                return f'{file} cannot be read: {reason(own)}; if it is damaged, ' + _AGAIN.format(
                    folder
                )
        return f'records cannot be read: {reason(error)}'

    def _scale(self, images: np.ndarray) -> np.ndarray:
        """0..white to -1..1, float32."""
        scaled = images.astype(np.float32)
        if self._half is not None:
            scaled /= np.float32(self._half)
            scaled -= 1
        return scaled


def _shards(builder: tfds.core.DatasetBuilder, split: str) -> list[tuple[str, int]]:
    """(file, records) of a split, in their order; none where the data set is only described."""
    info = builder.info.splits[split]
    return list(zip(map(str, info.filepaths), info.shard_lengths, strict=False))


def _find(name: str, data_dir: str) -> epath.Path:
    """The folder `data_dir/name[/config]/version` with the newest version, or the one named."""
    path, _, version = name.partition(':')
    root = epath.Path(data_dir) / path
    versions = _versions(root)
    if version and version in versions:
        return root / version
    if versions and not version:
        return root / max(versions, key=lambda text: [int(part) for part in text.split('.')])
    if versions:
        raise sources.DataError(
            f'data set {path!r} has no version {version!r} under {root}; it has {_list(versions)}'
        )
    configs = [child.name for child in _children(root) if _versions(child)]
    if configs:
        raise sources.DataError(
            f'data set {path!r} has several configurations under {root}: name one of '
            f'{_list(f"{path}/{config}" for config in configs)}'
        )
    known = tfds.list_builders(with_community_datasets=False)
    if path.split('/')[0] in known:
        raise sources.DataError(
            f'data set {name!r} is not under {data_dir}: point --data_dir or TFDS_DATA_DIR at a '
            'folder that has it, or prepare it with: '
            f'python -m kd.data.prepare {name} --data_dir={data_dir}'
        )
    ours = ['digits', 'mnist1d', *toys.TOYS]
    present = {
        child.name
        for child in _children(epath.Path(data_dir))
        if any(_versions(folder) for folder in [child, *_children(child)])
    }
    close = difflib.get_close_matches(name, sorted({*ours, *present, *known}), n=3)
    hint = f' (did you mean {_list(close)}?)' if close else ''
    raise sources.DataError(
        f'unknown data set {name!r}{hint}: embedded are {_list(ours)}; under {data_dir} lie '
        f'{_list(sorted(present - {*ours})) or "none"}; any image data set of tfds works too'
    )


def _check_format(name: str, builder: tfds.core.DatasetBuilder, folder: epath.Path) -> None:
    info = builder.info
    formats = {info.file_format, *info.alternative_file_formats}
    if tfds.core.FileFormat.ARRAY_RECORD not in formats:
        have = ', '.join(sorted(form.value for form in formats if form))
        raise sources.DataError(
            f'data set {name!r} under {folder} is in format {have or "unknown"}, and only '
            'array_record can be read at random; prepare a second copy with: '
            f'python -m kd.data.prepare {name} --data_dir=ANOTHER_FOLDER'
        )


def _versions(folder: epath.Path) -> list[str]:
    return [
        child.name
        for child in _children(folder)
        if _VERSION.fullmatch(child.name) and (child / 'dataset_info.json').exists()
    ]


def _children(folder: epath.Path) -> list[epath.Path]:
    """Sub-folders by name; none where there is no such folder."""
    return sorted(child for child in folder.iterdir() if child.is_dir()) if folder.is_dir() else []


def _list(names: Iterable[str]) -> str:
    return ', '.join(repr(name) for name in names)
