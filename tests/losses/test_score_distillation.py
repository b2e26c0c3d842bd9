"""Directions and adversarial losses against gradients by hand and Gaussians in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.losses import adversarial, schedule, score_distillation

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(name='x')
def _x():
    return jnp.asarray(np.random.default_rng(0).standard_normal((3, 4, 2)))


def test_the_sign_of_the_direction_and_its_normaliser(x):
    # mu_real one above, mu_fake at the sample: to the teacher is up, and g is what is subtracted.
    np.testing.assert_allclose(score_distillation.direction(x, x + 1, x), -np.ones(x.shape))
    real, fake = x + np.cos(x), x - np.sin(x)
    g = score_distillation.direction(x, real, fake)
    scale = np.abs(x - real).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(g, (fake - real) / scale, rtol=1e-12)
    np.testing.assert_allclose(score_distillation.direction(7 * x, 7 * real, 7 * fake), g)


def test_an_example_does_not_change_the_directions_of_others(x):
    real, fake = x + np.cos(x), x - np.sin(x)
    g = score_distillation.direction(x, real, fake)
    large = jnp.asarray([1000.0, 1.0, 1.0])[:, None, None]
    other = score_distillation.direction(large * x, large * real, large * fake)
    assert (np.asarray(other[1:]) == np.asarray(g[1:])).all()


def test_where_real_and_sample_agree_the_direction_stays_finite(x):
    g = score_distillation.direction(x, x, x)
    assert (np.asarray(g) == 0).all()


def test_directions_are_constants_and_the_surrogate_passes_them_on(x):
    def g_of(x):
        return score_distillation.direction(x, 2 * x + 1, jnp.sin(x))

    assert (np.asarray(jax.jacobian(g_of)(x)) == 0).all()
    gradient = jax.grad(lambda x: score_distillation.surrogate(x, g_of(x)).mean())(x)
    np.testing.assert_allclose(gradient, g_of(x) / x.size, rtol=1e-9)
    value = score_distillation.surrogate(x, g_of(x))
    np.testing.assert_allclose(value, 0.5 * np.square(g_of(x)).mean((1, 2)), rtol=1e-9)


def test_the_direction_is_the_gradient_of_the_divergence_of_gaussians():
    """Data N(m, S^2), generator mu + s z, its own denoiser: d/ds and d/dmu of KL, by quadrature."""
    path, t = schedule.edm(), jnp.asarray(0.9)
    m, deviation, mu, s = 0.4, 0.5, -0.2, 0.8
    sigma = 0.9

    def divergence(mu, s):
        a, b = s**2 + sigma**2, deviation**2 + sigma**2
        return 0.5 * (a / b + (mu - m) ** 2 / b - 1 - jnp.log(a / b))

    nodes, weights = np.polynomial.hermite_e.hermegauss(40)
    z, e = np.meshgrid(nodes, nodes, indexing='ij')
    mass = np.outer(weights, weights) / (2 * np.pi)
    x = mu + s * z
    x_t = x + sigma * e

    def denoiser(mean, std):
        return mean + std**2 / (std**2 + sigma**2) * (x_t - mean)

    # Unnormalised: eps_real - eps_fake over sigma is s_fake - s_real, the gradient in x.
    real, fake = (
        schedule.convert(path, jnp.asarray(d).reshape(-1, 1), x_t.reshape(-1, 1), t, 'x0', 'eps')
        for d in (denoiser(m, deviation), denoiser(mu, s))
    )
    g = np.asarray(score_distillation.vsd(real, fake, 1 / sigma)).reshape(z.shape)
    by_mu, by_s = jax.grad(divergence, (0, 1))(mu, s)
    np.testing.assert_allclose((mass * g).sum(), by_mu, rtol=1e-9)
    np.testing.assert_allclose((mass * g * z).sum(), by_s, rtol=1e-9)
    # The form of DMD differs by sigma^2 alone.
    difference = denoiser(mu, s) - denoiser(m, deviation)
    np.testing.assert_allclose(difference / sigma**2, g, rtol=1e-9)


def test_guidance_splits_into_matching_and_augmentation(x):
    conditional, unconditional, fake, scale = jnp.sin(x), jnp.cos(x), x**2, 4.0
    guided = unconditional + scale * (conditional - unconditional)
    parts = (fake - conditional) + score_distillation.augmentation(
        conditional, unconditional, scale
    )
    np.testing.assert_allclose(parts, fake - guided, atol=1e-12)
    assert (np.asarray(score_distillation.augmentation(conditional, unconditional, 1.0)) == 0).all()


def test_moments_against_the_divergence_of_gaussians(x):
    mean, variance = 0.3, 1.7
    found = score_distillation.mean_variance_kl(x, mean, variance)
    m, s2 = x.mean((1, 2)), x.var((1, 2))
    wanted = 0.5 * ((s2 + (m - mean) ** 2) / variance - 1 - np.log(s2 / variance))
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    standard = (x - x.mean((1, 2), keepdims=True)) / x.std((1, 2), keepdims=True)
    zero = score_distillation.mean_variance_kl(mean + np.sqrt(variance) * standard, mean, variance)
    np.testing.assert_allclose(zero, 0, atol=1e-12)
    over_batch = score_distillation.mean_variance_kl(x, mean, variance, axes=(0,))
    assert over_batch.shape == (4, 2)


def test_adversarial_losses_where_nothing_is_told_apart():
    zero = jnp.zeros((3, 2))
    np.testing.assert_allclose(adversarial.discriminator_softplus(zero, zero), 2 * np.log(2))
    np.testing.assert_allclose(adversarial.generator_softplus(zero), np.log(2))
    np.testing.assert_allclose(adversarial.relativistic(zero, zero), np.log(2))
    # The optimal discriminator's logit is the log ratio: the loss is 2 log 2 - 2 JS.
    p, q = np.asarray([0.7, 0.2, 0.1]), np.asarray([0.2, 0.2, 0.6])
    logit = jnp.log(p / q)
    value = (p * jax.nn.softplus(-logit) + q * jax.nn.softplus(logit)).sum()
    both = adversarial.discriminator_softplus(logit, logit)
    np.testing.assert_allclose(both, jax.nn.softplus(-logit) + jax.nn.softplus(logit))
    m = (p + q) / 2
    js = 0.5 * (p * np.log(p / m)).sum() + 0.5 * (q * np.log(q / m)).sum()
    np.testing.assert_allclose(value, 2 * np.log(2) - 2 * js, rtol=1e-9)


def test_penalties_of_a_linear_discriminator(x):
    w = jnp.asarray(np.random.default_rng(1).standard_normal((4, 2)))

    def logits(x):
        return jnp.sum(w * x, axis=(1, 2))

    square = float(jnp.sum(w**2))
    np.testing.assert_allclose(adversarial.r1(logits, x), np.full(3, square / 2), rtol=1e-12)
    many = jnp.broadcast_to(x[:1], (20_000, 4, 2))
    found = adversarial.finite_difference(logits, many, jax.random.key(0), 0.1)
    np.testing.assert_allclose(found.mean(), 0.01 * square, rtol=0.05)
