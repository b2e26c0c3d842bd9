"""Policy gradients against the enumeration of small policies, in float64."""

import math
from itertools import combinations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import special

from kd.losses import aggregate, policy
from kd.metrics import mean

V = 7
RNG = np.random.default_rng(0)
LOGITS, REFERENCE, OLD = RNG.normal(size=(3, V)) * 1.3


@pytest.fixture(scope='module', autouse=True)
def _float64(quick_compilation):
    with jax.enable_x64(True), quick_compilation():
        yield


def law(z):
    return special.softmax(z)


def kl(z_a, z_b):
    return jnp.sum(jax.nn.softmax(z_a) * (jax.nn.log_softmax(z_a) - jax.nn.log_softmax(z_b)))


def slope_of_kl(*, forward=False):
    """Of the KL of the policy and the reference, in the policy's logits: by hand."""
    p, ref = law(LOGITS), law(REFERENCE)
    if forward:
        return p - ref
    d = np.log(p) - np.log(ref)
    return p * (d - (p * d).sum())


def expected(estimate, sampled_by):
    """Mean and mean gradient over all tokens, of `estimate(log_p [V])`, weighed by a law."""

    def value(z):
        return jnp.sum(law(sampled_by) * estimate(jax.nn.log_softmax(z)))

    return jax.value_and_grad(value)(jnp.asarray(LOGITS))


LOG_REF, LOG_OLD = np.log(law(REFERENCE)), np.log(law(OLD))


class TestKL:
    @pytest.mark.parametrize('kind', ['k1', 'k2', 'k3', 'k3+'])
    def test_means_and_gradients_of_fresh_samples(self, kind):
        value, slope = expected(lambda l: policy.kl_estimate(l, LOG_REF, kind), LOGITS)
        d = np.log(law(LOGITS)) - LOG_REF
        wanted = float(kl(LOGITS, REFERENCE)) if kind != 'k2' else (law(LOGITS) * d**2 / 2).sum()
        assert float(value) == pytest.approx(wanted, rel=1e-10)
        slopes = {
            'k1': np.zeros(V),
            'k2': slope_of_kl(),
            'k3': slope_of_kl(forward=True),
            'k3+': slope_of_kl(),
        }
        np.testing.assert_allclose(slope, slopes[kind], atol=1e-12)

    @pytest.mark.parametrize('kind', ['k1', 'k3'])
    def test_weighed_ones_are_right_for_samples_of_any_old_policy(self, kind):
        value, slope = expected(
            lambda l: policy.kl_estimate(l, LOG_REF, kind, old_log_p=LOG_OLD), OLD
        )
        assert float(value) == pytest.approx(float(kl(LOGITS, REFERENCE)), rel=1e-10)
        np.testing.assert_allclose(slope, slope_of_kl(), atol=1e-12)

    def test_the_gradient_of_a_weighed_k3_is_rho_d(self):
        log_p = np.log(law(LOGITS))
        slope = jax.vmap(
            jax.grad(lambda l, r, o: policy.kl_estimate(l, r, 'k3', old_log_p=o)), (0, 0, 0)
        )(log_p, LOG_REF, LOG_OLD)
        np.testing.assert_allclose(slope, np.exp(log_p - LOG_OLD) * (log_p - LOG_REF), rtol=1e-10)

    def test_k3_is_never_negative_and_0_where_both_agree(self):
        d = np.concatenate([np.linspace(-30, 30, 61), [1e-9, -1e-9]])
        value = np.asarray(policy.kl_estimate(d, np.zeros_like(d)))
        assert (value >= 0).all()
        assert np.flatnonzero(value == 0).tolist() == [30]

    def test_the_gradient_of_distillation_on_policy_is_that_of_the_reverse_kl(self):
        """E_v[A_v grad log p_v] with A = log p_T - log p is -grad KL(p, T)."""

        def loss(log_p):
            advantage = -policy.kl_estimate(log_p, LOG_REF, 'k1')
            fresh = policy.log_ratio(log_p, jax.lax.stop_gradient(log_p))
            return policy.clipped_surrogate(fresh, advantage)

        np.testing.assert_allclose(expected(loss, LOGITS)[1], slope_of_kl(), atol=1e-12)

    def test_what_old_samples_cannot_correct_is_refused(self):
        with pytest.raises(ValueError, match=r'old_log_p weighs k1 and k3, not k2\.'):
            policy.kl_estimate(LOG_REF, LOG_REF, 'k2', old_log_p=LOG_OLD)
        with pytest.raises(ValueError, match=r"or 'k3\+', got 'k4'"):
            policy.kl_estimate(LOG_REF, LOG_REF, 'k4')


