"""Prepares a tfds data set as array_record: `python -m kd.data.prepare mnist --data_dir=DIR`.

Downloads what the data set needs, so this wants a network (`digits` does not).
"""

from absl import app, flags
from etils import epath

from kd.data import sources

_DATA_DIR = flags.DEFINE_string(
    'data_dir', None, 'Where to write; default TFDS_DATA_DIR, then ~/tensorflow_datasets.'
)


def prepare(name: str, data_dir: str) -> epath.Path:
    """Writes the array_record copy of data set `name` under `data_dir`; returns its folder."""
    # tfds takes most of a second to import, and `--help` should not.
    import tensorflow_datasets as tfds

    from kd.data.builders import digits

    if name == digits.Digits.name:
        return digits.prepare(data_dir)
    builder = tfds.builder(name, data_dir=data_dir, file_format='array_record')
    builder.download_and_prepare()
    return epath.Path(builder.data_dir)


def main(argv: list[str]) -> None:
    if len(argv) != 2:
        raise app.UsageError('name one data set: python -m kd.data.prepare NAME [--data_dir=DIR]')
    print(prepare(argv[1], sources.default_data_dir(_DATA_DIR.value)))


if __name__ == '__main__':
    app.run(main)
