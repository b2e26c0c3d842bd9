"""Influence on validation: by retraining, dense algebra and limits; the card's checks."""

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kd.losses import influence

pytestmark = pytest.mark.usefixtures('compiled_quickly')

N, M, D, C, DECAY = 24, 12, 3, 3, 0.05


class Regression:
    """Softmax regression with an L2 regulariser, in float64 and NumPy, of soft targets."""

    def __init__(self, seed=0):
        rng = np.random.default_rng(seed)
        self.true = rng.normal(size=(D, C))
        self.x, self.xv = rng.normal(size=(N, D)), rng.normal(size=(M, D))
        self.y = scipy.special.softmax(self.x @ self.true + rng.normal(size=(N, C)), -1)
        self.yv = np.eye(C)[(self.xv @ self.true).argmax(-1)]

    def losses(self, theta, x, y):
        return -(y * scipy.special.log_softmax(x @ theta.reshape(D, C), -1)).sum(-1)

    def gradients(self, theta, x, y):
        p = scipy.special.softmax(x @ theta.reshape(D, C), -1)
        return np.einsum('nd,nc->ndc', x, p - y).reshape(len(x), -1)

    def hessian(self, theta, w):
        p = scipy.special.softmax(self.x @ theta.reshape(D, C), -1)
        curved = np.einsum('nc,cd->ncd', p, np.eye(C)) - np.einsum('nc,nd->ncd', p, p)
        h = np.einsum('n,ni,nab,nj->iajb', w, self.x, curved, self.x) / N
        return h.reshape(D * C, D * C) + DECAY * np.eye(D * C)

    def fitted(self, w):
        """The minimum of (1/n) sum w l + decay/2 |theta|^2, by Newton."""
        theta = np.zeros(D * C)
        for _ in range(30):
            slope = w @ self.gradients(theta, self.x, self.y) / N + DECAY * theta
            theta = theta - np.linalg.solve(self.hessian(theta, w), slope)
        assert np.linalg.norm(slope) < 1e-12
        return theta

    def validation(self, theta):
        return self.losses(theta, self.xv, self.yv).mean()


@pytest.fixture(scope='module')
def fitted():
    model = Regression()
    return model, model.fitted(np.ones(N))


@jax.jit
def found(theta, x, y, xv, yv, damping):
    """Influences by the functions under test."""

    def ce(theta, x, y):
        return -(y * jax.nn.log_softmax(x @ theta.reshape(D, C))).sum(-1)

    return influence.influence_on_validation(
        lambda p, chunk: ce(p, *chunk),
        theta,
        (x.reshape(4, -1, D), y.reshape(4, -1, C)),
        jax.grad(lambda p: ce(p, xv, yv).mean())(theta),
        lambda v: influence.gauss_newton_product(
            lambda p: x @ p.reshape(D, C), theta, v, damping=damping
        ),
        iterations=100,
    )


def influences(model, theta, damping=DECAY):
    with jax.enable_x64(True):
        values, residual = found(theta, model.x, model.y, model.xv, model.yv, damping)
        return np.asarray(values), float(residual)


def test_the_sign_and_size_are_those_of_training_again(fitted):
    model, theta = fitted
    values, residual = influences(model, theta)
    assert residual < 1e-10
    h = 1e-3
    for i in range(0, N, 5):
        w = np.ones(N)
        ends = [model.validation(model.fitted(w + s * h * np.eye(N)[i])) for s in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * h)
        assert values[i] / N == pytest.approx(slope, rel=1e-4, abs=1e-9)


def test_leaving_an_example_out_does_what_it_says(fitted):
    model, theta = fitted
    base = model.validation(theta)
    change = [model.validation(model.fitted(np.ones(N) - np.eye(N)[i])) - base for i in range(N)]
    values, _ = influences(model, theta)
    assert np.corrcoef(change, -values / N)[0, 1] > 0.95


