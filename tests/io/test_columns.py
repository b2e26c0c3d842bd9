"""Columns of examples on disk: what comes back, and what is refused."""

import jax
import numpy as np
import pytest

from kd.errors import UserError
from kd.io import columns

SPEC = {
    'weight': columns.NUMBER,
    'asked': columns.TRUTH,
    'said': jax.ShapeDtypeStruct((3,), np.float32),
}
MADE_OF = {'data': 'aa', 'training of student': 'bb'}


def values(count, seed=0):
    rng = np.random.default_rng(seed)
    return {
        'weight': rng.random(count, np.float32),
        'asked': rng.random(count) < 0.5,
        'said': rng.normal(size=(count, 3)).astype(np.float32),
    }


def test_columns_come_back_as_they_were_in_any_order(tmp_path):
    given = values(11)
    columns.Writer(tmp_path, SPEC, 11, MADE_OF, per_file=4).write(given)
    stored = columns.Columns(tmp_path, SPEC, MADE_OF)
    order = np.array([10, 0, 3, 4, 4])
    for name, found in stored.fetch(order).items():
        assert found.dtype == SPEC[name].dtype
        np.testing.assert_array_equal(found, given[name][order])
    np.testing.assert_array_equal(stored.all()['said'], given['said'])


def test_a_writer_goes_on_with_what_is_missing(tmp_path):
    given = values(11)
    columns.Writer(tmp_path, SPEC, 11, MADE_OF, per_file=4).write(given)
    (tmp_path / 'columns' / '00001.array_record').unlink()
    with pytest.raises(UserError, match=r'lacks 1 of its 3 files'):
        columns.Columns(tmp_path, SPEC)
    columns.Writer(tmp_path, SPEC, 11, MADE_OF, per_file=4).write(given)
    np.testing.assert_array_equal(columns.Columns(tmp_path, SPEC).all()['weight'], given['weight'])


def test_columns_of_something_else_are_one_clear_line(tmp_path):
    with pytest.raises(UserError, match=r'has no set of columns \(no columns/ in it\)'):
        columns.Columns(tmp_path, SPEC)
    columns.Writer(tmp_path, SPEC, 5, MADE_OF).write(values(5))
    with pytest.raises(UserError, match='was made from another training of student'):
        columns.Columns(tmp_path, SPEC, {**MADE_OF, 'training of student': 'cc'})
    with pytest.raises(UserError, match='was made from another data'):
        columns.Writer(tmp_path, SPEC, 5, {**MADE_OF, 'data': 'cc'}).write(values(5))
    wide = {**SPEC, 'said': jax.ShapeDtypeStruct((4,), np.float32)}
    with pytest.raises(UserError, match='does not fit: fields'):
        columns.Columns(tmp_path, wide, MADE_OF)
    with pytest.raises(ValueError, match="'asked' has 4 of 5 examples"):
        columns.Writer(tmp_path, SPEC, 5, MADE_OF).write({**values(5), 'asked': np.zeros(4, bool)})
    with pytest.raises(
        UserError, match="keep: there is no column 'wait', only weight, asked, said"
    ):
        columns.check_names(('wait',), SPEC, 'keep')
