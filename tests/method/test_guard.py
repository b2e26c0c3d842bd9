"""The guard: what a bad step leaves behind, and what the guard costs."""

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
    leaves,
    moving_average,
    pursue,
    residual_gradient,
    run,
    squared_error,
    two_players,
    w_of,
)

from kd import metrics as metrics_lib
from kd.method import (
    Method,
    Objective,
    Player,
    alternate,
    minimize,
    repeat,
    with_ema,
    with_nonfinite_guard,
    with_projection,
)
from kd.metrics import mean
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def data():
    return batches()


def guarded(mode):
    """A method with everything in its state that a bad step could spoil."""
    method = minimize(moving_average, optax.adam(LR), initial_with_stats)
    return with_nonfinite_guard(with_ema(method, {'slow': 0.9}), mode)


def poisoned(batch, value=np.nan):
    return {**batch, 'y': np.where(np.arange(8) == 3, value, batch['y']).astype(np.float32)}


def test_a_skipped_step_leaves_no_trace_but_its_count(data):
    method = guarded('skip')
    step = compiled(method)
    state = method.init(jax.random.key(0))
    state, _ = step(state, data[0])
    before = leaves(state)
    state, metrics = step(state, poisoned(data[1]))
    assert int(state.step) == 2
    assert_bit_identical(leaves(state.replace(step=jnp.int32(1))), before)
    assert not state.extra['halted']
    assert metrics_lib.divide(metrics) == {'nonfinite': 1.0}
    # The next good batch counts, and is as if the bad one had not been there.
    state, metrics = step(state, data[2])
    clean, _ = run(method, [data[0], data[2]])
    assert_bit_identical(state.replace(step=clean.step), clean)
    assert (metrics['nonfinite'].total, metrics['nonfinite'].count) == (0, 1)
    assert metrics['loss'].count == 8


def test_a_halted_state_stays_as_it_was_before_the_bad_step(data):
    method = guarded('stop')
    step = compiled(method)
    state = method.init(jax.random.key(0))
    for batch in data[:2]:
        state, _ = step(state, batch)
    before = leaves(state.replace(extra={}))
    window = []
    for batch in (poisoned(data[2], np.inf), data[3], data[4]):
        state, metrics = step(state, batch)
        window.append(metrics)
        assert state.extra['halted']
        assert int(state.step) == 2
        assert_bit_identical(leaves(state.replace(extra={})), before)
    merged = functools.reduce(metrics_lib.merge, window)
    # One step was bad, the two good ones after it are not counted.
    assert (merged['nonfinite'].total, merged['loss'].count) == (1, 0)


