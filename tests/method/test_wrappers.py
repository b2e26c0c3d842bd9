"""Averages, collection and projection against NumPy and closed forms."""

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
    initial,
    noisy,
    residual_gradient,
    run,
    squared_error,
    w_of,
)

from kd.errors import UserError
from kd.method import (
    Objective,
    minimize,
    with_collect,
    with_ema,
    with_extra,
    with_memory,
    with_nonfinite_guard,
    with_projection,
    with_result,
)
from kd.metrics import mean

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def data():
    return batches()


def test_what_is_collected_is_a_constant_to_the_gradient():
    def collect(state, batch, key):
        return {**batch, 'target': 2 * w_of(state) * batch['x']}

    def loss(params, state, batch, key):
        return Objective(mean(((params['w'] * batch['x'] - batch['target']) ** 2).sum(-1)))

    method = with_collect(minimize(loss, optax.sgd(LR), initial), collect)
    state, _ = run(method, [{'x': np.ones((4, 3), np.float32)}])
    # d/dw (w - c)^2 = 2 (w - c) = -2 w at c = 2 w; through the target it would be +2 w.
    np.testing.assert_allclose(w_of(state), START + LR * 2 * START, rtol=1e-6)


def test_collection_draws_anew_at_every_step_and_apart_from_the_loss(data):
    def collect(state, batch, key):
        return {**batch, 'drawn': jax.random.normal(key, batch['y'].shape)}

    def loss(params, state, batch, key):
        objective = noisy(params, state, batch, key)
        return objective._replace(metrics={**objective.metrics, 'drawn': mean(batch['drawn'])})

    method = with_collect(minimize(loss, optax.sgd(LR), initial), collect)
    (_, history), (_, again) = run(method, data), run(method, data)
    drawn = [float(m['drawn'].total) for m in history]
    noise = [float(m['noise'].total) for m in history]
    assert len({*drawn, *noise}) == 2 * len(data)
    assert_bit_identical(history, again)


def with_running_loss():
    """Half of the last value, the loss and the step's number, read by the next step."""

    def loss(params, state, batch, key):
        objective = squared_error(params, state, batch, key)
        read = mean(state.extra['running']['value'][None])
        return objective._replace(metrics={**objective.metrics, 'read': read})

    def update(extra, metrics, steps):
        total, count = metrics['loss']
        return {'value': extra['value'] / 2 + total / count + steps}

    method = minimize(loss, optax.sgd(LR), initial)
    return with_extra(method, 'running', {'value': 3.0}, update)


def test_a_value_of_a_methods_own_goes_by_the_metrics_of_each_step(data):
    state, history = run(with_running_loss(), data)
    value = 3.0
    for step, metrics in enumerate(history, 1):
        np.testing.assert_allclose(metrics['read'].total, value, rtol=1e-5)
        value = value / 2 + float(metrics['loss'].total / metrics['loss'].count) + step
    np.testing.assert_allclose(state.extra['running']['value'], value, rtol=1e-5)


def test_a_step_that_is_left_out_leaves_that_value(data):
    method = with_nonfinite_guard(with_running_loss(), 'skip')
    bad = {**data[1], 'y': np.full_like(data[1]['y'], np.nan)}
    before, _ = run(method, data[:1])
    after, _ = run(method, [data[0], bad])
    assert_bit_identical(after.extra['running'], before.extra['running'])


