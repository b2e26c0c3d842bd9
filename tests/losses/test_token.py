"""Targets, gates, masks and rankings of tokens against NumPy, SciPy and enumeration."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.special
import scipy.stats

from kd.losses import divergence, token

INF = np.inf
entropy = jax.jit(token.entropy)
entropy_guided_temperature = jax.jit(token.entropy_guided_temperature, static_argnames='top_k')
top_fraction_mask = jax.jit(token.top_fraction_mask, static_argnums=2, static_argnames='scope')
list_mle = jax.jit(token.list_mle, static_argnums=2)


@pytest.fixture(scope='module', autouse=True)
def _quick(quick_compilation):
    with quick_compilation():
        yield


def law_entropy(logits):
    return scipy.stats.entropy(scipy.special.softmax(np.asarray(logits, np.float64), -1), axis=-1)


@pytest.fixture(scope='module')
def logits():
    return 2 * np.random.default_rng(0).normal(size=(2, 5, 7)).astype(np.float32)


def test_entropy_is_scipys_and_exact_at_its_ends(logits):
    np.testing.assert_allclose(entropy(logits), law_entropy(logits), rtol=1e-5)
    tempered = entropy(logits, temperature=1.7)
    np.testing.assert_allclose(tempered, law_entropy(logits / 1.7), rtol=1e-5)
    ends = np.array([[0.0] * 4, [1e4, 0, 0, 0], [0, 0, -INF, -INF], [-INF] * 4], np.float32)
    np.testing.assert_allclose(entropy(ends), [np.log(4), 0, np.log(2), 0], rtol=1e-6)


def test_gradient_of_the_entropy_of_two_outcomes():
    difference = np.linspace(-3, 3, 7, dtype=np.float32)
    two = np.stack([difference, np.zeros(7, np.float32), np.full(7, -INF, np.float32)], -1)
    slope = jax.grad(lambda z: entropy(z).sum())(jnp.asarray(two))
    p = scipy.special.expit(difference)
    np.testing.assert_allclose(slope[:, 0], -p * (1 - p) * difference, atol=1e-6)
    np.testing.assert_array_equal(slope[:, 2], 0)


class TestInterpolatedLogits:
    def test_mixes_logits_and_ends_at_either_side(self, logits):
        student, teacher = logits
        for t in (0.0, 0.3, 1.0):
            found = token.interpolated_logits(student, teacher, t)
            np.testing.assert_allclose(found, (1 - t) * student + t * teacher, atol=1e-6)
        per_position = np.linspace(0, 1, 5, dtype=np.float32)[:, None]
        found = token.interpolated_logits(student, teacher, per_position)
        np.testing.assert_array_equal(found[0], student[0])
        np.testing.assert_array_equal(found[-1], teacher[-1])

    def test_gradient_is_the_students_law_less_the_targets(self, logits):
        def loss(s, t, weight):
            return divergence.forward_kl(s, token.interpolated_logits(s, t, weight)).sum()

        slopes = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))
        student, teacher = map(jnp.asarray, logits)
        q = scipy.special.softmax(logits[0], -1)
        for t in (0.0, 0.5, 1.0):
            target = scipy.special.softmax((1 - t) * logits[0] + t * logits[1], -1)
            of_student, of_teacher, of_t = slopes(student, teacher, t)
            np.testing.assert_allclose(of_student, q - target, atol=1e-6)
            np.testing.assert_array_equal(of_teacher, 0)
            assert of_t == 0
        # For small t it is t Cov_q(z_s - z_t); without the detached student it would be another.
        change = logits[0] - logits[1]
        covariance = q * (change - (q * change).sum(-1, keepdims=True))
        with jax.enable_x64(True):
            small, _, _ = slopes(*(x.astype(np.float64) for x in logits), 1e-3)
        np.testing.assert_allclose(small, 1e-3 * covariance, atol=2e-2 * 1e-3)

        def attached(s):
            return divergence.forward_kl(s, 0.5 * s + 0.5 * teacher).sum()

        half = scipy.special.softmax(logits.mean(0), -1)
        assert np.abs(jax.jit(jax.grad(attached))(student) - (q - half)).max() > 0.05

    def test_constants_of_either_side_leave_the_law(self, logits):
        plain = jax.nn.softmax(token.interpolated_logits(*logits, 0.4))
        moved = jax.nn.softmax(token.interpolated_logits(logits[0] + 3, logits[1] - 2, 0.4))
        np.testing.assert_allclose(moved, plain, atol=1e-6)

    @pytest.mark.parametrize('t', [0.0, 0.5, 1.0])
    def test_impossible_outcomes_stay_impossible(self, t):
        student = jnp.array([0.0, -INF, 1.0, -INF])
        teacher = jnp.array([2.0, 3.0, -INF, -INF])
        found = token.interpolated_logits(student, teacher, t)
        np.testing.assert_array_equal(found, [2 * t, -INF, -INF, -INF])

    def test_bfloat16_is_mixed_in_float32(self):
        half = jnp.array([1.0, 2.0], jnp.bfloat16)
        found = token.interpolated_logits(half, 2 * half, 0.4001)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, [1.4001, 2.8002], rtol=1e-6)

    def test_refuses_other_shapes(self):
        with pytest.raises(ValueError, match=r'one shape, got \(3,\) and \(4,\)'):
            token.interpolated_logits(np.zeros(3), np.zeros(4), 0.5)


def test_confidence_gate_is_a_half_between_equals_and_without_gradient():
    student, teacher = np.array([1.0, 2.0, 0.0]), np.array([1.0, 0.5, 3.0])
    found = token.confidence_gate(student, teacher, 0.5)
    np.testing.assert_allclose(found, scipy.special.expit((student - teacher) / 0.5), rtol=1e-6)
    assert found[0] == 0.5
    slopes = jax.grad(lambda *h: token.confidence_gate(*h).sum(), (0, 1))(
        jnp.asarray(student), jnp.asarray(teacher)
    )
    assert not np.any(slopes)
    with pytest.raises(ValueError, match='temperature must be positive, got 0'):
        token.confidence_gate(student, teacher, 0)


class TestOpenerMask:
    def test_constant_entropies_of_any_size(self):
        sizes = np.random.default_rng(1).uniform(0.01, 5, (2000, 1)).astype(np.float32)
        entropies = np.broadcast_to(sizes, (2000, 50))
        counted = np.ones((2000, 50), bool)
        found = token.opener_mask(entropies, counted, 0.1)
        np.testing.assert_array_equal(found, np.broadcast_to(np.arange(50) < 5, (2000, 50)))
        assert np.all(token.opener_mask(entropies, counted, 1.0))

    def test_is_the_shortest_start_that_reaches_the_share(self):
        rng = np.random.default_rng(2)
        entropies = rng.exponential(size=(20, 30)).astype(np.float32)
        where = rng.random((20, 30)) < 0.7
        found = np.asarray(token.opener_mask(entropies, where, 0.35))
        for row, counted, mask in zip(entropies.astype(np.float64), where, found, strict=True):
            total, reached, expected = row[counted].sum(), 0.0, []
            for i in np.flatnonzero(counted):
                expected.append(i)
                reached += row[i]
                if reached >= 0.35 * total:
                    break
            np.testing.assert_array_equal(np.flatnonzero(mask), expected)

    def test_padding_does_not_count_and_certainty_has_one_token(self):
        entropies = np.array([[9, 1, 1, 1, 9], [5, 0, 0, 0, 5], [1, 1, 1, 1, 1]], np.float32)
        where = np.array([[0, 1, 1, 1, 0], [0, 1, 1, 1, 0], [0, 0, 0, 0, 0]], bool)
        found = token.opener_mask(entropies, where, 0.5)
        np.testing.assert_array_equal(found, [[0, 1, 1, 0, 0], [0, 1, 0, 0, 0], [0, 0, 0, 0, 0]])


class TestTopFractionMask:
    @pytest.mark.parametrize('scope', ['batch', 'sequence'])
    def test_takes_the_largest(self, scope):
        rng = np.random.default_rng(3)
        values = rng.normal(size=(6, 20)).astype(np.float32)
        where = rng.random((6, 20)) < 0.6
        found = np.asarray(top_fraction_mask(values, where, 0.3, scope=scope))
        expected = np.zeros_like(where)
        groups = np.arange(6) if scope == 'sequence' else np.zeros(6, int)
        for group in np.unique(groups):
            inside = where & (groups == group)[:, None]
            count = math.ceil(0.3 * inside.sum())
            expected |= inside & (values >= np.sort(values[inside])[-count])
            assert (expected & inside).sum() == count
        np.testing.assert_array_equal(found, expected)

    def test_a_tenth_of_50_is_5_of_one_is_1_and_of_none_is_none(self):
        values = np.arange(50, dtype=np.float32)[None]
        where = np.arange(50) < np.array([[50], [1], [0]])
        found = top_fraction_mask(np.repeat(values, 3, 0), where, 0.1, scope='sequence')
        np.testing.assert_array_equal(found.sum(-1), [5, 1, 0])
        assert not np.any(top_fraction_mask(values, where[:1], 0.0))

    def test_equals_are_taken_together(self):
        found = top_fraction_mask(np.array([1.0, 2, 2, 0]), np.ones(4, bool), 0.25)
        np.testing.assert_array_equal(found, [False, True, True, False])

    def test_mean_entropy_has_gradient_at_its_tokens_alone(self, logits):
        where = np.array([True, True, True, True, False])

        def loss(z):
            h = entropy(z)
            chosen = top_fraction_mask(h, where, 0.5)
            return jnp.sum(h * chosen) / jnp.sum(chosen)

        slope = jax.jit(jax.grad(loss))(jnp.asarray(logits[0]))
        chosen = np.argsort(-np.where(where, law_entropy(logits[0]), -1))[:2]
        np.testing.assert_array_equal(np.flatnonzero(np.any(slope != 0, -1)), np.sort(chosen))

    def test_refuses_other_scopes(self):
        with pytest.raises(ValueError, match="scope must be 'batch' or 'sequence', got 'row'"):
            token.top_fraction_mask(np.ones(3), np.ones(3, bool), scope='row')


class TestListMLE:
    def test_is_a_probability_of_orders(self):
        scores = np.array([0.3, -1.0, 2.0, 0.9], np.float32)
        orders = np.array(list(itertools.permutations(range(4))), np.float32)
        losses = list_mle(np.broadcast_to(scores, (24, 4)), orders, 4)
        np.testing.assert_allclose(np.exp(-losses).sum(), 1, rtol=1e-6)
        # The probability of one order: favourites drawn without replacement.
        kept, weights, probability = list(range(4)), np.exp(scores.astype(np.float64)), 1.0
        for favourite in np.argsort(-orders[7]):
            probability *= weights[favourite] / weights[kept].sum()
            kept.remove(favourite)
        np.testing.assert_allclose(losses[7], -np.log(probability), rtol=1e-6)

    def test_special_cases(self, logits):
        student, teacher = logits
        np.testing.assert_allclose(list_mle(student, teacher, 1), 0, atol=1e-6)
        np.testing.assert_allclose(
            list_mle(np.zeros(6), np.arange(6.0), 5), np.log(math.factorial(5)), rtol=1e-6
        )
        top = np.argsort(-student, -1)[:, :2]
        s, t = (np.take_along_axis(x, top, -1) for x in logits)
        behind = np.where(t[:, 0] > t[:, 1], s[:, 1] - s[:, 0], s[:, 0] - s[:, 1])
        found = list_mle(student, teacher, 2)
        np.testing.assert_allclose(found, np.logaddexp(0, behind), rtol=1e-5)

    def test_of_the_teacher_the_order_alone_counts(self, logits):
        student, teacher = logits
        plain = list_mle(student, teacher, 5)
        np.testing.assert_array_equal(list_mle(student, np.exp(teacher) - 9, 5), plain)
        np.testing.assert_allclose(list_mle(student + 4, teacher, 5), plain, rtol=1e-5)
        slope = jax.grad(lambda t: list_mle(student, t, 5).sum())(jnp.asarray(teacher))
        np.testing.assert_array_equal(slope, 0)

    def test_sums_over_prefixes_are_the_reversed_ranking(self, logits):
        student, teacher = logits
        s = np.take_along_axis(student, np.argsort(-teacher, -1), -1)
        prefixes = np.logaddexp.accumulate(s, axis=-1)
        np.testing.assert_allclose(
            list_mle(student, -teacher, 7), (prefixes - s).sum(-1), rtol=1e-5
        )

    def test_descent_raises_the_teachers_favourite(self):
        slope = jax.grad(lambda s: list_mle(s, jnp.arange(4.0)[::-1], 4))
        descend = jax.jit(lambda s: jax.lax.fori_loop(0, 300, lambda _, s: s - 0.3 * slope(s), s))
        np.testing.assert_allclose(descend(jnp.zeros(4)), [6.07, 1.93, -1.93, -6.07], atol=0.01)

    def test_impossible_outcomes_are_not_ranked(self):
        student, teacher = jnp.array([1.0, -INF, 0.5, -INF]), jnp.array([0.0, 9.0, 1.0, 2.0])
        value, slope = jax.value_and_grad(list_mle)(student, teacher, 4)
        np.testing.assert_allclose(value, np.logaddexp(0, 0.5), rtol=1e-6)
        share = scipy.special.expit(0.5)
        np.testing.assert_allclose(slope, [share, 0, -share, 0], atol=1e-6)

    def test_refuses_more_than_there_are(self):
        with pytest.raises(ValueError, match=r'k must be in 1 .. 3 \(the outcomes\), got 4'):
            list_mle(np.zeros(3), np.zeros(3), 4)


class TestEntropyGuidedTemperature:
    def test_is_the_root_or_the_nearer_end(self):
        rng = np.random.default_rng(4)
        logits = rng.normal(size=(40, 12)) * rng.uniform(0.3, 6, (40, 1))
        found = np.asarray(entropy_guided_temperature(logits.astype(np.float32)))
        inside = 0
        for z, tau in zip(logits, found, strict=True):
            now = law_entropy(z)
            target = now + 0.5 * scipy.special.expit(2 * (now - 1.2))
            gap = [law_entropy(z / end) - target for end in (1.1, 1.5)]
            if now <= 0.03 or gap[0] >= 0:
                expected = 1.1
            elif gap[1] <= 0:
                expected = 1.5
            else:
                inside += 1

                def short(tau, z=z, target=target):
                    return law_entropy(z / tau) - target

                expected = scipy.optimize.brentq(short, 1.1, 1.5)
                assert abs(law_entropy(z / tau) - target) < 1e-5
            assert tau == pytest.approx(expected, abs=1e-5)
        assert 10 < inside < 40

    def test_facts_keep_the_low_end_and_uniform_laws_take_the_high_one(self):
        logits = np.array([[20.0, 0, 0, 0], [0.0] * 4, [5.0, 0.0, -INF, -INF]], np.float32)
        found = entropy_guided_temperature(logits)
        np.testing.assert_allclose(found[:2], [1.1, 1.5], rtol=1e-6)
        without = entropy_guided_temperature(logits[2, :2])
        np.testing.assert_array_equal(found[2], without)

    def test_rises_with_the_amplitude_and_has_no_gradient(self, logits):
        taus = [
            entropy_guided_temperature(logits[0], amplitude=a) for a in (0.0, 0.1, 0.2, 0.5, 1.0)
        ]
        assert np.all(np.diff(taus, axis=0) >= 0)
        assert np.ptp(taus) > 0.3
        slope = jax.grad(lambda z: entropy_guided_temperature(z).sum())
        np.testing.assert_array_equal(slope(jnp.asarray(logits[0])), 0)

    def test_the_largest_logits_stand_for_all(self):
        z = np.random.default_rng(5).normal(size=(6, 40)).astype(np.float32) * 3
        tail = np.full((6, 500), -30, np.float32)
        full = entropy_guided_temperature(z)
        found = entropy_guided_temperature(np.concatenate([tail, z], -1), top_k=40)
        np.testing.assert_allclose(found, full, atol=2e-6)

    def test_refuses_reversed_ends(self):
        with pytest.raises(ValueError, match='need 0 < low <= high, got low=2'):
            token.entropy_guided_temperature(np.zeros(3), low=2)


def test_k2_pulls_towards_the_reference_alone():
    log_p, reference = jnp.array([-1.0, -2.0, -INF]), jnp.array([-1.5, -0.5, -INF])
    np.testing.assert_allclose(token.k2(log_p, reference), [0.125, 1.125, 0])
    slopes = jax.grad(lambda l, r: token.k2(l, r).sum(), (0, 1))(log_p, reference)
    np.testing.assert_allclose(slopes, [[0.5, -1.5, 0], [0, 0, 0]])


def test_entropy_weights_favour_certain_tokens_and_have_mean_one():
    rng = np.random.default_rng(5)
    entropies = rng.gamma(1.0, 1.0, (4, 6)).astype(np.float32)
    where = rng.random((4, 6)) < 0.6
    found = np.asarray(token.entropy_weights(np.where(where, entropies, np.nan), where, 2.0))
    raw = np.exp(-2.0 * entropies) * where
    np.testing.assert_allclose(found, raw / raw.sum() * where.sum(), rtol=1e-5)
    assert found[where].mean() == pytest.approx(1, abs=1e-6)
    order = np.argsort(entropies[where])
    assert (np.diff(found[where][order]) < 0).all()
    np.testing.assert_allclose(token.entropy_weights(entropies, where, 0.0), where, rtol=1e-6)
    # Weights whose exponentials would all be 0 are as good as any.
    far = np.asarray(token.entropy_weights(entropies + 500, where))
    near = np.asarray(token.entropy_weights(entropies, where))
    np.testing.assert_allclose(far, near, rtol=1e-3)
    assert not np.asarray(token.entropy_weights(entropies, np.zeros_like(where))).any()
