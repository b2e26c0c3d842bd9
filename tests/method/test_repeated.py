"""Several updates on one batch against a loop written by hand."""

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

from kd.losses import policy
from kd.method import Objective, minimize, repeat, with_collect, with_ema
from kd.metrics import mean, scalar
from kd.parallel import mesh as mesh_lib
from kd.training import optimizer as optim

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def data():
    return batches()


def adam(slopes):
    """NumPy's Adam from START over functions of the weights."""
    w, first, second = START.astype(np.float64), np.zeros(3), np.zeros(3)
    for n, slope_at in enumerate(slopes, 1):
        slope = slope_at(w)
        first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * slope**2
        w = w - LR * first / (1 - 0.9**n) / (np.sqrt(second / (1 - 0.999**n)) + 1e-8)
    return w


@pytest.mark.parametrize('unroll', [False, True])
def test_updates_go_over_the_parts_of_the_batch_in_turn(data, unroll):
    method = repeat(
        minimize(squared_error, optax.adam(LR), initial), 4, parts=2, group=2, unroll=unroll
    )
    state, history = run(method, data[:3])
    # Pairs of rows stay together.
    rows = [[0, 1, 4, 5], [2, 3, 6, 7]] * 2
    parts = [{k: v[r] for k, v in batch.items()} for batch in data[:3] for r in rows]
    slopes = [lambda w, b=part: residual_gradient(w, b, b['mask'])[1] for part in parts]
    np.testing.assert_allclose(w_of(state), adam(slopes), rtol=1e-4)
    assert int(state.step) == 3
    assert int(state.opt_state[0].count) == 12
    assert history[0]['grad_norm'].count == 4
    assert history[0]['loss'].count == 2 * data[0]['mask'].sum()


def test_each_update_has_a_key_of_its_own_which_the_step_decides(data):
    def drawing(params, state, batch, key):
        objective = noisy(params, state, batch, key)
        return objective._replace(metrics={'noise': mean(jax.random.normal(key, (4,)))})

    method = repeat(minimize(drawing, optax.sgd(LR), initial), 3)
    first = method.init(jax.random.key(0))
    state, history = run(method, data[:2])
    for step, metrics in enumerate(history):
        keys = [jax.random.fold_in(jax.random.fold_in(first.key, u), step) for u in range(3)]
        wanted = sum(float(jax.random.normal(key, (4,)).sum()) for key in keys)
        np.testing.assert_allclose(metrics['noise'].total, wanted, rtol=1e-5)
    assert_bit_identical(state.key, first.key)


def test_one_update_is_the_method_itself():
    method = minimize(squared_error, optax.sgd(LR), initial)
    assert repeat(method, 1) is method


def test_what_is_collected_once_serves_all_updates_and_averages_count_steps(data):
    def collect(state, batch, key):
        # Of the whole batch, whatever the parts: a statistic has its place here.
        start = jnp.full(8, state.variables()['params']['w'][0])
        return {**batch, 'y': batch['y'] - batch['y'].mean(), 'start': start}

    def loss(params, state, batch, key):
        objective = squared_error(params, state, batch, key)
        return objective._replace(metrics={'moved': scalar(params['w'][0] - batch['start'][0])})

    method = repeat(minimize(loss, optax.sgd(LR), initial), 2, parts=2)
    method = with_ema(with_collect(method, collect), {'half': 0.5})
    batch = {k: data[0][k] for k in ('x', 'y')}
    state, [metrics] = run(method, [batch])
    centred = {**batch, 'y': batch['y'] - batch['y'].mean()}
    w = [START.astype(np.float64)]
    for part in range(2):
        slope = residual_gradient(w[-1], {k: v[part::2] for k, v in centred.items()})[1]
        w.append(w[-1] - LR * slope)
    np.testing.assert_allclose(w_of(state), w[-1], rtol=1e-5)
    np.testing.assert_allclose(metrics['moved'].total, w[1][0] - w[0][0], rtol=1e-4)
    np.testing.assert_allclose(w_of(state, 'half'), (w[0] + w[-1]) / 2, rtol=1e-5)