@pytest.mark.parametrize('mode', ['skip', 'stop'])
def test_the_guard_does_not_touch_finite_steps(data, mode):
    state, history = run(guarded(mode), data)
    plain, plain_history = run(
        with_ema(minimize(moving_average, optax.adam(LR), initial_with_stats), {'slow': 0.9}), data
    )
    # XLA contracts products and sums to its liking, within the condition otherwise than outside.
    for ours, theirs in zip(leaves(state.replace(extra={})), leaves(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-9)
    for guarded_metrics, plain_metrics in zip(history, plain_history, strict=True):
        assert guarded_metrics.pop('nonfinite') == (0, 1)
        for ours, theirs in zip(leaves(guarded_metrics), leaves(plain_metrics), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-6)


def of(loss, batch, tx=None):
    """A method of a loss per example of parameters `w` [3] and `batch['c']` [4, 3], and a batch."""

    def objective(params, state, batch, key):
        value, metrics = loss(params['w'], batch['c'])
        return Objective(mean(value), metrics)

    return minimize(objective, tx or optax.sgd(LR), initial), {'c': np.asarray(batch, np.float32)}


HERE = np.tile(START, (4, 1))
BAD = {
    'loss': of(lambda w, c: (jnp.log(0.0 * (w - c).sum(-1)), {}), 1 + HERE),
    # The root has an infinite slope at zero, where it is finite.
    'gradient': of(lambda w, c: (jnp.sqrt(jnp.abs(w - c).sum(-1)), {}), HERE),
    'metric': of(lambda w, c: ((w - c).sum(-1), {'log': mean(jnp.log(w - c))}), HERE),
    # A gradient of 2 and a learning rate that is finite by itself.
    'update': of(lambda w, c: (2 * (w - c).sum(-1), {}), 1 + HERE, optax.sgd(3e38)),
    # Adam without its epsilon divides zero by zero where the gradient is zero.
    'adam': of(lambda w, c: (w[0] * c[:, 0], {}), HERE, optax.adam(LR, eps=0.0)),
}


@pytest.mark.parametrize('mode', ['skip', 'stop'])
@pytest.mark.parametrize('where', BAD)
def test_whatever_is_not_finite_leaves_no_trace(mode, where):
    method, batch = BAD[where]
    method = with_nonfinite_guard(with_ema(method, {'slow': 0.9}), mode)
    before = leaves(method.init(jax.random.key(0)).replace(extra={}))
    state, [metrics] = run(method, [batch])
    assert metrics_lib.divide(metrics) == {'nonfinite': 1.0}
    assert (int(state.step), bool(state.extra['halted'])) == ((1, False), (0, True))[mode == 'stop']
    assert not state.extra['partial']
    assert_bit_identical(leaves(state.replace(step=jnp.int32(0), extra={})), before)


@pytest.mark.parametrize('mode', ['skip', 'stop'])
def test_a_projection_that_is_not_finite_leaves_no_trace(mode, data):
    unit = lambda p: {'w': p['w'] / jnp.linalg.norm(p['w'] * 0)}  # noqa: E731
    method = with_projection(minimize(squared_error, optax.sgd(LR), initial), unit)
    state, [metrics] = run(with_nonfinite_guard(method, mode), data[:1])
    np.testing.assert_array_equal(w_of(state), START)
    assert metrics_lib.divide(metrics) == {'nonfinite': 1.0}


def by_hand(loss_of):
    """A method that knows nothing of the guard."""

    def init(key, frozen=None):
        return State.create(key, initial(key), extra={'seen': jnp.zeros(())})

    def step(state, batch):
        params = state.variables()['params']
        loss, grad = jax.value_and_grad(lambda p: loss_of(p, batch))(params)
        params = jax.tree.map(lambda p, g: p - LR * g, params, grad)
        extra = {**state.extra, 'seen': state.extra['seen'] + batch['y'].sum()}
        state = state.with_params(params).replace(step=state.step + 1, extra=extra)
        return state, {'loss': metrics_lib.scalar(loss)}

    return Method(init, step)


@pytest.mark.parametrize('mode', ['skip', 'stop'])
def test_a_step_written_by_hand_is_guarded_as_a_whole(mode, data):
    plain = by_hand(lambda p, b: ((b['x'] @ p['w'] - b['y']) ** 2).mean())
    method = with_nonfinite_guard(plain, mode)
    state, history = run(method, [data[0], poisoned(data[1]), data[2]])
    wanted, _ = run(plain, [data[0], data[2]] if mode == 'skip' else data[:1])
    np.testing.assert_allclose(w_of(state), w_of(wanted), rtol=1e-6)
    np.testing.assert_allclose(state.extra['seen'], wanted.extra['seen'], rtol=1e-6)
    assert int(state.step) == (3 if mode == 'skip' else 1)
    assert [float(m['nonfinite'].total) for m in history] == [0, 1, 0]


WIDTH, LAYERS = 96, 3


def deep(params, state, batch, key):
    x = batch['x']
    for layer in params.values():
        x = jnp.tanh(x @ layer['kernel'] + layer['bias'])
    return Objective(mean((x**2).sum(-1)))


def deep_start(key):
    def layer(key):
        return {'kernel': jax.random.normal(key, (WIDTH, WIDTH)) / 10, 'bias': jnp.zeros(WIDTH)}

    return {'params': {f'layer{i}': layer(k) for i, k in enumerate(jax.random.split(key, LAYERS))}}


@pytest.mark.parametrize(
    'tx', [optax.adam(LR), optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(LR))]
)
def test_the_guard_costs_at_most_one_copy_of_the_parameters(tx):
    plain = with_ema(minimize(deep, tx, deep_start), {'slow': 0.9})
    batch = {'x': np.ones((4, WIDTH), np.float32)}
    temporaries = []
    for method in (plain, with_nonfinite_guard(plain, 'stop')):
        state = method.init(jax.random.key(0))
        program = compiled(method).lower(state, batch).compile()
        temporaries.append(program.memory_analysis().temp_size_in_bytes)
    # Decided first, then updated in place: two programs, not a choice between two results.
    assert ' conditional(' in program.as_text()
    size = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert temporaries[1] <= temporaries[0] + 1.02 * size


