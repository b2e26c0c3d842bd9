"""The classical losses: what they do not see, what they cost, and the parts they are made of."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.integrate
import scipy.special
import scipy.stats
from classical_oracles import LABELS, lskd, wsld

from kd.losses import classification, contrastive, feature_maps, relation

pytestmark = pytest.mark.usefixtures('compiled_quickly')

GENERATOR = np.random.default_rng(21)
STUDENT, TEACHER = GENERATOR.normal(size=(2, 8, 6))
KEPT = np.array([1, 1, 0, 1, 1, 0, 1, 1], bool)
OF_EXAMPLES = (
    relation.rkd_distance,
    relation.rkd_angle,
    relation.probabilistic_transfer,
    relation.correlation_congruence,
    partial(relation.correlation_congruence, kernel='bilinear'),
    contrastive.info_nce,
    partial(contrastive.info_nce, symmetric=True),
)


def test_where_leaves_examples_out_of_every_relation():
    spoiled = np.where(KEPT[:, None], STUDENT, np.nan)

    @partial(jax.jit, static_argnums=2)
    def values(s, t, masked):
        def total(s):
            given = {'where': KEPT} if masked else {}
            made = [loss(s, t, **given) for loss in OF_EXAMPLES]
            return sum(map(jnp.sum, made)), made

        return jax.grad(total, has_aux=True)(s)

    with jax.enable_x64(True):
        gradient, masked = values(spoiled, TEACHER, True)
        expected_gradient, expected = values(STUDENT[KEPT], TEACHER[KEPT], False)
    for value, wanted in zip(masked, expected, strict=True):
        np.testing.assert_allclose(value[KEPT], wanted, rtol=1e-10, atol=1e-14)
        np.testing.assert_array_equal(value[~KEPT], 0)
    np.testing.assert_allclose(gradient[KEPT], expected_gradient, rtol=1e-9, atol=1e-12)
    np.testing.assert_array_equal(gradient[~KEPT], 0)


def test_relations_do_not_see_rotations_and_those_of_distance_no_scale_and_shift():
    turn = np.linalg.qr(GENERATOR.normal(size=(6, 6)))[0]

    @jax.jit
    def values(s):
        return [loss(s, TEACHER) for loss in OF_EXAMPLES[:5]]

    with jax.enable_x64(True):
        base, turned, moved = map(values, (STUDENT, STUDENT @ turn, 3 * STUDENT @ turn + 5))
        own = values(TEACHER)
    for i, name in enumerate(('rkd_distance', 'rkd_angle', 'pkt', 'cckd', 'bilinear')):
        np.testing.assert_allclose(turned[i], base[i], rtol=1e-9, err_msg=name)
        assert np.allclose(moved[i], base[i], rtol=1e-9) == (i < 2), name
        np.testing.assert_allclose(own[i], 0, atol=1e-14)


def test_examples_that_coincide_have_distance_and_gradient_zero_in_float32():
    same = np.broadcast_to(STUDENT[:1] * 1000, STUDENT.shape).astype(np.float32)

    @jax.jit
    def gradient(s):
        def total(s):
            return jnp.sum(relation.rkd_distance(s, TEACHER) + relation.rkd_angle(s, TEACHER))

        return jax.grad(total)(s)

    np.testing.assert_array_equal(gradient(jnp.asarray(same)), 0)
    assert np.all(np.isfinite(gradient(jnp.asarray(STUDENT, jnp.float32))))


def sizes(f, *shapes):
    """Elements of the largest array in the program of the gradient of f."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.make_jaxpr(jax.grad(lambda s, t: jnp.sum(f(s, t))))(*arrays)

    def largest(jaxpr):
        found = [v.aval.size for equation in jaxpr.eqns for v in equation.outvars]
        for equation in jaxpr.eqns:
            for value in equation.params.values():
                inner = getattr(value, 'jaxpr', None)
                found += [largest(inner)] if hasattr(inner, 'eqns') else []
        return max(found, default=0)

    return largest(program.jaxpr)


