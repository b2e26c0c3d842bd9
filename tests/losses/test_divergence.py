"""Divergences: gradients in closed form, limits, bounds, masks and refusals."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kd.losses import divergence, outcomes, signal

pytestmark = pytest.mark.usefixtures('compiled_quickly')

GENERATOR = np.random.default_rng(1)
STUDENT, TEACHER = GENERATOR.normal(size=(2, 4, 7)) * 2
Q, P = (scipy.special.softmax(x, axis=-1) for x in (STUDENT, TEACHER))

DIVERGENCES = {
    'forward_kl': divergence.forward_kl,
    'reverse_kl': divergence.reverse_kl,
    'generalized_jsd': divergence.generalized_jsd,
    'skew_kl': divergence.skew_kl,
    'skew_reverse_kl': divergence.skew_reverse_kl,
    'mixed_kl': partial(divergence.mixed_kl, weight=0.3),
    'adaptive_kl': divergence.adaptive_kl,
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


def head_share(mass):
    """g_h / (g_h + g_t) of every row, by a loop."""
    shares = []
    for p, q in zip(P, Q, strict=True):
        head, held = [], 0.0
        for v in np.argsort(-p):
            if head and held >= mass * (1 - 1e-6):
                break
            head.append(v)
            held += p[v]
        gap = np.abs(p - q)
        shares.append(gap[head].sum() / gap.sum())
    return np.array(shares)


@pytest.mark.parametrize('mass', [0.0, 1e-9, 0.5, 0.9])
def test_adaptive_kl_and_its_gradient_with_weights_that_are_constants(mass):
    f = partial(divergence.adaptive_kl, mass=mass)
    share = head_share(mass)
    forward, reverse = np.sum(P * np.log(P / Q), -1), np.sum(Q * np.log(Q / P), -1)
    expected = share * forward + (1 - share) * reverse
    np.testing.assert_allclose(f(STUDENT, TEACHER), expected, rtol=1e-12)
    to_reverse = Q * (np.log(Q / P) - reverse[:, None])
    slope = share[:, None] * (Q - P) + (1 - share)[:, None] * to_reverse
    np.testing.assert_allclose(student_gradient(f), slope, atol=1e-12)
    # The weights belong to outcomes, not to places: any order of them is as good.
    shuffled = f(STUDENT[:, ::-1], TEACHER[:, ::-1])
    np.testing.assert_allclose(shuffled, expected, rtol=1e-12)


def test_the_head_of_adaptive_kl_is_the_favourite_alone_half_of_equals_or_all():
    gap = np.abs(P - Q)
    favourite = gap[np.arange(4), P.argmax(-1)] / gap.sum(-1)
    np.testing.assert_allclose(head_share(1e-9), favourite, rtol=1e-12)
    all_ = divergence.adaptive_kl(STUDENT, TEACHER, mass=1)
    np.testing.assert_allclose(all_, divergence.forward_kl(STUDENT, TEACHER), rtol=1e-12)
    # Half of six equal outcomes is three, though sums of sixths miss a half by rounding.
    student = np.log([[0.4, 0.2, 0.1, 0.1, 0.1, 0.1]])
    for dtype in (np.float32, np.float64):
        value = divergence.adaptive_kl(student.astype(dtype), np.zeros((1, 6), dtype))
        q, p = np.exp(student[0]), np.full(6, 1 / 6)
        share = np.abs(p - q)[:3].sum() / np.abs(p - q).sum()
        expected = share * np.sum(p * np.log(p / q)) + (1 - share) * np.sum(q * np.log(q / p))
        np.testing.assert_allclose(value, [expected], rtol=1e-6)


def test_a_part_of_adaptive_kl_without_weight_does_not_count_even_where_it_is_infinite():
    # The head agrees, so the forward KL has weight 0; the student excludes the last outcome.
    teacher = jnp.log(jnp.array([0.5, 0.3, 0.2]))
    student = jnp.log(jnp.array([0.5, 0.5, 0.0]))
    value, slope = jax.value_and_grad(divergence.adaptive_kl)(student, teacher)
    np.testing.assert_allclose(value, 0.5 * np.log(0.5 / 0.3), rtol=1e-12)
    assert np.isfinite(slope).all()
    # Where it has weight, it counts.
    assert np.isposinf(divergence.adaptive_kl(student, teacher, mass=0.9))


def test_mixed_kl_has_both_ends_exactly_and_the_middle_between():
    forward, reverse = (f(STUDENT, TEACHER) for f in (divergence.forward_kl, divergence.reverse_kl))
    np.testing.assert_array_equal(divergence.mixed_kl(STUDENT, TEACHER, weight=1), forward)
    np.testing.assert_array_equal(divergence.mixed_kl(STUDENT, TEACHER, weight=0.0), reverse)
    middle = divergence.mixed_kl(STUDENT, TEACHER, weight=0.3)
    np.testing.assert_allclose(middle, 0.3 * forward + 0.7 * reverse, rtol=1e-12)
    restricted = np.where(np.arange(7) < 5, STUDENT, -np.inf)
    assert np.all(np.isfinite(divergence.mixed_kl(restricted, TEACHER, weight=0)))


def test_the_conventions_of_other_libraries():
    def kl(a, b):
        return np.sum(a * np.log(a / b), -1)

    # TRL's generalized_jsd_loss(beta), SDPO's alpha: the weight is the teacher's.
    for beta in (0.1, 0.9):
        m = (1 - beta) * Q + beta * P
        trl = beta * kl(P, m) + (1 - beta) * kl(Q, m)
        ours = divergence.generalized_jsd(STUDENT, TEACHER, beta=beta)
        np.testing.assert_allclose(ours, trl, rtol=1e-12)
    # DistiLLM's: lam is the student's weight in js_distance, the skew of the others.
    lam = 0.9
    m = lam * Q + (1 - lam) * P
    js = (1 - lam) * kl(P, m) + lam * kl(Q, m)
    ours = divergence.generalized_jsd(STUDENT, TEACHER, beta=1 - lam)
    np.testing.assert_allclose(ours, js, rtol=1e-12)
    skewed = kl(P, lam * P + (1 - lam) * Q), kl(Q, (1 - lam) * P + lam * Q)
    for f, expected in zip((divergence.skew_kl, divergence.skew_reverse_kl), skewed, strict=True):
        np.testing.assert_allclose(f(STUDENT, TEACHER, alpha=lam), expected, rtol=1e-12)
    symmetric = (1 - lam) * kl(P, Q) + lam * kl(Q, P)
    ours = divergence.mixed_kl(STUDENT, TEACHER, weight=1 - lam)
    np.testing.assert_allclose(ours, symmetric, rtol=1e-12)


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
        value = outcomes.per_position(divergence.forward_kl, student, given)
        np.testing.assert_array_equal(value, divergence.forward_kl(student, given))
    for wrong in (lambda s, t: jnp.mean(s), lambda s, t: s * t, lambda s, t: jnp.mean(s, 0)):
        if size == 4 and wrong(student, teacher).shape == (4,):
            continue  # One value per class then has the shape of one per position.
        with pytest.raises(ValueError, match=r'returns one value per position, \(4,\)'):
            outcomes.per_position(wrong, student, teacher)


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
        (lambda: divergence.mixed_kl(STUDENT, TEACHER, weight=2), r'weight .* in \[0, 1\]'),
        (lambda: divergence.adaptive_kl(STUDENT, TEACHER, mass=-0.5), r'mass .* in \[0, 1\]'),
    ],
)
def test_refusals_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
