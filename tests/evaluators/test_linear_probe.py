"""Linear probes against scikit-learn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from kd.errors import UserError
from kd.evaluators import linear_probe as probes

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def data():
    """Three overlapping classes in five dimensions, of which one is constant."""
    rng = np.random.default_rng(0)
    y = rng.integers(0, 3, 240)
    x = rng.normal(size=(240, 5)) + 0.8 * np.eye(3, 5)[y]
    x[:, 4] = 2.0
    return x, y


@pytest.mark.parametrize('penalty', [0.1, 1.0, 30.0])
def test_the_optimum_is_that_of_scikit_learn(data, penalty):
    x, y = data
    weight, bias = probes.logistic_regression(x[:, :4], y, 3, penalty=penalty)
    oracle = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(x[:, :4], y)
    np.testing.assert_allclose(weight.T, oracle.coef_, atol=2e-5)
    # Of the intercepts the differences alone are determined.
    np.testing.assert_allclose(bias - bias.mean(), oracle.intercept_ - oracle.intercept_.mean(),
                               atol=2e-5)  # fmt: skip


def test_features_are_standardised_by_those_of_training(data):
    x, y = data
    train, test = (x[:160], y[:160]), (x[160:], y[160:])
    mean, deviation = train[0].mean(0), np.where(train[0].std(0) > 0, train[0].std(0), 1)
    oracle = LogisticRegression(tol=1e-10, max_iter=10_000)
    oracle.fit((train[0] - mean) / deviation, train[1])
    wanted = oracle.score((test[0] - mean) / deviation, test[1])
    assert probes.accuracy(train, test, 3) == pytest.approx(wanted)
    # Units of the features are no matter.
    scale, shift = np.array([1e3, 1e-3, 1, 5, 1]), np.arange(5)
    moved = [(of[0] * scale + shift, of[1]) for of in (train, test)]
    assert probes.accuracy(*moved, 3) == pytest.approx(wanted)


def test_a_few_labels_of_each_class(data):
    x, y = data
    rows = [probes.chosen(y, 3, 5, draw) for draw in range(4)]
    for each in rows:
        np.testing.assert_array_equal(np.bincount(y[each]), [5, 5, 5])
    assert len({tuple(sorted(each)) for each in rows}) == 4
    np.testing.assert_array_equal(rows[2], probes.chosen(y, 3, 5, 2))
    test = x[160:], y[160:]
    alone = [probes.accuracy((x[each], y[each]), test, 3) for each in rows]
    assert probes.few_shot((x, y), test, 3, 5, draws=4) == pytest.approx(np.mean(alone))
    with pytest.raises(UserError, match=r'class 0 has \d+ examples, and 200 are wanted'):
        probes.few_shot((x, y), test, 3, 200)


def test_tokens_are_averaged_without_that_of_the_class():
    tokens = jax.random.normal(jax.random.key(0), (2, 5, 3))
    np.testing.assert_allclose(probes.pool(tokens), np.asarray(tokens)[:, 1:].mean(1), rtol=1e-6)
    maps = jax.random.normal(jax.random.key(1), (2, 4, 5, 3), jnp.bfloat16)
    np.testing.assert_allclose(
        probes.pool(maps), np.asarray(maps, np.float32).mean((1, 2)), atol=1e-6
    )
    assert probes.pool(tokens[:, 0]).shape == (2, 3)