def test_rkd_makes_no_array_of_differences():
    b, d = 16, 128

    def released(s, t):
        def cosines(x):
            differences = x[None] - x[:, None]
            length = jnp.linalg.norm(differences + 1e-9, axis=-1, keepdims=True)
            unit = differences / length
            return jnp.einsum('ijd,ikd->ijk', unit, unit)

        return (cosines(s) - cosines(t)) ** 2

    assert sizes(released, (b, d), (b, d)) >= b * b * d
    for loss in (relation.rkd_angle, relation.rkd_distance):
        assert sizes(loss, (b, d), (b, d)) <= b**3


def test_nst_holds_an_eighth_of_the_products_by_position():
    b, p, c = 4, 64, 32

    def released(s, t):
        def kernel(a, b):
            products = a[:, :, None, :] * b[:, None, :, :]
            return jnp.mean(jnp.sum(products, -1) ** 2, axis=(1, 2))

        s, t = (jnp.swapaxes(x.reshape(b, p, c), 1, 2) for x in (s, t))
        return kernel(t, t) + kernel(s, s) - 2 * kernel(s, t)

    shapes = [(b, 8, 8, c)] * 2
    assert 8 * sizes(feature_maps.neuron_selectivity, *shapes) <= sizes(released, *shapes)


def test_pooling_is_by_the_windows_of_adaptive_pooling():
    x = GENERATOR.normal(size=(2, 5, 7, 3))
    with jax.enable_x64(True):
        found = jax.jit(lambda x: feature_maps.pooled(x, (3, 4)))(x)
    for i, (top, bottom) in enumerate([(0, 2), (1, 4), (3, 5)]):
        for j, (left, right) in enumerate([(0, 2), (1, 4), (3, 6), (5, 7)]):
            window = x[:, top:bottom, left:right].mean((1, 2))
            np.testing.assert_allclose(found[:, i, j], window, rtol=1e-12)
    with pytest.raises(ValueError, match=r'2 sizes are needed for features \(2, 5, 7, 3\)'):
        feature_maps.pooled(x, (3,))


def test_the_margin_is_the_mean_of_the_negative_part_also_where_there_is_hardly_any():
    means, stds = (
        np.array([0.3, -1.0, 0.0, 2.0, 12.0, -0.5, 0.5]),
        np.array([1, 2, 0.5, 1, 1, 0, 0]),
    )
    with jax.enable_x64(True):
        found = jax.jit(feature_maps.negative_mean)(means, stds)
    for mean, std, value in zip(means[:4], stds[:4], found[:4], strict=True):
        law = scipy.stats.norm(mean, std)
        expected = scipy.integrate.quad(lambda x: x * law.pdf(x), -40, 0)[0] / law.cdf(0)  # noqa: B023
        np.testing.assert_allclose(value, expected, rtol=1e-7)
    # Far off, E[x | x < 0] is about -std^2 / mean: not the -3 std of the released code.
    np.testing.assert_allclose(found[4], -1 / 12, rtol=2e-2)
    np.testing.assert_array_equal(found[5:], [-0.5, 0.0])


def test_the_variance_of_vid_is_trained_to_the_mean_square_of_the_error():
    s, t = (x.reshape(8, 3, 2) for x in (STUDENT, TEACHER))
    target = ((s - t) ** 2).mean((0, 1)) - 1e-5
    with jax.enable_x64(True):
        best = jnp.log(jnp.expm1(target))
        total = lambda scale: jnp.mean(  # noqa: E731
            feature_maps.variational_information(s, scale, t)
        )
        at_best, elsewhere = map(jax.jit(jax.grad(total)), (best, best + 0.5))
    np.testing.assert_allclose(at_best, 0, atol=1e-12)
    assert np.all(np.asarray(elsewhere) > 1e-3)


