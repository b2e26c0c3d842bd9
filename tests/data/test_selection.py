"""Games against linear programs and enumeration; draws against their probabilities."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

from kd.data import selection

pytestmark = pytest.mark.usefixtures('compiled_quickly')

N = 6
hard, soft = (jax.jit(game) for game in (selection.rad_hard, selection.rad_soft))


def played(game, gain, number, where=None):
    """In float64."""
    where = np.ones(len(gain), bool) if where is None else where
    with jax.enable_x64(True):
        q, value, support = game(np.asarray(gain), float(number), where=where)
        return np.asarray(q), float(value), int(support)


def value_of_hard(gain, m):
    """max v: sum_i q_i g_i c_i >= v for every c of m ones."""
    rows = [
        [*(-gain * np.isin(np.arange(N), ones)), 1.0]
        for ones in itertools.combinations(range(N), m)
    ]
    result = linprog(
        [0.0] * N + [-1.0], A_ub=rows, b_ub=np.zeros(len(rows)), A_eq=[[1.0] * N + [0.0]],
        b_eq=[1.0], bounds=[(0, None)] * N + [(None, None)],
    )  # fmt: skip
    return -result.fun


def value_of_soft(gain, rho):
    """max rho G mu - sum g lam: mu - lam_i <= q_i, the dual of the adversary's program."""
    rows = np.hstack([-np.eye(N), -np.eye(N), np.ones((N, 1))])
    result = linprog(
        [*np.zeros(N), *gain, -rho * gain.sum()], A_ub=rows, b_ub=np.zeros(N),
        A_eq=[[1.0] * N + [0.0] * (N + 1)], b_eq=[1.0], bounds=[(0, None)] * (2 * N + 1),
    )  # fmt: skip
    return -result.fun


@pytest.mark.parametrize('seed', range(8))
def test_values_are_those_of_linear_programs(seed):
    gain = np.random.default_rng(seed).random(N)
    before = N + 1
    for m in range(1, N + 1):
        q, value, support = played(hard, gain, m)
        assert value == pytest.approx(value_of_hard(gain, m), abs=1e-7)
        # What it promises it holds against the worst choice.
        worst = min(
            sum(q[i] * gain[i] for i in ones) for ones in itertools.combinations(range(N), m)
        )
        assert worst == pytest.approx(value, abs=1e-9)
        top, even = np.argsort(-gain)[:2], np.full(N, 1 / N)
        for other in (np.isin(np.arange(N), top) / 2, even):
            assert np.sort(other * gain)[:m].sum() <= value + 1e-9
        inside = q > 0
        assert q.sum() == pytest.approx(1.0)
        np.testing.assert_allclose((q * gain)[inside], 1 / np.sum(1 / gain[inside]), rtol=1e-7)
        assert inside.sum() == support <= before
        assert set(np.flatnonzero(inside)) == set(np.argsort(-gain)[:support])
        before = support
    for rho in (0.2, 0.6, 0.9):
        q, value, support = played(soft, gain, rho)
        assert value == pytest.approx(value_of_soft(gain, rho), abs=1e-7)
        np.testing.assert_allclose(np.sort(q)[::-1], [1 / support] * support + [0] * (N - support))


def test_limits_of_the_games():
    gain = np.random.default_rng(0).random(N)
    best = np.eye(N)[gain.argmax()]
    np.testing.assert_allclose(played(hard, gain, N)[0], best)
    np.testing.assert_allclose(played(soft, gain, 1.0)[0], best)
    q, _, support = played(hard, gain, 1)
    assert support == N
    np.testing.assert_allclose(q, (1 / gain) / (1 / gain).sum())
    for game, number in ((hard, 4), (soft, 0.6)):
        (q, value, _), (again, scaled, _) = (played(game, s * gain, number) for s in (1.0, 0.1))
        np.testing.assert_allclose(again, q, rtol=1e-6)
        assert scaled == pytest.approx(0.1 * value)
    for game, number in ((hard, 4), (soft, 4 / 6)):
        q, value, support = played(game, np.full(N, 0.3), number)
        assert support == N
        np.testing.assert_allclose(q, 1 / N)
        assert value == pytest.approx(0.3 * 4 / 6)
    # A student that is sure of everything.
    assert np.isfinite(played(hard, np.zeros(N), 3)[0]).all()


def test_what_is_gone_has_no_part_in_a_game():
    rng = np.random.default_rng(0)
    gain = rng.random(10)
    where = np.isin(np.arange(10), rng.choice(10, N, replace=False))
    for game, number in ((hard, 4), (soft, 0.6)):
        whole, part = played(game, gain, number, where), played(game, gain[where], number)
        np.testing.assert_allclose(whole[0][where], part[0])
        np.testing.assert_array_equal(whole[0][~where], 0.0)
        assert whole[1:] == pytest.approx(part[1:])


def test_gains_are_what_is_between_the_two_likeliest():
    probs = np.array([[0.5, 0.3, 0.2], [1.0, 0.0, 0.0], [0.25, 0.5, 0.25]])
    np.testing.assert_allclose(selection.margin_gain(probs), [0.8, 0.0, 0.75], atol=1e-6)
    np.testing.assert_allclose(selection.uncertainty(probs, 'confidence'), [0.5, 0, 0.5], atol=1e-6)
    by_hand = [-(0.5 * np.log(0.5) + 0.3 * np.log(0.3) + 0.2 * np.log(0.2)), 0, 1.5 * np.log(2)]
    np.testing.assert_allclose(selection.uncertainty(probs, 'entropy'), by_hand, atol=1e-6)
    with pytest.raises(ValueError, match="is 'margin', 'entropy' or 'confidence', got 'gini'"):
        selection.uncertainty(probs, 'gini')