def test_the_solution_is_that_of_dense_algebra(fitted):
    model, theta = fitted
    inverse = np.linalg.inv(model.hessian(theta, np.ones(N)))
    slope = model.gradients(theta, model.xv, model.yv).mean(0)
    each = model.gradients(theta, model.x, model.y)
    values, _ = influences(model, theta)
    np.testing.assert_allclose(values, -each @ inverse @ slope, rtol=1e-7, atol=1e-9)
    # On its own loss no example does harm.
    assert (np.einsum('ni,ij,nj->n', each, -inverse, each) <= 0).all()


def test_much_damping_leaves_the_alignment_of_gradients_and_little_does_not(fitted):
    model, theta = fitted
    slope = model.gradients(theta, model.xv, model.yv).mean(0)
    aligned = -model.gradients(theta, model.x, model.y) @ slope
    much, little = influences(model, theta, 1e4)[0], influences(model, theta, 0.01)[0]
    np.testing.assert_allclose(1e4 * much, aligned, rtol=1e-3, atol=1e-6)
    ranks = [np.argsort(np.argsort(x)) for x in (aligned, much, little)]
    np.testing.assert_array_equal(ranks[0], ranks[1])
    assert (ranks[0] != ranks[2]).sum() > N / 4


def test_duplicates_are_alike_and_order_does_not_matter(fitted):
    _, theta = fitted
    twin = Regression()
    twin.x[1], twin.y[1] = twin.x[0], twin.y[0]
    values, _ = influences(twin, theta)
    assert values[0] == pytest.approx(values[1], rel=1e-9)
    order = np.random.default_rng(1).permutation(N)
    twin.x, twin.y = twin.x[order], twin.y[order]
    np.testing.assert_allclose(influences(twin, theta)[0], values[order], rtol=1e-8, atol=1e-12)


def test_a_wrong_label_is_found_harmful():
    rose = []
    for i in range(N):
        other = Regression()
        hard = np.eye(C)[(other.x @ other.true).argmax(-1)]
        other.y = hard.copy()
        right = influences(other, other.fitted(np.ones(N)))[0][i]
        # The least likely class.
        other.y[i] = np.eye(C)[(other.x[i] @ other.true).argmin()]
        rose.append(influences(other, other.fitted(np.ones(N)))[0][i] > right)
    assert np.mean(rose) > 0.9


def network(params, x):
    return jnp.tanh(x @ params['a']) @ params['b']


def test_the_product_is_the_hessian_of_a_linear_model_and_psd_of_a_network():
    rng = np.random.default_rng(0)
    with jax.enable_x64(True):
        x, w = jnp.asarray(rng.normal(size=(10, D))), jnp.asarray(rng.random(10))
        y, t = jnp.asarray(rng.integers(C, size=10)), jnp.asarray(rng.normal(size=(10, C)))

        def mixture(z):
            """Distillation at temperature 2, and labels."""
            q, p = jax.nn.log_softmax(z / 2), jax.nn.softmax(t / 2)
            hard = -jax.nn.log_softmax(z)[jnp.arange(10), y]
            return 0.3 * hard + 0.7 * 4 * -(p * q).sum(-1)

        theta = jnp.asarray(rng.normal(size=(D, C)))
        v = jnp.asarray(rng.normal(size=(D, C)))

        @jax.jit
        def both(theta, v):
            ours = influence.gauss_newton_product(
                lambda p: x @ p, theta, v, loss=mixture, weights=w, damping=0.2
            )
            risk = jax.grad(lambda p: jnp.mean(w * mixture(x @ p)))
            return ours, jax.jvp(risk, (theta,), (v,))[1] + 0.2 * v

        np.testing.assert_allclose(*both(theta, v), rtol=1e-9)
        params = {
            'a': jnp.asarray(rng.normal(size=(D, 4))), 'b': jnp.asarray(rng.normal(size=(4, C)))
        }  # fmt: skip
        flat, unravel = jax.flatten_util.ravel_pytree(params)

        @jax.jit
        @jax.vmap
        def column(v):
            product = influence.gauss_newton_product(
                lambda p: network(p, x), params, unravel(v), weights=w
            )
            return jax.flatten_util.ravel_pytree(product)[0]

        g = np.asarray(column(jnp.eye(len(flat))))
        jacobian = jax.jacobian(lambda f: network(unravel(f), x))(flat)
        p = np.asarray(jax.nn.softmax(network(params, x)))
        curved = np.einsum('nc,cd->ncd', p, np.eye(C)) - np.einsum('nc,nd->ncd', p, p)
        by_hand = np.einsum('n,nai,nab,nbj->ij', w, jacobian, curved, jacobian) / 10
        np.testing.assert_allclose(g, by_hand, rtol=1e-8, atol=1e-12)
        assert np.linalg.eigvalsh((g + g.T) / 2).min() > -1e-12


