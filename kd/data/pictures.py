"""Whole pictures of any size: of folders, and the two photographs that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kd.data.builders import records
from kd.data.sources import DataError

# Two photographs of 427 x 640 pixels. Columns 240 .. 400 of each are 'test', what is to the left
# and to the right of them 'train'. (The right edge of the flower is all but flat.)
CHINA_FLOWER = 'china_flower'
_STRIP = (240, 400)
# What is read; arrays of NumPy are mapped into memory and not decoded.
SUFFIXES = ('.png', '.bmp', '.jpg', '.jpeg', '.tif', '.tiff', '.npy')


def pictures(of: str, split: str, data_dir: str = '') -> dict[str, np.ndarray]:
    """Pictures by name, uint8 [H, W, 3] each, in the order of their names.

    Args:
      of: 'china_flower', or a folder below the data directory (or anywhere, if it begins with /).
      split: 'train' or 'test' of 'china_flower'; of a folder the folder in it with the pictures.
      data_dir: of the recipe.

    Raises:
      DataError: no such split, folder or picture.
    """
    if of == CHINA_FLOWER:
        return _china_flower(split)
    return in_folder(records.locate(of, data_dir) / split)


def in_folder(folder: Path) -> dict[str, np.ndarray]:
    """The pictures of a folder, see `pictures`."""
    if not folder.is_dir():
        raise DataError(f'there is no folder of pictures {folder}')
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)
    if not files:
        raise DataError(f'{folder} has no pictures; those of {", ".join(SUFFIXES)} are read')
    return {file.stem: read(file) for file in files}


def read(file: Path) -> np.ndarray:
    """A picture, uint8 [H, W, 3]; grey ones get three equal channels.

    Raises:
      DataError: no such file, or none of a picture.
    """
    if file.suffix.lower() == '.npy':
        return _mapped(file)
    from PIL import Image

    try:
        with Image.open(file) as opened:
            return np.asarray(opened.convert('RGB'))
    except OSError as error:
        raise DataError(f'{file} cannot be read as a picture: {error}') from error


def _mapped(file: Path) -> np.ndarray:
    try:
        found = np.load(file, mmap_mode='r')
    except (OSError, ValueError) as error:
        raise DataError(f'{file} cannot be read as an array: {error}') from error
    if found.dtype != np.uint8 or found.ndim != 3 or found.shape[-1] != 3:
        raise DataError(
            f'{file} is {found.dtype} {list(found.shape)}, and a picture is uint8 [H, W, 3]'
        )
    return found


def _china_flower(split: str) -> dict[str, np.ndarray]:
    from sklearn.datasets import load_sample_images

    if split not in ('train', 'test'):
        raise DataError(f"{CHINA_FLOWER} has the splits 'train' and 'test', not {split!r}")
    first, last = _STRIP
    found = {}
    for name, picture in zip(('china', 'flower'), load_sample_images().images, strict=True):
        if split == 'test':
            found[name] = picture[:, first:last]
        else:
            found[f'{name}_left'], found[f'{name}_right'] = picture[:, :first], picture[:, last:]
    return found
