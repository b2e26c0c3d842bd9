"""Feature losses: invariances, masks, and features captured from a Flax network."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import feature

pytestmark = pytest.mark.usefixtures('compiled_quickly')

GENERATOR = np.random.default_rng(5)
STUDENT = GENERATOR.normal(size=(6, 2, 2, 3))
TEACHER = GENERATOR.normal(size=(6, 2, 2, 4))
ROTATION = np.linalg.qr(GENERATOR.normal(size=(12, 12)))[0]
IMAGES = GENERATOR.normal(size=(6, 4, 4, 2))


@pytest.fixture(autouse=True)
def _float64():
    with jax.enable_x64(True):
        yield


def matrix(x):
    return np.reshape(x, (len(x), -1))


def test_cka_does_not_see_rotations_scales_and_shifts_and_is_symmetric():
    cka = feature.linear_cka
    base = cka(STUDENT, TEACHER)
    assert 0.1 < base < 1
    np.testing.assert_allclose(cka(STUDENT, STUDENT), 1, rtol=1e-12)
    np.testing.assert_allclose(cka(3 * matrix(STUDENT) @ ROTATION + 5, TEACHER), base, rtol=1e-10)
    np.testing.assert_allclose(cka(TEACHER, STUDENT), base, rtol=1e-12)


def test_cka_of_many_examples_is_that_of_the_features_and_of_few_that_of_the_examples():
    # One side of each pair decides which of the two equal forms is computed.
    x, y = np.random.default_rng(6).normal(size=(2, 7, 6))
    wide = np.pad(x, ((0, 0), (0, 4)))
    np.testing.assert_allclose(feature.linear_cka(x, y), feature.linear_cka(wide, y), rtol=1e-12)


@pytest.mark.parametrize('f', [feature.linear_cka, feature.similarity_preserving])
def test_where_leaves_examples_out_of_batch_statistics(f):
    kept = np.array([True, True, False, True, True, False])
    spoiled = np.where(kept[:, None, None, None], STUDENT, np.nan)

    def total(s):
        value = f(s, TEACHER, where=kept)
        return jnp.sum(value), value

    gradient, value = jax.grad(total, has_aux=True)(spoiled)
    expected = f(STUDENT[kept], TEACHER[kept])
    np.testing.assert_allclose(value[kept] if value.ndim else value, expected, rtol=1e-10)
    np.testing.assert_array_equal(np.asarray(gradient)[~kept], 0)
    assert np.all(np.isfinite(gradient))


def test_similarity_preserving_does_not_see_rotations_of_features():
    value = feature.similarity_preserving(matrix(STUDENT) @ ROTATION, STUDENT)
    np.testing.assert_allclose(value, 0, atol=1e-20)


def test_attention_transfer_is_two_minus_two_cosines_and_ignores_scale():
    energy = [np.sum(np.abs(x) ** 3, axis=-1).reshape(6, -1) for x in (STUDENT, TEACHER)]
    cosine = np.sum(energy[0] * energy[1], -1) / np.prod(np.linalg.norm(energy, axis=-1), axis=0)
    value = feature.attention_transfer(STUDENT, 100 * TEACHER, power=3.0)
    np.testing.assert_allclose(value, 2 - 2 * cosine, rtol=1e-10)


def test_hint_counts_what_where_keeps():
    mask = np.array([[True, False], [True, True]])[..., None]
    value = feature.hint(STUDENT, TEACHER[..., :3], where=mask)
    squares = (STUDENT - TEACHER[..., :3]) ** 2
    expected = (squares.sum(axis=(1, 2, 3)) - squares[:, 0, 1].sum(-1)) / 2
    np.testing.assert_allclose(value, expected, rtol=1e-12)


@pytest.mark.parametrize(
    'f',
    [
        feature.hint,
        feature.attention_transfer,
        feature.similarity_preserving,
        feature.linear_cka,
    ],
)
def test_zero_features_have_finite_values_and_gradients(f):
    zero = jnp.zeros_like(STUDENT)
    value, gradient = jax.value_and_grad(lambda s: jnp.sum(f(s, STUDENT)))(zero)
    assert np.isfinite(value)
    assert np.all(np.isfinite(gradient))


class Network(nn.Module):
    width: int

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(self.width, (3, 3), name='stem')(x))
        self.sow('intermediates', 'mean', jnp.mean(x, axis=(1, 2)))
        return nn.Dense(5, name='head')(x.reshape(x.shape[0], -1))


def test_features_of_a_flax_network_give_a_gradient_to_its_layers_before_and_not_behind():
    x = jnp.asarray(IMAGES)
    student, teacher = Network(3), Network(4)
    params = student.init(jax.random.key(0), x)
    _, seen = teacher.apply(teacher.init(jax.random.key(1), x), x, capture_intermediates=True)
    target = feature.captured(seen['intermediates'], 'stem')

    @jax.jit
    def loss(params):
        logits, state = student.apply(params, x, capture_intermediates=True)
        names = ('', 'stem', 'mean')
        seen = {name: feature.captured(state['intermediates'], name) for name in names}
        return jnp.mean(feature.attention_transfer(seen['stem'], target)), (logits, seen)

    (value, (logits, found)), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_array_equal(found[''], logits)
    np.testing.assert_allclose(found['mean'], np.mean(np.maximum(found['stem'], 0), axis=(1, 2)))
    expected = [np.sum(np.square(f), axis=-1).reshape(6, -1) for f in (found['stem'], target)]
    expected = [e / np.linalg.norm(e, axis=-1, keepdims=True) for e in expected]
    np.testing.assert_allclose(value, np.mean(np.sum((expected[0] - expected[1]) ** 2, -1)))
    assert np.linalg.norm(gradient['params']['stem']['kernel']) > 1e-3
    assert np.all(gradient['params']['head']['kernel'] == 0)
    with pytest.raises(ValueError, match=r"no captured layer 'stm'; there are \['', 'head', 'mean"):
        feature.captured(seen['intermediates'], 'stm')


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda: feature.hint(STUDENT, TEACHER), 'give the student a regressor'),
        (lambda: feature.attention_transfer(STUDENT, TEACHER[:, :1]), 'differ in C alone'),
        (lambda: feature.linear_cka(STUDENT, TEACHER[:3]), 'of the same examples'),
    ],
)
def test_refusals_say_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
