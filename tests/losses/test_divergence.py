"""Divergences: gradients in closed form, limits, bounds, masks and refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kd.losses import divergence, signal

GENERATOR = np.random.default_rng(1)
STUDENT, TEACHER = GENERATOR.normal(size=(2, 4, 7)) * 2
Q, P = (scipy.special.softmax(x, axis=-1) for x in (STUDENT, TEACHER))

DIVERGENCES = {
    'forward_kl': divergence.forward_kl,
    'reverse_kl': divergence.reverse_kl,
    'generalized_jsd': divergence.generalized_jsd,
    'skew_kl': divergence.skew_kl,
    'skew_reverse_kl': divergence.skew_reverse_kl,
    'total_variation': divergence.total_variation,
    'alpha_beta': partial(divergence.alpha_beta, alpha=0.2, beta=0.7),
    'alpha_beta at an edge': partial(divergence.alpha_beta, alpha=0.0, beta=0.7),
    'renyi': partial(divergence.renyi, alpha=0.5),
}
each_divergence = pytest.mark.parametrize('f', DIVERGENCES.values(), ids=DIVERGENCES)


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def student_gradient(f):
    return jax.grad(lambda s: jnp.sum(f(s, jnp.asarray(TEACHER))))(jnp.asarray(STUDENT))


def expectation(weights, x):
    return np.sum(weights * x, axis=-1, keepdims=True)


def skew_gradient(a):
    r = (1 - a) * P * Q / (a * P + (1 - a) * Q)
    return -(r - Q * r.sum(-1, keepdims=True))


def jsd_gradient(beta):
    log_ratio = np.log(Q / (beta * P + (1 - beta) * Q))
    return (1 - beta) * Q * (log_ratio - expectation(Q, log_ratio))


@pytest.mark.parametrize(
    ('f', 'closed_form'),
    [
        (divergence.forward_kl, Q - P),
        (divergence.reverse_kl, Q * (np.log(Q / P) - expectation(Q, np.log(Q / P)))),
        (partial(divergence.generalized_jsd, beta=0.3), jsd_gradient(0.3)),
        (partial(divergence.skew_kl, alpha=0.1), skew_gradient(0.1)),
    ],
    ids=['forward_kl', 'reverse_kl', 'generalized_jsd', 'skew_kl'],
)
def test_gradient_in_the_logits_is_the_closed_form(f, closed_form):
    np.testing.assert_allclose(student_gradient(f), closed_form, atol=1e-12)


@each_divergence
def test_zero_with_zero_gradient_where_student_and_teacher_agree_and_positive_elsewhere(f):
    same = jnp.asarray(TEACHER)
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(f(s, same)))(same)
    assert abs(value) < 1e-12
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    assert np.all(f(STUDENT, TEACHER) > 1e-3)


@each_divergence
def test_constants_added_to_logits_change_nothing(f):
    shifted = f(STUDENT + 3.0, TEACHER - np.arange(4.0)[:, None])
    np.testing.assert_allclose(shifted, f(STUDENT, TEACHER), rtol=1e-12)


@each_divergence
def test_temperature_divides_both_logits_and_scales_nothing(f):
    expected = f(STUDENT / 3, TEACHER / 3)
    np.testing.assert_allclose(f(STUDENT, TEACHER, temperature=3.0), expected, rtol=1e-12)
    per_row = f(STUDENT, TEACHER, temperature=np.array([1.0, 2, 3, 4])[:, None])
    np.testing.assert_allclose(per_row[2], expected[2], rtol=1e-12)


@each_divergence
def test_where_takes_outcomes_out_and_axis_moves_them(f):
    keep = np.array([True, True, False, True, True, False, True])
    expected = f(STUDENT[:, keep], TEACHER[:, keep])
    np.testing.assert_allclose(f(STUDENT, TEACHER, where=keep), expected, rtol=1e-12)
    masked = [np.where(keep, x, -np.inf) for x in (STUDENT, TEACHER)]
    np.testing.assert_allclose(f(*masked), expected, rtol=1e-12)
    turned = f(STUDENT.T, TEACHER.T, axis=0, where=keep[:, None])
    np.testing.assert_allclose(turned, expected, rtol=1e-12)


@each_divergence
def test_where_over_positions_gives_zero_value_and_gradient_whatever_is_there(f):
    rows = np.array([True, False, True, False])
    teacher = np.where(rows[:, None], TEACHER, np.nan)

    def total(s):
        value = f(s, teacher, where=rows[:, None])
        return jnp.sum(value), value

    (_, value), gradient = jax.value_and_grad(total, has_aux=True)(jnp.asarray(STUDENT))
    np.testing.assert_allclose(value, np.where(rows, f(STUDENT, TEACHER), 0.0), rtol=1e-12)
    np.testing.assert_allclose(gradient, rows[:, None] * student_gradient(f), atol=1e-12)


def test_value_is_infinite_only_where_the_divergence_is_and_gradients_stay_finite():
    restricted = np.where(np.arange(7) < 5, STUDENT, -np.inf)
    assert np.all(np.isposinf(divergence.forward_kl(restricted, TEACHER)))
    assert np.all(np.isposinf(divergence.reverse_kl(TEACHER, restricted)))
    assert np.all(np.isposinf(divergence.renyi(restricted, TEACHER, alpha=2.0)))
    kept = np.arange(7) < 5
    q = np.where(kept, Q, 0) / Q[:, kept].sum(-1, keepdims=True)
    expected = np.sum(q[:, kept] * np.log(q[:, kept] / P[:, kept]), axis=-1)
    np.testing.assert_allclose(divergence.reverse_kl(restricted, TEACHER), expected, rtol=1e-12)
    gradient = jax.grad(lambda s: jnp.sum(divergence.forward_kl(s, TEACHER)))(restricted)
    finite_terms = (P[:, kept].sum(-1, keepdims=True) * q - P)[:, kept]
    np.testing.assert_allclose(gradient[:, kept], finite_terms, atol=1e-12)
    tv = np.abs(q - P).sum(-1) / 2
    np.testing.assert_allclose(divergence.total_variation(restricted, TEACHER), tv, rtol=1e-12)


def test_jsd_ends_are_exactly_the_two_kl_and_the_scaled_limits_near_them():
    jsd = divergence.generalized_jsd
    forward, reverse = (f(STUDENT, TEACHER) for f in (divergence.forward_kl, divergence.reverse_kl))
    np.testing.assert_array_equal(jsd(STUDENT, TEACHER, beta=0), forward)
    np.testing.assert_array_equal(jsd(STUDENT, TEACHER, beta=1.0), reverse)
    np.testing.assert_allclose(jsd(STUDENT, TEACHER, beta=1e-4) / 1e-4, forward, rtol=1e-2)
    np.testing.assert_allclose(jsd(STUDENT, TEACHER, beta=1 - 1e-4) / 1e-4, reverse, rtol=1e-2)
    half = jsd(STUDENT, TEACHER, beta=0.5)
    np.testing.assert_allclose(half, jsd(TEACHER, STUDENT, beta=0.5), rtol=1e-12)
    assert np.all(half < np.log(2))


def test_skewed_divergences_lie_between_zero_and_minus_log_alpha():
    apart = np.array([[50.0, 0.0], [0.0, 50.0]])
    for f in (divergence.skew_kl, divergence.skew_reverse_kl):
        np.testing.assert_allclose(f(*apart, alpha=0.1), -np.log(0.1), rtol=1e-12)
        np.testing.assert_allclose(f(STUDENT, TEACHER, alpha=1), 0.0, atol=1e-15)
    np.testing.assert_array_equal(
        divergence.skew_kl(STUDENT, TEACHER, alpha=0), divergence.forward_kl(STUDENT, TEACHER)
    )
    np.testing.assert_array_equal(
        divergence.skew_reverse_kl(STUDENT, TEACHER, alpha=0),
        divergence.reverse_kl(STUDENT, TEACHER),
    )


@pytest.mark.parametrize(
    ('alpha', 'beta', 'expected'),
    [
        (1, 0, np.sum(P * np.log(P / Q), -1)),
        (0, 1, np.sum(Q * np.log(Q / P), -1)),
        (0.5, 0.5, 4 * (1 - np.sum(np.sqrt(P * Q), -1))),
        (1, 1, np.sum((P - Q) ** 2, -1) / 2),
        (2, 0, np.sum(P**2 * np.log(P**2 / Q**2) - P**2 + Q**2, -1) / 4),
    ],
)
def test_alpha_beta_special_cases(alpha, beta, expected):
    value = divergence.alpha_beta(STUDENT, TEACHER, alpha=alpha, beta=beta)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize('edge', [(0.6, 0.0), (0.0, 0.6)])
def test_alpha_beta_edges_are_the_limits_of_the_interior(edge):
    near = divergence.alpha_beta(STUDENT, TEACHER, alpha=edge[0] + 1e-6, beta=edge[1] + 1e-6)
    at = divergence.alpha_beta(STUDENT, TEACHER, alpha=edge[0], beta=edge[1])
    np.testing.assert_allclose(near, at, rtol=1e-4)


def test_renyi_rises_with_alpha_through_the_forward_kl_at_one():
    alphas = (0.2, 0.5, 1 - 1e-6, 1.0, 1 + 1e-6, 2.0, 5.0)
    values = np.array([divergence.renyi(STUDENT, TEACHER, alpha=a) for a in alphas])
    assert np.all(np.diff(values, axis=0) > 0)
    np.testing.assert_allclose(values[2], values[3], rtol=1e-5)
    np.testing.assert_array_equal(values[3], divergence.forward_kl(STUDENT, TEACHER))
    half = -2 * np.log(np.sum(np.sqrt(P * Q), axis=-1))
    np.testing.assert_allclose(values[1], half, rtol=1e-12)


def test_forward_kl_times_temperature_squared_keeps_the_size_of_its_gradient():
    def gradient_size(temperature, power):
        def scaled(s):
            kl = divergence.forward_kl(s, TEACHER, temperature=temperature)
            return jnp.sum(temperature**power * kl)

        return np.linalg.norm(jax.grad(scaled)(jnp.asarray(STUDENT)))

    np.testing.assert_allclose(gradient_size(200.0, 2) / gradient_size(100.0, 2), 1, rtol=0.02)
    np.testing.assert_allclose(gradient_size(200.0, 0) / gradient_size(100.0, 0), 1 / 4, rtol=0.02)


def test_temperature_may_be_learned_next_to_masked_logits():
    student, teacher = (np.where(np.arange(7) < 5, x, -np.inf) for x in (STUDENT, TEACHER))

    def loss(temperature):
        return jnp.sum(divergence.forward_kl(student, teacher, temperature=temperature))

    expected = (loss(2.0 + 1e-5) - loss(2.0 - 1e-5)) / 2e-5
    np.testing.assert_allclose(jax.grad(loss)(2.0), expected, rtol=1e-6)


def test_teacher_axes_broadcast_as_an_ensemble():
    ensemble = np.stack([TEACHER, TEACHER + STUDENT])
    value = divergence.forward_kl(STUDENT, ensemble)
    np.testing.assert_allclose(value[1], divergence.forward_kl(STUDENT, ensemble[1]), rtol=1e-12)


@pytest.mark.parametrize('temperature', [0, -4.0, np.nan, np.array([[1.0], [0.0], [2.0], [1.0]])])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    for f in (divergence.forward_kl, divergence.total_variation):
        with pytest.raises(ValueError, match='temperature must be positive'):
            f(STUDENT, TEACHER, temperature=temperature)


@pytest.mark.parametrize('size', [7, 4])
def test_divergences_of_others_are_held_to_one_value_per_position(size):
    # A square of logits too, in which a class and a position cannot be told by their number.
    student, teacher = STUDENT[:, :size], TEACHER[:, :size]
    ensemble = np.stack([teacher, teacher + student])
    for given in (teacher, ensemble, signal.top_k(teacher, 2)):
        value = divergence.per_position(divergence.forward_kl, student, given)
        np.testing.assert_array_equal(value, divergence.forward_kl(student, given))
    for wrong in (lambda s, t: jnp.mean(s), lambda s, t: s * t, lambda s, t: jnp.mean(s, 0)):
        if size == 4 and wrong(student, teacher).shape == (4,):
            continue  # One value per class then has the shape of one per position.
        with pytest.raises(ValueError, match=r'returns one value per position, \(4,\)'):
            divergence.per_position(wrong, student, teacher)


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: divergence.forward_kl(STUDENT, TEACHER[:, :6]), r'same outcomes on axis -1.*4, 6'),
        (lambda: divergence.forward_kl(STUDENT, TEACHER[:, :1]), 'same outcomes on axis -1'),
        (lambda: divergence.generalized_jsd(STUDENT, TEACHER, beta=1.5), r'beta .* in \[0, 1\]'),
        (lambda: divergence.skew_kl(STUDENT, TEACHER, alpha=-0.1), r'alpha .* in \[0, 1\]'),
        (lambda: divergence.generalized_jsd(STUDENT, TEACHER, beta=jnp.ones(())), 'Python number'),
        (lambda: divergence.alpha_beta(STUDENT, TEACHER, alpha=-1, beta=2), 'alpha must be'),
        (lambda: divergence.alpha_beta(STUDENT, TEACHER, alpha=0, beta=0), r'alpha \+ beta > 0'),
        (lambda: divergence.renyi(STUDENT, TEACHER, alpha=0), 'alpha > 0'),
    ],
)
def test_refusals_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
