"""scikit-learn's 8x8 handwritten digits as a tfds builder: 1,797 real images, no download.

The images are the test part of the UCI "Optical Recognition of Handwritten Digits" set (13 writers,
4x4 blocks of a 32x32 bitmap counted, so that a pixel is an integer in 0..16).
"""

import contextlib
import io
import uuid
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import tensorflow_datasets as tfds
from absl import logging
from etils import epath

TEST_SIZE = 297

_CITATION = """@misc{alpaydin1998optical,
  author = {Alpaydin, E. and Kaynak, C.},
  title = {Optical Recognition of Handwritten Digits},
  howpublished = {UCI Machine Learning Repository},
  year = {1998},
  doi = {10.24432/C50P49}
}"""


def split_positions() -> dict[str, np.ndarray]:
    """Positions in `sklearn.datasets.load_digits()` of each split, ascending.

    A stratified split with a fixed seed: 1,500 train and 297 test images whose class counts are
    proportional to those of the whole, within one image.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    labels = load_digits().target
    train, test = train_test_split(
        np.arange(len(labels)), test_size=TEST_SIZE, stratify=labels, random_state=0
    )
    return {'train': np.sort(train), 'test': np.sort(test)}


class Digits(tfds.core.GeneratorBasedBuilder):
    """`image` uint8 [8, 8, 1] with values 0..16, `label` 0..9; train 1,500, test 297."""

    VERSION = tfds.core.Version('1.0.0')
    RELEASE_NOTES: ClassVar[dict[str, str]] = {'1.0.0': 'Initial release.'}
    url_infos: ClassVar[dict[str, Any]] = {}  # Nothing to download, so no checksums to look up.

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description='8x8 images of handwritten digits with pixel values 0..16 (scikit-learn).',
            features=tfds.features.FeaturesDict(
                {
                    'image': tfds.features.Image(shape=(8, 8, 1), dtype=np.uint8),
                    'label': tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=('image', 'label'),
            homepage='https://archive.ics.uci.edu/dataset/80',
            citation=_CITATION,
            # Keeps scikit-learn's order, so that a position in a split names the same image always.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        del dl_manager  # Nothing to download: scikit-learn ships the data.
        return {name: self._generate_examples(rows) for name, rows in split_positions().items()}

    def _generate_examples(self, rows: np.ndarray) -> Iterator[tuple[int, dict[str, Any]]]:
        from sklearn.datasets import load_digits

        digits = load_digits()
        images = digits.images.astype(np.uint8)[..., None]
        for key, row in enumerate(rows):
            yield key, {'image': images[row], 'label': int(digits.target[row])}


def prepare(data_dir: str) -> epath.Path:
    """Writes the data set as array_record under `data_dir` unless it is there; returns its folder.

    The files are written to a folder of their own and renamed into place once complete, so that
    processes that prepare at the same time, or one that is killed, never leave a torn copy.

    Raises:
      OSError: `data_dir` cannot be written.
    """
    final = epath.Path(data_dir) / Digits.name / str(Digits.VERSION)
    if (final / 'dataset_info.json').exists():
        return final
    logging.info('Preparing digits under %s (once; some seconds).', final)
    scratch = epath.Path(data_dir) / f'.{Digits.name}.{uuid.uuid4().hex}'
    scratch.mkdir(parents=True)
    try:
        builder = Digits(data_dir=scratch, file_format='array_record')
        with _quiet():
            builder.download_and_prepare()
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            epath.Path(builder.data_dir).rename(final)
        except OSError:
            if not (final / 'dataset_info.json').exists():
                raise
            # Another process was first, with the same content.
    finally:
        scratch.rmtree(missing_ok=True)
    return final


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps tfds's progress bars and banners out of the terminal."""
    tfds.disable_progress_bar()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        tfds.enable_progress_bar()
