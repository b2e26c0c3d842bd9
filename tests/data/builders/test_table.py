"""The table of a language of one token, its draws, and what a student gives up of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kd.config import Recipe
from kd.data.builders import table
from kd.data.context import SourceContext
from kd.data.sources import DataError
from kd.evaluators.coverage import law_metrics
from kd.models.structured import BottleneckLM


def source(split, **arguments):
    return table.table(SourceContext(split, Recipe(stages={}, data={}, seed=3)), **arguments)


def test_the_law_is_peaked_and_known():
    law = table.logits(0)
    assert law.shape == (48, 48, 48)
    p = special.softmax(law, axis=-1)
    top = np.sort(p, axis=-1)[..., -3:].sum(-1)
    # Valid answers have most of the mass, and others a share that a student has to get rid of.
    assert 0.9 < top.mean() < 1
    assert (table.valid(law).sum(-1) == 3).all()
    assert (table.logits(1) != law).any()


def test_all_contexts_are_there_once_and_answers_have_the_law():
    every = source('test')
    batch = every.fetch(np.arange(len(every)))
    assert len({tuple(pair) for pair in batch['input'].tolist()}) == len(every) == 48**2
    a, b = batch['input'].T
    np.testing.assert_array_equal(batch['teacher_logits'], table.logits(3)[a, b])
    rows = np.tile(table.logits(3)[5, 7], (20_000, 1))
    drawn = np.bincount(table.answers(rows, np.random.default_rng(0)), minlength=48) / 20_000
    np.testing.assert_allclose(drawn, special.softmax(rows[0]), atol=0.015)
    sharp = source('train', temperature=0, size=50, teacher='none')
    batch = sharp.fetch(np.arange(50))
    assert set(batch) == {'index', 'input', 'label'}
    a, b = batch['input'].T
    assert (batch['label'] == table.logits(3)[a, b].argmax(-1)).all()
    again = source('train', temperature=0, size=50).fetch(np.arange(50))
    np.testing.assert_array_equal(again['input'], batch['input'])
    with pytest.raises(DataError, match=r"the table has the splits .*, not 'valid'"):
        source('valid')


def test_pairs_have_a_right_and_a_wrong_answer_of_the_law():
    drawn = table.preferences(SourceContext('train', Recipe(stages={}, data={}, seed=3)), size=500)
    assert drawn.pairs
    batch = drawn.fetch(np.arange(500))
    law, (a, b) = table.logits(3), batch['input'][:, 0].T
    np.testing.assert_array_equal(batch['input'][:, 1], batch['input'][:, 0])
    np.testing.assert_array_equal(batch['teacher_logits'][:, 1], law[a, b])
    found = np.take_along_axis(table.valid(law[a, b]), batch['label'], 1)
    np.testing.assert_array_equal(found, np.tile([True, False], (500, 1)))
    # Each by the teacher's law on its side.
    row = np.tile(law[5, 7], (20_000, 1))
    sides = table.right_and_wrong(row, np.random.default_rng(0))
    for side, kept in zip(sides.T, (table.valid(row[0]), ~table.valid(row[0])), strict=True):
        wanted = special.softmax(np.where(kept, row[0], -np.inf))
        np.testing.assert_allclose(np.bincount(side, minlength=48) / 20_000, wanted, atol=0.015)


def test_what_a_student_gives_up_against_sums_by_hand():
    rng = np.random.default_rng(0)
    p, q = rng.dirichlet(np.ones(5), size=(2, 4))
    found = law_metrics(np.log(q), np.log(p), top=2)
    for i in range(4):
        best = np.argsort(p[i])[-2:]
        wanted = {
            'valid': q[i, best].sum(),
            'entropy': -(q[i] * np.log(q[i])).sum(),
            'tv': np.abs(p[i] - q[i]).sum() / 2,
            'forward_kl': (p[i] * np.log(p[i] / q[i])).sum(),
            'reverse_kl': (q[i] * np.log(q[i] / p[i])).sum(),
            'score': (q[i] * np.log(p[i])).sum(),
        }
        for name, value in wanted.items():
            np.testing.assert_allclose(found[name][i], value, rtol=2e-5)
    # What neither says is nothing, and what the teacher never says has no score.
    impossible = law_metrics(np.array([0.0, 0.0, -np.inf]), np.array([0.0, 0.0, -np.inf]), top=1)
    np.testing.assert_allclose(impossible['score'], np.log(0.5), rtol=1e-6)


def test_the_bottleneck_bounds_the_rank_of_the_logits():
    network = BottleneckLM(width=3)
    pairs = jnp.asarray(table.contexts()[:200])
    variables = network.init(jax.random.key(0), pairs)
    logits = np.asarray(network.apply(variables, pairs))
    assert logits.shape == (200, 48)
    assert np.linalg.matrix_rank(logits - logits[:1], tol=1e-4) == 3
    with pytest.raises(ValueError, match='BottleneckLM'):
        network.apply(variables, pairs[0])
