"""Attacks in their ball, against closed forms; the losses of robust training in NumPy."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kd.losses import divergence, robust

pytestmark = pytest.mark.usefixtures('compiled_quickly')

B, D, K = 16, 6, 4
RNG = np.random.default_rng(0)
W = jnp.asarray(RNG.normal(size=(D, K)), jnp.float32)
X = jnp.asarray(RNG.uniform(-1, 1, (B, D)), jnp.float32)
Y = jnp.asarray(RNG.integers(0, K, B), jnp.int32)


def cross_entropy(x):
    return -jnp.take_along_axis(jax.nn.log_softmax(x @ W), Y[:, None], -1)[:, 0]


def attack(loss=cross_entropy, x=X, seed=0, **options):
    given = dict(epsilon=0.2, step=0.05, steps=10) | options
    return jax.jit(lambda x: robust.pgd(jax.random.key(seed), loss, x, **given))(x)


@pytest.mark.parametrize('norm', ['linf', 'l2'])
@pytest.mark.parametrize('steps', [0, 1, 10])
def test_an_attack_stays_in_the_ball_and_in_the_range(norm, steps):
    found = attack(steps=steps, norm=norm, jitter=0.5, start='uniform')
    change = np.asarray(found - X)
    size = np.abs(change).max(1) if norm == 'linf' else np.linalg.norm(change, axis=1)
    assert size.max() <= 0.2 + 1e-6
    assert size.max() > 0.19
    assert np.abs(found).max() <= 1.0


def test_without_steps_it_is_the_jittered_input():
    inside = 0.5 * X
    found = attack(x=inside, steps=0)
    noise = 0.001 * jax.random.normal(jax.random.key(0), X.shape)
    np.testing.assert_allclose(found, inside + noise, atol=1e-7)


def test_every_step_more_raises_the_loss_of_a_linear_model():
    values = [np.asarray(cross_entropy(attack(steps=n))) for n in (0, 1, 3, 10)]
    for fewer, more in pairwise(values):
        assert (more >= fewer - 1e-6).all()
    assert (values[-1] > values[0] + 0.05).mean() > 0.9


def test_two_classes_have_their_optimum_in_a_corner_once_the_steps_reach_it():
    w, sign = W[:, 0], jnp.where(Y % 2 == 0, 1.0, -1.0)
    loss = lambda x: jax.nn.softplus(-sign * (x @ w))  # noqa: E731
    wide = dict(loss=loss, low=-9.0, high=9.0, jitter=0.0)
    best = X - 0.2 * sign[:, None] * jnp.sign(w)
    np.testing.assert_allclose(attack(**wide, steps=4), best, atol=1e-6)
    np.testing.assert_allclose(attack(**wide, steps=3), X + 0.75 * (best - X), atol=1e-6)
    # In the other ball it goes along the gradient.
    along = -sign[:, None] * w / jnp.linalg.norm(w)
    np.testing.assert_allclose(attack(**wide, norm='l2'), X + 0.2 * along, atol=1e-5)


def test_a_loss_that_is_least_at_the_input_needs_jitter():
    clean = X @ W
    loss = lambda x: divergence.forward_kl(x @ W, clean)  # noqa: E731
    slope = jax.grad(lambda x: loss(x).sum())(X)
    np.testing.assert_allclose(slope, 0.0, atol=1e-7)
    still = attack(loss=lambda x: jnp.sum((x - X) ** 2, -1), jitter=0.0)
    np.testing.assert_array_equal(still, X)
    moved = attack(loss)
    assert (np.asarray(loss(moved)) > 20 * np.asarray(loss(attack(loss, steps=0)))).all()


def test_a_loop_of_python_gives_the_same_attack_and_nothing_flows_back():
    np.testing.assert_allclose(attack(unroll=True), attack(), atol=1e-6)
    slope = jax.grad(lambda x: attack(x=x).sum())(X)
    np.testing.assert_array_equal(slope, 0.0)


def test_radii_may_differ_by_example():
    radius = jnp.linspace(0.0, 0.3, B)[:, None]
    found = attack(epsilon=radius, low=-9.0, high=9.0)
    np.testing.assert_allclose(jnp.abs(found - X).max(1), radius[:, 0], atol=1e-6)


# The losses


def logits(seed):
    return np.random.default_rng(seed).normal(size=(B, K)).astype(np.float32)


def log_softmax(z):
    return scipy.special.log_softmax(np.float64(z), -1)


def kl(p, q):
    p, q = log_softmax(p), log_softmax(q)
    return (np.exp(p) * (p - q)).sum(-1)


CLEAN, ATTACKED, TEACHER, TAUGHT = (logits(seed) for seed in range(1, 5))
CE = -log_softmax(CLEAN)[np.arange(B), Y]


def test_losses_are_their_equations():
    pairs = [
        (robust.trades(CLEAN, ATTACKED, Y, beta=6.0), CE + 6 * kl(CLEAN, ATTACKED)),
        (robust.rslad(CLEAN, ATTACKED, TEACHER),
         5 / 6 * kl(TEACHER, ATTACKED) + kl(TEACHER, CLEAN) / 6),
        (robust.ard(CLEAN, ATTACKED, TEACHER, Y, soft_weight=0.9, temperature=3.0),
         0.1 * CE + 0.9 * 9 * kl(TEACHER / 3, ATTACKED / 3)),
        (robust.adaad(CLEAN, ATTACKED, TEACHER, TAUGHT, clean_weight=0.3),
         0.7 * kl(TAUGHT, ATTACKED) + 0.3 * kl(TEACHER, CLEAN)),
    ]  # fmt: skip
    for found, expected in pairs:
        assert found.shape == (B,)
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)
    # As released: a small number within the logarithm, and means over classes.
    q = np.exp(log_softmax(TEACHER))
    released = [(q * (np.log(q + 1e-5) - log_softmax(z))).mean() for z in (ATTACKED, CLEAN)]
    found = robust.rslad(CLEAN, ATTACKED, TEACHER, eps=1e-5).mean() / K
    assert float(found) == pytest.approx(5 / 6 * released[0] + released[1] / 6, rel=1e-5)


def test_gradients_go_where_each_method_says():
    """Through both laws in TRADES; the natural term of RSLAD vanishes at the teacher's own law."""
    through = jax.grad(lambda a, b: robust.trades(a, b, Y).sum(), (0, 1))
    clean, attacked = through(jnp.asarray(CLEAN), jnp.asarray(ATTACKED))
    p, r = np.exp(log_softmax(CLEAN)), log_softmax(CLEAN) - log_softmax(ATTACKED)
    hot = np.eye(K)[np.asarray(Y)]
    expected = p - hot + 6 * p * (r - (p * r).sum(-1, keepdims=True))
    np.testing.assert_allclose(clean, expected, atol=1e-5)
    np.testing.assert_allclose(attacked, 6 * (np.exp(log_softmax(ATTACKED)) - p), atol=1e-5)
    slope = jax.grad(lambda s: robust.rslad(s, jnp.asarray(ATTACKED), jnp.asarray(CLEAN)).sum())
    np.testing.assert_allclose(slope(jnp.asarray(CLEAN)), 0.0, atol=1e-6)
    # With no attack both terms are one.
    same = robust.rslad(CLEAN, CLEAN, TEACHER)
    np.testing.assert_allclose(same, kl(TEACHER, CLEAN), rtol=1e-5)


def test_the_margin_is_above_nothing_where_the_network_is_wrong():
    found = np.asarray(robust.margin(CLEAN, Y))
    np.testing.assert_array_equal(found > 0, CLEAN.argmax(-1) != Y)
    others = np.where(np.eye(K, dtype=bool)[np.asarray(Y)], -np.inf, CLEAN).max(-1)
    np.testing.assert_allclose(found, others - CLEAN[np.arange(B), Y], rtol=1e-6)
    # It has a slope where the cross-entropy has none left.
    sure = jnp.asarray(100 * np.eye(K, dtype=np.float32)[np.asarray(Y)])
    steep, flat = (
        jax.grad(lambda z, f=f: f(z).sum())(sure)
        for f in (lambda z: robust.margin(z, Y), lambda z: -jax.nn.log_softmax(z)[jnp.arange(B), Y])
    )
    assert np.abs(flat).max() == 0.0
    assert np.abs(steep).max() == 1.0
