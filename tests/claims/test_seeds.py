"""Many runs at once are the same as one after another."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.data import pipeline
from kd.errors import UserError
from kd.method import Objective, Player, Privacy, alternate, minimize, private
from kd.methods.vision.logit_kd import logit_kd
from kd.methods.vision.supervised import supervised
from kd.metrics import mean
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


def test_data_and_teachers_of_a_run_are_its_own(setup):
    data, _ = setup
    rng = np.random.default_rng(1)
    network = from_linen(MLP(widths=(8,), num_classes=3), jax.ShapeDtypeStruct((1, 2), jnp.float32))
    context = seeds.context(
        network=network, teacher=network, tx=optax.sgd(0.1), num_classes=3,
        references={'anchor': network},
    )  # fmt: skip
    assert context.references['anchor'].apply is network.apply
    method = logit_kd(context, soft_weight=0.5)
    labels = rng.integers(0, 3, (2, 60)).astype(np.int32)
    teachers = jax.vmap(network.init)(jax.random.split(jax.random.key(9), 2))
    inputs = {'input': data['input']}
    together = seeds.train(
        method, inputs, np.array([3, 5]), steps=3, batch_size=16,
        per_run={'label': labels}, frozen_per_run={'teacher': teachers},
    )  # fmt: skip
    assert together.frozen == {}
    np.testing.assert_array_equal(together.step, [3, 3])
    for row, seed in enumerate((3, 5)):
        own = {**inputs, 'label': labels[row]}
        frozen = {'teacher': jax.tree.map(lambda x, row=row: x[row], teachers)}
        alone = seeds.train_one(method, own, seed, steps=3, batch_size=16, frozen=frozen)
        jax.tree.map(
            lambda a, b, row=row: np.testing.assert_allclose(a[row], b, rtol=1e-5, atol=1e-6),
            together.params,
            alone.params,
        )


def test_a_player_that_rests_costs_the_vmapped_runs_nothing():
    calls = []

    def rarely(params, state, batch, key):
        jax.debug.callback(lambda: calls.append('rare'))
        return Objective(mean(params['w'] * batch['input'][:, 0]))

    def always(params, state, batch, key):
        return Objective(mean(params['w'] * batch['input'][:, 1]))

    start = {'params': {'w': jnp.ones(())}}
    method = alternate(
        {
            'rare': Player(rarely, optax.sgd(0.1), period=4),
            'often': Player(always, optax.sgd(0.1)),
        },
        lambda key: {'rare': start, 'often': start},
    )
    data = {'input': np.ones((10, 2), np.float32)}
    state = seeds.train(method, data, np.arange(3), steps=8, batch_size=2)
    jax.effects_barrier()
    # Once for all runs at two of the steps; were both branches computed, at all eight.
    assert len(calls) == 2
    np.testing.assert_allclose(state.params['rare']['w'], np.full(3, 0.8), rtol=1e-6)
    np.testing.assert_allclose(state.params['often']['w'], np.full(3, 0.2), rtol=1e-5)


def test_a_context_makes_optimisers_for_its_steps():
    context = seeds.context(steps=4, optimizer=dict(name='sgd', lr=1.0, schedule='linear'))

    def rates(tx, count):
        state, found = tx.init(jnp.zeros(())), []
        for _ in range(count):
            update, state = tx.update(jnp.ones(()), state)
            found.append(-float(update))
        return found

    np.testing.assert_allclose(rates(context.tx, 4), [1, 0.75, 0.5, 0.25], rtol=1e-6)
    np.testing.assert_allclose(rates(context.tx_of(2), 8), np.repeat([1, 0.75, 0.5, 0.25], 2))
    further = context.optimizer(name='sgd', lr=2.0, schedule='linear')
    np.testing.assert_allclose(rates(further, 4), [2, 1.5, 1, 0.5], rtol=1e-6)
    with pytest.raises(ValueError, match='give the context `steps`'):
        seeds.context().optimizer(lr=1.0)
    # One that is made by hand has no schedule that goes by steps.
    by_hand = optax.sgd(0.1)
    assert seeds.context(tx=by_hand).tx_of(2) is by_hand
    with pytest.raises(UserError, match=r'needs stage\.optimizer'):
        seeds.context().tx_of(2)


def test_every_example_is_seen_once_an_epoch():
    rows = seeds._rows(0, 30, 7, first=0, count=30).ravel()
    for epoch in range(7):
        assert sorted(rows[30 * epoch : 30 * (epoch + 1)]) == list(range(30))
    np.testing.assert_array_equal(
        seeds._rows(0, 30, 7, first=9, count=4), rows.reshape(30, 7)[9:13]
    )


def test_batches_by_coins_are_those_of_the_pipeline():
    """A gradient that adds up what is taken, against the same coins by hand."""
    x = np.random.default_rng(0).normal(size=20).astype(np.float32)
    method = minimize(
        lambda params, state, batch, key: Objective(mean(params['w'] * batch['x'])),
        optax.sgd(1.0),
        lambda key: {'params': {'w': jnp.zeros(())}},
        along=private(Privacy(1e6, 0.0, 5)),
    )
    options = dict(steps=6, batch_size=14, poisson=5)
    state = seeds.train(method, {'x': x}, np.array([3, 4]), **options)
    for found, seed in zip(state.params['network']['w'], (3, 4), strict=True):
        coins = pipeline.CoinIndices(20, 14, 5, seed=seed, host_index=0, host_count=1)
        taken = np.concatenate([rows[mask] for rows, mask in (coins[i] for i in range(6))])
        np.testing.assert_allclose(found, -x[taken].sum() / 5, rtol=1e-5)


def test_who_looks_sees_all_runs_on_their_way(setup):
    data, method = setup
    options = dict(steps=5, batch_size=16)
    seen = []
    runs = seeds.train(
        method, data, np.array([3, 5]), watched=2, **options,
        watch=lambda state: seen.append((int(state.step), state)),
    )  # fmt: skip
    assert [at for at, _ in seen] == [2, 4, 5]
    first = seeds.train(method, data, np.array([3, 5]), steps=2, batch_size=16)
    jax.tree.map(np.testing.assert_array_equal, seen[0][1].params, first.params)
    jax.tree.map(np.testing.assert_array_equal, seen[2][1].params, runs.params)
