"""The step of every method and combinator against NumPy, closed forms and bit-identity."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd import metrics as metrics_lib
from kd.method import (
    Objective,
    Player,
    alternate,
    gradient,
    minimize,
    with_collect,
    with_ema,
    with_nonfinite_guard,
    with_projection,
)
from kd.metrics import mean
from kd.state import State

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


@pytest.fixture(scope='module')
def data():
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


# minimize


def test_gradient_descent_on_a_quadratic_follows_its_closed_form():
    # 1/2 |w - c|^2 contracts towards c by 1 - lr at every step.
    target = np.array([0.5, 1.0, -1.0], np.float32)

    def loss(params, state, batch, key):
        return Objective(mean(0.5 * ((params['w'] - batch['c']) ** 2).sum(-1)))

    state, history = run(
        minimize(loss, optax.sgd(LR), initial), [{'c': np.tile(target, (4, 1))}] * 20
    )
    expected = target + (1 - LR) ** 20 * (START - target)
    np.testing.assert_allclose(state.params['w'], expected, rtol=1e-5)
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
    np.testing.assert_allclose(state.params['w'], w, rtol=1e-5)


def test_linear_regression_converges_to_the_normal_equations():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(8, 3)).astype(np.float32), rng.normal(size=8).astype(np.float32)
    method = minimize(squared_error, optax.sgd(LR), initial)
    batch = {'x': x, 'y': y}
    train = jax.jit(lambda s: jax.lax.scan(lambda s, _: method.step(s, batch), s, length=1000)[0])
    state = train(method.init(jax.random.key(0)))
    expected = np.linalg.lstsq(x.astype(np.float64), y.astype(np.float64))[0]
    np.testing.assert_allclose(state.params['w'], expected, rtol=1e-4)


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_micro_batches_of_unequal_counts_give_the_gradient_of_the_whole(micro_batches):
    rng = np.random.default_rng(2)
    # Parts are strided: part i holds the examples i, i + 4, ...; they count 3, 2, 1 and 0.
    mask = np.array([1, 1, 1, 0, 1, 1, 0, 0, 1, 0, 0, 0], bool)
    batch = {'x': rng.normal(size=(12, 3)), 'y': rng.normal(size=12), 'mask': mask}
    with jax.enable_x64(True):
        params = {'w': jnp.asarray(START, jnp.float64)}
        state = State.create(jax.random.key(0), params, ())
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
        np.testing.assert_allclose(cut.params['w'], whole.params['w'], rtol=1e-5)


def test_a_batch_with_nothing_to_count_does_not_move_the_parameters(data):
    batch = {**data[0], 'mask': np.zeros(8, bool)}
    for parts in (1, 4):
        method = minimize(squared_error, optax.sgd(LR), initial, micro_batches=parts)
        state, history = run(method, [batch])
        np.testing.assert_array_equal(state.params['w'], START)
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


def moving_average(params, state, batch, key):
    """Keeps a running mean of the inputs, as BatchNorm does, and uses it."""
    average = 0.9 * state.mutables['stats']['mean'] + 0.1 * batch['x'].mean(0)
    residual = (batch['x'] - average) @ params['w'] - batch['y']
    return Objective(mean(residual**2), {}, {'stats': {'mean': average}})


def initial_with_stats(key):
    return {**initial(key), 'stats': {'mean': jnp.zeros(3)}}


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
    np.testing.assert_allclose(state.mutables['stats']['mean'], average, rtol=1e-5)
    np.testing.assert_allclose(state.params['w'], w, rtol=1e-5)
    assert set(state.variables()) == {'params', 'stats'}


def test_a_loss_without_mutables_keeps_those_there_are(data):
    state, _ = run(minimize(squared_error, optax.sgd(LR), initial_with_stats), data[:2])
    np.testing.assert_array_equal(state.mutables['stats']['mean'], np.zeros(3))


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
    np.testing.assert_allclose(state.params['w'], w, rtol=1e-5)
    np.testing.assert_array_equal(state.frozen['teacher']['params']['w'], [3, 2, 1])


def test_the_state_is_donated(data):
    method = minimize(squared_error, optax.adam(LR), initial)
    before = method.init(jax.random.key(0))
    compiled(method)(before, data[0])
    assert before.params['w'].is_deleted()
    assert all(x.is_deleted() for x in jax.tree.leaves(before.opt_state))


# Randomness


def noisy(params, state, batch, key):
    noise = jax.random.normal(key, batch['y'].shape)
    residual = batch['x'] @ params['w'] - batch['y'] - noise
    return Objective(mean(residual**2), {'noise': mean(noise)})


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


# alternate


def pursue(params, state, batch, key):
    return Objective(mean((params['a'] * batch['t'] - state.params['follower']['b']) ** 2))


def follow(params, state, batch, key):
    gap = params['b'] - 2 * state.params['leader']['a'] * batch['t']
    return Objective(mean(gap**2), {'gap': mean(gap)})


def two_players(key):
    del key
    return {'params': {'leader': {'a': jnp.float32(1.0)}, 'follower': {'b': jnp.float32(-1.0)}}}


def test_two_players_move_as_in_a_hand_written_loop():
    players = {
        'leader': Player(pursue, optax.sgd(LR, momentum=0.9), period=2),
        'follower': Player(follow, optax.adam(0.05), period=3),
    }
    rng = np.random.default_rng(3)
    batches = [{'t': rng.normal(size=8).astype(np.float32)} for _ in range(8)]
    state, history = run(alternate(players, two_players), batches)

    a, b = 1.0, -1.0
    velocity, first, second, moves = 0.0, 0.0, 0.0, 0
    for step, batch in enumerate(batches):
        t, metrics = batch['t'].astype(np.float64), history[step]
        leads, follows = step % 2 == 0, step % 3 == 0
        assert metrics['leader/loss'].count == 8 * leads
        assert metrics['leader/grad_norm'].count == leads
        assert metrics['follower/loss'].count == 8 * follows
        assert metrics['follower/gap'].count == 8 * follows
        if leads:
            np.testing.assert_allclose(
                metrics['leader/loss'].total, ((a * t - b) ** 2).sum(), rtol=1e-4
            )
            velocity = np.mean(2 * (a * t - b) * t) + 0.9 * velocity
            a -= LR * velocity
        if follows:
            # The follower sees the leader where it has moved to.
            gap = b - 2 * a * t
            np.testing.assert_allclose(metrics['follower/gap'].total, gap.sum(), rtol=1e-4)
            moves += 1
            slope = np.mean(2 * gap)
            first = 0.9 * first + 0.1 * slope
            second = 0.999 * second + 0.001 * slope**2
            corrected = first / (1 - 0.9**moves), second / (1 - 0.999**moves)
            b -= 0.05 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    assert int(state.step) == 8
    np.testing.assert_allclose(state.params['leader']['a'], a, rtol=1e-5)
    np.testing.assert_allclose(state.params['follower']['b'], b, rtol=1e-5)
    # Over a window, a metric is the mean over the moves that were made.
    window = functools.reduce(metrics_lib.merge, history)
    assert window['leader/grad_norm'].count == 4
    assert window['follower/grad_norm'].count == 3


def test_a_player_does_not_get_the_key_of_another():
    def loss(params, state, batch, key):
        draw = mean(jax.random.normal(key, batch['t'].shape))
        return Objective(mean(jax.tree.leaves(params)[0] * batch['t']), {'draw': draw})

    players = {name: Player(loss, optax.sgd(LR)) for name in ('leader', 'follower')}
    _, history = run(alternate(players, two_players), [{'t': np.ones(8, np.float32)}] * 2)
    draws = [float(m[f'{p}/draw'].total) for m in history for p in ('leader', 'follower')]
    assert len(set(draws)) == 4


def test_parameters_and_players_of_different_names_are_refused():
    method = alternate({'leader': Player(pursue, optax.sgd(LR))}, two_players)
    with pytest.raises(ValueError, match=r"\['follower', 'leader'\], players are \['leader'\]"):
        method.init(jax.random.key(0))


# Combinators


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


# The guard against non-finite steps


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
    assert_bit_identical(state.replace(extra={}), plain)
    for guarded_metrics, plain_metrics in zip(history, plain_history, strict=True):
        assert guarded_metrics.pop('nonfinite').total == 0
        assert_bit_identical(guarded_metrics, plain_metrics)


def test_a_finite_loss_with_an_infinite_gradient_is_caught():
    def loss(params, state, batch, key):
        return Objective(mean(jnp.sqrt(jnp.abs(params['w'] - batch['c']).sum(-1))))

    method = with_nonfinite_guard(minimize(loss, optax.sgd(LR), initial), 'skip')
    state, [metrics] = run(method, [{'c': np.tile(START, (4, 1))}])
    np.testing.assert_array_equal(state.params['w'], START)
    assert metrics['nonfinite'].total == 1


@pytest.mark.parametrize('mode', ['skip', 'stop'])
def test_an_update_that_is_not_finite_is_caught_though_loss_and_gradient_are(mode):
    # Adam without its epsilon divides zero by zero where the gradient is zero.
    method = minimize(squared_error, optax.adam(LR, eps=0.0), initial)
    batch = {'x': np.eye(2, 3, dtype=np.float32), 'y': np.zeros(2, np.float32)}
    state, [metrics] = run(with_nonfinite_guard(method, mode), [batch])
    np.testing.assert_array_equal(state.params['w'], START)
    assert metrics_lib.divide(metrics) == {'nonfinite': 1.0}


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
