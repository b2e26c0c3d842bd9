"""Discrepancies in random features: against sums by hand, laws that are known, and a step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.losses import mean_embedding
from kd.losses.schedule import edm
from kd.methods.diffusion.distribution_matching import Views
from kd.methods.diffusion.embedding_loss import discrepancy, embedding_loss
from kd.models.denoiser import Denoised
from kd.models.mlp import MLP
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

FEATURES = from_linen(MLP((16,), 8), jax.ShapeDtypeStruct((1, 2), jnp.float32))


@pytest.fixture(name='points')
def _points():
    rng = np.random.default_rng(0)
    return rng.standard_normal((2, 6, 3)), 0.5 + rng.standard_normal((2, 9, 3))


@pytest.mark.parametrize('unbiased', [False, True])
@pytest.mark.parametrize('kernel', ['linear', 'gaussian'])
def test_discrepancies_against_sums_over_pairs(points, kernel, unbiased):
    x, y = points
    width = 1.3

    def k(a, b):
        if kernel == 'linear':
            return a @ b
        square = np.sum((a - b) ** 2)
        return np.mean([np.exp(-square / 2 / (h * width) ** 2) for h in (0.5, 1, 2, 4)])

    def mean(a, b, own):
        values = [k(p, q) for i, p in enumerate(a) for j, q in enumerate(b) if not (own and i == j)]
        return np.mean(values)

    wanted = [
        mean(a, a, unbiased) + mean(b, b, unbiased) - 2 * mean(a, b, False)
        for a, b in zip(x, y, strict=True)
    ]
    found = mean_embedding.mmd2(
        jnp.asarray(x), jnp.asarray(y), kernel=kernel, unbiased=unbiased, bandwidth=width
    )
    np.testing.assert_allclose(found, wanted, rtol=2e-4, atol=1e-6)
    with pytest.raises(ValueError, match="got 'cubic'"):
        mean_embedding.mmd2(x, y, kernel='cubic')


def test_of_one_law_the_unbiased_statistic_has_mean_zero_and_the_biased_one_has_not():
    x, y = jax.random.normal(jax.random.key(0), (2, 400, 4, 3))
    unbiased = np.asarray(mean_embedding.mmd2(x, y, unbiased=True))
    assert abs(unbiased.mean()) < 3 * unbiased.std() / 20
    assert unbiased.min() < 0
    # tr Cov / n of both.
    np.testing.assert_allclose(mean_embedding.mmd2(x, y).mean(), 2 * 3 / 4, rtol=0.1)


def test_the_biased_statistic_shrinks_a_generator_and_the_unbiased_one_does_not():
    """d/da of x = a z with data of the same law: 2 a / B, and 0."""
    z, y = jax.random.normal(jax.random.key(1), (2, 20_000, 4, 1))

    def mean(a, unbiased):
        return mean_embedding.mmd2(a * z, y, unbiased=unbiased).mean()

    assert float(jax.grad(mean)(1.0, False)) == pytest.approx(2 / 4, abs=0.03)
    assert float(jax.grad(mean)(1.0, True)) == pytest.approx(0, abs=0.03)


def views(x):
    return Views(x, jnp.zeros(len(x)), {}, edm(), None, None, None)


def test_the_term_is_the_mean_over_networks_and_its_gradient_is_by_hand():
    x, real = jax.random.normal(jax.random.key(2), (2, 5, 2))
    term, key = discrepancy(FEATURES, 1.0, 3), jax.random.key(3)

    def value(x, real):
        return term.loss(views(x), {'input': real}, key)

    def by_hand(x, real):
        total = 0.0
        for each in jax.random.split(key, 3):
            phi = FEATURES.init(each)
            gap = FEATURES.apply(phi, x).logits.mean(0) - FEATURES.apply(phi, real).logits.mean(0)
            total += jnp.sum(gap**2) / 8
        return total / 3

    np.testing.assert_allclose(value(x, real), jnp.full(5, by_hand(x, real)), rtol=1e-5)
    gradient, of_real = jax.grad(lambda x, real: value(x, real).mean(), (0, 1))(x, real)
    np.testing.assert_allclose(gradient, jax.grad(by_hand)(x, real), rtol=1e-4, atol=1e-6)
    # Data are constants; other networks see something else.
    assert (np.asarray(of_real) == 0).all()
    other = term.loss(views(x), {'input': real}, jax.random.key(4))
    assert not np.allclose(value(x, real), other)
    order = np.random.default_rng(0).permutation(5)
    np.testing.assert_allclose(value(x[order], real[order]), value(x, real), rtol=1e-5)


def test_random_networks_see_a_scale_that_means_do_not():
    wide = from_linen(MLP((64,), 64), jax.ShapeDtypeStruct((1, 1), jnp.float32))
    term, key = discrepancy(wide, 1.0, 16), jax.random.key(0)
    one, two, three = jax.random.normal(jax.random.key(5), (3, 512, 1))

    def found(x, real):
        return float(term.loss(views(x), {'input': real}, key)[0])

    null = found(one, two)
    assert found(2 * one, two) > 10 * null
    # Of the points themselves: the means do not tell them apart.
    assert float(mean_embedding.mmd2(2 * one, three)) < 0.05


@pytest.fixture(scope='module')
def network():
    module = Denoised(VelocityMLP(width=8, depth=1), edm(0.02, 5.0), precondition='edm')
    return from_linen(
        module, *module.example_inputs({'input': jax.ShapeDtypeStruct((2,), jnp.float32)})
    )


def test_few_samples_against_many_examples(network):
    """Of sixteen examples and four samples the critic sees four, the discrepancy all."""
    context = seeds.context(
        network=network, teacher=network, tx=optax.sgd(0.1), steps=4,
        spec={'input': jax.ShapeDtypeStruct((2,), jnp.float32)},
    )  # fmt: skip
    options = dict(
        times=(5.0,), optimizer=dict(name='sgd', lr=0.1), updates=2, samples=4,
        embedding=dict(name='kd.models.mlp.MLP', widths=(8,), num_classes=4), networks=2,
        clock=dict(name='kd.sampling.times.karras', low=0.02, high=5.0),
    )  # fmt: skip
    teacher = jax.tree.map(lambda x: x + 0.1, network.init(jax.random.key(0)))
    batch = {'input': jax.random.normal(jax.random.key(1), (16, 2))}
    moved = {}
    for weight in (0.0, 0.5):
        method = embedding_loss(context, embedding_weight=weight, **options)
        state = jax.jit(method.init)(jax.random.key(0), {'teacher': teacher})
        state, metrics = jax.jit(method.step)(state, batch)
        moved[weight] = state.params['generator']
        assert float(metrics['generator/loss'].count) == 4
        assert float(metrics['fake/denoising'].count) == 8
        assert ('generator/embedding' in metrics) == bool(weight)
    # The critic is the teacher at first: without the discrepancy the generator stays.
    jax.tree.map(np.testing.assert_array_equal, moved[0.0], teacher['params'])
    change = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), moved[0.5], teacher['params'])
    assert max(jax.tree.leaves(change)) > 0
