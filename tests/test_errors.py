"""What a person's own code raises becomes one line that says where."""

import importlib.metadata
import importlib.util

import pytest

from kd import errors
from kd.config import build

MINE = """
import json
import numpy as np
from kd.losses import numerics

def key(): return {}['labl']
def value(): raise ValueError('two\\nlines')
def nothing(): raise RuntimeError
def exact(): assert False, 'never'
def library(): return json.loads('{')
def installed(): return np.zeros(2) @ np.zeros(3)
def ours(): return numerics.check_positive('tau', 0)
def user(): from kd.errors import UserError; raise UserError('as it is')
"""


@pytest.fixture(scope='module')
def mine(tmp_path_factory):
    file = tmp_path_factory.mktemp('mine') / 'mine.py'
    file.write_text(MINE)
    spec = importlib.util.spec_from_file_location('mine', file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ('name', 'line', 'said'),
    [
        ('key', 6, "KeyError: 'labl'"),
        ('value', 7, 'two'),
        ('nothing', 8, 'RuntimeError'),
        ('exact', 9, 'AssertionError: never'),
        ('library', 10, 'Expecting property name'),
        ('installed', 11, 'matmul: Input operand 1 has a mismatch'),
        ('ours', 12, 'tau must be positive, got 0.'),
    ],
)
def test_the_last_line_of_ones_own_is_named(mine, name, line, said):
    with pytest.raises(errors.UserError) as caught, errors.one_line('student: the step fails'):
        getattr(mine, name)()
    text = str(caught.value)
    assert text.startswith(f'student: the step fails: {mine.__file__}, line {line}: {said}')
    assert '\n' not in text


def test_a_file_under_the_working_directory_is_named_from_there(mine, tmp_path, monkeypatch):
    folder = tmp_path / 'here'
    folder.mkdir()
    (folder / 'broken.py').write_text('def f(:\n')
    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location('broken', folder / 'broken.py')
    module = importlib.util.module_from_spec(spec)
    message = r'^x: here/broken\.py, line 1: SyntaxError: invalid syntax'
    with pytest.raises(errors.UserError, match=message), errors.one_line('x'):
        spec.loader.exec_module(module)


def test_what_is_nobodys_own_keeps_its_trace_unless_it_refuses_an_argument(mine):
    with pytest.raises(errors.UserError, match=r'^as it is$'), errors.one_line('x'):
        mine.user()
    # A mistake in code that is nobody's own.
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        build({'name': 'importlib.metadata.version', 'distribution_name': 'no-such'}, where='x')
    with pytest.raises(errors.UserError, match=r'^x: Expecting value: line 1 column 1'):
        build({'name': 'json.loads', 's': ''}, where='x')
