"""Averages of what is trained against their closed forms."""

import jax
import numpy as np
import optax
import pytest
from regression import LR, START, batches, initial, run, squared_error, w_of

from kd.errors import UserError
from kd.method import Objective, minimize, with_ema
from kd.metrics import mean, scalar

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def data():
    return batches()


AVERAGES = {
    'fast': 0.5,
    'slow': {'decay': 0.99, 'of': ('network',)},
    'still': 1.0,
    'none': 0.0,
    'half': {'halflife': 4.0},
    'late': {'decay': 0.75, 'start': 3},
    'ramped': {'halflife': 3.0, 'ramp': 0.5},
    'both': {'decay': 0.9, 'ramp': 2.0, 'start': 2},
    'third': {'decay': 0.3, 'every': 3},
    'third_half': {'halflife': 4.0, 'every': 3, 'ramp': 1.0, 'start': 2},
}


def decays(name, steps):
    """The decay after each step, written out."""
    n = np.arange(steps)
    with np.errstate(divide='ignore'):
        return {
            'fast': np.full(steps, 0.5),
            'slow': np.full(steps, 0.99),
            'still': np.ones(steps),
            'none': np.zeros(steps),
            'half': np.full(steps, 2 ** (-1 / 4)),
            'late': np.where(n < 3, 0.0, 0.75),
            'ramped': 2.0 ** (-1 / np.minimum(3.0, 0.5 * n)),
            # 0.9 halves a weight in 6.58 steps.
            'both': np.where(
                n < 2, 0, 2.0 ** (-1 / np.minimum(6.578813479, 2 * np.maximum(n - 2, 0)))
            ),
            # Of three steps one moves it: that with n + 1 steps taken.
            'third': np.where((n + 1) % 3, 1.0, 0.3),
            'third_half': np.where(
                n < 2,
                0.0,
                np.where((n + 1) % 3, 1.0, 2.0 ** (-3 / np.minimum(4.0, np.maximum(n - 2, 0)))),
            ),
        }[name]


@pytest.fixture(scope='module')
def followed(data):
    """The state after all batches, and the weights before and after each step."""
    method = with_ema(minimize(squared_error, optax.sgd(LR), initial), AVERAGES)
    state, _ = run(method, data)
    iterates = [START, *(w_of(run(method, data[: n + 1])[0]) for n in range(len(data)))]
    return state, np.asarray(iterates, np.float64)


@pytest.mark.parametrize('name', AVERAGES)
def test_averages_follow_their_closed_form(followed, name):
    state, iterates = followed
    average = iterates[0]
    for decay, w in zip(decays(name, len(iterates) - 1), iterates[1:], strict=True):
        average = decay * average + (1 - decay) * w
    np.testing.assert_allclose(w_of(state, name), average, rtol=1e-5)
    if name in ('still', 'none'):
        np.testing.assert_array_equal(w_of(state, name), START if name == 'still' else w_of(state))


@pytest.mark.parametrize(('decay', 'of'), [(0.0, 'the parameters before'), (1.0, 'the start')])
def test_a_loss_sees_the_average_before_the_step(data, decay, of):
    def loss(params, state, batch, key):
        objective = squared_error(params, state, batch, key)
        target = state.variables('target')['params']['w'][0]
        return objective._replace(metrics={'target': scalar(target)})

    method = with_ema(minimize(loss, optax.sgd(LR), initial), {'target': decay})
    _, history = run(method, data)
    iterates = [START[0], *(w_of(run(method, data[: n + 1])[0])[0] for n in range(len(data) - 1))]
    wanted = iterates if of == 'the parameters before' else [START[0]] * len(data)
    np.testing.assert_array_equal([m['target'].total for m in history], wanted)


def test_an_average_holds_its_parts_and_no_others():
    start = {name: {'params': {name[0]: np.ones(2, np.float32)}} for name in ('network', 'head')}

    def loss(params, state, batch, key):
        return Objective(mean(params['network']['n'] * params['head']['h'] * batch['x']))

    method = minimize(loss, optax.sgd(LR), lambda key: start)
    averages = {'own': 0.5, 'all': {'decay': 0.5, 'of': ('network', 'head')}}
    state, _ = run(with_ema(method, averages), [{'x': np.ones(2, np.float32)}])
    wanted = {'own': {'network': {'n': 0}}, 'all': {'network': {'n': 0}, 'head': {'h': 0}}}
    assert jax.tree.structure(state.ema) == jax.tree.structure(wanted)
    np.testing.assert_allclose(state.variables('all', part='head')['params']['h'], 1 - LR / 4)


@pytest.mark.parametrize(
    ('average', 'message'),
    [
        (1.5, r'ema\.slow must be a number in \[0, 1\], got 1.5'),
        ({'decay': -0.1}, r'ema\.slow\.decay must be a number in \[0, 1\]'),
        ({'halflife': 0.0}, r'ema\.slow\.halflife must be a number above 0'),
        ({'decay': 0.9, 'ramp': -1.0}, r'ema\.slow\.ramp must be a number above 0'),
        ({'decay': 0.9, 'every': 0}, r'ema\.slow\.every must be an integer from 1'),
        ({'decay': 0.9, 'start': -1}, r'ema\.slow\.start must be an integer from 0'),
        ({'decay': 0.9, 'halflife': 3.0}, r'ema\.slow needs either a decay or a halflife'),
        ({'start': 3}, r'ema\.slow needs either a decay or a halflife'),
        ({'halflif': 3.0}, r"ema\.slow has no 'halflif'\. Did you mean 'halflife'"),
        (
            {'decay': 0.9, 'of': 'fake'},
            r"ema\.slow is of \['fake'\]; the method trains \['network'\]",
        ),
    ],
)
def test_averages_that_cannot_be_are_refused(average, message):
    method = minimize(squared_error, optax.sgd(LR), initial)
    with pytest.raises(UserError, match=message):
        with_ema(method, {'slow': average}).init(jax.random.key(0))
