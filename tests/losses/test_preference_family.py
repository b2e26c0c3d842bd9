"""Losses of pairs of answers, from sums of log-probabilities and counts of tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kd.losses import preference_family as family

RNG = np.random.default_rng(0)
B = 6
COUNTS = RNG.integers(1, 40, (B, 2))
LOG_P, ANCHOR = (-COUNTS * RNG.exponential(size=(2, B, 2))).astype(np.float32)
MEANS = LOG_P / COUNTS


@pytest.fixture(scope='module', autouse=True)
def _quick(quick_compilation):
    with quick_compilation():
        yield


def gradient(loss, log_p=LOG_P):
    return np.asarray(jax.jit(jax.grad(lambda x: jnp.sum(loss(x))))(jnp.asarray(log_p)))


def cosine(a, b):
    return np.sum(a * b) / np.linalg.norm(a) / np.linalg.norm(b)


class TestDPO:
    """With the warmed-up student as the reference it is SODA, with the teacher LLaVA-MoD's."""

    def test_at_the_reference_it_is_log_2_and_pulls_the_pair_apart(self):
        np.testing.assert_allclose(family.dpo(LOG_P, LOG_P, 0.3), np.log(2), rtol=1e-6)
        slope = gradient(lambda x: family.dpo(x, LOG_P, 0.3))
        np.testing.assert_allclose(slope, np.tile([-0.15, 0.15], (B, 1)), rtol=1e-6)

    def test_equal_answers_teach_nothing(self):
        alike = np.repeat(LOG_P[:, :1], 2, axis=1)

        def loss(x):
            return family.dpo(jnp.stack([x, x], -1), np.repeat(ANCHOR[:, :1], 2, axis=1))

        np.testing.assert_allclose(loss(alike[:, 0]), np.log(2), rtol=1e-6)
        np.testing.assert_allclose(gradient(loss, alike[:, 0]), 0, atol=1e-7)

    def test_swapped_answers_turn_the_margin(self):
        margin = 0.1 * ((LOG_P - ANCHOR) @ [1, -1])
        swapped = family.dpo(LOG_P[:, ::-1], ANCHOR[:, ::-1])
        np.testing.assert_allclose(family.dpo(LOG_P, ANCHOR) - swapped, -margin, atol=1e-5)

    def test_the_anchor_counts_by_its_difference_and_has_no_gradient(self):
        moved = family.dpo(LOG_P, ANCHOR + np.arange(B)[:, None])
        np.testing.assert_allclose(moved, family.dpo(LOG_P, ANCHOR), rtol=1e-5)
        np.testing.assert_array_equal(gradient(lambda x: family.dpo(LOG_P, x)), 0)

    @pytest.mark.parametrize('share', [0.3, 0.9])
    def test_the_optimum_of_two_answers(self, share):
        """Preferred by a share of the judges: log-odds move by logit(share) / beta."""
        reference, beta = np.log([0.2, 0.8]).astype(np.float32), 0.5
        best = np.log(0.2 / 0.8) + scipy.special.logit(share) / beta

        def loss(odds):
            log_q = jnp.stack([jax.nn.log_sigmoid(odds), jax.nn.log_sigmoid(-odds)], -1)
            first = family.dpo(log_q, jnp.broadcast_to(reference, log_q.shape), beta)
            second = family.dpo(
                log_q[..., ::-1], jnp.broadcast_to(reference[::-1], log_q.shape), beta
            )
            return share * first + (1 - share) * second

        slope = gradient(loss, np.float32(best + np.array([-0.5, 0.0, 0.5])))
        np.testing.assert_allclose(slope[1], 0, atol=1e-6)
        assert slope[0] < -0.01
        assert slope[2] > 0.01


class TestSimPO:
    def test_is_minus_log_sigmoid_of_means_less_the_margin(self):
        exact = -scipy.special.log_expit(2.5 * (MEANS @ [1, -1]) - 0.7)
        found = family.simpo(LOG_P, COUNTS, 2.5, 0.7)
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
        exact = -scipy.special.log_expit(2.5 * (MEANS @ [1, -1]) - np.arange(B))
        found = family.simpo(LOG_P, COUNTS, 2.5, np.arange(B))
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize('gamma', [0.0, 1.0])
    def test_tends_to_the_symmetric_loss(self, gamma):
        """By beta sigma(gamma): beta / 2 without a margin."""
        soft = gradient(lambda x: family.simpo(x, COUNTS, 1e-3, gamma))
        symmetric = gradient(lambda x: family.redi(x, COUNTS, 1.0))
        assert cosine(soft, symmetric) > 0.999
        ratio = np.linalg.norm(soft) / np.linalg.norm(symmetric)
        assert ratio == pytest.approx(1e-3 * scipy.special.expit(gamma), rel=0.01)


