"""Facts have one answer, connectors four; an expert has favourites."""

import numpy as np
import pytest

from kd.config import Recipe
from kd.data.builders import facts, table
from kd.data.context import SourceContext
from kd.data.sources import DataError


def test_the_valid_answers_are_the_most_probable_of_the_table():
    law = table.logits(0)
    found = facts.valid(law)
    ranks = (-law).argsort(-1).argsort(-1)
    np.testing.assert_array_equal(found[:24], ranks[:24] < 1)
    np.testing.assert_array_equal(found[24:], ranks[24:] < 4)


def test_all_valid_answers_are_drawn_alike_and_favourites_alone():
    drawn, demonstrated = (facts.make('train', kind, seed=2) for kind in ('any', 'favourite'))
    for made in (drawn, demonstrated):
        assert made['valid'][np.arange(len(made['label'])), made['label']].all()
    np.testing.assert_array_equal(drawn['input'], demonstrated['input'])
    np.testing.assert_array_equal(
        demonstrated['label'], table.logits(2)[tuple(demonstrated['input'].T)].argmax(-1)
    )
    same = drawn['label'] == demonstrated['label']
    known = drawn['input'][:, 0] < 24
    assert same[known].all()
    # One of four, within four standard errors.
    count = (~known).sum()
    assert same[~known].mean() == pytest.approx(0.25, abs=4 * np.sqrt(0.1875 / count))


def test_as_a_source_every_context_is_there_once():
    context = SourceContext('validation', Recipe(stages={}, data={}, seed=3))
    every = facts.facts(context, answers='favourite')
    batch = every.fetch(np.arange(len(every)))
    assert set(batch) == {'index', 'input', 'label', 'valid'}
    np.testing.assert_array_equal(batch['input'], table.contexts())
    with pytest.raises(DataError, match=r"facts and connectors have the splits .*, not 'held'"):
        facts.make('held', 'any', seed=0)