class TestAdvantages:
    # Three live groups of four, and a dead one whose mean is not exact in binary.
    REWARDS = np.array([0, 1, 1, 0, 0.5, 2, -1, 0.25, 1, 0, 0, 0, 0.1, 0.1, 0.1, 0.1])

    @pytest.mark.parametrize('ddof', [0, 1])
    def test_grpo_has_mean_0_and_deviation_1(self, ddof):
        found = np.asarray(policy.group_advantage(self.REWARDS, 4, ddof=ddof, epsilon=1e-12))
        live = found.reshape(4, 4)[:3]
        np.testing.assert_allclose(live.mean(1), 0, atol=1e-12)
        np.testing.assert_allclose(live.std(1, ddof=ddof), 1, rtol=1e-9)
        assert (found[12:] == 0).all()

    def test_values_by_hand(self):
        # Two right of eight: 1.6202 and -.5401 with ddof 1 (KEPO), 7 % more with 0.
        rewards = np.array([1, 1, 0, 0, 0, 0, 0, 0])
        found = policy.group_advantage(rewards, 8, ddof=1, epsilon=1e-4)
        np.testing.assert_allclose(found, [1.6199] * 2 + [-0.5400] * 6, atol=1e-4)
        ratio = policy.group_advantage(rewards, 8, epsilon=0.0) / found
        np.testing.assert_allclose(ratio, np.sqrt(8 / 7), rtol=1e-3)
        np.testing.assert_allclose(
            policy.group_advantage(rewards, 8, 'dr_grpo'), [0.75] * 2 + [-0.25] * 6
        )
        np.testing.assert_allclose(
            policy.group_advantage(rewards, 8, 'rloo'), [6 / 7] * 2 + [-2 / 7] * 6
        )

    def test_rloo_is_the_reward_less_the_mean_of_the_others(self):
        grouped = self.REWARDS.reshape(4, 4)
        others = np.array([[np.delete(row, i).mean() for i in range(4)] for row in grouped])
        np.testing.assert_allclose(
            policy.group_advantage(self.REWARDS, 4, 'rloo'), (grouped - others).ravel(), atol=1e-12
        )

    def test_grpo_does_not_see_the_scale_of_rewards(self):
        plain = policy.group_advantage(self.REWARDS, 4)
        scaled = policy.group_advantage(3 * self.REWARDS - 5, 4)
        np.testing.assert_allclose(scaled, plain, atol=1e-5)

    @pytest.mark.parametrize('kind', ['grpo', 'dr_grpo', 'rloo'])
    @pytest.mark.parametrize('dtype', [np.float32, np.float64])
    def test_dead_groups_are_0_and_known(self, kind, dtype):
        # In float32 the mean of thirds is no third.
        rewards = np.repeat(np.array([1 / 3, 0.1, 0.0, 1.0], dtype), 7)
        assert (np.asarray(policy.group_advantage(rewards, 7, kind)) == 0).all()
        assert policy.dead_groups(rewards, 7).tolist() == [True] * 4
        assert policy.dead_groups(self.REWARDS, 4).tolist() == [False] * 3 + [True]

    @pytest.mark.parametrize(
        ('kind', 'ddof'), [('grpo', 0), ('grpo', 1), ('dr_grpo', 0), ('rloo', 0)]
    )
    def test_an_answer_without_a_reward_is_as_if_it_had_not_been_given(self, kind, ddof):
        rewards = np.array([0, 1, 1, 0, 0.5, 2, -1, 9, 0, 9, 9, 9, 9, 9, 9, 9, 1, 9, 1, 0])
        where = rewards != 9
        where[-1] = False
        found = np.asarray(policy.group_advantage(rewards, 4, kind, ddof=ddof, where=where))
        for row in (0, 1):
            there = np.arange(4 * row, 4 * row + 4)[where[4 * row : 4 * row + 4]]
            alone = policy.group_advantage(rewards[there], len(there), kind, ddof=ddof)
            np.testing.assert_allclose(found[there], alone, rtol=1e-6)
        assert (found[~where] == 0).all()
        # One alone has nobody to be compared with, and two that are equal are dead.
        assert (found[8:] == 0).all()
        dead = policy.dead_groups(rewards, 4, where=where)
        assert dead.tolist() == [False, False, True, True, True]

    def test_groups_that_do_not_fit_are_refused(self):
        with pytest.raises(ValueError, match=r'rewards \(6,\) do not divide into groups of 4'):
            policy.group_advantage(np.zeros(6), 4)
        with pytest.raises(ValueError, match='of at least 2'):
            policy.group_advantage(np.zeros(6), 1)
        with pytest.raises(ValueError, match='ddof is 0 or 1, got 2'):
            policy.group_advantage(np.zeros(6), 2, ddof=2)


