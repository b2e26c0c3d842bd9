"""Steps of several players against a loop written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from regression import LR, START, assert_bit_identical, follow, pursue, run, two_players

from kd import metrics as metrics_lib
from kd.method import Objective, Player, alternate, with_ema
from kd.metrics import mean

pytestmark = pytest.mark.usefixtures('compiled_quickly')


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


# A generator, a critic and what passes between them.


def generator_loss(params, state, batch, key):
    sample = params['g'] * batch['z']
    return Objective(mean((sample - state.params['critic']['c']) ** 2), {}, {}, {'sample': sample})


def critic_loss(params, state, batch, key):
    gap = params['c'] - batch['out/generator']['sample']
    noise = 0.01 * jax.random.normal(key, gap.shape)
    return Objective(mean((gap + noise) ** 2), {'rows': mean(jnp.zeros(len(gap)))})


def gan(key):
    return {
        'generator': {'params': {'g': jnp.float32(2.0)}},
        'critic': {'params': {'c': jnp.float32(0.5)}},
    }


BATCH = {'z': np.linspace(-1, 2, 8, dtype=np.float32)}


def test_a_player_is_given_what_those_before_it_computed_before_they_moved():
    players = {
        'generator': Player(generator_loss, optax.sgd(LR)),
        'critic': Player(critic_loss, optax.sgd(LR)),
    }
    method = alternate(players, gan)
    state, _ = run(method, [BATCH])
    z = BATCH['z'].astype(np.float64)
    g = 2 - LR * np.mean(2 * (2 * z - 0.5) * z)
    np.testing.assert_allclose(state.params['generator']['g'], g, rtol=1e-6)
    key = jax.random.fold_in(method.init(jax.random.key(0)).step_key(), 1)
    gap = 0.5 - 2 * z + 0.01 * np.asarray(jax.random.normal(key, (8,)))
    np.testing.assert_allclose(state.params['critic']['c'], 0.5 - LR * 2 * gap.mean(), rtol=1e-6)


def test_the_gradient_of_a_player_to_other_parts_is_zero():
    # Both losses read both parts; each player moves its own alone, by its own gradient alone.
    def joint(params, state, batch, key):
        g = params.get('g', state.params['generator']['g'])
        c = params.get('c', state.params['critic']['c'])
        return Objective(mean((g * batch['z'] - c) ** 2))

    still = {
        'generator': Player(joint, optax.sgd(LR)),
        'critic': Player(lambda p, s, b, k: Objective(mean(0.0 * p['c'] * b['z'])), optax.sgd(LR)),
    }
    state, _ = run(alternate(still, gan), [BATCH])
    assert float(state.params['critic']['c']) == 0.5
    assert float(state.params['generator']['g']) != 2.0


@pytest.mark.parametrize('rows', ['split', 'same'])
@pytest.mark.parametrize('unroll', [False, True])
def test_repeated_moves_are_a_loop_over_keys_and_rows(rows, unroll):
    players = {
        'generator': Player(generator_loss, optax.sgd(LR)),
        'critic': Player(critic_loss, optax.adam(LR), repeats=4, rows=rows, unroll=unroll),
    }
    method = alternate(players, gan)
    first = method.init(jax.random.key(0))
    state, [metrics] = run(method, [BATCH])
    z, c, moments = BATCH['z'].astype(np.float64), 0.5, np.zeros(2)
    key = jax.random.fold_in(first.step_key(), 1)
    for move in range(4):
        own = z[move::4] if rows == 'split' else z
        noise = 0.01 * np.asarray(jax.random.normal(jax.random.fold_in(key, move), own.shape))
        slope = 2 * np.mean(c - 2 * own + noise)
        moments = np.array([0.9, 0.999]) * moments + np.array([0.1, 0.001]) * [slope, slope**2]
        corrected = moments / (1 - np.array([0.9, 0.999]) ** (move + 1))
        c -= LR * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    np.testing.assert_allclose(state.params['critic']['c'], c, rtol=1e-5)
    assert metrics['critic/rows'].count == (8 if rows == 'split' else 32)
    assert metrics['critic/grad_norm'].count == 4
    assert int(state.step) == 1
    assert int(state.opt_state['critic'][0].count) == 4


def test_optimisers_count_moves_and_averages_count_steps():
    players = {
        'generator': Player(generator_loss, optax.adam(LR)),
        'critic': Player(critic_loss, optax.adam(LR), repeats=5, rows='same'),
    }
    method = with_ema(alternate(players, gan), {'slow': {'decay': 0.5, 'of': 'generator'}})
    state, _ = run(method, [BATCH] * 3)
    assert int(state.step) == 3
    assert int(state.opt_state['generator'][0].count) == 3
    assert int(state.opt_state['critic'][0].count) == 15
    assert jax.tree.structure(state.ema) == jax.tree.structure({'slow': {'generator': {'g': 0}}})


def test_a_repeated_player_knows_the_number_of_its_move():
    def numbered(params, state, batch, key):
        number = batch['move'].astype(jnp.float32)
        return Objective(
            mean(params['c'] * number * batch['z'] ** 0),
            {f'is{i}': metrics_lib.scalar(number == i) for i in range(3)},
            {},
            {'number': jnp.full(batch['z'].shape, number), 'z': batch['z']},
        )

    def later(params, state, batch, key):
        given = batch['out/critic']
        return Objective(
            mean(params['g'] * batch['z']),
            {'number': mean(given['number']), 'apart': mean(jnp.abs(given['z'] - batch['z']))},
        )

    for rows, number in (('split', 1.0), ('same', 2.0)):
        players = {
            'critic': Player(numbered, optax.sgd(LR), repeats=3, rows=rows, micro_batches=2),
            'generator': Player(later, optax.sgd(LR)),
        }
        state, [metrics] = run(alternate(players, gan), [{'z': np.arange(6, dtype=np.float32)}])
        found = metrics_lib.divide(metrics)
        # Each of the two micro-batches counts.
        assert [metrics[f'critic/is{i}'].total for i in range(3)] == [2, 2, 2]
        np.testing.assert_allclose(state.params['critic']['c'], 0.5 - LR * (0 + 1 + 2), rtol=1e-6)
        # Outputs come back in the order of the batch; of moves on the same rows the last ones.
        assert (found['generator/number'], found['generator/apart']) == (number, 0.0)


def test_two_players_of_one_part_share_its_moments_in_a_slot():
    tx = optax.adam(LR)
    players = {
        'mean': Player(lambda p, s, b, k: Objective(mean(p['c'] * b['z'])), tx, 'critic', 'shared'),
        'square': Player(
            lambda p, s, b, k: Objective(mean(p['c'] ** 2 * b['z'] ** 2)), tx, 'critic', 'shared'
        ),
        'generator': Player(generator_loss, optax.sgd(LR)),
    }
    state, _ = run(alternate(players, gan), [BATCH] * 2)
    assert set(state.opt_state) == {'shared', 'generator'}
    z, c, moments = BATCH['z'].astype(np.float64), 0.5, np.zeros(2)
    for move in range(4):
        slope = z.mean() if move % 2 == 0 else 2 * c * (z**2).mean()
        moments = np.array([0.9, 0.999]) * moments + np.array([0.1, 0.001]) * [slope, slope**2]
        corrected = moments / (1 - np.array([0.9, 0.999]) ** (move + 1))
        c -= LR * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
    np.testing.assert_allclose(state.params['critic']['c'], c, rtol=1e-4)


def test_a_player_moves_first_at_its_offset_and_puts_out_at_every_step():
    players = {
        'generator': Player(generator_loss, optax.sgd(LR), period=3, offset=2),
        'critic': Player(critic_loss, optax.sgd(LR)),
    }
    _, history = run(alternate(players, gan), [BATCH] * 9)
    moved = [step for step, m in enumerate(history) if m['generator/loss'].count]
    assert moved == [2, 5, 8]
    assert all(m['critic/loss'].count == 8 for m in history)
    before, _ = run(alternate(players, gan), [BATCH] * 2)
    assert float(before.params['generator']['g']) == 2.0


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_a_player_that_rests_is_traced_once(micro_batches):
    traced = []

    def counted(*arguments):
        traced.append(1)
        return pursue(*arguments)

    players = {
        'leader': Player(counted, optax.sgd(LR), period=2, micro_batches=micro_batches),
        'follower': Player(follow, optax.sgd(LR)),
    }
    method = alternate(players, two_players)
    jax.eval_shape(method.step, method.init(jax.random.key(0)), {'t': np.ones(8, np.float32)})
    assert len(traced) == 1


@pytest.mark.parametrize('micro_batches', [1, 4])
def test_micro_batches_of_a_player_are_its_own(micro_batches):
    # Ragged counts: parts of the batch have 2, 2, 1 and 1 examples that count.
    def ragged(params, state, batch, key):
        return Objective(mean((params['c'] - batch['z']) ** 2, batch['mask']))

    players = {
        'generator': Player(generator_loss, optax.sgd(LR), micro_batches=2),
        'critic': Player(ragged, optax.sgd(LR), micro_batches=micro_batches),
    }
    mask = np.array([1, 1, 1, 0, 1, 1, 0, 1], bool)
    state, _ = run(alternate(players, gan), [{**BATCH, 'mask': mask}])
    slope = 2 * np.mean(0.5 - BATCH['z'][mask].astype(np.float64))
    np.testing.assert_allclose(state.params['critic']['c'], 0.5 - LR * slope, rtol=1e-6)


def test_parts_may_start_as_copies_of_a_frozen_tree():
    teacher = {'params': {'w': jnp.asarray(START)}, 'stats': {'mean': jnp.ones(3)}}

    def init(key, frozen):
        return {'generator': frozen['teacher'], 'fake': frozen['teacher']}

    def loss(params, state, batch, key):
        return Objective(mean(batch['z'] * params['w'].sum()), {}, {'stats': {'mean': params['w']}})

    players = {name: Player(loss, optax.adam(LR)) for name in ('generator', 'fake')}
    method = alternate(players, init)
    begun = method.init(jax.random.key(0), {'teacher': teacher})
    for part in players:
        np.testing.assert_array_equal(begun.variables(part=part)['params']['w'], START)
        np.testing.assert_array_equal(begun.variables(part=part)['stats']['mean'], np.ones(3))
    state, _ = run(method, [BATCH] * 2, frozen={'teacher': teacher})
    assert not np.array_equal(state.params['fake']['w'], START)
    np.testing.assert_array_equal(state.frozen['teacher']['params']['w'], START)
    # Each keeps its own running statistics: those of its parameters before the last move.
    assert set(state.mutables) == {'generator', 'fake'}


def test_leaves_that_a_player_does_not_train_keep_every_bit():
    params = {'base': jnp.asarray([-0.0, 1.5]), 'lora': jnp.asarray([0.5, 0.5])}

    def loss(params, state, batch, key):
        return Objective(mean(batch['z'] * ((params['base'] + params['lora']) ** 2).sum()))

    tx = optax.adamw(LR, weight_decay=0.1)
    players = {
        'fake': Player(loss, tx, trainable='^lora'),
        'network': Player(loss, tx, trainable=lambda path: path == 'lora'),
    }
    start = {'params': params}
    state, history = run(
        alternate(players, lambda key: {'fake': start, 'network': start}), [BATCH] * 10
    )
    for part in players:
        assert_bit_identical(state.params[part]['base'], params['base'])
        assert not np.array_equal(state.params[part]['lora'], params['lora'])
        # A count and two moments of the one leaf.
        assert sorted(x.shape for x in jax.tree.leaves(state.opt_state[part])) == [(), (2,), (2,)]
    assert history[0]['fake/grad_norm'].total > 0


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'repeats': 0}, "repeats of 'critic' must be at least 1"),
        ({'period': 0}, "period of 'critic' must be at least 1"),
        ({'offset': -1}, "offset of 'critic' must be at least 0"),
        ({'rows': 'all'}, r"rows of 'critic' must be one of \('split', 'same'\), got 'all'"),
        ({'slot': 'generator'}, "share the slot 'generator' must move the same leaves of one part"),
    ],
)
def test_players_that_cannot_be_are_refused(changes, message):
    players = {
        'generator': Player(generator_loss, optax.sgd(LR)),
        'critic': Player(critic_loss, optax.sgd(LR))._replace(**changes),
    }
    with pytest.raises(ValueError, match=message):
        alternate(players, gan)


def test_moves_that_do_not_divide_the_batch_say_so():
    players = {
        'generator': Player(generator_loss, optax.sgd(LR)),
        'critic': Player(critic_loss, optax.sgd(LR), repeats=3),
    }
    method = alternate(players, gan)
    with pytest.raises(ValueError, match="of 8 does not divide into 3 moves of 'critic'; change"):
        method.step(method.init(jax.random.key(0)), BATCH)