class TestREDI:
    def test_is_linear_in_alpha_from_fine_tuning_to_the_symmetric_loss(self):
        for alpha in (0.0, 0.8, 1.0):
            found = family.redi(LOG_P, COUNTS, alpha)
            np.testing.assert_allclose(found, MEANS @ [-1, alpha], rtol=1e-5, atol=1e-6)
        slope = gradient(lambda x: family.redi(x, COUNTS, 0.8))
        np.testing.assert_allclose(slope, [-1, 0.8] / COUNTS, rtol=1e-6)
        alike = np.repeat(LOG_P[:, :1], 2, axis=1)
        np.testing.assert_array_equal(family.redi(alike, np.full((B, 2), 7), 1.0), 0)

    def test_a_weight_that_fades_leaves_unlikely_answers_alone(self):
        weight = 0.8 * np.exp(1.5 * MEANS[:, 1])
        found = family.redi(LOG_P, COUNTS, 0.8, 1.5)
        np.testing.assert_allclose(found, weight * MEANS[:, 1] - MEANS[:, 0], rtol=1e-5, atol=1e-6)
        slope = gradient(lambda x: family.redi(x, COUNTS, 0.8, 1.5))
        np.testing.assert_allclose(slope, np.stack([-np.ones(B), weight], 1) / COUNTS, rtol=1e-5)

    def test_an_empty_answer_has_neither_value_nor_nan(self):
        log_p, counts = np.array([[-3.0, 0.0]]), np.array([[2, 0]])
        np.testing.assert_allclose(family.redi(log_p, counts), [1.5])
        np.testing.assert_allclose(family.simpo(log_p, counts, 1.0, 0.0), np.logaddexp(0, 1.5))

    def test_on_a_table_it_has_one_stationary_law_if_alpha_is_below_1(self):
        right, wrong = np.array([0.6, 0.3, 0.1]), np.array([0.2, 0.1, 0.7])

        def slope(z, right, wrong, alpha):
            def expected(z):
                log_q = jax.nn.log_softmax(z)
                pairs = jnp.stack(jnp.meshgrid(log_q, log_q, indexing='ij'), -1)
                losses = family.redi(pairs, jnp.ones_like(pairs), alpha)
                return jnp.sum(right[:, None] * wrong * losses)

            return jax.grad(expected)(z)

        @jax.jit
        def descend(right, wrong, alpha):
            step = lambda _, z: z - 1.0 * slope(z, right, wrong, alpha)  # noqa: E731
            z = jax.lax.fori_loop(0, 3000, step, jnp.array([0.5, -1.0, 0.2]))
            return slope(jnp.array([0.5, -1.0, 0.2]), right, wrong, alpha), z

        q = scipy.special.softmax([0.5, -1.0, 0.2])
        first, z = descend(right, np.array([0.2, 0.5, 0.3]), 0.3)
        np.testing.assert_allclose(
            first, -(right - q) + 0.3 * (np.array([0.2, 0.5, 0.3]) - q), atol=1e-6
        )
        stationary = (right - 0.3 * np.array([0.2, 0.5, 0.3])) / 0.7
        np.testing.assert_allclose(scipy.special.softmax(z), stationary, atol=1e-3)
        # Where the wrong law outweighs the right one nothing is left.
        _, z = descend(right, wrong, 0.5)
        assert scipy.special.softmax(z)[2] < 1e-3
        # alpha = 1: the same push everywhere, without end.
        first, z = descend(right, wrong, 1.0)
        np.testing.assert_allclose(first, wrong - right, atol=1e-6)
        np.testing.assert_allclose(
            np.asarray(z) - [0.5, -1.0, 0.2], 3000 * (right - wrong), rtol=1e-3
        )


class TestKTOPair:
    def test_is_the_mean_of_both_sides_against_the_baseline_of_the_other(self):
        a = (LOG_P - ANCHOR).astype(np.float64)
        chosen, rejected = (max(a[:, i].mean(), 0) for i in (0, 1))
        baseline = family.kto_baseline(LOG_P, ANCHOR)
        np.testing.assert_allclose(baseline, [chosen, rejected], rtol=1e-5, atol=1e-6)
        exact = (
            1 - scipy.special.expit(0.1 * (a[:, 0] - rejected))
            + 1 - scipy.special.expit(0.1 * (chosen - a[:, 1]))
        ) / 2  # fmt: skip
        found = family.kto_pair(LOG_P, ANCHOR, baseline, 0.1)
        np.testing.assert_allclose(found, exact, rtol=1e-5)

    def test_at_the_reference_it_is_a_half_and_the_official_gradient_is_twice_ours(self):
        """Just above it: the baseline is cut off at 0."""
        log_p = ANCHOR + np.float32([1e-4, 1e-4])

        def loss(x, official):
            return family.kto_pair(
                x, ANCHOR, family.kto_baseline(x, ANCHOR, official=official), 0.1
            )

        np.testing.assert_allclose(loss(log_p, False), 0.5, atol=1e-5)
        ours, official = (gradient(lambda x, o=o: loss(x, o), log_p) for o in (False, True))
        np.testing.assert_allclose(ours, np.tile([-0.0125, 0.0125], (B, 1)), rtol=1e-3)
        np.testing.assert_allclose(official, 2 * ours, rtol=1e-3)

    def test_the_anchor_has_no_gradient_and_padding_no_weight(self):
        for official in (False, True):
            slope = gradient(
                lambda r, o=official: family.kto_pair(
                    LOG_P, r, family.kto_baseline(LOG_P, r, official=o)
                )
            )
            np.testing.assert_array_equal(slope, 0)
        where = np.arange(B) < 4
        np.testing.assert_allclose(
            family.kto_baseline(LOG_P, ANCHOR, where=where),
            family.kto_baseline(LOG_P[:4], ANCHOR[:4]),
            rtol=1e-6,
        )
        np.testing.assert_array_equal(family.kto_baseline(LOG_P, ANCHOR, where=where & False), 0)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: family.simpo(LOG_P, COUNTS, 0.0), 'beta must be positive'),
        (lambda: family.kto_pair(LOG_P, ANCHOR, [0, 0], -1.0), 'beta must be positive'),
        (lambda: family.redi(LOG_P, COUNTS[:, 0]), r'counts needs two candidates .* shape \(6,\)'),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