def slope(loss, x):
    return np.asarray(jax.vmap(jax.grad(loss))(jnp.asarray(x, float)))


class TestSurrogate:
    RATIOS = np.log([0.5, 0.79, 0.81, 1.0, 1.27, 1.29, 2.0, 4.0])

    @pytest.mark.parametrize(
        ('advantage', 'dual', 'alive'),
        [
            (2.0, None, [1, 1, 1, 1, 1, 0, 0, 0]),
            (-2.0, None, [0, 0, 1, 1, 1, 1, 1, 1]),
            (-2.0, 3.0, [0, 0, 1, 1, 1, 1, 1, 0]),
            (0.0, None, [0] * 8),
        ],
    )
    def test_value_and_where_the_gradient_is_alive(self, advantage, dual, alive):
        def loss(x):
            return policy.clipped_surrogate(x, advantage, low=0.2, high=0.28, dual=dual)

        rho = np.exp(self.RATIOS)
        wanted = -np.minimum(rho * advantage, np.clip(rho, 0.8, 1.28) * advantage)
        wanted = np.minimum(wanted, 6.0) if dual else wanted
        np.testing.assert_allclose(loss(self.RATIOS), wanted, rtol=1e-12, atol=1e-15)
        np.testing.assert_allclose(
            slope(loss, self.RATIOS), -np.array(alive) * rho * advantage, rtol=1e-12, atol=1e-15
        )
        stopped = policy.is_clipped(self.RATIOS, advantage, low=0.2, high=0.28)
        if dual is None and advantage:
            assert stopped.tolist() == [not x for x in alive]

    def test_the_first_update_is_reinforce_and_sums_to_0_for_equal_lengths(self):
        rng = np.random.default_rng(1)
        log_p, rewards = rng.normal(size=(8, 5)), rng.integers(0, 2, 8)
        advantage = policy.group_advantage(rewards, 4)[:, None]
        where = np.arange(5) < rng.integers(1, 6, 8)[:, None]

        def loss(log_p, mode, where):
            ratio = policy.log_ratio(log_p, jax.lax.stop_gradient(log_p))
            losses = policy.clipped_surrogate(ratio, advantage, low=0.1, high=0.3)
            total, count = mean(aggregate.per_row(losses, aggregate.weights(where, mode)))
            return total / count

        found = jax.grad(loss)(jnp.asarray(log_p), 'token_mean', where)
        np.testing.assert_allclose(
            found, np.where(where, -np.asarray(advantage), 0) / where.sum(), rtol=1e-6
        )
        even = np.ones_like(where)
        assert abs(float(loss(log_p, 'sequence_mean', even))) < 1e-6

    def test_nothing_flows_to_the_old_policy_or_the_advantage(self):
        def loss(old, advantage):
            return policy.clipped_surrogate(policy.log_ratio(-1.0, old), advantage)

        assert jax.grad(loss, (0, 1))(-1.1, 1.0) == (0, 0)

    def test_far_and_impossible_tokens_are_finite(self):
        inf = np.inf
        log_p, old = np.array([-1e4, 0, -inf, -inf, -1]), np.array([0, -1e4, -inf, -1, -inf])
        found = np.asarray(policy.log_ratio(log_p, old))
        np.testing.assert_array_equal(found, [-20, 20, 0, -20, 20])
        slopes = jax.vmap(jax.grad(policy.log_ratio))(jnp.asarray(log_p), jnp.asarray(old))
        np.testing.assert_array_equal(slopes, np.zeros(5))
        for kind in ('k1', 'k2', 'k3', 'k3+'):
            value, of = jax.vmap(
                jax.value_and_grad(lambda l, r, kind=kind: policy.kl_estimate(l, r, kind))
            )(jnp.asarray(log_p[:3]), jnp.asarray(old[:3]))
            assert np.isfinite(value).all()
            assert np.isfinite(of).all()

    def test_a_dual_limit_below_the_ratio_itself_is_refused(self):
        with pytest.raises(ValueError, match='dual must be above 1, got 1'):
            policy.clipped_surrogate(0.0, 1.0, dual=1.0)


