"""Records of categories with a group and an outcome: made, and from files as published."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kd.data.sources import Batch, DataError

SIZES = {'train': 4_000, 'validation': 1_000, 'test': 2_000}
# Of `biased`: categories of its columns.
COLUMNS = (5, 5, 5, 5, 2, 2)
_CUTS = (-1.0, -0.35, 0.35, 1.0)
_BINS = 8


class Table(NamedTuple):
    """A table as it lies in a file.

    Attributes:
      names: of its columns, the sensitive one and the outcome among them.
      rows: of each split, texts.
      cut: columns of numbers, cut into 8 equal parts of the training rows' range.
      binary: columns of numbers, of which it is kept whether they are above 0.
      outcome: column, and the text that counts as 1.
    """

    names: tuple[str, ...]
    rows: dict[str, list[list[str]]]
    cut: tuple[str, ...]
    binary: tuple[str, ...]
    outcome: tuple[str, str]


def biased(rng: np.random.Generator, count: int) -> Batch:
    """Records whose outcome depends on a merit, which should count, and on the group.

        s coin, m ~ N(0, 1),   label = m + (2 s - 1) + N(0, 1) / 2 > 0,   merit = m > 0

    Two columns are of m, one weakly, one is noise, and two are s but for every twentieth record.
    """
    group = rng.integers(2, size=count)
    m, noise = rng.standard_normal(count), rng.standard_normal((5, count))
    cut = [np.digitize(x, _CUTS) for x in (
        m + 0.3 * noise[0], m + 0.3 * noise[1], (m + 1.5 * noise[2]) / 1.8, noise[3],
    )]  # fmt: skip
    proxies = [np.where(rng.random(count) < 0.05, 1 - group, group) for _ in range(2)]
    return {
        'input': np.stack([*cut, *proxies], 1).astype(np.int32),
        'label': (m + (2 * group - 1) + 0.5 * noise[4] > 0).astype(np.int32),
        'group': group.astype(np.int32),
        'merit': (m > 0).astype(np.int32),
    }


_ADULT = (
    'age', 'workclass', 'fnlwgt', 'education', 'education-num', 'marital-status', 'occupation',
    'relationship', 'race', 'sex', 'capital-gain', 'capital-loss', 'hours-per-week',
    'native-country', 'income',
)  # fmt: skip


def adult(folder: Path) -> Table:
    """`adult.data` and `adult.test` of UCI; education is kept once, '?' is a category."""
    rows = {}
    for split, name in (('train', 'adult.data'), ('test', 'adult.test')):
        lines = _csv(folder / name)
        rows[split] = [
            [*row[:4], *row[5:14], row[14].rstrip('.')] for row in lines if len(row) == len(_ADULT)
        ]
    names = tuple(name for name in _ADULT if name != 'education-num')
    return Table(
        names, rows, ('age', 'fnlwgt', 'hours-per-week'), ('capital-gain', 'capital-loss'),
        ('income', '>50K'),
    )  # fmt: skip


_COMPAS = (
    'sex', 'age_cat', 'race', 'c_charge_degree', 'juv_fel_count', 'juv_misd_count',
    'juv_other_count', 'priors_count', 'two_year_recid',
)  # fmt: skip


def compas(folder: Path) -> Table:
    """`compas-scores-two-years.csv` of ProPublica, by its own filter; a fifth is the test split.

    Scores of COMPAS itself are left out.
    """
    file = folder / 'compas-scores-two-years.csv'
    header, *lines = _csv(file)
    place = {name: i for i, name in reversed(list(enumerate(header)))}
    wanted = (*_COMPAS, 'days_b_screening_arrest', 'is_recid', 'score_text')
    if missing := [name for name in wanted if name not in place]:
        raise DataError(f'{file} has no columns {missing}; bring the file of ProPublica')

    def at(row: Sequence[str], name: str) -> str:
        return row[place[name]]

    kept = [
        [at(row, name) for name in _COMPAS]
        for row in lines
        if at(row, 'days_b_screening_arrest')
        and abs(_numbers('days_b_screening_arrest', at(row, 'days_b_screening_arrest'))) <= 30
        and at(row, 'is_recid') != '-1'
        and at(row, 'c_charge_degree') != 'O'
        and at(row, 'score_text') != 'N/A'
    ]
    order = np.random.default_rng(0).permutation(len(kept))
    first = int(0.8 * len(kept))
    rows = {
        'train': [kept[i] for i in order[:first]],
        'test': [kept[i] for i in order[first:]],
    }
    binary = ('juv_fel_count', 'juv_misd_count', 'juv_other_count')
    return Table(_COMPAS, rows, ('priors_count',), binary, ('two_year_recid', '1'))


def coded(table: Table, sensitive: str) -> tuple[dict[str, Batch], tuple[int, ...], int]:
    """Splits of a table as numbers, categories of its columns, and the number of groups.

    The sensitive column is `group` and no column of `input`. Categories lie in alphabetical order;
    one that no training record has is a DataError.
    """
    if sensitive not in table.names or sensitive == table.outcome[0]:
        raise DataError(f'there is no column {sensitive!r} to be the group, only {table.names}')
    if empty := [split for split, rows in table.rows.items() if not rows]:
        raise DataError(f'the split {empty[0]!r} has no records; bring the files as published')
    train = dict(zip(table.names, zip(*table.rows['train'], strict=True), strict=True))
    fitted = {name: _coder(name, values, table) for name, values in train.items()}
    inside = [name for name in table.names if name not in (sensitive, table.outcome[0])]
    splits = {}
    for split, rows in table.rows.items():
        columns = dict(zip(table.names, zip(*rows, strict=True), strict=True))
        codes = {name: fitted[name][0](values) for name, values in columns.items()}
        outcome, positive = table.outcome
        splits[split] = {
            'input': np.stack([codes[name] for name in inside], 1).astype(np.int32),
            'label': np.array([value == positive for value in columns[outcome]], np.int32),
            'group': codes[sensitive].astype(np.int32),
        }
    return splits, tuple(fitted[name][1] for name in inside), fitted[sensitive][1]


def _coder(name: str, values: Sequence[str], table: Table):
    """(texts -> codes, number of codes) of a column, by its training values."""
    if name in table.binary:
        return lambda texts: (_numbers(name, texts) > 0).astype(int), 2
    if name in table.cut:
        numbers = _numbers(name, values)
        edges = np.linspace(numbers.min(), numbers.max(), _BINS + 1)[1:-1]
        return lambda texts: np.digitize(_numbers(name, texts), edges), _BINS
    known = {value: code for code, value in enumerate(sorted(set(values)))}

    def code(texts: Sequence[str]) -> np.ndarray:
        if unknown := sorted(set(texts) - set(known)):
            raise DataError(f'column {name!r} has {unknown[0]!r}, which no training record has')
        return np.array([known[text] for text in texts])

    return code, len(known)


def _numbers(name: str, texts: Sequence[str]) -> np.ndarray:
    try:
        return np.array(texts, float)
    except ValueError as error:
        raise DataError(f'column {name!r} has what is no number: {error}') from error


def _csv(file: Path) -> list[list[str]]:
    if not file.is_file():
        raise DataError(
            f'there is no file {file}; name the folder that has it by --data_dir, or bring it there'
        )
    with file.open(encoding='utf-8', newline='') as stream:
        return [row for row in csv.reader(stream, skipinitialspace=True) if row]
