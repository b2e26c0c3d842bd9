"""Prepares a tfds data set as array_record: `python -m kd.data.prepare mnist --data_dir=DIR`.

Downloads what the data set needs, so this wants a network (`digits` does not).
"""

import argparse
from collections.abc import Sequence

from etils import epath

from kd.data import sources
from kd.process import command, path_argument


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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog='python -m kd.data.prepare', description=__doc__)
    parser.add_argument('name', metavar='NAME', help='of a data set of tfds')
    parser.add_argument(
        '--data_dir', type=path_argument, metavar='DIRECTORY',
        help='where to write; default TFDS_DATA_DIR, then ~/tensorflow_datasets',
    )  # fmt: skip
    arguments = parser.parse_args(argv)
    print(prepare(arguments.name, sources.default_data_dir(arguments.data_dir)))
    return 0


if __name__ == '__main__':
    command(main)
