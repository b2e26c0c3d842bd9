"""Private gradients: clipped record by record, one noise, whatever the parts and the devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import (
    LR,
    START,
    initial,
    initial_with_stats,
    moving_average,
    noisy,
    run,
    squared_error,
    w_of,
)

from kd.errors import UserError
from kd.method import Objective, Privacy, minimize, private
from kd.method.private import with_noise
from kd.metrics import mean
from kd.parallel import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROWS, EXPECTED = 12, 5


@pytest.fixture(scope='module')
def batch():
    """Nine records in twelve rows; the padding is one of them again, and loud."""
    rng = np.random.default_rng(1)
    data = {
        'x': rng.normal(size=(ROWS, 3)).astype(np.float32),
        'y': rng.normal(size=ROWS).astype(np.float32),
        'mask': np.arange(ROWS) < 9,
    }
    data['y'][9:] = 50
    return data


def method(clip_norm, noise=0.0, loss=squared_error, tx=None, **options):
    along = private(Privacy(clip_norm, noise, EXPECTED))
    return minimize(loss, tx or optax.sgd(LR), initial, along=along, **options)


def direction(made, batch, **options):
    """What a step has descended along, [3], and its metrics."""
    state, (metrics,) = run(made, [batch], **options)
    return (START - np.asarray(w_of(state))) / LR, metrics


def by_hand(batch, clip_norm):
    """Clipped gradients of the records [9, 3], in float64, and their norms before."""
    x, y = (batch[name][batch['mask']].astype(np.float64) for name in 'xy')
    grads = 2 * (x @ START.astype(np.float64) - y)[:, None] * x
    norms = np.linalg.norm(grads, axis=1)
    return grads * np.minimum(1, clip_norm / norms)[:, None], norms


def test_without_bound_and_noise_it_is_the_sum_over_the_expected_number(batch):
    found, metrics = direction(method(1e9), batch)
    grads, norms = by_hand(batch, np.inf)
    np.testing.assert_allclose(found, grads.sum(0) / EXPECTED, rtol=1e-5)
    # Nine records, and 5 in the denominator; of as many as expected, the plain gradient.
    plain = minimize(squared_error, optax.sgd(LR), initial)
    np.testing.assert_allclose(found, direction(plain, batch)[0] * 9 / EXPECTED, rtol=1e-5)
    assert float(metrics['records'].total) == 9
    assert float(metrics['clipped'].total) == 0
    total, count = metrics['record_norm']
    assert float(total / count) == pytest.approx(norms.mean(), rel=1e-5)
    assert metrics['loss'].count == 9


def test_every_record_is_clipped_by_itself_and_a_small_one_is_left_alone(batch):
    grads, norms = by_hand(batch, 1.5)
    assert 0 < (norms > 1.5).sum() < 9
    made, untouched = method(1.5), by_hand(batch, np.inf)[0]
    found, metrics = direction(made, batch)
    np.testing.assert_allclose(found, grads.sum(0) / EXPECTED, rtol=1e-5)
    assert float(metrics['clipped'].total) == (norms > 1.5).sum()
    for row in range(9):
        alone, _ = direction(made, {**batch, 'mask': np.arange(ROWS) == row})
        assert np.linalg.norm(alone * EXPECTED) <= 1.5 * (1 + 1e-5)
        if norms[row] < 1.5:
            np.testing.assert_allclose(alone * EXPECTED, untouched[row], atol=1e-5)


def test_replacing_a_record_moves_the_sum_by_two_c_at_most_and_removing_one_by_c(batch):
    made = method(0.7)
    before = direction(made, batch)[0] * EXPECTED
    rng = np.random.default_rng(2)
    moves = []
    for row in range(9):
        other = {name: value.copy() for name, value in batch.items()}
        other['x'][row], other['y'][row] = 100 * rng.normal(size=3), 100 * rng.normal()
        moves.append(np.linalg.norm(direction(made, other)[0] * EXPECTED - before))
        other = {**batch, 'mask': batch['mask'] & (np.arange(ROWS) != row)}
        gone = direction(made, other)[0] * EXPECTED
        assert np.linalg.norm(gone - before) <= 0.7 * (1 + 1e-4)
    assert max(moves) <= 1.4 * (1 + 1e-4)
    # Neither bound is idle: they say that less would be too little.
    assert max(moves) > 0.8


def test_padding_adds_nothing_whatever_it_holds(batch):
    other = {name: value.copy() for name, value in batch.items()}
    other['x'][9:], other['y'][9:] = -7, 1e6
    loud, quiet = method(1.0, 2.0), method(1.0)
    np.testing.assert_array_equal(*(direction(loud, b)[0] for b in (batch, other)))
    nobody = {**batch, 'mask': np.zeros(ROWS, bool)}
    found, metrics = direction(quiet, nobody)
    np.testing.assert_array_equal(found, 0)
    assert (metrics['loss'].count, float(metrics['records'].total)) == (0, 0)


def test_micro_batches_and_devices_change_nothing_and_draw_no_noise_of_their_own(batch):
    whole, metrics = direction(method(1.0, 3.0, noisy), batch)
    assert np.abs(whole - direction(method(1.0, 0.0, noisy), batch)[0]).max() > 0.1
    for parts in (2, 3):
        found, of_parts = direction(method(1.0, 3.0, noisy, micro_batches=parts), batch)
        np.testing.assert_allclose(found, whole, rtol=1e-4)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), of_parts, metrics)
    sharding = mesh_lib.batch_sharding(mesh_lib.make_mesh({'data': 4}))
    spread = mesh_lib.put_batch(batch, sharding)
    for parts in (1, 3):
        found, of_mesh = direction(method(1.0, 3.0, noisy, micro_batches=parts), spread)
        np.testing.assert_allclose(found, whole, rtol=1e-4)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4), of_mesh, metrics)


def test_noise_is_sigma_c_at_every_number_and_new_at_every_step(batch):
    tree = {'a': jnp.ones((2000, 3)), 'b': jnp.zeros(2000)}
    found = with_noise(tree, jax.random.key(3), 0.6)
    drawn = np.concatenate([found['a'].T - 1, found['b'][None]])
    np.testing.assert_allclose(drawn.std(1), 0.6, rtol=0.05)
    assert np.abs(np.corrcoef(drawn) - np.eye(4)).max() < 0.1
    # In a run: sigma C / B around the clean direction, independent from step to step.
    made = method(0.5, 4.0, tx=optax.sgd(0.0))
    noise = jax.jit(
        lambda state: (
            jax.lax.scan(lambda s, _: made.step(s, batch), state, length=2000)[1]['grad_norm'].total
        )
    )(made.init(jax.random.key(0)))
    clean = by_hand(batch, 0.5)[0].sum(0) / EXPECTED
    expected = (clean**2).sum() + 3 * (4 * 0.5 / EXPECTED) ** 2
    assert float((noise**2).mean()) == pytest.approx(expected, rel=0.06)
    assert len(np.unique(noise)) > 1990


def test_bounds_may_be_of_the_state_and_part_of_the_network_may_stay_as_it_is(batch):
    def of_state(state):
        return Privacy(state.frozen['c'], 0.0, EXPECTED)

    made = minimize(squared_error, optax.sgd(LR), initial, along=private(of_state))
    found, _ = direction(made, batch, frozen={'c': jnp.float32(1.5)})
    np.testing.assert_allclose(found, direction(method(1.5), batch)[0], rtol=1e-6)

    def two(params, state, batch, key):
        residual = batch['x'] @ params['w'] + params['b'] - batch['y']
        return Objective(mean(residual**2))

    def init(key):
        return {'params': {'w': jnp.asarray(START), 'b': jnp.float32(0)}}

    along = private(Privacy(1.5, 1.0, EXPECTED))
    made = minimize(two, optax.sgd(LR), init, along=along, trainable='w')
    state, _ = run(made, [batch])
    assert float(state.params['network']['b']) == 0
    # The norm that is clipped is that of what moves.
    quiet = minimize(
        two, optax.sgd(LR), init, along=private(Privacy(1.5, 0.0, EXPECTED)), trainable='w'
    )
    np.testing.assert_allclose(
        direction(quiet, batch)[0], by_hand(batch, 1.5)[0].sum(0) / EXPECTED, rtol=1e-5
    )


def test_what_records_would_share_is_refused(batch):
    along = private(Privacy(1.0, 1.0, EXPECTED))
    made = minimize(moving_average, optax.sgd(LR), initial_with_stats, along=along)
    with pytest.raises(UserError, match=r"without \['stats'\], which all records of a batch would"):
        run(made, [batch])
    bare = {name: batch[name] for name in 'xy'}
    with pytest.raises(UserError, match=r"whose 'mask' says which rows .* set the stage's poisson"):
        run(method(1.0), [bare])
