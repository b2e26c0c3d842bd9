"""Many runs at once are the same as one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.methods.vision.supervised import supervised
from kd.models.mlp import MLP
from kd.network import from_linen


@pytest.fixture(scope='module')
def setup():
    rng = np.random.default_rng(0)
    data = {
        'input': rng.normal(size=(60, 2)).astype(np.float32),
        'label': rng.integers(0, 3, 60).astype(np.int32),
    }
    network = from_linen(MLP(widths=(8,), num_classes=3), jax.ShapeDtypeStruct((1, 2), jnp.float32))
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    return data, supervised(seeds.context(network=network, tx=tx, num_classes=3))


def test_runs_side_by_side_equal_runs_one_by_one(setup):
    data, method = setup
    together = seeds.train(method, data, np.array([3, 5]), steps=13, batch_size=16)
    for row, seed in enumerate((3, 5)):
        alone = seeds.train_one(method, data, seed, steps=13, batch_size=16)
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_allclose(a[row], b, rtol=1e-5, atol=1e-6),
            together.params,
            alone.params,
        )


def test_hyperparameters_differ_by_run(setup):
    data, method = setup
    rates = {'learning_rate': np.array([0.0, 0.1])}
    start = jax.vmap(lambda s: method.init(jax.random.key(s)).params)(jnp.array([7, 7]))
    state = seeds.train(
        method, data, np.array([7, 7]), steps=3, batch_size=16, hyperparameters=rates
    )
    moved = jax.tree.map(
        lambda a, b: jnp.abs(a - b).max(axis=tuple(range(1, a.ndim))), state.params, start
    )
    for leaf in jax.tree.leaves(moved):
        assert leaf[0] == 0.0
        assert leaf[1] > 0.0
    with pytest.raises(ValueError, match='no hyperparameter'):
        seeds.train(
            method, data, np.array([1]), steps=1, batch_size=16, hyperparameters={'x': [1.0]}
        )


def test_every_example_is_seen_once_an_epoch():
    rows = seeds._rows(0, 30, 7, first=0, count=30).ravel()
    for epoch in range(7):
        assert sorted(rows[30 * epoch : 30 * (epoch + 1)]) == list(range(30))
    np.testing.assert_array_equal(
        seeds._rows(0, 30, 7, first=9, count=4), rows.reshape(30, 7)[9:13]
    )
