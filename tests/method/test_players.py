"""Steps of several players against a loop written by hand."""

import functools

import jax
import numpy as np
import optax
import pytest
from regression import LR, follow, pursue, run, two_players

from kd import metrics as metrics_lib
from kd.method import Objective, Player, alternate
from kd.metrics import mean


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
