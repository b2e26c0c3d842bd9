"""Linear regression, small enough to be followed in NumPy, and how tests run a method."""

import jax
import jax.numpy as jnp
import numpy as np

from kd.method import Objective
from kd.metrics import mean

LR = 0.1
START = np.array([1.0, -2.0, 0.5], np.float32)


def compiled(method):
    """The step as the loop runs it: jitted, its state donated."""
    return jax.jit(method.step, donate_argnums=0)


def run(method, batches, *, key=0, frozen=None):
    """The last state and each step's metrics; `step` is compiled once."""
    state, step, history = method.init(jax.random.key(key), frozen), compiled(method), []
    for batch in batches:
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
    return state, history


def w_of(state, average=None):
    """The weights [3] of the regression."""
    return state.variables(average)['params']['w']


def leaves(tree):
    """Every array of a tree as bytes-comparable NumPy, keys included."""
    data = jax.tree.map(
        lambda x: jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x,
        tree,
    )
    return [np.asarray(x).copy() for x in jax.tree.leaves(data)]


def assert_bit_identical(first, second):
    first, second = leaves(first), leaves(second)
    assert len(first) == len(second)
    for a, b in zip(first, second, strict=True):
        assert a.dtype == b.dtype
        assert a.tobytes() == b.tobytes()


def squared_error(params, state, batch, key):
    del state, key
    residual = batch['x'] @ params['w'] - batch['y']
    return Objective(mean(residual**2, batch.get('mask')), {'bias': mean(residual)})


def initial(key):
    del key
    return {'params': {'w': jnp.asarray(START)}}


def batches():
    """Seven batches of eight examples, with a mask."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(7, 8, 3)).astype(np.float32)
    y = rng.normal(size=(7, 8)).astype(np.float32)
    mask = rng.random((7, 8)) < 0.6
    return [{'x': x[i], 'y': y[i], 'mask': mask[i]} for i in range(7)]


def residual_gradient(w, batch, mask=None):
    """Loss and gradient of the masked mean of squares, in float64."""
    x, y = batch['x'].astype(np.float64), batch['y'].astype(np.float64)
    mask = np.ones(len(y), bool) if mask is None else mask
    residual = (x @ w - y) * mask
    count = max(mask.sum(), 1)
    return (residual**2).sum() / count, 2 * x.T @ residual / count


def moving_average(params, state, batch, key):
    """Keeps a running mean of the inputs, as BatchNorm does, and uses it."""
    average = 0.9 * state.variables()['stats']['mean'] + 0.1 * batch['x'].mean(0)
    residual = (batch['x'] - average) @ params['w'] - batch['y']
    return Objective(mean(residual**2), {}, {'stats': {'mean': average}})


def initial_with_stats(key):
    return {**initial(key), 'stats': {'mean': jnp.zeros(3)}}


def noisy(params, state, batch, key):
    noise = jax.random.normal(key, batch['y'].shape)
    residual = batch['x'] @ params['w'] - batch['y'] - noise
    return Objective(mean(residual**2), {'noise': mean(noise)})


# Two players.


def pursue(params, state, batch, key):
    return Objective(mean((params['a'] * batch['t'] - state.params['follower']['b']) ** 2))


def follow(params, state, batch, key):
    gap = params['b'] - 2 * state.params['leader']['a'] * batch['t']
    return Objective(mean(gap**2), {'gap': mean(gap)})


def two_players(key):
    del key
    return {
        'leader': {'params': {'a': jnp.float32(1.0)}},
        'follower': {'params': {'b': jnp.float32(-1.0)}},
    }