def test_too_few_iterations_are_seen_in_the_residual_and_too_many_do_no_harm():
    rng = np.random.default_rng(0)
    root = rng.normal(size=(8, 8))
    a = jnp.asarray(root @ root.T + 0.5 * np.eye(8), jnp.float32)
    b = {'x': jnp.asarray(rng.normal(size=5), jnp.float32), 'y': jnp.ones(3, jnp.float32)}
    join = lambda v: jnp.concatenate([v['x'], v['y']])  # noqa: E731
    product = lambda v: dict(zip('xy', jnp.split(a @ join(v), [5]), strict=True))  # noqa: E731
    solve = jax.jit(
        lambda b, n: influence.conjugate_gradient(product, b, iterations=n), static_argnums=1
    )
    exact = np.linalg.solve(np.asarray(a, float), np.asarray(join(b), float))
    x, residual = solve(b, 200)
    assert float(residual) < 1e-4
    np.testing.assert_allclose(join(x), exact, rtol=1e-3, atol=1e-4)
    x, residual = solve(b, 2)
    left = np.asarray(join(b), float) - np.asarray(a, float) @ np.asarray(join(x), float)
    wanted = np.linalg.norm(left) / np.linalg.norm(join(b))
    assert wanted > 1e-2
    assert float(residual) == pytest.approx(wanted, rel=1e-3)
    x, residual = solve(jax.tree.map(jnp.zeros_like, b), 2)
    assert float(residual) == float(jnp.abs(join(x)).max()) == 0.0


def test_weights_of_influence():
    values = np.random.default_rng(0).normal(size=50)
    weights = np.asarray(influence.influence_weights(values, kappa=2.0))
    by_hand = 1 / (1 + np.exp(2.0 * values / values.std()))
    np.testing.assert_allclose(weights, by_hand, rtol=1e-5)
    np.testing.assert_array_equal(influence.influence_weights(values, kappa=0.0), 0.5)
    hard = influence.influence_weights(values, kappa=1e6)
    np.testing.assert_allclose(hard, values < 0, atol=1e-6)
    # Losses in another unit.
    np.testing.assert_allclose(
        influence.influence_weights(7.0 * values, kappa=2.0), weights, rtol=1e-5
    )
    slope = jax.grad(lambda v: influence.influence_weights(v).sum())(jnp.asarray(values))
    np.testing.assert_array_equal(slope, 0.0)


def test_a_teacher_is_held_to_what_helped_and_only_its_own_logits_move():
    rng = np.random.default_rng(0)
    logits, y, values = rng.normal(size=(6, C)), rng.integers(C, size=6), rng.normal(size=6)
    scale = -values / values.std()
    log_p = scipy.special.log_softmax(logits, -1)
    found = influence.teacher_feedback(logits, y, values)
    np.testing.assert_allclose(found, -scale * log_p[np.arange(6), y], rtol=1e-5)
    slope = jax.grad(lambda z, v: influence.teacher_feedback(z, y, v).sum(), (0, 1))
    of_logits, of_values = slope(jnp.asarray(logits), jnp.asarray(values))
    wanted = scale[:, None] * (np.exp(log_p) - np.eye(C)[y])
    np.testing.assert_allclose(of_logits, wanted, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(of_values, 0.0)
    part = influence.teacher_feedback(logits[:2], y[:2], values[:2], deviation=values.std())
    np.testing.assert_allclose(part, found[:2], rtol=1e-5)
