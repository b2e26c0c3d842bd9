"""Files are written whole, as JSON that others read, and damage is told with the file's name."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest

from kd import files
from kd.errors import UserError


def test_what_is_not_finite_is_null_at_any_depth():
    value = {'a': math.nan, 'b': [1.5, -math.inf, {'c': np.float64('inf'), 'd': (2, 'x', True)}]}
    text = files.json_text(value)
    assert text == '{"a": null, "b": [1.5, null, {"c": null, "d": [2, "x", true]}]}'
    assert json.loads(text, parse_constant=pytest.fail)['b'][0] == 1.5


def test_a_file_is_replaced_whole_and_an_error_leaves_the_old_one_alone(tmp_path):
    file = tmp_path / 'x.json'
    files.write_json(file, {'a': 1})
    with pytest.raises(RuntimeError, match='half way'), files.replacing(file) as partial:  # noqa: PT012
        partial.write_text('{"a"')
        raise RuntimeError('half way')
    assert files.read_json(file, '') == {'a': 1}
    assert os.listdir(tmp_path) == ['x.json']


def test_a_file_and_its_folder_are_on_the_disk_before_it_counts(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: synced.append(os.readlink(f'/proc/self/fd/{fd}')))
    files.write_whole(tmp_path / 'x', 'text')
    assert sync
    assert synced == [str(tmp_path / 'x.partial'), str(tmp_path)]


@pytest.mark.parametrize('content', [b'', b'{"a": 1', b'[1]', b'\xff\xfe\x00', b'3'])
def test_damage_is_told_with_the_name_of_the_file(tmp_path, content):
    file = tmp_path / 'done.json'
    file.write_bytes(content)
    with pytest.raises(UserError, match=r'done\.json is damaged: .*; delete it\.$'):
        files.read_json(file, 'delete it')


@pytest.mark.parametrize(
    'path', ['gs://b/run', 's3://b', 'gs:/b/run', 'hdfs://n:80/x', 'file:///x']
)
def test_addresses_are_refused(path):
    with pytest.raises(UserError, match=r"^--workdir: 'g?.*' is an address"):
        files.local(path, '--workdir')


@pytest.mark.parametrize('path', ['runs/a', '/runs/a:b', 'C:/runs', 'a:b/c', '', 'gs'])
def test_paths_of_this_machine_are_not(path):
    assert str(files.local(path)) == (path or '.')


def test_a_write_that_finds_no_room_is_told_with_the_name_of_the_file(tmp_path):
    with pytest.raises(OSError, match='No space left') as full, files.naming(tmp_path / 'x'):
        Path('/dev/full').write_text('x' * 100000)
    assert full.value.filename == str(tmp_path / 'x')
    with pytest.raises(OSError, match='No such file') as other, files.naming(tmp_path / 'x'):
        (tmp_path / 'none').read_text()
    assert other.value.filename == str(tmp_path / 'none')