def test_what_is_remembered_is_read_by_the_next_step_and_lost_with_a_step_left_out(data):
    def collect(state, batch, key):
        seen = state.extra['seen']
        drawn = jax.random.normal(key, ())
        batch = {**batch, 'sum': jnp.full(batch['y'].shape, seen['sum'])}
        return batch, {'sum': seen['sum'] + batch['y'].sum(), 'drawn': drawn}

    def loss(params, state, batch, key):
        objective = squared_error(params, state, batch, key)
        return objective._replace(metrics={**objective.metrics, 'read': mean(batch['sum'])})

    first = {'sum': 1.0, 'drawn': 0.0}
    method = with_memory(minimize(loss, optax.sgd(LR), initial), 'seen', first, collect)
    state, history = run(method, data)
    sums = 1 + np.cumsum([0, *(batch['y'].sum() for batch in data)])
    read = [float(m['read'].total / m['read'].count) for m in history]
    np.testing.assert_allclose(read, sums[:-1], rtol=1e-5)
    np.testing.assert_allclose(state.extra['seen']['sum'], sums[-1], rtol=1e-5)
    # The key is that of a batch that is collected without a memory.
    plain = with_collect(
        minimize(loss, optax.sgd(LR), initial),
        lambda state, batch, key: {**batch, 'sum': jnp.full(8, jax.random.normal(key, ()))},
    )
    _, others = run(plain, data)
    last = others[-1]['read']
    np.testing.assert_allclose(last.total / last.count, state.extra['seen']['drawn'], rtol=1e-6)
    guarded = with_nonfinite_guard(method, 'skip')
    before, _ = run(guarded, data[:1])
    after, _ = run(guarded, [data[0], {**data[1], 'x': np.full_like(data[1]['x'], np.nan)}])
    assert_bit_identical(after.extra['seen'], before.extra['seen'])


def test_projected_gradient_descent_is_numpys(data):
    method = minimize(squared_error, optax.sgd(LR), initial)
    method = with_projection(method, lambda p: {'w': p['w'] / jnp.linalg.norm(p['w'])})
    state, _ = run(with_ema(method, {'half': 0.5}), data)
    w = START.astype(np.float64)
    average = w
    for batch in data:
        w = w - LR * residual_gradient(w, batch, batch['mask'])[1]
        w /= np.linalg.norm(w)
        average = 0.5 * average + 0.5 * w
    np.testing.assert_allclose(w_of(state), w, rtol=1e-5)
    np.testing.assert_allclose(w_of(state, 'half'), average, rtol=1e-5)


def test_several_parts_are_projected_by_name():
    start = {name: {'params': {'w': jnp.asarray(START)}} for name in ('network', 'head')}

    def loss(params, state, batch, key):
        return Objective(mean((params['network']['w'] * params['head']['w'] * batch['x']).sum(-1)))

    unit = lambda p: {**p, 'head': {'w': p['head']['w'] / jnp.linalg.norm(p['head']['w'])}}  # noqa: E731
    method = with_projection(minimize(loss, optax.sgd(LR), lambda key: start), unit)
    state, _ = run(method, [{'x': np.ones((4, 3), np.float32)}])
    moved = START - LR * START
    np.testing.assert_allclose(w_of(state), moved, rtol=1e-6)
    np.testing.assert_allclose(state.params['head']['w'], moved / np.linalg.norm(moved), rtol=1e-6)


def test_another_part_can_be_the_result():
    start = {'a': {'params': {'w': jnp.full(3, 1.0)}}, 'b': {'params': {'w': jnp.full(3, 2.0)}}}
    method = minimize(lambda p, s, b, k: Objective(mean(b['x'])), optax.sgd(LR), lambda key: start)
    with pytest.raises(UserError, match=r"result is 'network', but the method trains .'a', 'b'."):
        with_result(method, 'network', 'n.result').init(jax.random.key(0))
    method = with_ema(with_result(method, 'b'), {'slow': 0.5})
    state, _ = run(method, [{'x': np.ones(2, np.float32)}])
    np.testing.assert_array_equal(w_of(state), np.full(3, 2.0))
    assert set(state.ema['slow']) == {'b'}
    with pytest.raises(UserError, match=r"no part 'c', only .'a', 'b'."):
        state.variables(part='c')
    with pytest.raises(UserError, match=r"no average 'slow' of a part 'a', only .'b'."):
        state.variables('slow', part='a')
