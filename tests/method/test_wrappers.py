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
    compiled,
    initial,
    noisy,
    residual_gradient,
    run,
    squared_error,
)

from kd.method import Objective, minimize, with_collect, with_ema, with_projection
from kd.metrics import mean


@pytest.fixture(scope='module')
def data():
    return batches()


def test_averages_follow_their_closed_form(data):
    decays = {'fast': 0.5, 'slow': 0.99}
    method = with_ema(minimize(squared_error, optax.sgd(LR), initial), decays)
    state, step = method.init(jax.random.key(0)), compiled(method)
    iterates = [START.astype(np.float64)]
    for batch in data:
        state, _ = step(state, batch)
        iterates.append(np.asarray(state.params['w'], np.float64))
    n = len(data)
    for name, decay in decays.items():
        weights = [decay**n, *((1 - decay) * decay ** (n - k) for k in range(1, n + 1))]
        np.testing.assert_allclose(state.ema[name]['w'], weights @ np.stack(iterates), rtol=1e-5)
        np.testing.assert_array_equal(state.variables(name)['params']['w'], state.ema[name]['w'])
    np.testing.assert_array_equal(state.variables()['params']['w'], state.params['w'])


def test_what_is_collected_is_a_constant_to_the_gradient():
    def collect(state, batch, key):
        return {**batch, 'target': 2 * state.params['w'] * batch['x']}

    def loss(params, state, batch, key):
        return Objective(mean(((params['w'] * batch['x'] - batch['target']) ** 2).sum(-1)))

    method = with_collect(minimize(loss, optax.sgd(LR), initial), collect)
    state, _ = run(method, [{'x': np.ones((4, 3), np.float32)}])
    # d/dw (w - c)^2 = 2 (w - c) = -2 w at c = 2 w; through the target it would be +2 w.
    np.testing.assert_allclose(state.params['w'], START + LR * 2 * START, rtol=1e-6)


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
    np.testing.assert_allclose(state.params['w'], w, rtol=1e-5)
    np.testing.assert_allclose(state.ema['half']['w'], average, rtol=1e-5)
