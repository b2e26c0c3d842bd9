"""Ancestral steps with learned variances and a pull, and soft labels: against NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.data.builders import mixtures
from kd.losses import schedule
from kd.models.denoiser import Denoised
from kd.models.latent_dit import LatentDiT
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, guided, soft_label, times
from kd.sampling.denoiser import Prediction

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PATH = schedule.discrete('linear', 1e-4, 0.02)
GRID = times.sampling(PATH, 50)


def bars():
    """abar of all times, and of the grid of 50 from the cleanest on."""
    bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    return bar, bar[GRID[::-1].astype(int)]


def test_the_grid_is_that_of_the_release_and_its_two_clocks_differ():
    """Step 25 is t = 510, still soft where labels are clean up to 500: clean from 24 on."""
    spaced = [round(i * 999 / 49) for i in range(50)]
    np.testing.assert_array_equal(GRID[::-1], spaced)
    assert (spaced[24], spaced[25], spaced[45]) == (489, 510, 917)
    share = np.asarray(soft_label.clean_share(jnp.asarray(spaced, jnp.float32), 900.0, 500.0))
    assert share[24] == 1
    assert 0.97 < share[25] < 1
    assert (share[45:] == 0).all()
    # How much the window's gradients are multiplied by.
    amplified = 1 / np.sqrt(bars()[1][[30, 45]])
    np.testing.assert_allclose(amplified, [6.7, 71.0], rtol=0.02)


@pytest.mark.parametrize('s', [1, 20, 49])
def test_mean_and_learned_variance_of_a_step_are_those_of_the_respaced_chain(s):
    """By the betas that the kept times have of each other, as DDPM's formulas take them."""
    _, bar = bars()
    beta = 1 - bar[s] / bar[s - 1]
    least = beta * (1 - bar[s - 1]) / (1 - bar[s])
    rng = np.random.default_rng(s)
    x, x0, v = rng.normal(size=(3, 2, 4))
    mean = (np.sqrt(bar[s - 1]) * beta * x0 + np.sqrt(1 - beta) * (1 - bar[s - 1]) * x) / (
        1 - bar[s]
    )
    grid = GRID[::-1]
    with jax.enable_x64(True):
        t, to = jnp.full(2, grid[s], jnp.float64), jnp.full(2, grid[s - 1], jnp.float64)
        plain = guided.posterior(PATH, Prediction(jnp.asarray(x0), {}), jnp.asarray(x), t, to)
        said = Prediction(jnp.asarray(x0), {}, jnp.asarray(v))
        learned = guided.posterior(PATH, said, jnp.asarray(x), t, to)
    np.testing.assert_allclose(plain[0], mean, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(plain[1][0], np.sqrt(least), rtol=1e-7)
    np.testing.assert_array_equal(plain[0], learned[0])
    variance = np.exp(v * np.log(beta) + (1 - v) * np.log(least))
    np.testing.assert_allclose(learned[1], np.sqrt(variance), rtol=1e-7)


MIXTURE = mixtures.quadrants()
EXACT = mixtures.exact_denoiser(MIXTURE, PATH)
LABEL = {'label': jnp.arange(4)}
SHORT = times.sampling(PATH, 8)


def exactly(x, t, key):
    del key
    return EXACT.apply({}, x, jnp.broadcast_to(t, (4,)), LABEL)


def began():
    return diffusion.noise(PATH, jax.random.key(3), (4, 2), float(SHORT[0]))


def test_without_a_pull_it_is_ancestral_sampling_to_the_bit():
    key = jax.random.key(0)

    @jax.jit
    def all_ways(z):
        plain = diffusion.sample(
            PATH, EXACT.bind({}, LABEL), z, SHORT, key, step=diffusion.ddim(1.0)
        )
        none = guided.sample(PATH, exactly, z, SHORT, key)
        zero = guided.sample(PATH, exactly, z, SHORT, key, pull=jnp.ones_like, scale=0.0)
        outside = guided.sample(PATH, exactly, z, SHORT, key, pull=jnp.ones_like, window=(8, 9))
        return plain, none, zero, outside

    plain, *others = all_ways(began())
    for other in others:
        np.testing.assert_array_equal(plain, other)


def test_a_pull_moves_the_mean_by_its_gradient_in_the_window_alone():
    """Trap: by the deviation, not the variance, and through x0 = (x - sigma eps) / alpha."""
    key, force = jax.random.key(0), jnp.array([0.3, -0.2])
    window, scale = (3, 5), 0.7
    found = jax.jit(
        lambda z: guided.sample(
            PATH, exactly, z, SHORT, key, pull=lambda x0: jnp.broadcast_to(force, x0.shape),
            scale=scale, window=window,
        )
    )(began())  # fmt: skip
    keys = jax.random.split(key, len(SHORT))
    step = jax.jit(lambda x, t, to: guided.posterior(PATH, exactly(x, t, key), x, t, to))
    x = began()
    for i, (t, to) in enumerate(itertools.pairwise(SHORT)):
        mean, deviation = step(x, t, to)
        if window[0] <= len(SHORT) - 1 - i <= window[1]:
            mean = mean - scale * deviation * force / PATH.alpha(t)
        x = mean + deviation * jax.random.normal(keys[1 + i], x.shape)
    last = exactly(x, SHORT[-1], key).x0
    np.testing.assert_allclose(found, last, rtol=1e-4, atol=1e-4)


def test_randomness_of_what_is_asked_is_fresh_at_every_step():
    seen = []

    def ask(x, t, key):
        jax.debug.callback(lambda k: seen.append(k.tobytes()), jax.random.key_data(key))
        return exactly(x, t, key)

    jax.block_until_ready(guided.sample(PATH, ask, began(), SHORT, jax.random.key(0)))
    jax.effects_barrier()
    assert len(set(seen)) == len(seen) == len(SHORT)


# Soft labels


OWN, OTHER = np.random.default_rng(1).normal(size=(2, 2, 64)).astype(np.float32) * 0.1
HOW = dict(high=900.0, low=500.0, noise=0.06, semantic=0.01)


@pytest.fixture(scope='module')
def mixed():
    @jax.jit
    def both(key, t, noise):
        given = HOW | dict(noise=noise)
        return tuple(
            soft_label.mixed(key, OWN, OTHER, t, form=form, **given)
            for form in ('released', 'paper')
        )

    return lambda t, noise=0.06, seed=0: both(jax.random.key(seed), t, noise)


def test_a_clean_label_is_itself_to_the_bit(mixed):
    for t in (0.0, 489.0, 500.0):
        for e in mixed(t):
            np.testing.assert_array_equal(e, OWN)
    assert np.abs(mixed(510.0)[0] - OWN).max() > 1e-4


def test_soft_labels_have_the_mean_and_deviation_of_both_rows_together(mixed):
    for t in (510.0, 700.0, 899.0, 950.0):
        for e in mixed(t):
            np.testing.assert_allclose(np.mean(e), OWN.mean(), atol=1e-6)
            np.testing.assert_allclose(np.std(e), OWN.std(), rtol=1e-5)
    released = mixed(700.0)[0]
    assert abs(np.std(released[0]) - OWN[0].std()) > 1e-5


def test_soft_labels_against_numpy(mixed):
    t, a = 700.0, 0.5
    key = jax.random.key(0)

    def standard(e):
        e = e.astype(np.float64)
        return (e - e.mean()) / e.std() * OWN.std() + OWN.mean()

    uniform, normal = jax.random.uniform(key, OWN.shape), jax.random.normal(key, OWN.shape)
    released = np.sqrt(a) * OWN + np.sqrt(1 - a) * (0.06 * uniform + 0.01 * OTHER)
    paper = np.sqrt(a) * OWN + (1 - np.sqrt(a)) * (0.06 * normal + 0.01 * OTHER)
    for found, wanted in zip(mixed(t), (released, paper), strict=True):
        np.testing.assert_allclose(found, standard(np.asarray(wanted)), atol=1e-6)


def test_above_the_first_time_a_label_is_noise_whose_weight_cancels(mixed):
    """And neither the class nor the other one is in it."""
    weak, strong = mixed(950.0, 0.06)[0], mixed(950.0, 6.0)[0]
    np.testing.assert_allclose(weak, strong, atol=1e-5)
    correlation = np.corrcoef(np.ravel(weak), OWN.ravel())[0, 1]
    assert abs(correlation) < 0.3
    assert np.abs(mixed(950.0, seed=1)[0] - weak).max() > 0.05


def perceptron():
    inner = VelocityMLP(width=8, depth=2, num_classes=4)
    module = Denoised(inner, PATH, 'eps')
    return from_linen(
        module, *module.example_inputs({'input': jax.ShapeDtypeStruct((2,), jnp.float32)})
    )


def noisy(network):
    """Variables of which none is 0, without a program for each of them."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.float32(0.3 * rng.standard_normal(x.shape)), shapes)


def test_a_network_told_its_own_embeddings_says_what_it_says_of_the_labels():
    network = perceptron()
    variables, own = noisy(network), denoisers.of_network(network)

    @jax.jit
    def ask(x, t, label, mix):
        rows = soft_label.embeddings(own, variables, x[0], t[0], label, 'label')
        plain = own.apply(variables, x, t, {'label': label}).x0

        def told(rows):
            given = (own, variables, x, t, {'label': label}, rows, 'label')
            return soft_label.told_embeddings(*given).x0

        return rows, plain, told(rows), told(rows + mix)

    label = jnp.array([0, 2, 4])
    x, t = jax.random.normal(jax.random.key(2), (3, 2)), jnp.full(3, 300.0)
    rows, plain, same, others = ask(x, t, label, 1.0)
    kernel = np.asarray(variables['params']['label']['kernel'])
    np.testing.assert_allclose(rows, np.sqrt(5) * kernel[np.asarray(label)], rtol=1e-6)
    np.testing.assert_array_equal(plain, same)
    assert np.abs(others - plain).max() > 1e-3


def test_dit_says_shares_of_its_variances_and_is_told_embeddings():
    inner = LatentDiT(width=8, depth=1, heads=2, num_classes=3, grid=2)
    module = Denoised(inner, PATH, 'eps')
    network = from_linen(
        module, *module.example_inputs({'input': jax.ShapeDtypeStruct((4, 4, 4), jnp.float32)})
    )
    own = denoisers.of_network(network)
    assert module.variance
    variables = noisy(network)
    x, t, label = jnp.ones((2, 4, 4, 4)), jnp.array([100.0, 800.0]), jnp.array([1, 3])

    @jax.jit
    def ask(x):
        plain = own.apply(variables, x, t, {'label': label})
        rows = soft_label.embeddings(own, variables, x[0], 5.0, label, 'emb/class_embedder')
        both = soft_label.told_embeddings(
            own, variables, x, t, {'label': label}, rows, 'emb/class_embedder', variances=True
        )
        raw = inner.apply(variables, t, x, label=label, variances=True)
        return plain, both, raw

    plain, both, raw = ask(x)
    assert plain.share is None
    np.testing.assert_array_equal(plain.x0, both.x0)
    np.testing.assert_allclose(both.share, 0.5 * (raw[..., 4:] + 1), rtol=1e-6)
    alpha, sigma = (np.asarray(f(t))[:, None, None, None] for f in (PATH.alpha, PATH.sigma))
    np.testing.assert_allclose(both.x0, (x - sigma * raw[..., :4]) / alpha, rtol=1e-4, atol=1e-4)
