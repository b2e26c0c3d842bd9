"""Prepared data whose files are damaged: one line with the name of the file, never a short read."""

import shutil

import numpy as np
import pytest

from kd.data import catalogue, sources


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    catalogue.load('digits', 'train', data_dir=folder)
    return folder


@pytest.fixture
def digits(prepared, tmp_path):
    """A copy of the folder of the data set and what reads all of its test split."""
    shutil.copytree(prepared, tmp_path / 'data')

    def read():
        source = catalogue.load('digits', 'test', data_dir=tmp_path / 'data')
        return source.fetch(np.arange(len(source)))

    [folder] = (tmp_path / 'data' / 'digits').iterdir()
    return folder, read


def flipped(content):
    content = bytearray(content)
    content[len(content) // 3] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(
    'damage',
    [flipped, lambda x: x[:-1], lambda x: x[: len(x) // 2], lambda x: b'', None],
    ids=['flipped', 'short by one', 'half', 'empty', 'missing'],
)
def test_a_damaged_file_of_records_is_told_by_its_name(digits, damage):
    folder, read = digits
    whole = read()
    [file] = folder.glob('digits-test.array_record*')
    if damage is None:
        file.unlink()
    else:
        file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(sources.DataError, match=f'^{file} cannot be read: ') as told:
        read()
    assert f'delete {folder} and prepare the data set again' in str(told.value)
    assert len(whole['label']) == 297


def test_fewer_records_than_promised_are_no_short_read(digits):
    folder, read = digits
    info = folder / 'dataset_info.json'
    text = info.read_text()
    assert '"297"' in text
    # As if the file of another, smaller data set lay here.
    info.write_text(text.replace('"297"', '"300"'))
    with pytest.raises(sources.DataError, match=r'digits-test\.array_record.* cannot be read'):
        read()


@pytest.mark.parametrize('name', ['dataset_info.json', 'features.json'])
@pytest.mark.parametrize('content', ['', '{"a"', '{}'])
def test_a_damaged_description_is_told_with_its_folder(digits, name, content):
    folder, read = digits
    (folder / name).write_text(content)
    with pytest.raises(sources.DataError, match=f"description of data set 'digits' in {folder}"):
        read()
