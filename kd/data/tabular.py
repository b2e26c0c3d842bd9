"""Sources of records of categories: a table by its name.

    data=dict(source=dict(name='kd.data.tabular.records', of='adult', sensitive='sex'),
              train='train', test='test')

Fields of an example, for networks as `kd.models.tabular.TabularVAE`:

    input   int32 [C]   a category of each column
    label   int32 []    the outcome
    group   int32 []    of the sensitive column, which is not in `input`
    merit   int32 []    of 'biased' alone: the outcome without the bias
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from kd.data import catalogue, sources
from kd.data.builders import record_files
from kd.data.context import SourceContext
from kd.errors import did_you_mean

# Categories of all columns of a table in their order, its outcome left out.
_ADULT = {
    'age': 8, 'workclass': 9, 'fnlwgt': 8, 'education': 16, 'marital-status': 7, 'occupation': 15,
    'relationship': 6, 'race': 5, 'sex': 2, 'capital-gain': 2, 'capital-loss': 2,
    'hours-per-week': 8, 'native-country': 42,
}  # fmt: skip
_COMPAS = {
    'sex': 2, 'age_cat': 3, 'race': 6, 'c_charge_degree': 2, 'juv_fel_count': 2,
    'juv_misd_count': 2, 'juv_other_count': 2, 'priors_count': 8,
}  # fmt: skip
TABLES = {'adult': _ADULT, 'compas': _COMPAS}


class Form(NamedTuple):
    """Categories of each column of `input`, and groups."""

    columns: tuple[int, ...]
    groups: int


def form(of: str, sensitive: str = 'sex') -> Form:
    """What networks have to know of a table.

    Raises:
      DataError: no such table or column.
    """
    if of == 'biased':
        return Form(record_files.COLUMNS, 2)
    if of not in TABLES:
        raise sources.DataError(
            f"there is no table '{of}'.{did_you_mean(of, TABLES)} Tables: biased, "
            f'{", ".join(TABLES)}'
        )
    table = TABLES[of]
    if sensitive not in table:
        raise sources.DataError(f"'{of}' has no column '{sensitive}', only {list(table)}")
    columns = tuple(count for name, count in table.items() if name != sensitive)
    return Form(columns, table[sensitive])


def records(context: SourceContext, *, of: str, sensitive: str = 'sex') -> sources.Source:
    """A split of a table: 'train' or 'test', of 'biased' also 'validation'.

    Args:
      context: a split.
      of: 'biased', which is made here (`record_files.biased`), or 'adult' or 'compas', whose files
        lie in a folder of that name in the data directory.
      sensitive: the column that is the group; 'biased' has one.

    Raises:
      DataError: no such table, column or file, or a file with other categories.
    """
    known = form(of, sensitive)
    directory = context.recipe.data_dir
    spec = {
        'input': jax.ShapeDtypeStruct((len(known.columns),), np.int32),
        'label': jax.ShapeDtypeStruct((), np.int32),
        'group': jax.ShapeDtypeStruct((), np.int32),
    }
    if of == 'biased':
        spec['merit'] = spec['label']
        arrays = _biased()
    elif directory == catalogue.DESCRIBED:
        # tfds takes most of a second to import.
        from kd.data.builders import described

        return described.of_spec(of, context.split, spec, 2)
    else:
        folder = Path(catalogue.default_data_dir(directory or None)) / of
        read: Any = getattr(record_files, of)
        arrays, columns, groups = record_files.coded(read(folder), sensitive)
        if (columns, groups) != known:
            raise sources.DataError(
                f'{folder} has columns of {columns} categories and {groups} groups, and {of} is '
                f'known to have {known.columns} and {known.groups}; these are other files'
            )
    sizes = {split: len(part['label']) for split, part in arrays.items()}
    data = sources.DataSet(of, sizes, lambda split: sources.in_memory(arrays[split]), spec, 2)
    return sources.Source(data, context.split)


@functools.cache
def _biased() -> dict[str, sources.Batch]:
    rng = np.random.default_rng(0)
    return {split: record_files.biased(rng, count) for split, count in record_files.SIZES.items()}
