"""Synthetic sets in files that others can load: NPZ, and a data set in the format of tfds."""

from __future__ import annotations

import contextlib
import io
import shutil
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from kd import files
from kd.data.distilled.synthetic import SyntheticSet
from kd.errors import UserError, reason

VERSION = '1.0.0'


def write_npz(file: Path, made: SyntheticSet, images: np.ndarray) -> None:
    """Writes `image`, `input`, `label` and `step_size` to an NPZ file, whole or not at all.

    Args:
      file: ends in .npz.
      made: the set.
      images: [n, H, W, C], its pixels before standardisation, around [-1, 1].
    """
    with files.replacing(file) as partial, partial.open('wb') as stream:
        np.savez(
            stream,
            image=np.asarray(images, np.float32),
            input=np.asarray(made.input),
            label=np.asarray(made.label),
            step_size=np.asarray(made.step_size),
        )


def read_npz(file: Path) -> SyntheticSet:
    """The set of `write_npz`, bit for bit.

    Raises:
      UserError: the file is damaged, or another.
    """
    try:
        with np.load(file) as stored:
            return SyntheticSet(*(stored[name] for name in ('input', 'label', 'step_size')))
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f'{file} cannot be read: {reason(error)}') from error


def write_tfds(
    folder: Path,
    name: str,
    made: SyntheticSet,
    images: np.ndarray,
    num_classes: int | None,
    class_names: Sequence[str] | None = None,
) -> Path:
    """Writes the set as the split `train` of the tfds data set `name`, in array_record.

    Features: `image`, uint8 pixels clipped to what can be shown; `label`, the most probable class;
    `input`, float32, exactly what networks were trained on; `soft_label` where labels are soft.

    Args:
      folder: data directory, for `tfds.data_source(name, data_dir=folder)` or `kd.data.sources`.
      name: small letters, digits and '_'.
      made: the set.
      images: [n, H, W, C] around [-1, 1], C 1, 3 or 4.
      num_classes: of the labels.
      class_names: a name per class, or None.

    Returns:
      The directory of the version. What was there is replaced.
    """
    import tensorflow_datasets as tfds  # takes seconds to import

    label = np.asarray(made.label)
    soft = label.ndim > 1
    shape = images.shape[1:]
    names = dict(names=list(class_names)) if class_names else dict(num_classes=num_classes)
    features = {
        'image': tfds.features.Image(shape=shape, dtype=np.uint8),
        'label': tfds.features.ClassLabel(**names),
        'input': tfds.features.Tensor(shape=np.shape(made.input)[1:], dtype=np.float32),
    }
    if soft:
        features['soft_label'] = tfds.features.Tensor(shape=label.shape[1:], dtype=np.float32)
    shown = np.clip(np.round((images + 1) * 127.5), 0, 255).astype(np.uint8)
    examples = []
    for i in range(len(label)):
        example = {'image': shown[i], 'input': np.asarray(made.input[i])}
        example['label'] = int(label[i].argmax() if soft else label[i])
        examples.append(example | ({'soft_label': label[i]} if soft else {}))
    target = folder / name / VERSION
    shutil.rmtree(target, ignore_errors=True)
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            tfds.dataset_builders.store_as_tfds_dataset(
                name=name,
                version=VERSION,
                features=tfds.features.FeaturesDict(features),
                split_datasets={'train': list(enumerate(examples))},
                data_dir=folder,
                description='A synthetic training set.',
                file_format='array_record',
                disable_shuffling=True,
            )
    finally:
        tfds.enable_progress_bar()
    return target
