"""Losses with labels: identities between them, smoothing, masks and refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kd.losses import classification, divergence

pytestmark = pytest.mark.usefixtures('compiled_quickly')

GENERATOR = np.random.default_rng(3)
STUDENT, TEACHER = GENERATOR.normal(size=(2, 5, 6)) * 2
LABELS = np.array([0, 5, 2, 2, 3], np.int32)
KEEP = np.array([True, False, True, True, False, True])
ROWS = np.array([True, False, True, True, False])


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize('temperature', [1.0, 4.0])
def test_kl_is_target_kl_plus_the_rest_of_the_mass_times_non_target_kl(temperature):
    arguments = (STUDENT, TEACHER, LABELS)
    target = classification.target_kl(*arguments, temperature=temperature)
    rest = classification.non_target_kl(*arguments, temperature=temperature)
    p = scipy.special.softmax(TEACHER / temperature, axis=-1)[np.arange(5), LABELS]
    expected = divergence.forward_kl(STUDENT, TEACHER, temperature=temperature)
    np.testing.assert_allclose(target + (1 - p) * rest, expected, rtol=1e-12)


def test_decoupled_kd_with_a_masked_outcome_is_that_of_fewer_outcomes():
    labels = np.array([0, 5, 2, 2, 3], np.int32)
    among_kept = np.array([0, 3, 1, 1, 2], np.int32)
    keep = np.array([True, False, True, True, False, True])
    whole = classification.decoupled_kd(STUDENT, TEACHER, labels, where=keep)
    part = classification.decoupled_kd(STUDENT[:, keep], TEACHER[:, keep], among_kept)
    np.testing.assert_allclose(whole, part, rtol=1e-12)


def test_decoupled_kd_stays_finite_where_the_teacher_is_certain():
    certain = np.where(np.arange(6) == LABELS[:, None], 1e4, TEACHER)
    loss = lambda s: jnp.sum(classification.decoupled_kd(s, certain, LABELS))  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(STUDENT))
    q = scipy.special.softmax(STUDENT, axis=-1)[np.arange(5), LABELS]
    rest = classification.non_target_kl(STUDENT, TEACHER, LABELS)
    np.testing.assert_allclose(value, np.sum(-np.log(q) + 8 * rest), rtol=1e-10)
    assert np.all(np.isfinite(gradient))


def test_cross_entropy_of_indices_probabilities_and_smoothing_is_optax_on_soft_labels():
    onehot = np.eye(6)[LABELS]
    mixed = 0.3 * onehot + 0.7 * onehot[::-1]
    for labels, probabilities in ((LABELS, onehot), (mixed, mixed)):
        value = classification.cross_entropy(STUDENT, labels, label_smoothing=0.2)
        smooth = optax.smooth_labels(probabilities, 0.2)
        expected = optax.losses.softmax_cross_entropy(STUDENT, smooth)
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_label_smoothing_spreads_over_possible_outcomes_only():
    labels, among_kept = np.array([0, 5, 2, 2, 3]), np.array([0, 3, 1, 1, 2])
    value = classification.cross_entropy(STUDENT, labels, label_smoothing=0.2, where=KEEP)
    part = classification.cross_entropy(STUDENT[:, KEEP], among_kept, label_smoothing=0.2)
    np.testing.assert_allclose(value, part, rtol=1e-12)
    masked = np.where(KEEP, STUDENT, -np.inf)
    again = classification.cross_entropy(masked, labels, label_smoothing=0.2)
    np.testing.assert_allclose(again, part, rtol=1e-12)
    assert np.isposinf(classification.cross_entropy(masked, np.full(5, 1))).all()


def test_soft_and_hard_carries_temperature_squared_on_the_soft_part_alone():
    value = classification.soft_and_hard(
        STUDENT, TEACHER, LABELS, temperature=3.0, hard_weight=0.25, label_smoothing=0.1
    )
    soft = divergence.forward_kl(STUDENT, TEACHER, temperature=3.0)
    hard = classification.cross_entropy(STUDENT, LABELS, label_smoothing=0.1)
    np.testing.assert_allclose(value, 0.75 * 9 * soft + 0.25 * hard, rtol=1e-12)
    reverse = classification.soft_and_hard(
        STUDENT, TEACHER, LABELS, temperature=1, hard_weight=0, divergence=divergence.reverse_kl
    )
    np.testing.assert_array_equal(reverse, divergence.reverse_kl(STUDENT, TEACHER))


@pytest.mark.parametrize('label', [-100, -1, 6, 7])
def test_a_label_that_is_no_outcome_is_an_impossible_one(label):
    labels = np.where(np.arange(5) == 1, label, LABELS)
    rest = np.arange(5) != 1
    for smoothing in (0.0, 0.2):
        right = classification.cross_entropy(STUDENT, LABELS, label_smoothing=smoothing)
        value = classification.cross_entropy(STUDENT, labels, label_smoothing=smoothing)
        np.testing.assert_allclose(value, np.where(rest, right, np.inf), rtol=1e-12)
    # Whole smoothing asks nothing of the labels.
    uniform = classification.cross_entropy(STUDENT, labels, label_smoothing=1.0)
    assert np.isfinite(uniform).all()
    arguments = (STUDENT, TEACHER)
    for f in (classification.target_kl, classification.non_target_kl, classification.decoupled_kd):
        expected = np.where(rest, f(*arguments, LABELS), np.nan)
        np.testing.assert_allclose(f(*arguments, labels), expected, rtol=1e-12)
        # What is to be ignored is taken out.
        ignored = f(*arguments, labels, where=rest[:, None])
        np.testing.assert_allclose(ignored, np.where(rest, expected, 0.0), rtol=1e-12)
    loss = lambda s: classification.cross_entropy(s, labels, where=rest[:, None]).sum()  # noqa: E731
    value, gradient = jax.value_and_grad(loss)(jnp.asarray(STUDENT))
    np.testing.assert_allclose(value, classification.cross_entropy(STUDENT, LABELS)[rest].sum())
    assert np.isfinite(gradient).all()


def test_labels_that_are_not_finite_make_a_loss_that_is_not():
    onehot = np.eye(6)[LABELS]
    onehot[2, 0] = np.nan
    value = classification.cross_entropy(STUDENT, onehot)
    np.testing.assert_array_equal(np.isnan(value), np.arange(5) == 2)


def test_a_part_of_weight_zero_does_not_count_even_where_it_is_infinite():
    unknown = np.full(5, -1)
    soft = classification.soft_and_hard(STUDENT, TEACHER, unknown, temperature=2.0, hard_weight=0)
    np.testing.assert_allclose(soft, 4 * divergence.forward_kl(STUDENT, TEACHER, temperature=2.0))
    impossible = np.where(np.arange(6) == 0, -np.inf, STUDENT)
    labels = np.array([1, 5, 2, 2, 3])
    hard = classification.soft_and_hard(impossible, TEACHER, labels, temperature=2, hard_weight=1)
    np.testing.assert_allclose(hard, classification.cross_entropy(impossible, labels), rtol=1e-12)


def test_half_the_centred_logit_mse_is_the_high_temperature_limit_of_distillation():
    value = classification.logit_mse(STUDENT, TEACHER, center=True)
    limit = 1e8 * divergence.forward_kl(STUDENT, TEACHER, temperature=1e4)
    np.testing.assert_allclose(limit, value / 2, rtol=1e-3)
    shifted = classification.logit_mse(STUDENT + 7, TEACHER, center=True)
    np.testing.assert_allclose(shifted, value, rtol=1e-12)


def test_logit_mse_means_over_the_outcomes_that_count():
    for center in (False, True):
        value = classification.logit_mse(STUDENT, TEACHER, center=center, where=KEEP)
        part = classification.logit_mse(STUDENT[:, KEEP], TEACHER[:, KEEP], center=center)
        np.testing.assert_allclose(value, part, rtol=1e-12)


LOSSES = {
    'cross_entropy': lambda s, t, **o: classification.cross_entropy(
        s, LABELS, label_smoothing=0.1, **o
    ),
    'soft_and_hard': lambda s, t, **o: classification.soft_and_hard(
        s, t, LABELS, temperature=2.0, hard_weight=0.5, **o
    ),
    'decoupled_kd': lambda s, t, **o: classification.decoupled_kd(s, t, LABELS, **o),
    'logit_mse': classification.logit_mse,
}


@pytest.mark.parametrize('f', LOSSES.values(), ids=LOSSES)
def test_where_over_positions_gives_zero_value_and_gradient_whatever_is_there(f):
    student, teacher = (np.where(ROWS[:, None], x, np.nan) for x in (STUDENT, TEACHER))

    def total(s, t, **options):
        value = f(s, t, **options)
        return jnp.sum(value), value

    gradient, value = jax.grad(total, has_aux=True)(student, teacher, where=ROWS[:, None])
    full_gradient, full_value = jax.grad(total, has_aux=True)(STUDENT, TEACHER)
    np.testing.assert_allclose(value, np.where(ROWS, full_value, 0.0), rtol=1e-12)
    np.testing.assert_allclose(gradient, ROWS[:, None] * full_gradient, atol=1e-12)


@pytest.mark.parametrize(
    ('call', 'error', 'message'),
    [
        (
            lambda: classification.cross_entropy(STUDENT, LABELS[:3]),
            ValueError,
            r'int labels \(5,\) or float labels \(5, 6\)',
        ),
        (
            lambda: classification.cross_entropy(STUDENT, LABELS, label_smoothing=1.2),
            ValueError,
            r'label_smoothing .* \[0, 1\]',
        ),
        (
            lambda: classification.soft_and_hard(
                STUDENT,
                TEACHER,
                LABELS,
                temperature=1.0,
                hard_weight=0.5,
                divergence=lambda s, t, **_: (s - t) ** 2,
            ),
            ValueError,
            r'<lambda> returned shape \(5, 6\) for logits \(5, 6\); .* per position, \(5,\)',
        ),
        (
            lambda: classification.target_kl(STUDENT, TEACHER, np.eye(6)[LABELS]),
            TypeError,
            'needs int labels',
        ),
    ],
)
def test_refusals_say_what_was_expected(call, error, message):
    with pytest.raises(error, match=message):
        call()