def test_one_players_bad_move_undoes_the_step_of_both():
    method = with_nonfinite_guard(
        alternate(
            {
                'leader': Player(pursue, optax.sgd(LR)),
                'follower': Player(
                    lambda p, s, b, k: Objective(mean(p['b'] * jnp.log(b['t']))), optax.sgd(LR)
                ),
            },
            two_players,
        ),
        'skip',
    )
    state, [metrics] = run(method, [{'t': np.zeros(8, np.float32)}])
    assert (state.params['leader']['a'], state.params['follower']['b']) == (1.0, -1.0)
    assert metrics_lib.divide(metrics) == {'nonfinite': 1.0}


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="must be 'stop' or 'skip', got 'ignore'"):
        with_nonfinite_guard(minimize(squared_error, optax.sgd(LR), initial), 'ignore')


def repeated_critic():
    """Two players, the second of which repeats; its second move is bad where the batch says so."""

    def generator(params, state, batch, key):
        return Objective(mean(params['a'] * batch['t']))

    def critic(params, state, batch, key):
        bad = jnp.where((batch['move'] == 1) & batch['bad'].any(), jnp.nan, 1.0)
        return Objective(mean(params['b'] * bad * batch['t']))

    players = {
        'leader': Player(generator, optax.sgd(LR)),
        'follower': Player(critic, optax.sgd(LR), repeats=4, rows='same'),
    }
    return alternate(players, two_players)


@pytest.mark.parametrize('mode', ['skip', 'stop'])
def test_each_repeated_move_is_guarded_by_itself(mode):
    good = {'t': np.ones(8, np.float32), 'bad': np.zeros(8, bool)}
    method = with_nonfinite_guard(repeated_critic(), mode)
    state, [metrics, after] = run(method, [{**good, 'bad': np.ones(8, bool)}, good])
    assert (metrics['nonfinite'].total, after['nonfinite'].total) == (1, 0)
    if mode == 'skip':
        # Three of its moves, then four; five updates are tried in a step.
        assert (metrics['nonfinite'].count, metrics['follower/grad_norm'].count) == (5, 3)
        moves, leads, step = 7, 2, 2
    else:
        # All that comes after the bad move is left out, and the state stays at the step.
        assert (metrics['nonfinite'].count, metrics['follower/grad_norm'].count) == (3, 1)
        assert after['leader/loss'].count == 0
        moves, leads, step = 1, 1, 0
    np.testing.assert_allclose(state.params['follower']['b'], -1 - LR * moves, rtol=1e-6)
    np.testing.assert_allclose(state.params['leader']['a'], 1 - LR * leads, rtol=1e-6)
    assert (int(state.step), bool(state.extra['halted'])) == (step, mode == 'stop')
    # Its first move and the leader's are made.
    assert bool(state.extra['partial']) == (mode == 'stop')


@pytest.mark.parametrize('mode', ['skip', 'stop'])
def test_each_of_several_updates_is_guarded_by_itself(mode, data):
    # Update u is made on rows u, u + 4: those of the second are bad.
    y = np.where(np.arange(8) % 4 == 1, np.nan, data[0]['y']).astype(np.float32)
    batch = {'x': data[0]['x'], 'y': y}
    method = repeat(minimize(squared_error, optax.sgd(LR), initial), 4, parts=4)
    method = with_nonfinite_guard(with_ema(method, {'half': 0.5}), mode)
    state, [metrics] = run(method, [batch])
    w = START.astype(np.float64)
    for part in (0, 2, 3) if mode == 'skip' else (0,):
        w = w - LR * residual_gradient(w, {k: v[part::4] for k, v in batch.items()})[1]
    np.testing.assert_allclose(w_of(state), w, rtol=1e-5)
    np.testing.assert_allclose(w_of(state, 'half'), (START + w) / 2, rtol=1e-5)
    tried, made = (4, 3) if mode == 'skip' else (2, 1)
    assert metrics['nonfinite'] == (1, tried)
    assert metrics['grad_norm'].count == made
    assert (int(state.step), bool(state.extra['partial'])) == ((1, False), (0, True))[
        mode == 'stop'
    ]


def test_the_guard_of_several_updates_costs_at_most_one_copy():
    batch = {'x': np.ones((4, WIDTH), np.float32)}
    temporaries = []
    for mode in ('', 'stop'):
        method = repeat(minimize(deep, optax.adam(LR), deep_start), 3)
        method = with_nonfinite_guard(method, mode) if mode else method
        state = method.init(jax.random.key(0))
        program = compiled(method).lower(state, batch).compile()
        temporaries.append(program.memory_analysis().temp_size_in_bytes)
    size = sum(x.nbytes for x in jax.tree.leaves(state.params))
    assert temporaries[1] <= temporaries[0] + 1.02 * size