def test_layers_with_more_positions_are_pooled_before_their_flow():
    fine, coarse = GENERATOR.normal(size=(2, 4, 4, 3)), GENERATOR.normal(size=(2, 2, 2, 5))
    small = fine.reshape(2, 2, 2, 2, 2, 3).mean((2, 4)).reshape(2, 4, 3)
    expected = np.einsum('bpc,bpd->bcd', small, coarse.reshape(2, 4, 5)) / 4
    with jax.enable_x64(True):
        found = jax.jit(feature_maps.flow_of_solution)
        np.testing.assert_allclose(found(fine, coarse), expected, rtol=1e-10)
        np.testing.assert_allclose(found(coarse, fine), np.swapaxes(expected, 1, 2), rtol=1e-10)


def test_the_weight_of_soft_labels_passes_no_gradient():
    def gradient(loss):
        return jax.jit(jax.grad(lambda s: jnp.sum(loss(s, TEACHER))))(STUDENT)

    labels = jnp.asarray(LABELS)
    with jax.enable_x64(True):
        found = gradient(partial(classification.weighted_soft_label, labels=labels))
        plain = gradient(partial(classification.divergences.forward_kl))
    q, p = (scipy.special.softmax(x, -1) for x in (STUDENT, TEACHER))
    kl = np.sum(p * np.log(p / q), axis=-1)
    weight = wsld(STUDENT, TEACHER) / kl
    np.testing.assert_allclose(found, weight[:, None] * np.asarray(plain), rtol=1e-6)


def test_standardised_logits_are_compared_up_to_scale_and_shift():
    with jax.enable_x64(True):
        value = jax.jit(partial(classification.standardised_kl, temperature=1.0))
        np.testing.assert_allclose(value(3 * TEACHER + 2, TEACHER), 0, atol=1e-12)
        np.testing.assert_allclose(value(STUDENT, TEACHER), lskd(STUDENT, TEACHER), rtol=1e-6)
    assert np.all(lskd(-TEACHER, TEACHER) > 0.1)


def test_a_bank_takes_its_scale_from_the_first_batch_and_its_rows_from_each():
    bank = contrastive.start_bank(jax.random.key(0), 20, 4)
    np.testing.assert_allclose(np.linalg.norm(bank.student, axis=-1), 1, rtol=1e-5)
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)  # noqa: E731
    s, t = unit(STUDENT[:3, :4]), unit(TEACHER[:3, :4])
    index = np.array([7, 0, 19], np.int32)
    negatives = GENERATOR.integers(0, 20, (3, 5)).astype(np.int32)

    @jax.jit
    def step(bank):
        _, scale = contrastive.crd(bank, s, t, index, negatives, temperature=0.5)
        return contrastive.update_bank(bank, s, t, index, scale, momentum=0.5)

    after = step(bank)
    rows = np.concatenate([index[:, None], negatives], axis=1)
    memory = np.asarray(bank.teacher)
    first = 20 * np.mean(
        [np.exp(memory[r] @ a / 0.5) for a, each in zip(s, rows, strict=True) for r in each]
    )
    np.testing.assert_allclose(after.scale[0], first, rtol=1e-5)
    np.testing.assert_array_equal(step(after).scale, after.scale)
    expected = np.asarray(bank.student).copy()
    expected[index] = unit((expected[index] + s) / 2)
    np.testing.assert_allclose(after.student, expected, rtol=1e-5, atol=1e-6)


def test_negatives_are_uniform_over_examples_of_other_classes():
    labels = np.array([2, 0, 1, -1, 0, 2, 2, 1, -1, 0], np.int32)  # two rows without an example
    draw = jax.jit(contrastive.draw_negatives, static_argnums=3)
    drawn = np.asarray(draw(jax.random.key(0), np.array([0, 1, 2], np.int32), labels, 6000))
    for own, rows in enumerate(drawn):
        others = np.flatnonzero((labels != own) & (labels >= 0))
        count = np.bincount(rows, minlength=10)
        assert count.sum() == count[others].sum()
        assert scipy.stats.chisquare(count[others]).pvalue > 1e-3
    only = np.zeros(4, np.int32)
    alone = np.asarray(draw(jax.random.key(1), only[:1], only, 6000))
    assert set(np.unique(alone)) == {0, 1, 2, 3}