def test_the_schedule_of_an_optimiser_for_several_updates_ends_with_the_last(data):
    # A gradient of 1 throughout: a step of two updates moves by twice its rate.
    def loss(params, state, batch, key):
        return Objective(mean(params['w'].sum() * jnp.ones(8)))

    tx = optim.optimizer(3, name='sgd', lr=1.0, schedule='linear', updates=2)
    state, _ = run(repeat(minimize(loss, tx, initial), 2), data[:3])
    np.testing.assert_allclose(w_of(state), START - 2 * (1 + 2 / 3 + 1 / 3), rtol=1e-6)


GROUP = 4


def of_groups(micro_batches, *, in_collect=True):
    """Four updates on two parts of a batch of four groups, whose rewards are drawn."""

    def collect(state, batch, key):
        rewards = batch['y'] + jax.random.normal(key, batch['y'].shape)
        old = jax.nn.log_sigmoid(batch['x'] @ state.variables()['params']['w'])
        advantage = policy.group_advantage(rewards, GROUP) if in_collect else rewards
        return {**batch, 'advantage': advantage, 'old': old}

    def loss(params, state, batch, key):
        advantage = batch['advantage']
        if not in_collect:
            advantage = advantage - advantage.mean()
        ratio = policy.log_ratio(jax.nn.log_sigmoid(batch['x'] @ params['w']), batch['old'])
        losses = policy.clipped_surrogate(ratio, advantage)
        return Objective(mean(losses), {'clipped': mean(policy.is_clipped(ratio, advantage))})

    one = minimize(loss, optax.adam(LR), initial, micro_batches=micro_batches)
    return with_collect(repeat(one, 4, parts=2, group=GROUP), collect)


@pytest.fixture(scope='module')
def groups():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(16, 3)).astype(np.float32)
    return [{'x': x, 'y': rng.normal(size=16).astype(np.float32)}] * 2


def test_statistics_of_groups_do_not_depend_on_micro_batches(groups):
    whole, history = run(of_groups(1), groups)
    # Two rows each: every group of four is torn apart.
    torn, torn_history = run(of_groups(4), groups)
    np.testing.assert_allclose(w_of(torn), w_of(whole), rtol=1e-5)
    for one, other in zip(history, torn_history, strict=True):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), one, other)
    assert sum(float(metrics['clipped'].total) for metrics in history) > 0
    # In a loss the same statistic would be of what is left of a group.
    wrong = [w_of(run(of_groups(m, in_collect=False), groups)[0]) for m in (1, 4)]
    assert np.abs(np.subtract(*wrong)).max() > 0.02


def test_statistics_of_groups_do_not_depend_on_the_devices(groups):
    method = of_groups(1)
    whole, _ = run(method, groups)
    sharding = mesh_lib.batch_sharding(mesh_lib.make_mesh({'data': 4}))
    spread, _ = run(method, [mesh_lib.put_batch(batch, sharding) for batch in groups])
    assert len(spread.step.sharding.device_set) == 4
    np.testing.assert_allclose(w_of(spread), w_of(whole), rtol=1e-5)


@pytest.mark.parametrize(('updates', 'parts', 'group'), [(0, 1, 1), (3, 2, 1), (2, 2, 0)])
def test_updates_that_cannot_be_are_refused(updates, parts, group):
    method = minimize(squared_error, optax.sgd(LR), initial)
    with pytest.raises(ValueError, match='all must be positive and the updates a multiple'):
        repeat(method, updates, parts=parts, group=group)


def test_groups_that_would_be_torn_say_so(data):
    method = repeat(minimize(squared_error, optax.sgd(LR), initial), 2, parts=2, group=3)
    with pytest.raises(ValueError, match='batch of 8 in groups of 3 does not divide into 2 parts'):
        method.step(method.init(jax.random.key(0)), data[0])