class TestAnchored:
    @staticmethod
    def loss(advantage, gap, **options):
        """Of one token whose l = l_old, as a function of l."""

        def of(log_p):
            ratio = policy.anchored_log_ratio(log_p, -1.0, -1.0 - gap, **options)
            return policy.clipped_surrogate(ratio, advantage, low=0.2, high=0.28)

        return float(jax.grad(of)(-1.0))

    def test_alpha_1_is_grpo_as_is_a_teacher_that_is_the_old_policy(self):
        log_p = np.linspace(-2, -0.2, 9)
        plain = policy.log_ratio(log_p, -1.0)
        np.testing.assert_array_equal(policy.anchored_log_ratio(log_p, -1.0, -9.0, 1.0), plain)
        for alpha in (0.0, 0.3, 0.9):
            np.testing.assert_allclose(
                policy.anchored_log_ratio(log_p, -1.0, -1.0, alpha), plain, atol=1e-12
            )

    def test_updates_against_the_teacher_are_blocked(self):
        # r = e^.3 = 1.3499 > 1.28: no increase, and a decrease weighs more.
        assert self.loss(1.0, 0.6) == 0
        assert self.loss(-1.0, 0.6) == pytest.approx(1.3499, abs=1e-4)
        # r = .7408 < .8: no decrease.
        assert self.loss(-1.0, -0.6) == 0
        assert self.loss(1.0, -0.6) == pytest.approx(-0.7408, abs=1e-4)
        assert self.loss(0.0, 0.6) == 0

    def test_the_clamp_is_of_the_teacher_alone_and_bounds_the_ratio(self):
        gaps = np.linspace(-50, 50, 21)
        ratio = policy.anchored_log_ratio(np.full(21, -1.0), -1.0, -1.0 - gaps, 0.3)
        np.testing.assert_allclose(ratio, 0.7 * np.clip(gaps, -1, 1), rtol=1e-12)
        # Outside, alpha of the gradient is left, or all of it.
        r = math.exp(0.5)
        assert self.loss(-1.0, 5.0) == pytest.approx(0.5 * r)
        assert self.loss(-1.0, 5.0, clamp_gradient='straight') == pytest.approx(r)

    def test_what_no_sign_clips_lies_between_the_logarithms_of_both_ends(self):
        ratio = np.linspace(-0.4, 0.4, 801)
        either = [policy.is_clipped(ratio, sign, low=0.2, high=0.2) for sign in (1.0, -1.0)]
        free = ratio[~np.logical_or(*either)]
        assert free.min() == pytest.approx(math.log(0.8), abs=1e-3)
        assert free.max() == pytest.approx(math.log(1.2), abs=1e-3)
        # The symmetric bound log(1 + eps) that the paper prints is none on the lower side.
        assert -free.min() > math.log(1.2)

    def test_the_last_log_probability_with_a_gradient(self):
        old, teacher, alpha = -1.2, -0.9, 0.5
        last = alpha * old + (1 - alpha) * teacher + math.log(1.28)

        def loss(x):
            ratio = policy.anchored_log_ratio(x, old, teacher, alpha)
            return policy.clipped_surrogate(ratio, 1.0, high=0.28)

        below, above = slope(loss, [last - 1e-6, last + 1e-6])
        assert below == pytest.approx(-1.28, rel=1e-4)
        assert above == 0

    def test_a_common_shift_changes_nothing_and_nothing_flows_to_the_teacher(self):
        rng = np.random.default_rng(2)
        three = rng.normal(size=(3, 6))
        np.testing.assert_allclose(
            policy.anchored_log_ratio(*(three + 4)), policy.anchored_log_ratio(*three), atol=1e-12
        )
        flows = jax.grad(lambda o, t: policy.anchored_log_ratio(-1.0, o, t), (0, 1))(-1.1, -1.3)
        assert flows == (0, 0)

    def test_another_clamp_is_refused(self):
        with pytest.raises(ValueError, match="clamp_gradient is 'literal' or 'straight', got 'x'"):
            policy.anchored_log_ratio(0.0, 0.0, 0.0, clamp_gradient='x')


