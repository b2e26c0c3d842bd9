"""Every form of a teacher signal against the dense value: equal, a bound of it, or unbiased."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kd.losses import classification, divergence, sequence, signal

pytestmark = pytest.mark.usefixtures('compiled_quickly')

GENERATOR = np.random.default_rng(2)
POSITIONS, SIZE = 3, 6
STUDENT, TEACHER = GENERATOR.normal(size=(2, POSITIONS, SIZE)) * 2
P, Q = (scipy.special.softmax(x, axis=-1) for x in (TEACHER, STUDENT))

DIVERGENCES = {
    'forward_kl': divergence.forward_kl,
    'reverse_kl': divergence.reverse_kl,
    'generalized_jsd': divergence.generalized_jsd,
    'skew_kl': divergence.skew_kl,
    'skew_reverse_kl': divergence.skew_reverse_kl,
    'mixed_kl': partial(divergence.mixed_kl, weight=0.3),
    'adaptive_kl': divergence.adaptive_kl,
    'total_variation': divergence.total_variation,
    'amari alpha': partial(divergence.alpha_beta, alpha=0.25, beta=0.75),
    'alpha_beta': partial(divergence.alpha_beta, alpha=0.5, beta=0.7),
    'renyi': partial(divergence.renyi, alpha=2.0),
}
COARSE = [name for name in DIVERGENCES if name not in ('alpha_beta', 'adaptive_kl')]

with jax.enable_x64(True):
    TOP = {k: signal.top_k(TEACHER, k) for k in (1, 3, SIZE - 1, SIZE)}


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def value_and_gradient(f, teacher, **options):
    def total(student):
        value = f(student, teacher, **options)
        return jnp.sum(value), value

    gradient, value = jax.grad(total, has_aux=True)(jnp.asarray(STUDENT))
    return value, gradient


def assert_same(got, expected, **tolerance):
    for x, y in zip(got, expected, strict=True):
        np.testing.assert_allclose(x, y, **({'rtol': 1e-10, 'atol': 1e-12} | tolerance))


@pytest.mark.parametrize('name', DIVERGENCES)
def test_dense_and_hidden_head_are_the_array_itself(name):
    f = DIVERGENCES[name]
    hidden = np.random.default_rng(3).normal(size=(POSITIONS, 4))
    head = np.linalg.lstsq(hidden, TEACHER, rcond=None)[0]  # 4 > POSITIONS: an exact fit
    expected = value_and_gradient(f, TEACHER)
    assert_same(value_and_gradient(f, signal.Dense(TEACHER)), expected)
    assert_same(value_and_gradient(f, signal.HiddenHead(hidden, head)), expected, rtol=1e-7)


@pytest.mark.parametrize('name', COARSE)
def test_top_k_rises_with_k_to_the_dense_value(name):
    f = DIVERGENCES[name]
    dense = value_and_gradient(f, TEACHER)
    values = [f(STUDENT, TOP[k]) for k in TOP]
    # Coarser outcomes can only lose divergence (data processing inequality).
    assert np.all(np.diff(values, axis=0) > -1e-12)
    assert np.mean(values[0]) < np.mean(dense[0]) - 1e-2
    assert_same((values[-1],), dense[:1])
    assert_same(value_and_gradient(f, TOP[SIZE - 1]), dense)


def test_top_k_forward_kl_obeys_the_chain_rule_and_its_gradient_formula():
    teacher = signal.top_k(TEACHER, 2)
    indices = np.asarray(teacher.indices)
    np.testing.assert_array_equal(indices, np.argsort(-TEACHER, axis=-1)[:, :2])
    listed = np.zeros(P.shape, bool)
    np.put_along_axis(listed, indices, True, axis=-1)
    tail_p, tail_q = (np.where(listed, 0, x).sum(-1, keepdims=True) for x in (P, Q))
    np.testing.assert_allclose(teacher.tail, tail_p[:, 0], rtol=1e-12)
    value, gradient = value_and_gradient(divergence.forward_kl, teacher)
    within_tail = np.sum(np.where(listed, 0, P * np.log(P / tail_p * tail_q / Q)), axis=-1)
    np.testing.assert_allclose(value + within_tail, np.sum(P * np.log(P / Q), axis=-1), rtol=1e-12)
    expected = np.where(listed, Q - P, Q - tail_p * Q / tail_q)
    np.testing.assert_allclose(gradient, expected, atol=1e-12)


def test_renormalized_top_k_pulls_the_student_towards_the_listed_outcomes_alone():
    teacher = signal.top_k(TEACHER, 2, temperature=2.0).renormalize()
    target = np.zeros(P.shape)
    exponents = np.exp(np.take_along_axis(TEACHER, np.asarray(teacher.indices), -1) / 2)
    probabilities = exponents / exponents.sum(-1, keepdims=True)
    np.put_along_axis(target, np.asarray(teacher.indices), probabilities, axis=-1)
    q = scipy.special.softmax(STUDENT / 2, axis=-1)
    value, gradient = value_and_gradient(divergence.forward_kl, teacher, temperature=2.0)
    expected = np.sum(scipy.special.rel_entr(target, q), axis=-1)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    np.testing.assert_allclose(gradient, (q - target) / 2, atol=1e-12)


def of_two():
    """The teacher's two favourites: their indices, p and q on them, the gradient's places."""
    top = signal.top_k(TEACHER, 2)
    indices = np.asarray(top.indices)
    p, q = (np.take_along_axis(x, indices, -1) for x in (P, Q))
    listed = np.zeros(P.shape, bool)
    np.put_along_axis(listed, indices, True, axis=-1)
    return top, p, q, listed


def test_a_partial_sum_has_the_listed_terms_alone_and_may_be_negative():
    top, p, q, listed = of_two()
    partial_sum = top.replace(rest='partial')
    value, gradient = value_and_gradient(divergence.forward_kl, partial_sum)
    np.testing.assert_allclose(value, np.sum(p * np.log(p / q), -1), rtol=1e-12)
    np.testing.assert_allclose(
        gradient, p.sum(-1, keepdims=True) * Q - np.where(listed, P, 0), atol=1e-12
    )
    value, gradient = value_and_gradient(divergence.reverse_kl, partial_sum)
    expected = np.sum(q * np.log(q / p), -1)
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    log_ratio = np.where(listed, np.log(Q / P) + 1, 0)
    slope = Q * (log_ratio - np.sum(Q * log_ratio, -1, keepdims=True))
    np.testing.assert_allclose(gradient, slope, atol=1e-12)
    # Not clamped: at its minimum, all of the student's mass on what is listed, it is P log P < 0.
    mass = p.sum(-1)
    value, gradient = value_and_gradient(
        lambda s, t: divergence.forward_kl(jnp.where(listed, s + TEACHER - STUDENT, -jnp.inf), t),
        partial_sum,
    )
    np.testing.assert_allclose(value, mass * np.log(mass), rtol=1e-9)
    np.testing.assert_allclose(gradient, 0, atol=1e-12)
    everything = signal.top_k(TEACHER, SIZE).replace(rest='partial')
    np.testing.assert_allclose(
        divergence.forward_kl(STUDENT, everything), divergence.forward_kl(STUDENT, TEACHER)
    )


def test_the_renormalised_form_compares_what_is_listed_and_says_nothing_else():
    top, p, q, listed = of_two()
    renormalised = top.replace(rest='renormalised')
    p, q = (x / x.sum(-1, keepdims=True) for x in (p, q))
    value, gradient = value_and_gradient(divergence.forward_kl, renormalised)
    np.testing.assert_allclose(value, np.sum(p * np.log(p / q), -1), rtol=1e-12)
    of_all = [np.where(listed, x, 0) for x in (P, Q)]
    p_all, q_all = (x / x.sum(-1, keepdims=True) for x in of_all)
    np.testing.assert_allclose(gradient, q_all - p_all, atol=1e-12)
    for f, expected in (
        (divergence.reverse_kl, np.sum(q * np.log(q / p), -1)),
        (divergence.total_variation, np.abs(p - q).sum(-1) / 2),
    ):
        np.testing.assert_allclose(f(STUDENT, renormalised), expected, rtol=1e-12)
    # Proportional on what is listed is no distance, however much mass is elsewhere.
    away = np.where(listed, TEACHER - 7.0, 3.0)
    np.testing.assert_allclose(divergence.mixed_kl(away, renormalised), 0, atol=1e-12)
    everything = signal.top_k(TEACHER, SIZE).replace(rest='renormalised')
    np.testing.assert_allclose(
        divergence.mixed_kl(STUDENT, everything), divergence.mixed_kl(STUDENT, TEACHER)
    )


@pytest.mark.parametrize('rest', ['partial', 'renormalised'])
def test_every_reading_keeps_empty_slots_masks_and_extremes_finite(rest):
    top = of_two()[0].replace(rest=rest)
    log_probs = np.pad(top.log_probs, ((0, 0), (0, 2)), constant_values=-np.inf)
    padded = top.replace(log_probs=log_probs, indices=np.pad(top.indices, ((0, 0), (0, 2))))
    for f in (divergence.forward_kl, divergence.reverse_kl):
        assert_same(value_and_gradient(f, padded), value_and_gradient(f, top))
    rows = np.array([True, False, True])
    value, gradient = value_and_gradient(divergence.forward_kl, top, where=rows[:, None])
    full_value, full_gradient = value_and_gradient(divergence.forward_kl, top)
    np.testing.assert_allclose(value, np.where(rows, full_value, 0), rtol=1e-12)
    np.testing.assert_allclose(gradient, rows[:, None] * full_gradient, atol=1e-12)
    slope = jax.grad(lambda s: jnp.sum(divergence.mixed_kl(s, top)))(jnp.asarray(1e4 * STUDENT))
    assert np.isfinite(slope).all()


def test_the_student_s_top_k_has_the_teacher_s_probabilities_and_its_tail():
    found = signal.student_top_k(STUDENT, TEACHER, 2, temperature=2.0)
    p, q = (scipy.special.softmax(x / 2, axis=-1) for x in (TEACHER, STUDENT))
    indices = np.argsort(-STUDENT, axis=-1)[:, :2]
    np.testing.assert_array_equal(found.indices, indices)
    listed_p, listed_q = (np.take_along_axis(x, indices, -1) for x in (p, q))
    np.testing.assert_allclose(np.exp(found.log_probs), listed_p, rtol=1e-12)
    np.testing.assert_allclose(found.tail, 1 - listed_p.sum(-1), rtol=1e-12)
    p, q = (np.concatenate([x, 1 - x.sum(-1, keepdims=True)], -1) for x in (listed_p, listed_q))
    value = divergence.reverse_kl(STUDENT, found, temperature=2.0)
    np.testing.assert_allclose(value, np.sum(q * np.log(q / p), -1), rtol=1e-12)
    # All but one outcome is all of them; and the choice carries no gradient.
    expected = value_and_gradient(divergence.generalized_jsd, TEACHER)
    most = lambda s, t: divergence.generalized_jsd(s, signal.student_top_k(s, t, SIZE - 1))  # noqa: E731
    assert_same(value_and_gradient(most, TEACHER), expected)


def test_vocabularies_padded_unlike_are_cut_to_what_both_have():
    generator = np.random.default_rng(5)
    hidden, head = generator.normal(size=(POSITIONS, 4)), generator.normal(size=(4, SIZE + 3))
    wide = hidden @ head
    expected = value_and_gradient(divergence.forward_kl, wide[:, :SIZE])

    def cut(student, teacher):
        return divergence.forward_kl(*signal.cut(student, teacher))

    for teacher in (wide, signal.Dense(wide), signal.HiddenHead(hidden, head)):
        assert_same(value_and_gradient(cut, teacher), expected, rtol=1e-9)
    # The other way round, what the student has more counts for nothing and gets no gradient.
    poisoned = jnp.where(np.arange(SIZE + 3) < SIZE, wide, np.nan)
    value, slope = jax.value_and_grad(lambda s: jnp.sum(cut(s, TEACHER)))(poisoned)
    plain = np.sum(divergence.forward_kl(wide[:, :SIZE], TEACHER))
    np.testing.assert_allclose(value, plain, rtol=1e-12)
    np.testing.assert_array_equal(slope[:, SIZE:], 0)
    fused = sequence.fused_divergence(
        hidden, head, TEACHER, divergence=lambda z, t: divergence.reverse_kl(*signal.cut(z, t))
    )
    np.testing.assert_allclose(fused, divergence.reverse_kl(wide[:, :SIZE], TEACHER), rtol=1e-9)


def test_empty_slots_of_top_k_say_nothing():
    k2 = signal.top_k(TEACHER, 2)
    log_probs = np.pad(k2.log_probs, ((0, 0), (0, 2)), constant_values=-np.inf)
    padded = signal.TopK(log_probs, np.pad(k2.indices, ((0, 0), (0, 2))), k2.tail)
    for f in (divergence.forward_kl, divergence.reverse_kl):
        assert_same(value_and_gradient(f, padded), value_and_gradient(f, k2))


@pytest.mark.parametrize('outside', [-1, SIZE, SIZE + 3])
def test_an_outcome_that_the_student_has_not_is_impossible_for_it(outside):
    # The teacher's first outcome gets a name that the student does not know.
    kept = signal.top_k(TEACHER, 2)
    renamed = signal.TopK(kept.log_probs, kept.indices.at[:, 0].set(outside), kept.tail)
    second = np.asarray(kept.indices)[:, 1]
    p, rows = np.exp(kept.log_probs), np.arange(POSITIONS)
    distance = p[:, 0] + abs(p[:, 1] - Q[rows, second])
    distance = 0.5 * (distance + abs(kept.tail - (1 - Q[rows, second])))
    np.testing.assert_allclose(divergence.total_variation(STUDENT, renamed), distance, rtol=1e-9)
    assert np.isposinf(divergence.forward_kl(STUDENT, renamed)).all()
    # Empty slots may have any index.
    empty = signal.TopK(kept.log_probs.at[:, 0].set(-np.inf), renamed.indices, 1 - p[:, 1])
    assert np.isfinite(divergence.forward_kl(STUDENT, empty)).all()

    tokens = np.stack([second, np.full(POSITIONS, outside)], axis=-1)
    for weight, wanted in ((0.5, np.inf), (0.0, -0.5 * np.log(Q[rows, second]))):
        weights = np.broadcast_to([0.5, weight], tokens.shape)
        value = divergence.forward_kl(STUDENT, signal.Sampled(tokens, jnp.asarray(weights)))
        np.testing.assert_allclose(value, np.broadcast_to(wanted, value.shape), rtol=1e-12)


def test_small_tails_keep_their_digits_in_float32():
    logits = jnp.asarray([[20.0, 0.0, -1.0, -2.0]], jnp.float32)
    teacher = signal.top_k(logits, 1)
    exact = np.sum(np.exp([0.0, -1, -2])) / np.sum(np.exp([20.0, 0, -1, -2]))
    np.testing.assert_allclose(teacher.tail, [exact], rtol=1e-6)
    student = jnp.asarray([[20.0, 0.0, 0.0, 0.0]], jnp.float32)
    uniform = signal.top_k(jnp.zeros((1, 4), jnp.float32), 1)
    q_tail = 3 / (np.exp(20) + 3)
    expected = np.log(0.25) / 4 + 3 * np.log(0.75 / q_tail) / 4
    np.testing.assert_allclose(divergence.forward_kl(student, uniform), [expected], rtol=1e-6)


def sampled_by_enumeration(draws, proposal):
    """Value and gradient for every possible sample of `draws` tokens, and its probability."""
    entropy = -np.sum(P * np.log(P), axis=-1)
    for tokens in itertools.product(range(SIZE), repeat=draws):
        tokens = np.array(tokens)
        teacher = signal.Sampled(
            np.broadcast_to(tokens, (POSITIONS, draws)),
            P[:, tokens] / (draws * proposal[:, tokens]),
            entropy,
        )
        yield value_and_gradient(divergence.forward_kl, teacher), proposal[:, tokens].prod(-1)


@pytest.mark.parametrize('draws', [1, 2])
def test_sampled_forward_kl_and_gradient_are_unbiased_by_enumeration(draws):
    proposal = scipy.special.softmax(TEACHER / 2, axis=-1)
    value, gradient, mass = 0.0, 0.0, 0.0
    for (v, g), probability in sampled_by_enumeration(draws, proposal):
        value += probability * v
        gradient += probability[:, None] * g
        mass += probability
    np.testing.assert_allclose(mass, 1, rtol=1e-12)
    np.testing.assert_allclose(value, divergence.forward_kl(STUDENT, TEACHER), rtol=1e-12)
    np.testing.assert_allclose(gradient, Q - P, atol=1e-12)


def test_sample_draws_from_the_proposal_with_weights_that_undo_it(key):
    draws = 20_000
    teacher = signal.sample(key, TEACHER, draws, proposal_temperature=2.0)
    proposal = scipy.special.softmax(TEACHER / 2, axis=-1)
    ratio = np.take_along_axis(P / proposal, np.asarray(teacher.tokens), axis=-1)
    np.testing.assert_allclose(teacher.weights, ratio / draws, rtol=1e-10)
    np.testing.assert_allclose(teacher.entropy, -np.sum(P * np.log(P), axis=-1), rtol=1e-12)
    onehot = np.asarray(teacher.tokens)[..., None] == np.arange(SIZE)
    estimate = np.sum(onehot * np.asarray(teacher.weights)[..., None], axis=1)
    standard_error = np.sqrt(P**2 / proposal / draws)
    assert np.all(np.abs(estimate - P) < 5 * standard_error)


def test_one_draw_of_weight_one_is_the_cross_entropy_of_a_label():
    labels = np.array([0, 3, 5])
    teacher = signal.Sampled(labels[:, None], np.ones((POSITIONS, 1)))
    assert_same(
        value_and_gradient(divergence.forward_kl, teacher),
        value_and_gradient(lambda s, _: classification.cross_entropy(s, labels), teacher),
    )


@pytest.mark.parametrize('form', ['top_k', 'sampled'])
def test_where_over_positions_holds_for_sparse_signals(form, key):
    teacher = signal.top_k(TEACHER, 2) if form == 'top_k' else signal.sample(key, TEACHER, 4)
    rows = np.array([True, False, True])
    value, gradient = value_and_gradient(divergence.forward_kl, teacher, where=rows[:, None])
    full_value, full_gradient = value_and_gradient(divergence.forward_kl, teacher)
    np.testing.assert_allclose(value, np.where(rows, full_value, 0.0), rtol=1e-12)
    np.testing.assert_allclose(gradient, rows[:, None] * full_gradient, atol=1e-12)


def test_signals_are_pytrees_that_vmap_maps_and_jit_takes():
    teacher = signal.top_k(TEACHER, 3, temperature=2.0)
    f = partial(divergence.forward_kl, temperature=2.0)
    np.testing.assert_allclose(jax.jit(jax.vmap(f))(STUDENT, teacher), f(STUDENT, teacher))


@pytest.mark.parametrize('name', [name for name in DIVERGENCES if name != 'forward_kl'])
def test_sampled_is_refused_by_name_where_it_defines_nothing(name, key):
    expected = rf'^{name.split()[0].replace("amari", "alpha_beta")}.*Sampled.*needs Dense'
    with pytest.raises(TypeError, match=expected):
        DIVERGENCES[name](STUDENT, signal.sample(key, TEACHER, 2))


def test_top_k_is_refused_by_name_where_it_defines_nothing():
    top2, labels = signal.top_k(TEACHER, 2), np.zeros(POSITIONS, np.int32)
    with pytest.raises(TypeError, match=r'^alpha_beta\(alpha=0.5, beta=0.7\).*TopK.*HiddenHead\.$'):
        DIVERGENCES['alpha_beta'](STUDENT, top2)
    with pytest.raises(TypeError, match=r'^adaptive_kl .*TopK.*HiddenHead\.$'):
        divergence.adaptive_kl(STUDENT, top2)
    with pytest.raises(TypeError, match=r'^logit_mse .*TopK'):
        classification.logit_mse(STUDENT, top2)
    with pytest.raises(TypeError, match=r'^cut .*TopK.* needs Dense or HiddenHead\.$'):
        signal.cut(STUDENT, top2)
    with pytest.raises(TypeError, match=r'^student_top_k .*TopK'):
        signal.student_top_k(STUDENT, top2, 2)
    with pytest.raises(ValueError, match=r"^rest must be one of .*'partial'.* got 'none'"):
        top2.replace(rest='none')
    with pytest.raises(ValueError, match=r'^student_top_k .*\(3, 6\) and \(3, 5\); see signal.cut'):
        signal.student_top_k(STUDENT, TEACHER[:, :5], 2)
    for f in (classification.target_kl, classification.non_target_kl):
        with pytest.raises(TypeError, match=r'kl .*TopK'):
            f(STUDENT, top2, labels)


def test_a_sparse_signal_is_bound_to_its_temperature(key):
    for teacher in (signal.top_k(TEACHER, 2), signal.sample(key, TEACHER, 2)):
        with pytest.raises(ValueError, match=r'recorded at temperature 1\.0 .* temperature 2'):
            divergence.forward_kl(STUDENT, teacher, temperature=2)
    with pytest.raises(ValueError, match='between 1 and the number of outcomes 6, got k=7'):
        signal.top_k(TEACHER, 7)


def test_only_dense_logits_follow_the_axis_the_other_forms_keep_their_outcomes_last():
    generator = np.random.default_rng(4)
    hidden, head = generator.normal(size=(POSITIONS, 4)), generator.normal(size=(4, SIZE))
    teacher = signal.HiddenHead(hidden, head)
    for form in (teacher, signal.top_k(hidden @ head, 3)):
        expected = divergence.forward_kl(STUDENT, form)
        turned = divergence.forward_kl(STUDENT.T, form, axis=0)
        np.testing.assert_allclose(turned, expected, rtol=1e-12)
    turned = divergence.forward_kl(STUDENT.T, signal.Dense((hidden @ head).T), axis=0)
    np.testing.assert_allclose(turned, divergence.forward_kl(STUDENT, teacher), rtol=1e-12)
