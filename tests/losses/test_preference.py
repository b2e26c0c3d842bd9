"""Anchored preference losses against their formulas, and the losses that are special cases."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special
import scipy.stats
from jax.sharding import PartitionSpec

from kd.losses import preference, preference_family

pytestmark = pytest.mark.usefixtures('compiled_quickly')

RNG = np.random.default_rng(0)
B, P = 8, 5
LOG_P, ANCHOR = scipy.special.log_softmax(2 * RNG.normal(size=(2, B, P)), axis=-1)
TARGET = RNG.dirichlet(np.ones(P), size=B)
TAU = RNG.uniform(0.3, 3.0, B)
REWARDS = RNG.normal(size=(B, P))


def cross_entropy(log_p, anchor, target, tau):
    """The definition, in NumPy float64."""
    policy = scipy.special.log_softmax((log_p - anchor) / np.reshape(tau, (-1, 1)), axis=-1)
    return -np.sum(target * policy, axis=-1)


def test_value_and_gradient_equal_the_definition_and_finite_differences():
    with jax.enable_x64(True):
        loss = partial(
            preference.anchored_cross_entropy, anchor_log_p=ANCHOR, target=TARGET, tau=TAU
        )
        np.testing.assert_allclose(
            loss(LOG_P), cross_entropy(LOG_P, ANCHOR, TARGET, TAU), atol=1e-12
        )
        slope = np.asarray(jax.grad(lambda l: jnp.sum(loss(l)))(LOG_P))
    numeric = np.zeros((B, P))
    for j in range(P):
        step = 1e-6 * np.eye(P)[j]
        up, down = (cross_entropy(LOG_P + s, ANCHOR, TARGET, TAU) for s in (step, -step))
        numeric[:, j] = (up - down) / 2e-6
    np.testing.assert_allclose(slope, numeric, atol=1e-8)
    np.testing.assert_allclose(np.sum(slope, -1), 0, atol=1e-12)


def test_anchor_and_target_get_no_gradient():
    slopes = jax.grad(
        lambda a, q: jnp.sum(preference.anchored_cross_entropy(LOG_P, a, q, TAU)), argnums=(0, 1)
    )(jnp.asarray(ANCHOR), jnp.asarray(TARGET))
    assert all(np.all(slope == 0) for slope in slopes)


def test_constants_per_context_change_nothing():
    shift = 7 * RNG.normal(size=(B, 1))
    plain = preference.anchored_cross_entropy(LOG_P, ANCHOR, TARGET, TAU)
    for moved in ((LOG_P + shift, ANCHOR), (LOG_P, ANCHOR + shift)):
        value = preference.anchored_cross_entropy(*moved, TARGET, TAU)
        np.testing.assert_allclose(value, plain, rtol=1e-5, atol=1e-5)


def test_masked_candidates_equal_absent_ones():
    where = np.arange(P) < 3
    target = TARGET[:, :3] / TARGET[:, :3].sum(-1, keepdims=True)
    padded = np.concatenate([target, np.zeros((B, 2))], axis=-1)
    exact = cross_entropy(LOG_P[:, :3], ANCHOR[:, :3], target, TAU)
    masked = preference.anchored_cross_entropy(LOG_P, ANCHOR, padded, TAU, where=where)
    np.testing.assert_allclose(masked, exact, rtol=1e-5)
    impossible = np.where(where, LOG_P, -np.inf)
    infinite = preference.anchored_cross_entropy(impossible, ANCHOR, padded, TAU)
    np.testing.assert_allclose(infinite, exact, rtol=1e-5)
    slope = jax.grad(
        lambda l: jnp.sum(preference.anchored_cross_entropy(l, impossible, padded, TAU))
    )(jnp.asarray(impossible))
    assert np.all(np.isfinite(slope))
    assert np.all(slope[:, 3:] == 0)


def test_a_context_without_candidates_is_zero_with_zero_gradient():
    where = np.arange(B)[:, None] > 0
    target = np.where(where, TARGET, 0.0)

    def total(log_p):
        return preference.anchored_cross_entropy(log_p, ANCHOR, target, TAU, where=where)

    assert total(jnp.asarray(LOG_P))[0] == 0
    slope = jax.grad(lambda l: jnp.sum(total(l)))(jnp.asarray(LOG_P))
    assert np.all(slope[0] == 0)
    assert np.all(np.isfinite(slope))


@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_extreme_log_probabilities_are_finite(dtype):
    log_p = jnp.asarray(1e4 * np.sign(LOG_P + 2), dtype)
    anchor = jnp.asarray(1e4 * np.sign(ANCHOR + 3), dtype)

    def total(log_p):
        return jnp.sum(preference.anchored_cross_entropy(log_p, anchor, TARGET, 0.05))

    value, slope = jax.value_and_grad(total)(log_p)
    assert value.dtype == jnp.float32
    assert np.isfinite(value)
    assert np.all(np.isfinite(slope))


def test_the_loss_is_the_same_under_jit_vmap_and_shard_map():
    arguments = tuple(jnp.asarray(x, jnp.float32) for x in (LOG_P, ANCHOR, TARGET, TAU))
    plain = preference.anchored_cross_entropy(*arguments)
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec('data')
    sharded = jax.shard_map(
        preference.anchored_cross_entropy, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec
    )
    for transform in (jax.jit, jax.vmap, lambda f: jax.jit(sharded)):
        value = transform(preference.anchored_cross_entropy)(*arguments)
        np.testing.assert_allclose(value, plain, rtol=1e-6)


def test_closed_form_is_the_minimum_over_random_policies():
    best = preference.closed_form_policy(ANCHOR, TARGET, TAU)
    np.testing.assert_allclose(np.sum(np.exp(best), -1), 1, rtol=1e-6)
    floor = scipy.stats.entropy(TARGET, axis=-1)
    at_best = preference.anchored_cross_entropy(best, ANCHOR, TARGET, TAU)
    np.testing.assert_allclose(at_best, floor, rtol=1e-5, atol=1e-6)
    for _ in range(20):
        other = np.asarray(best) + 0.1 * RNG.normal(size=(B, P))
        assert np.all(cross_entropy(other, ANCHOR, TARGET, TAU) >= np.asarray(at_best) - 1e-6)


def test_closed_form_gives_no_mass_where_the_target_has_none():
    target = np.array([0.5, 0.5, 0.0])
    policy = preference.closed_form_policy(np.log([0.2, 0.3, 0.5]), target, 2.0)
    np.testing.assert_allclose(np.exp(policy), [0.4, 0.6, 0.0], atol=1e-6)


@pytest.mark.parametrize('beta', [0.1, 2.0])
def test_dpo_is_minus_log_sigmoid_of_the_margin(beta):
    log_p, anchor = -30 * RNG.exponential(size=(2, 64, 2))
    margin = beta * ((log_p[:, 0] - log_p[:, 1]) - (anchor[:, 0] - anchor[:, 1]))
    exact = -scipy.special.log_expit(margin)
    np.testing.assert_allclose(
        preference_family.dpo(log_p, anchor, beta), exact, rtol=1e-5, atol=1e-6
    )
    rewards = RNG.normal(size=(64, 2))
    p = scipy.special.expit((rewards[:, 0] - rewards[:, 1]) / 0.7)
    soft = -p * scipy.special.log_expit(margin) - (1 - p) * scipy.special.log_expit(-margin)
    ours = preference_family.soft_dpo(log_p, anchor, rewards, beta, 0.7)
    np.testing.assert_allclose(ours, soft, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_distillation_is_hintons_cross_entropy_without_the_square(temperature):
    logits, teacher = jnp.asarray(RNG.normal(size=(2, B, P)), jnp.float32)
    targets = jax.nn.softmax(teacher / temperature)
    exact = optax.safe_softmax_cross_entropy(logits / temperature, targets)
    ours = preference_family.distillation(logits, teacher, temperature)
    np.testing.assert_allclose(ours, exact, rtol=1e-5)


def test_supervised_is_the_cross_entropy_of_labels():
    labels = RNG.integers(P, size=B)
    exact = optax.softmax_cross_entropy_with_integer_labels(jnp.asarray(LOG_P), labels)
    np.testing.assert_allclose(preference_family.supervised(LOG_P, labels), exact, rtol=1e-5)


@pytest.mark.parametrize('label', [-1, P])
def test_a_label_that_is_no_candidate_is_infinitely_unlikely(label):
    labels = np.full(B, label)
    for supervised in (preference_family.supervised, jax.jit(preference_family.supervised)):
        assert np.isposinf(supervised(LOG_P, labels)).all()


def test_rewards_that_are_not_finite_make_a_loss_that_is_not():
    rewards = np.where(np.arange(P) == 1, np.nan, REWARDS)

    def loss(log_p):
        target = preference.target_from_rewards(rewards)
        return preference.anchored_cross_entropy(log_p, ANCHOR, target)

    assert np.isnan(jax.jit(loss)(LOG_P)).all()


def test_max_entropy_is_minimal_at_the_maximum_entropy_policy():
    values, alpha = RNG.normal(size=(1, P)), 0.6
    slope = jax.grad(lambda z: jnp.sum(preference_family.max_entropy(z, values, alpha)))
    np.testing.assert_allclose(slope(jnp.asarray(values / alpha)), 0, atol=1e-6)
    assert np.max(np.abs(slope(jnp.zeros((1, P))))) > 1e-2


def test_targets_from_rewards_with_a_mask_ignore_absent_candidates():
    where = np.arange(P) < 3
    kept = REWARDS[:, :3]
    scores = (kept - kept.mean(-1, keepdims=True)) / kept.std(-1, keepdims=True)
    exact = scipy.special.softmax(scores / 0.5, axis=-1)
    target = preference.target_from_rewards(REWARDS, 0.5, 'standardized', where=where)
    np.testing.assert_allclose(target[:, :3], exact, rtol=1e-4)
    np.testing.assert_array_equal(target[:, 3:], 0)


def test_kernel_density_scores_are_ranks_that_tame_a_heavy_tail():
    buffer = RNG.standard_cauchy(size=200)
    rewards = np.array([-1e6, -1.0, 0.0, 1.0, 1e6])
    scores = np.asarray(preference.kernel_density_scores(rewards, buffer, 0.5, 1e-3))
    assert np.all(np.diff(scores) > 0)
    np.testing.assert_allclose(scores[[0, -1]], [-np.log(999), np.log(999)], rtol=1e-4)
    rank = np.mean(scipy.stats.norm.cdf((0.0 - buffer) / 0.5))
    np.testing.assert_allclose(scores[2], scipy.special.logit(rank), atol=1e-4)


def test_adaptive_temperature_by_hand():
    # H = .5, .5, 1 (clipped); mean rewards 0, 1, .5 are normalised to R = 0, 1, .5.
    neg_log_p = np.log(10) * np.array([[0.5, 0.5], [0.25, 0.75], [2.0, 2.0]])
    rewards = np.array([[-1.0, 1.0], [1.0, 1.0], [0.0, 1.0]])
    tau = preference.adaptive_temperature(
        neg_log_p, rewards, 10, base=0.8, uncertainty=1.0, failure=0.5
    )
    np.testing.assert_allclose(tau, 0.8 * np.array([1.75, 1.5, 2.0]), rtol=1e-6)
    equal = preference.adaptive_temperature(np.zeros((2, 2)), np.ones((2, 2)), 10)
    np.testing.assert_allclose(equal, 0.8 * (1 + 0.5 * 0.5), rtol=1e-6)
    slope = jax.grad(lambda r: jnp.sum(preference.adaptive_temperature(neg_log_p, r, 10)))
    np.testing.assert_array_equal(slope(jnp.asarray(rewards)), 0)


def test_anchor_modes():
    params, reference = {'w': jnp.array([1.0, 2.0])}, {'w': jnp.array([5.0, 6.0])}
    assert preference.anchor_init('fixed', params, reference) is reference
    for mode in ('self', 'ema', 'on_policy'):
        assert preference.anchor_init(mode, params) is params
    for mode in ('fixed', 'self'):
        assert preference.anchor_update(reference, params, mode) is reference
    assert preference.anchor_update(reference, params, 'on_policy') is params
    moved = preference.anchor_update(reference, params, 'ema', 0.75)
    np.testing.assert_allclose(moved['w'], [4.0, 5.0])
    # n steps towards constant parameters leave decay^n of the distance.
    anchor = reference
    for _ in range(10):
        anchor = preference.anchor_update(anchor, params, 'ema', 0.9)
    np.testing.assert_allclose(anchor['w'] - params['w'], 4 * 0.9**10, rtol=1e-5)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (
            lambda: preference.anchored_cross_entropy(LOG_P, ANCHOR[:, :3], TARGET),
            'same candidates on the last axis',
        ),
        (
            lambda: preference.anchored_cross_entropy(LOG_P, ANCHOR, TARGET, 0.0),
            'tau must be positive',
        ),
        (
            lambda: preference.anchored_cross_entropy(LOG_P, ANCHOR, 0.9 * TARGET),
            'target must be a distribution',
        ),
        (
            lambda: preference.anchored_cross_entropy(
                np.where(np.arange(P) == 0, -np.inf, LOG_P), ANCHOR, TARGET
            ),
            'the loss is infinite',
        ),
        (lambda: preference_family.dpo(LOG_P, ANCHOR), 'needs two candidates'),
        (lambda: preference_family.dpo(LOG_P[:, :2], ANCHOR[:, :2], 0.0), 'beta must be positive'),
        (
            lambda: preference.target_from_rewards(REWARDS, 1.0, 'rank'),
            "kind must be 'raw' or 'standardized'",
        ),
        (lambda: preference.target_from_rewards(REWARDS, -1.0), 'temperature must be positive'),
        (lambda: preference.kernel_density_scores(REWARDS, REWARDS[0], 1.0, 0.5), 'epsilon must'),
        (lambda: preference.adaptive_temperature(REWARDS, REWARDS, 1), 'vocab_size must be'),
        (
            lambda: preference.adaptive_temperature(REWARDS, REWARDS, 5, low=2.0, high=1.0),
            'need 0 < low <= high',
        ),
        (lambda: preference.anchor_update({}, {}, 'frozen'), 'anchor mode must be one of'),
        (lambda: preference.anchor_update({}, {}, 'ema', 1.5), r'decay must be in \[0, 1\]'),
        (lambda: preference.anchor_init('fixed', {}), "'fixed' needs a reference"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
