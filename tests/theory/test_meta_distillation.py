"""Softening, pooling, anchoring, recursion and projection against NumPy and SciPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
import scipy.stats

from kd.theory import meta_distillation as md
from kd.theory import simplex

pytestmark = pytest.mark.usefixtures('compiled_quickly')

RNG = np.random.default_rng(0)
P, Q, R = RNG.dirichlet(np.ones(5), size=(3, 4))
LOG_P, LOG_Q, LOG_R = np.log(P), np.log(Q), np.log(R)
CERTAIN = np.where(np.eye(2) > 0, 0.0, -np.inf)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def test_distances_equal_scipy_and_their_definitions():
    np.testing.assert_allclose(
        simplex.kl_divergence(LOG_P, LOG_Q), scipy.stats.entropy(P, Q, axis=-1), atol=1e-13
    )
    np.testing.assert_allclose(simplex.entropy(LOG_P), scipy.stats.entropy(P, axis=-1), atol=1e-13)
    np.testing.assert_allclose(simplex.total_variation(LOG_P, LOG_Q), np.abs(P - Q).sum(-1) / 2)
    ratio = np.log(P / Q)
    np.testing.assert_allclose(md.hilbert_metric(LOG_P, LOG_Q), ratio.max(-1) - ratio.min(-1))
    np.testing.assert_allclose(md.chi_square(LOG_P, LOG_Q), ((P - Q) ** 2 / Q).sum(-1))
    np.testing.assert_allclose(simplex.collision_probability(LOG_P), (P**2).sum(-1))


def test_outcomes_without_mass_in_both_count_for_nothing():
    padded_p, padded_q = (
        np.pad(x, ((0, 0), (0, 1)), constant_values=-np.inf) for x in (LOG_P, LOG_Q)
    )
    for distance in (
        simplex.kl_divergence,
        simplex.total_variation,
        md.hilbert_metric,
        md.chi_square,
    ):
        np.testing.assert_allclose(distance(padded_p, padded_q), distance(LOG_P, LOG_Q), atol=1e-13)
        slope = jax.jit(jax.grad(lambda x: jnp.sum(distance(x, padded_q))))(padded_p)  # noqa: B023
        assert np.all(np.isfinite(slope))


@pytest.mark.parametrize('power', [1.0, 0.5, 0.0, -1.0, 2.0])
def test_anchor_is_the_normalised_power_mean(power):
    lam = np.array([0.0, 0.2, 0.7, 1.0])
    weights = lam[:, None]
    if power:
        mean = ((1 - weights) * P**power + weights * Q**power) ** (1 / power)
    else:
        mean = P ** (1 - weights) * Q**weights
    exact = mean / mean.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(md.anchor(LOG_P, LOG_Q, lam, power)), exact, atol=1e-14)


def test_a_teacher_without_weight_has_no_say_even_where_it_has_no_mass():
    holed = np.array([[*np.log([0.5, 0.5]), -np.inf], np.log([0.2, 0.3, 0.5])])
    for family in ('linear', 'geometric', 'power'):
        pooled = md.aggregate(holed, np.array([0.0, 1.0]), family)
        np.testing.assert_allclose(np.exp(pooled), [0.2, 0.3, 0.5], atol=1e-14)


def test_pools_equal_numpy_with_weights_per_context():
    weights = RNG.dirichlet(np.ones(3), size=4).T
    stack, w = np.stack([P, Q, R]), weights[..., None]
    linear = np.exp(md.aggregate(np.log(stack), weights))
    np.testing.assert_allclose(linear, np.sum(w * stack, axis=0), atol=1e-14)
    geometric = np.prod(stack**w, axis=0)
    geometric /= geometric.sum(-1, keepdims=True)
    ours = np.exp(md.aggregate(np.log(stack), weights, 'geometric'))
    np.testing.assert_allclose(ours, geometric, atol=1e-14)


def test_softening_families_equal_numpy():
    tau = np.array([1.0, 1.5, 3.0, 10.0])
    power = P ** (1 / tau[:, None])
    power /= power.sum(-1, keepdims=True)
    np.testing.assert_allclose(np.exp(md.soften(LOG_P, tau)), power, atol=1e-14)
    mixing = P / tau[:, None] + (1 - 1 / tau[:, None]) / 5
    np.testing.assert_allclose(np.exp(md.soften(LOG_P, tau, 'mixing')), mixing, atol=1e-14)


def test_recursion_equals_a_python_loop_and_starts_with_generation_zero():
    lams = np.array([0.5, 0.1, 0.9])
    path = jax.jit(lambda lams: md.recurse(LOG_P, LOG_Q, lams, md.anchor))(lams)
    student, students = P, [P]
    for lam in lams:
        student = (1 - lam) * student + lam * Q
        students.append(student)
    np.testing.assert_allclose(np.exp(path.log_s), students, atol=1e-14)
    backward = [scipy.stats.entropy(Q, s, axis=-1) for s in students]
    np.testing.assert_allclose(path.measures['kl_base_student'], backward, atol=1e-13)
    assert set(path.measures) == set(md.MEASURES)


def test_history_operator_mixes_the_window_newest_first():
    window = np.stack([LOG_P, LOG_R])
    operator = functools.partial(md.history_anchor, weights=np.array([0.75, 0.25]))

    @jax.jit
    def run(lams):
        return md.recurse(window, LOG_Q, lams, operator, memory=2, measures=())

    path = run(np.array([0.2, 0.2]))
    first = 0.2 * Q + 0.8 * (0.75 * P + 0.25 * R)
    second = 0.2 * Q + 0.8 * (0.75 * first + 0.25 * P)
    np.testing.assert_allclose(np.exp(path.log_s), [P, first, second], atol=1e-14)


def test_projection_equals_maximum_likelihood_by_scipy():
    features = RNG.normal(size=(5, 2))
    theta, log_q = md.project_exponential_family(LOG_P[0], features)

    def negative_likelihood(theta):
        return scipy.special.logsumexp(features @ theta) - P[0] @ features @ theta

    fit = scipy.optimize.minimize(negative_likelihood, np.zeros(2), method='BFGS', tol=1e-12)
    np.testing.assert_allclose(theta, fit.x, atol=1e-5)
    np.testing.assert_allclose(np.exp(log_q) @ features, P[0] @ features, atol=1e-14)


def test_projection_converges_from_peaked_distributions():
    # Plain Newton diverges here: the first step overshoots by hundreds.
    log_p = np.log([1 - 4e-6, 1e-6, 1e-6, 1e-6, 1e-6])
    features = np.eye(5)[:, :4]
    _, log_q = md.project_exponential_family(log_p, features)
    np.testing.assert_allclose(log_q, log_p, rtol=1e-9)


def test_refit_counts_the_right_number_of_draws_with_the_right_law():
    log_p = np.log([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    samples = 20_000
    counts = samples * np.exp(md.refit_from_samples(jax.random.key(0), log_p, samples))
    np.testing.assert_allclose(counts, np.round(counts), atol=1e-9)
    np.testing.assert_allclose(counts.sum(-1), samples)
    statistic = np.sum((counts - samples * np.exp(log_p)) ** 2 / (samples * np.exp(log_p)), -1)
    assert np.all(statistic < scipy.stats.chi2.ppf(0.9999, df=2))
    smoothed = np.exp(md.refit_from_samples(jax.random.key(0), log_p, samples, smoothing=2.0))
    np.testing.assert_allclose(smoothed, (counts + 2) / (samples + 6), atol=1e-12)


def test_bfloat16_input_is_computed_in_float32():
    log_p = jax.nn.log_softmax(jnp.asarray(RNG.normal(size=(2, 3)), jnp.bfloat16))
    softened = md.soften(log_p, 2.0)
    assert softened.dtype == jnp.float32
    exact = np.exp(np.asarray(log_p, np.float64)) ** 0.5
    np.testing.assert_allclose(np.exp(softened), exact / exact.sum(-1, keepdims=True), atol=1e-6)


@pytest.mark.parametrize('power', [1.0, 0.5, 0.0])
def test_anchor_is_finite_with_finite_gradients_at_extreme_log_probabilities(power):
    log_s = jax.nn.log_softmax(jnp.array([1e4, -1e4, 0.0]))
    log_t = jax.nn.log_softmax(jnp.array([-1e4, 1e4, -jnp.inf]))
    log_s = log_s.at[2].set(-jnp.inf)

    def total(log_s, log_t):
        log_m = md.anchor(log_s, log_t, 0.3, power)
        return jnp.sum(jnp.where(log_m > -jnp.inf, log_m, 0.0))

    value, slopes = jax.jit(jax.value_and_grad(total, argnums=(0, 1)))(log_s, log_t)
    assert np.isfinite(value)
    assert all(np.all(np.isfinite(slope)) for slope in slopes)


def test_unnormalised_distributions_are_refused_with_their_sum():
    with pytest.raises(ValueError, match=r'log_s must .* worst sum is 1\.2'):
        md.anchor(np.log([0.6, 0.6]), np.log([0.5, 0.5]), 0.5)
    with pytest.raises(ValueError, match='log_p must'):
        simplex.entropy(np.array([np.nan, 0.0]))


@pytest.mark.parametrize('lam', [-0.1, 1.1])
def test_anchor_weights_outside_the_unit_interval_are_refused(lam):
    with pytest.raises(ValueError, match=r'lam must be in \[0, 1\]'):
        md.anchor(LOG_P, LOG_Q, lam)
    with pytest.raises(ValueError, match=r'lams must be in \[0, 1\]'):
        md.recurse(LOG_P, LOG_Q, [0.5, lam], md.anchor)


def test_a_base_teacher_without_support_is_refused_by_name():
    half = np.array([*np.log([0.5, 0.5]), -np.inf])
    full = np.log([0.4, 0.4, 0.2])
    message = (
        r'KL\(student \|\| base teacher\) is infinite: base teacher has no mass at index \(2,\)'
    )
    with pytest.raises(ValueError, match=message):
        md.recurse(full, half, [0.5], md.anchor)
    with pytest.raises(ValueError, match=r'KL\(p \|\| q\) is infinite'):
        simplex.kl_divergence(full, half)
    with pytest.raises(ValueError, match=r'KL\(q \|\| p\) is infinite'):
        md.hilbert_metric(half, full)
    # The other direction is finite, and so is the recursion in measures that allow for it.
    np.testing.assert_allclose(simplex.kl_divergence(half, full), np.log(1.25))
    path = md.recurse(full, half, [0.5], md.anchor, measures=('total_variation',))
    np.testing.assert_allclose(path.measures['total_variation'], [0.2, 0.1])


def test_a_measure_that_becomes_infinite_on_the_way_is_reported_with_its_generation():
    def losing(log_m, t):
        return jnp.where(t == 1, jnp.log(jnp.array([1.0, 0.0])), log_m)

    half = np.log([0.5, 0.5])
    with pytest.raises(ValueError, match='kl_base_student is not finite at generation 2'):
        md.recurse(half, half, [0.5] * 3, md.anchor, realise=losing, measures=('kl_base_student',))


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: md.soften(LOG_P, 0.0), 'tau must be positive'),
        (lambda: md.soften(LOG_P, 0.5, 'mixing'), r'tau must be in \[1, inf\]'),
        (lambda: md.soften(LOG_P, 2.0, 'other'), "family must be 'power' or 'mixing'"),
        (
            lambda: md.aggregate(LOG_P, np.full(4, 0.3)),
            'weights must be non-negative and sum to one',
        ),
        (lambda: md.aggregate(LOG_P, np.full(4, 0.25), 'other'), 'family must be one of'),
        (
            lambda: md.aggregate(CERTAIN, [0.5, 0.5], 'geometric'),
            'geometric pool is empty',
        ),
        (lambda: md.recurse(LOG_P, LOG_Q, [0.5], md.anchor, measures=('kl',)), 'Unknown measures'),
        (lambda: md.recurse(LOG_P, LOG_Q, [0.5], md.anchor, memory=2), 'memory=2 needs log_s0'),
        (
            lambda: md.project_exponential_family(LOG_P[0], np.ones((5, 1))),
            'affinely dependent',
        ),
        (
            lambda: md.project_exponential_family(CERTAIN[0], np.array([[0.0], [1.0]])),
            'boundary of the family',
        ),
        (lambda: md.refit_from_samples(jax.random.key(0), LOG_P, 0), 'num_samples >= 1'),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_checks_are_skipped_under_jit():
    unnormalised = np.log([0.6, 0.6])
    np.testing.assert_allclose(jax.jit(simplex.total_variation)(unnormalised, unnormalised), 0.0)
