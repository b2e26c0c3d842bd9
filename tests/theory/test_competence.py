"""Competence weighting: values by hand, the combinator, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kd.losses import divergence
from kd.theory import competence

pytestmark = pytest.mark.usefixtures('compiled_quickly')

RNG = np.random.default_rng(0)
RATES = jnp.array([0.0, 0.125, 0.5, 0.5, 0.875, 1.0, 0.25, 0.75])
STUDENT, TEACHER = jnp.asarray(RNG.normal(size=(2, 8, 5, 6)), jnp.float32)


def test_pass_rate_counts_the_rollouts_that_count():
    correct = jnp.array([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 1]])
    np.testing.assert_allclose(competence.pass_rate(correct), [0.75, 0.25, 1.0])
    where = jnp.array([[True, True, False, False], [True] * 4, [False] * 4])
    np.testing.assert_allclose(competence.pass_rate(correct, where=where), [0.5, 0.25, 0.0])
    assert competence.pass_rate(correct == 1).dtype == jnp.float32


def test_reward_variance_is_numpys_unbiased_one():
    correct = RNG.integers(2, size=(20, 8))
    np.testing.assert_allclose(
        competence.reward_variance(correct), correct.var(axis=1, ddof=1), atol=1e-6
    )


def test_kernel_at_the_ends_and_its_peak():
    np.testing.assert_allclose(competence.beta_kernel([0.0, 0.5, 1.0]), [0, 0.25, 0])
    np.testing.assert_allclose(competence.beta_kernel([0.0, 0.5, 1.0], 0.0, 0.0), 1)
    np.testing.assert_allclose(competence.beta_kernel([0.0, 1.0], 0.0, 2.0), [1, 0])
    np.testing.assert_allclose(competence.beta_kernel([2 / 3], 2.0, 1.0), 4 / 27, rtol=1e-6)


def test_hard_filter_keeps_the_open_middle():
    np.testing.assert_array_equal(competence.hard_filter([0.2, 0.3, 0.8]), [0, 1, 0])


def test_effective_count_of_equal_and_of_single_weights():
    np.testing.assert_allclose(competence.effective_count(jnp.ones(8)), 8)
    np.testing.assert_allclose(competence.effective_count(jnp.eye(8)[0]), 1)
    np.testing.assert_allclose(competence.effective_count(jnp.zeros(8)), 0)


def test_log_spread_ignores_the_scale_of_the_weights():
    best = jnp.array([1.0, 2.0, 3.0])
    weights = 7 * best * jnp.exp(jnp.array([0.3, -0.3, 0.1]))
    np.testing.assert_allclose(competence.log_spread(weights, best), 0.3, rtol=1e-5)


def test_snr_of_identical_gradients_is_infinite_and_of_pure_noise_near_zero():
    assert competence.cross_problem_snr(jnp.ones((4, 3))) == jnp.inf
    noise = jnp.asarray(RNG.normal(size=(4000, 50)), jnp.float32)
    assert abs(float(competence.cross_problem_snr(noise))) < 1e-3


def sequence_kl(student, teacher, where=None):
    """A divergence per problem: the mean over tokens, chunked callers included."""
    return jnp.mean(divergence.forward_kl(student, teacher), axis=-1, where=where)


def test_paced_weights_any_divergence_and_normalises_by_the_mean_weight():
    weights = np.asarray(RATES * (1 - RATES))
    plain = np.asarray(sequence_kl(STUDENT, TEACHER))
    ours = competence.paced(sequence_kl)(RATES, STUDENT, TEACHER)
    np.testing.assert_allclose(ours, weights * plain, rtol=1e-5)
    scaled = competence.paced(sequence_kl, normalise=True)(RATES, STUDENT, TEACHER)
    np.testing.assert_allclose(scaled, weights / weights.mean() * plain, rtol=1e-5)
    dead = competence.paced(sequence_kl, normalise=True)(jnp.zeros(8), STUDENT, TEACHER)
    np.testing.assert_array_equal(dead, 0)


def test_padding_does_not_change_the_weighted_loss():
    padded = [jnp.pad(x, ((0, 0), (0, 3), (0, 0)), constant_values=9.0) for x in (STUDENT, TEACHER)]
    where = jnp.arange(8) < 5
    ours = competence.paced(sequence_kl)(RATES, *padded, where=where[None, :])
    plain = competence.paced(sequence_kl)(RATES, STUDENT, TEACHER)
    np.testing.assert_allclose(ours, plain, rtol=1e-6)


def test_a_divergence_chunked_over_tokens_gives_the_same_loss():
    def chunked(student, teacher):
        chunks = jax.lax.map(
            lambda pair: divergence.forward_kl(*pair),
            (jnp.moveaxis(student, 1, 0), jnp.moveaxis(teacher, 1, 0)),
        )
        return jnp.mean(chunks, axis=0)

    ours = competence.paced(chunked)(RATES, STUDENT, TEACHER)
    plain = competence.paced(sequence_kl)(RATES, STUDENT, TEACHER)
    np.testing.assert_allclose(ours, plain, rtol=1e-5)


def test_problems_without_weight_have_no_gradient_even_where_the_divergence_is_infinite():
    teacher = TEACHER.at[0, 0, 0].set(-jnp.inf)

    def reverse(student):
        return jnp.mean(divergence.reverse_kl(student, teacher), axis=-1)

    assert np.isinf(reverse(STUDENT)[0])
    value = competence.paced(reverse)(RATES, STUDENT)
    assert np.all(np.isfinite(value))
    assert value[0] == 0


def test_sharded_normalisation_uses_the_global_mean():
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    spec = PartitionSpec('data')
    loss = competence.paced(sequence_kl, normalise=True, axis_name='data')
    sharded = jax.jit(jax.shard_map(loss, mesh=mesh, in_specs=(spec, spec, spec), out_specs=spec))
    plain = competence.paced(sequence_kl, normalise=True)(RATES, STUDENT, TEACHER)
    np.testing.assert_allclose(sharded(RATES, STUDENT, TEACHER), plain, rtol=1e-5)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: competence.pass_rate([[2.0, 0.0]]), r'correct must be in \[0, 1\]'),
        (lambda: competence.reward_variance([[1]]), 'at least two rollouts'),
        (lambda: competence.beta_kernel([1.1]), r'p must be in \[0, 1\]: it is a pass rate'),
        (lambda: competence.beta_kernel([0.5], -1.0), r'a must be in \[0, inf\]'),
        (lambda: competence.optimal_weights([1.0], [0.0]), 'variances must be positive'),
        (lambda: competence.kernel_efficiency([1.0], [1.0], [-1.0]), 'variances must be positive'),
        (lambda: competence.cross_problem_snr(jnp.ones((1, 3))), 'n >= 2'),
        (
            lambda: competence.paced(divergence.forward_kl)(RATES, STUDENT, TEACHER),
            'one value per problem',
        ),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