def test_rounding_has_exact_probabilities_and_numbers():
    inclusion = np.array([0.9, 0.1, 0.5, 0.0, 1.0, 0.35, 0.15], np.float32)
    draws = np.asarray(
        jax.jit(jax.vmap(selection.dependent_rounding, (0, None)))(
            jax.random.split(jax.random.key(0), 20_000), inclusion
        )
    )
    np.testing.assert_array_equal(draws.sum(1), 3)
    error = np.sqrt(inclusion * (1 - inclusion) / 20_000)
    assert (np.abs(draws.mean(0) - inclusion) <= 4 * error + 1e-6).all()
    # Never more often together than by coins of their own.
    together = np.einsum('ki,kj->ij', draws, draws) / 20_000
    bound = np.outer(inclusion, inclusion)
    off = ~np.eye(7, dtype=bool)
    assert (together[off] <= bound[off] + 4 * np.sqrt(0.25 / 20_000)).all()


def test_inclusion_sums_to_the_number_and_is_at_most_one():
    q = np.array([0.6, 0.2, 0.1, 0.1, 0.0])
    find = jax.jit(selection.inclusion_probabilities)
    np.testing.assert_allclose(find(q, 1), q, rtol=1e-5)
    found = np.asarray(find(q, 3))
    np.testing.assert_allclose(found, [1.0, 1.0, 0.5, 0.5, 0.0], rtol=1e-5)
    np.testing.assert_allclose(find(q, 4), q > 0, rtol=1e-5)
    np.testing.assert_allclose(find(q, 5), q > 0, rtol=1e-5)


def test_draws_are_different_available_and_by_the_game():
    gain = np.array([0.9, 0.8, 0.7, 0.2, 0.1, 0.6], np.float32)
    where = np.array([1, 1, 1, 1, 1, 0], bool)
    q = np.array([0.1, 0.3, 0.6, 0.0, 0.0, 0.0], np.float32)
    keys = jax.random.split(jax.random.key(0), 20_000)
    for exact in (False, True):

        def draw(count, exact=exact):
            one = lambda k: selection.draw(k, q, gain, count, where=where, exact=exact)  # noqa: E731
            return np.asarray(jax.jit(jax.vmap(one))(keys))

        first = np.bincount(draw(1)[:, 0], minlength=6) / 20_000
        np.testing.assert_allclose(first, q, atol=0.015)
        # All of the support, and the largest gains of the rest that is there.
        assert {tuple(sorted(row)) for row in draw(4)} == {(0, 1, 2, 3)}
        assert {tuple(sorted(row)) for row in draw(5)} == {(0, 1, 2, 3, 4)}
    pairs = np.asarray(jax.jit(jax.vmap(lambda k: selection.gumbel_top(k, jnp.log(q), 2)))(keys))
    # One after the other by what is left: P(0 first, then 2) = .1 * .6 / .9
    share = np.mean((pairs == [0, 2]).all(1))
    assert share == pytest.approx(0.1 * 0.6 / 0.9, abs=0.006)


def test_of_a_pool_of_more_than_a_million_the_support_comes_first():
    """By ranks of gains, which are as large as the pool."""
    n = 1_200_000
    gain, q = np.arange(n, dtype=np.float32), np.zeros(n, np.float32)
    q[:3] = 1 / 3
    assert set(np.asarray(selection.draw(jax.random.key(0), q, gain, 4))) == {0, 1, 2, n - 1}


def test_selection_is_of_what_is_left_and_by_its_kind():
    rng = np.random.default_rng(0)
    probs = rng.dirichlet(np.ones(4), 40).astype(np.float32)
    left = rng.random(40) < 0.5
    key = jax.random.key(1)
    for kind in selection.KINDS:
        chosen = np.asarray(selection.select(key, probs, 5, kind=kind, rho=0.6, where=left))
        assert len(set(chosen)) == 5
        assert left[chosen].all()
        if kind in ('margin', 'entropy', 'confidence'):
            score = np.where(left, selection.uncertainty(probs, kind), -np.inf)
            assert set(chosen) == set(np.argsort(-score)[:5])
    # The number of right answers is of what is left: with others gone the choice is the same.
    few = np.asarray(selection.select(key, probs, 5, kind='rad', where=left))
    gain = np.asarray(selection.margin_gain(probs))
    game = selection.rad_hard(gain[left], 0.6 * left.sum())
    assert set(few) <= set(np.flatnonzero(left)[np.asarray(game.q) > 0])


def test_a_cover_takes_the_farthest_each_time():
    rng = np.random.default_rng(0)
    points = rng.normal(size=(30, 2))
    taken = np.isin(np.arange(30), [3, 17])
    with jax.enable_x64(True):
        found = np.asarray(selection.k_center(points, taken, 4))
        alone = np.asarray(selection.k_center(points, np.zeros(30, bool), 2))
    have = [3, 17]
    for i in found:
        distance = np.linalg.norm(points[:, None] - points[have], axis=-1).min(1)
        assert i == distance.argmax()
        have.append(i)
    first = np.linalg.norm(points - points.mean(0), axis=1).argmax()
    assert alone.tolist() == [first, np.linalg.norm(points - points[first], axis=1).argmax()]
