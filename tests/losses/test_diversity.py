"""Distances of texts against the textbook, choices against all choices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import diversity

pytestmark = pytest.mark.usefixtures('compiled_quickly')

M = 7


def textbook(a, b):
    table = [[max(i, j) if not i * j else 0 for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i, j in itertools.product(range(1, len(a) + 1), range(1, len(b) + 1)):
        table[i][j] = min(
            table[i - 1][j] + 1, table[i][j - 1] + 1, table[i - 1][j - 1] + (a[i - 1] != b[j - 1])
        )
    return table[-1][-1]


@pytest.fixture(scope='module')
def texts():
    """A thousand texts of up to nine of three symbols, beyond which anything stands."""
    rng = np.random.default_rng(0)
    return rng.integers(0, 3, (1000, 9)), rng.integers(0, 10, 1000)


@pytest.fixture(scope='module')
def distance():
    return jax.jit(diversity.levenshtein)


def test_distances_are_the_textbooks_and_a_metric(texts, distance):
    tokens, lengths = texts
    others, other_lengths = np.roll(tokens, 1, 0), np.roll(lengths, 1)
    found = np.asarray(distance(tokens, others, lengths, other_lengths))
    assert found.dtype == np.int32
    wanted = [
        textbook(a[:m].tolist(), b[:n].tolist())
        for a, m, b, n in zip(tokens, lengths, others, other_lengths, strict=True)
    ]
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(found, distance(others, tokens, other_lengths, lengths))
    assert not distance(tokens, tokens, lengths, lengths).any()
    assert (abs(lengths - other_lengths) <= found).all()
    assert (found <= np.maximum(lengths, other_lengths)).all()
    # Triangles: 0 to 1, 1 to 2, 0 to 2.
    third = np.asarray(distance(tokens, np.roll(tokens, 2, 0), lengths, np.roll(lengths, 2)))
    assert (third <= found + np.roll(found, 1)).all()


def test_texts_broadcast_and_padding_does_not_matter(texts, distance):
    tokens, lengths = texts[0][:6], texts[1][:6]
    square = distance(tokens[:, None], tokens, lengths[:, None], lengths)
    assert square.shape == (6, 6)
    assert square[2, 4] == textbook(
        tokens[2, : lengths[2]].tolist(), tokens[4, : lengths[4]].tolist()
    )
    wide = np.pad(tokens, ((0, 0), (0, 3)), constant_values=7)
    np.testing.assert_array_equal(
        square, distance(wide[:, None], wide, lengths[:, None], lengths)
    )  # fmt: skip


def points(seed):
    rng = np.random.default_rng(seed)
    place = rng.normal(size=(M, 3))
    return np.linalg.norm(place[:, None] - place, axis=-1), rng.permutation(M) < 5


def least(distances, chosen):
    return min(distances[i, j] for i, j in itertools.combinations(chosen, 2))


def test_two_are_the_farthest_pair_and_more_are_at_most_half_as_near_as_the_best():
    choose = jax.jit(diversity.farthest_subset, static_argnums=2)
    for seed in range(20):
        distances, valid = points(seed)
        allowed = np.flatnonzero(valid)
        two, three = (np.asarray(choose(distances, valid, n)) for n in (2, 3))
        assert valid[three].all()
        assert len(set(three.tolist())) == 3
        best = [
            max(least(distances, c) for c in itertools.combinations(allowed, n)) for n in (2, 3)
        ]
        assert least(distances, two) == pytest.approx(best[0], rel=1e-6)
        assert least(distances, three) >= best[1] / 2
        # The members are the same in another order.
        order = np.random.default_rng(seed).permutation(M)
        again = np.asarray(choose(distances[order][:, order], valid[order], 3))
        assert set(order[again]) == set(three)


def test_where_there_are_too_few_none_is_taken_twice():
    distances, valid = points(0)
    for count in range(3):
        some = np.flatnonzero(valid)[:count]
        found = diversity.farthest_subset(distances, np.isin(np.arange(M), some), 3)
        assert sorted(found.tolist()) == [-1] * (3 - count) + sorted(some.tolist())
    with pytest.raises(ValueError, match=r'got \(7, 7\), \(6,\) and 3'):
        diversity.farthest_subset(distances, valid[:6], 3)


def test_a_shift_is_seen_in_the_directions_of_most_variance():
    rng = np.random.default_rng(0)
    before = rng.normal(size=(200, 5)) * np.array([9, 4, 1, 0.1, 0.1])
    assert diversity.latent_shift(before, before) == 0
    moved = before + np.array([3.0, 4.0, 0, 0, 0.1])
    shift = diversity.latent_shift(before, moved)
    assert float(shift) == pytest.approx(5, rel=0.02)
    turn = np.linalg.qr(rng.normal(size=(5, 5)))[0]
    turned = diversity.latent_shift(jnp.asarray(before @ turn), jnp.asarray(moved @ turn))
    assert float(turned) == pytest.approx(float(shift), rel=1e-4)
    # What moves across is not.
    across = diversity.latent_shift(before, before + np.array([0, 0, 0, 0, 2.0]))
    assert float(across) < 0.2
