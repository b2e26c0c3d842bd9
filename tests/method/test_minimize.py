"""Steps of `minimize` against NumPy, closed forms and bit-identity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import (
    LR,
    START,
    assert_bit_identical,
    batches,
    compiled,
    initial,
    initial_with_stats,
    moving_average,
    noisy,
    residual_gradient,
    run,
    squared_error,
    w_of,
)

from kd import metrics as metrics_lib
from kd.errors import UserError
from kd.method import Objective, gradient, minimize, with_ema
from kd.metrics import mean
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def data():
    return batches()


def test_gradient_descent_on_a_quadratic_follows_its_closed_form():
    # 1/2 |w - c|^2 contracts towards c by 1 - lr at every step.
    target = np.array([0.5, 1.0, -1.0], np.float32)

    def loss(params, state, batch, key):
        return Objective(mean(0.5 * ((params['w'] - batch['c']) ** 2).sum(-1)))

    state, history = run(
        minimize(loss, optax.sgd(LR), initial), [{'c': np.tile(target, (4, 1))}] * 20
    )
    expected = target + (1 - LR) ** 20 * (START - target)
    np.testing.assert_allclose(w_of(state), expected, rtol=1e-5)
    assert int(state.step) == 20
    losses = [0.5 * (1 - LR) ** (2 * n) * ((START - target) ** 2).sum() for n in range(20)]
    np.testing.assert_allclose(
        [m['loss'].total / m['loss'].count for m in history], losses, rtol=1e-5
    )
    norms = [(1 - LR) ** n * np.linalg.norm(START - target) for n in range(20)]
    np.testing.assert_allclose([m['grad_norm'].total for m in history], norms, rtol=1e-5)


def test_linear_regression_with_momentum_is_numpys(data):
    state, history = run(minimize(squared_error, optax.sgd(LR, momentum=0.9), initial), data)
    w, velocity = START.astype(np.float64), np.zeros(3)
    for batch, metrics in zip(data, history, strict=True):
        value, slope = residual_gradient(w, batch, batch['mask'])
        bias = (batch['x'].astype(np.float64) @ w - batch['y']).sum()
        velocity = slope + 0.9 * velocity
        w = w - LR * velocity
        np.testing.assert_allclose(metrics['loss'].total / metrics['loss'].count, value, rtol=1e-5)
        assert metrics['loss'].count == batch['mask'].sum()
        np.testing.assert_allclose(metrics['bias'].total, bias, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(metrics['grad_norm'].total, np.linalg.norm(slope), rtol=1e-5)
    np.testing.assert_allclose(w_of(state), w, rtol=1e-5)


def test_linear_regression_converges_to_the_normal_equations():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    method = minimize(squared_error, optax.sgd(LR), initial)
    batch = {'x': x, 'y': y}
    train = jax.jit(lambda s: jax.lax.scan(lambda s, _: method.step(s, batch), s, length=1000)[0])
    state = train(method.init(jax.random.key(0)))
    expected = np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64))[0]
    np.testing.assert_allclose(w_of(state), expected, rtol=1e-4)


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_micro_batches_of_unequal_counts_give_the_gradient_of_the_whole(micro_batches):
    rng = np.random.default_rng(2)
    # Parts are strided: part i holds the examples i, i + 4, ...; they count 3, 2, 1 and 0.
    mask = np.array([1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0], bool)
    batch = {'x': rng.normal(size=(12, 3)), 'y': rng.normal(size=12), 'mask': mask}
    with jax.enable_x64(True):
        params = {'w': jnp.asarray(START, jnp.float64)}
        state = State.create(jax.random.key(0), {'params': params})
        grads, objective = jax.jit(
            functools.partial(gradient, squared_error, micro_batches=micro_batches)
        )(params, state, {k: jnp.asarray(v) for k, v in batch.items()}, state.step_key())
    value, slope = residual_gradient(START.astype(np.float64), batch, mask)
    assert grads['w'].dtype == np.float64
    np.testing.assert_allclose(grads['w'], slope, rtol=1e-12)
    assert objective.loss.count == 6
    np.testing.assert_allclose(objective.loss.total / 6, value, rtol=1e-6)
    assert objective.metrics['bias'].count == 12
    everything = (batch['x'] @ START - batch['y']).sum()
    np.testing.assert_allclose(objective.metrics['bias'].total, everything, rtol=1e-5)


def test_micro_batches_train_like_one_batch(data):
    whole, _ = run(minimize(squared_error, optax.adam(LR), initial), data)
    for parts in (2, 4):
        method = minimize(squared_error, optax.adam(LR), initial, micro_batches=parts)
        cut, _ = run(method, data)
        np.testing.assert_allclose(w_of(cut), w_of(whole), rtol=1e-5)


def test_micro_batches_are_traced_once(data):
    traced = []

    def counted(*arguments):
        traced.append(1)
        return squared_error(*arguments)

    method = minimize(counted, optax.adam(LR), initial, micro_batches=4)
    jax.eval_shape(method.step, method.init(jax.random.key(0)), data[0])
    assert len(traced) == 1


def test_a_batch_with_nothing_to_count_does_not_move_the_parameters(data):
    batch = {**data[0], 'mask': np.zeros(8, bool)}
    for parts in (1, 4):
        method = minimize(squared_error, optax.sgd(LR), initial, micro_batches=parts)
        state, history = run(method, [batch])
        np.testing.assert_array_equal(w_of(state), START)
        assert history[0]['loss'].count == 0


def test_a_batch_that_does_not_divide_says_so(data):
    method = minimize(squared_error, optax.sgd(LR), initial, micro_batches=3)
    with pytest.raises(ValueError, match='batch of 8 does not divide into 3 micro-batches'):
        method.step(method.init(jax.random.key(0)), data[0])


def test_micro_batches_do_not_share_randomness():
    def loss(params, state, batch, key):
        draw = jax.random.uniform(key)
        moments = {'first': metrics_lib.scalar(draw), 'second': metrics_lib.scalar(draw**2)}
        return Objective(mean(params['w'] * batch['x']), moments)

    method = minimize(loss, optax.sgd(LR), initial, micro_batches=4)
    _, [metrics] = run(method, [{'x': np.ones((8, 1), np.float32)}])
    first, second = metrics_lib.divide({k: metrics[k] for k in ('first', 'second')}).values()
    assert second - first**2 > 0.01  # Zero if the four parts had drawn one number.


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_mutables_are_carried_from_part_to_part_and_step_to_step(data, micro_batches):
    method = minimize(
        moving_average, optax.sgd(LR), initial_with_stats, micro_batches=micro_batches
    )
    state, _ = run(method, data)
    w, average = START.astype(np.float64), np.zeros(3)
    for batch in data:
        slope = np.zeros(3)
        for part in range(micro_batches):
            x = batch['x'][part::micro_batches].astype(np.float64)
            average = 0.9 * average + 0.1 * x.mean(0)
            centred = x - average
            slope += 2 * centred.T @ (centred @ w - batch['y'][part::micro_batches]) / 8
        w = w - LR * slope
    np.testing.assert_allclose(state.mutables['network']['stats']['mean'], average, rtol=1e-5)
    np.testing.assert_allclose(w_of(state), w, rtol=1e-5)
    assert set(state.variables()) == {'params', 'stats'}


def test_a_loss_without_mutables_keeps_those_there_are(data):
    state, _ = run(minimize(squared_error, optax.sgd(LR), initial_with_stats), data[:2])
    np.testing.assert_array_equal(state.mutables['network']['stats']['mean'], np.zeros(3))


def test_frozen_trees_reach_the_loss_and_stay_as_they_are(data):
    teacher = {'params': {'w': jnp.array([3.0, 2.0, 1.0])}}

    def loss(params, state, batch, key):
        target = batch['x'] @ state.frozen['teacher']['params']['w']
        return Objective(mean((batch['x'] @ params['w'] - target) ** 2))

    method = minimize(loss, optax.sgd(LR), initial)
    state, history = run(method, data, frozen={'teacher': teacher})
    w = START.astype(np.float64)
    for batch, metrics in zip(data, history, strict=True):
        target = batch['x'].astype(np.float64) @ [3, 2, 1]
        value, slope = residual_gradient(w, {**batch, 'y': target})
        np.testing.assert_allclose(metrics['loss'].total / 8, value, rtol=1e-4)
        w -= LR * slope
    np.testing.assert_allclose(w_of(state), w, rtol=1e-5)
    np.testing.assert_array_equal(state.frozen['teacher']['params']['w'], [3, 2, 1])


def with_projector(key):
    """A regression through two hidden numbers and a projector."""
    keys = jax.random.split(key)
    network = {'params': {'w': jax.random.normal(keys[0], (3, 2))}, 'stats': {'n': jnp.zeros(())}}
    projector = {'params': {'p': jax.random.normal(keys[1], (2,)), 'b': -jnp.zeros(())}}
    return {'network': network, 'projector': projector}


def projected(params, state, batch, key):
    hidden = batch['x'] @ params['network']['w']
    out = hidden @ params['projector']['p'] + params['projector']['b']
    seen = state.variables(params=params['network'])['stats']['n'] + 1
    return Objective(mean((out - batch['y']) ** 2), {}, {'network': {'stats': {'n': seen}}})


def slopes_of(params, batch):
    """Gradients of `projected` to w, p and b, in float64."""
    w = np.asarray(params['network']['w'], np.float64)
    p = np.asarray(params['projector']['p'], np.float64)
    x, y = batch['x'].astype(np.float64), batch['y'].astype(np.float64)
    slope = 2 * (x @ w @ p - y) / len(y)
    return np.outer(x.T @ slope, p), (x @ w).T @ slope, slope.sum()


def test_parts_beside_the_network_are_trained_with_it(data):
    method = minimize(projected, optax.sgd(LR), with_projector)
    first = method.init(jax.random.key(0)).params
    state, _ = run(method, data[:1])
    w, p, b = slopes_of(first, data[0])
    np.testing.assert_allclose(w_of(state), first['network']['w'] - LR * w, rtol=1e-5)
    found = state.variables(part='projector')
    np.testing.assert_allclose(
        found['params']['p'], first['projector']['p'] - LR * p, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(found['params']['b'], -LR * b, rtol=1e-5)
    # The result is the network, and knows nothing of the projector.
    own = with_projector(jax.random.key(0))['network']
    assert jax.tree.structure(state.variables()) == jax.tree.structure(own)
    assert set(found) == {'params'}


def test_a_part_without_mutables_may_return_none(data):
    def loss(params, state, batch, key):
        return projected(params, state, batch, key)._replace(mutables={'projector': {}})

    method = minimize(loss, optax.sgd(LR), with_projector)
    state, _ = run(method, data[:1])
    first = method.init(jax.random.key(0))
    assert jax.tree.structure(state) == jax.tree.structure(first)


def test_mutables_of_parts_are_carried_over_micro_batches(data):
    method = minimize(projected, optax.sgd(LR), with_projector, micro_batches=4)
    state, _ = run(method, data[:2])
    assert float(state.variables()['stats']['n']) == 8


@pytest.mark.parametrize('trainable', ['^network/', lambda path: path == 'network/w'])
def test_leaves_that_are_not_trained_keep_every_bit_and_no_moments(data, trainable):
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(LR, weight_decay=0.1))
    method = minimize(projected, tx, with_projector, trainable=trainable)
    first = jax.device_get(method.init(jax.random.key(0)).params)
    state, history = run(method, data + data[:3])
    assert_bit_identical(state.params['projector'], first['projector'])
    assert not np.array_equal(w_of(state), first['network']['w'])
    # A count and two moments of the one leaf.
    assert sorted(x.shape for x in jax.tree.leaves(state.opt_state)) == [(), (3, 2), (3, 2)]
    # Nor have they a gradient: the norm is that of the others.
    norm = np.linalg.norm(slopes_of(first, data[0])[0])
    np.testing.assert_allclose(history[0]['grad_norm'].total, norm, rtol=1e-5)


def test_the_rest_is_trained_as_if_the_fixed_leaves_were_constants(data):
    fixed = minimize(projected, optax.adam(LR), with_projector, micro_batches=2, trainable='work/')
    constant = fixed.init(jax.random.key(0)).params['projector']

    def alone(params, state, batch, key):
        return Objective(mean((batch['x'] @ params['w'] @ constant['p'] - batch['y']) ** 2))

    start = lambda key: {'params': with_projector(key)['network']['params']}  # noqa: E731
    wanted, _ = run(minimize(alone, optax.adam(LR), start, micro_batches=2), data)
    np.testing.assert_allclose(w_of(run(fixed, data)[0]), w_of(wanted), rtol=1e-5)


@pytest.mark.parametrize(
    ('trainable', 'message'),
    [('(', 'no regular expression'), ('no', "'no' matches no parameter; there are: .'w'")],
)
def test_a_choice_of_leaves_that_cannot_be_is_refused(trainable, message):
    method = minimize(squared_error, optax.sgd(LR), initial, trainable=trainable)
    with pytest.raises(UserError, match=message):
        method.init(jax.random.key(0))


@pytest.mark.parametrize(
    ('variables', 'stray'),
    [
        ({'params': {}, 'projector': {'params': {}}}, 'projector'),
        ({'network': {'w': jnp.zeros(3)}}, 'network'),
        ({'w': jnp.zeros(3)}, 'w'),
    ],
)
def test_variables_that_are_neither_of_a_network_nor_of_parts_are_refused(variables, stray):
    method = minimize(squared_error, optax.sgd(LR), lambda key: variables)
    with pytest.raises(UserError, match=f"'{stray}' is out of place: there are those of one"):
        method.init(jax.random.key(0))


def test_the_state_is_donated(data):
    method = minimize(squared_error, optax.adam(LR), initial)
    before = method.init(jax.random.key(0))
    compiled(method)(before, data[0])
    assert w_of(before).is_deleted()
    assert all(x.is_deleted() for x in jax.tree.leaves(before.opt_state))


def test_an_interrupted_run_is_the_uninterrupted_one_bit_for_bit(data):
    method = with_ema(minimize(noisy, optax.adam(LR), initial), {'slow': 0.9})
    whole, history = run(method, data)
    step = compiled(method)
    resumed = method.init(jax.random.key(0))
    again = []
    for batch in data:
        # Through host memory and back, as through a checkpoint.
        host = jax.device_get(resumed.replace(key=jax.random.key_data(resumed.key)))
        resumed = jax.tree.map(jnp.array, host)
        resumed = resumed.replace(key=jax.random.wrap_key_data(resumed.key))
        resumed, metrics = step(resumed, batch)
        again.append(jax.device_get(metrics))
    assert_bit_identical(resumed, whole)
    assert_bit_identical(again, history)


def test_a_steps_randomness_depends_on_the_key_and_the_step_alone(data):
    method = minimize(noisy, optax.sgd(LR), initial)
    step = compiled(method)

    def noise_at(number, key, batch):
        state = method.init(jax.random.key(key)).replace(step=jnp.int32(number))
        return float(step(state, batch)[1]['noise'].total)

    _, history = run(method, data)
    noises = [float(m['noise'].total) for m in history]
    assert len(set(noises)) == len(noises)
    # Reached at once and with other data before it, step 4 draws the same; another key does not.
    assert noise_at(4, 0, data[0]) == noises[4]
    assert noise_at(4, 1, data[0]) != noises[4]