def test_weights_of_samples_of_another_policy_are_cut_and_constant():
    found = policy.importance_cap(np.log([0.5, 1.0, 3.0]), np.zeros(3))
    np.testing.assert_allclose(found, [0.5, 1, 2], rtol=1e-12)
    assert jax.grad(policy.importance_cap)(0.3, 0.0) == 0


def test_the_penalty_of_long_answers():
    lengths = np.array([0, 16384, 16385, 18432, 20480, 30000])
    found = policy.overlong_penalty(lengths, 20480, 4096)
    np.testing.assert_allclose(found, [0, 0, -1 / 4096, -0.5, -1, -1], rtol=1e-6)
    with pytest.raises(ValueError, match='need 0 < buffer <= longest, got 5 and 4'):
        policy.overlong_penalty(lengths, 4, 5)


def test_pass_at_k_by_counting_draws():
    n, k = 6, 3
    for c in range(n + 1):
        draws = list(combinations(range(n), k))
        wanted = np.mean([any(i < c for i in draw) for draw in draws])
        assert float(policy.pass_at_k(c, n, k)) == pytest.approx(wanted)
    np.testing.assert_allclose(policy.pass_at_k(np.arange(9), 8, 1), np.arange(9) / 8, rtol=1e-6)
    with pytest.raises(ValueError, match=r'k must be in 1 .. 4 \(samples\), got 5'):
        policy.pass_at_k(1, 4, 5)


class TestSiblings:
    REWARDS = np.random.default_rng(3).integers(0, 2, 40).astype(float)

    def test_the_first_other_right_answer_of_the_group(self):
        index, available = map(np.asarray, policy.sibling_index(self.REWARDS, 4))
        for row in range(40):
            group = range(row // 4 * 4, row // 4 * 4 + 4)
            others = [j for j in group if j != row and self.REWARDS[j] >= 0.5]
            assert available[row] == bool(others)
            assert index[row] != row
            assert index[row] // 4 == row // 4
            assert not others or index[row] == others[0]

    def test_one_right_answer_is_that_of_all_others_and_has_none(self):
        index, available = map(np.asarray, policy.sibling_index([0.0, 0, 1, 0], 4))
        assert available.tolist() == [True, True, False, True]
        assert index[available].tolist() == [2, 2, 2]
        assert not np.asarray(policy.sibling_index(np.zeros(8), 4)[1]).any()

    def test_what_is_right_does_not_depend_on_the_order_of_a_group(self):
        order = np.random.default_rng(4).permuted(np.arange(40).reshape(10, 4), axis=1).ravel()
        available = np.asarray(policy.sibling_index(self.REWARDS, 4)[1])
        index, moved = map(np.asarray, policy.sibling_index(self.REWARDS[order], 4))
        np.testing.assert_array_equal(moved, available[order])
        assert (self.REWARDS[order][index[moved]] == 1).all()
