"""GRPO on episodes: what an environment says is read, rewarded and not learnt."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from playing import ACTIONS, REWARD, SAMPLING, G, H, context, decoder, levels, sharp
from scipy import special

from kd.data.builders import push as world
from kd.errors import UserError
from kd.methods.rl import common, scoring
from kd.methods.rl.grpo import grpo
from kd.rewards.push import push
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def played(network):
    """Episodes of four levels, the variables of who played, and the player."""
    of = context(network)
    draw = common.drawing(of, common.Sampling(**SAMPLING))
    collect = common.rollouts(of, draw, common.of_block(of, REWARD), group=G, recomputed=True,
                              chunk=32, parts=2)  # fmt: skip
    state = State.create(jax.random.key(0), sharp(network, 1))
    made = jax.jit(collect)(state, levels(), jax.random.key(5))
    return jax.tree.map(np.asarray, made), state.variables(), draw


def test_rewards_are_those_of_the_episodes_played_again(played):
    made = played[0]
    table = world.table()
    for row in range(4 * G):
        agent, box, goal = (int(made[name][row]) for name in ('agent', 'box', 'goal'))

        def apart(cell, goal=goal):
            return sum(abs(x - y) for x, y in zip(divmod(cell, 5), divmod(goal, 5), strict=True))

        first = nearest = apart(box)
        for turn in made['tokens'][row].reshape(H, 4):
            if box == goal:
                assert not turn.any()
                continue
            assert turn[:3].tolist() == [27, 40 + agent, 40 + box]
            agent, box = table[agent, box, ACTIONS.index(turn[3])]
            nearest = min(nearest, apart(int(box)))
        assert made['rewards'][row] == pytest.approx(max(1 - nearest / first, 0), abs=1e-6)
        assert made['truncated'][row] == (box != goal)
    assert len(np.unique(made['rewards'])) > 1
    np.testing.assert_array_equal(made['mask'], made['there'] & (np.arange(4 * H) % 4 == 3))
    # Weights of actions alone: a mean over the actions of each episode.
    np.testing.assert_allclose(made['weight'], made['mask'] / made['mask'].sum(1, keepdims=True))


def test_scores_are_those_of_the_player_and_of_a_plain_forward_pass(network, played):
    made, variables, _ = played
    text = np.concatenate([made['input'], made['tokens']], 1)
    logits = np.asarray(jax.jit(lambda t: network.apply(variables, t).logits)(text), np.float64)
    log_q = special.log_softmax(logits[:, 2:-1, ACTIONS], -1)
    chosen = np.clip(made['tokens'] - ACTIONS[0], 0, 3)[..., None]
    wanted = np.where(made['mask'], np.take_along_axis(log_q, chosen, -1)[..., 0], 0)
    np.testing.assert_allclose(made['sampler_log_probs'], wanted, atol=1e-4)
    np.testing.assert_allclose(made['old_log_probs'], wanted, atol=1e-4)


def test_what_the_environment_says_is_read_and_has_no_loss(network, played):
    made, variables, draw = played
    heard = made['there'] & ~made['mask']

    @jax.jit
    def slope(tokens, weight):
        def loss(params):
            batch = {**made, 'tokens': tokens}
            found = scoring.answer_losses(
                network, {'params': params}, batch, draw,
                lambda said, weight: (weight * said.log_p, said.entropy),
                per_token={'weight': weight}, chunk=32,
            )  # fmt: skip
            return found.losses.sum(), found

        return jax.grad(loss, has_aux=True)(variables['params'])

    ones = np.ones(made['tokens'].shape, np.float32)
    grads, found = slope(made['tokens'], ones)
    assert not np.asarray(found.losses)[~made['mask']].any()
    assert not np.asarray(found.aux)[~made['mask']].any()
    # Whatever weights those tokens have, the gradient is the same.
    other, _ = slope(made['tokens'], np.where(heard, 100.0, ones).astype(np.float32))
    jax.tree.map(np.testing.assert_array_equal, grads, other)
    # Another observation changes what is said of the actions after it, and of none before.
    tokens = made['tokens'].copy()
    tokens[:, 5] = np.where(heard[:, 5], 64, tokens[:, 5])
    _, moved = slope(tokens, ones)
    apart = np.abs(np.asarray(moved.losses) - np.asarray(found.losses))
    assert apart[:, :7].max() < 1e-6
    assert apart[:, 7].max() > 1e-3


def test_grpo_runs_on_episodes_as_it_is(network):
    """A step is the gradient of REINFORCE over actions; every number of the log is of actions."""
    method = grpo(context(network), reward=REWARD, sampling=SAMPLING, chunk=32)
    state = jax.jit(method.init)(jax.random.key(0), {})
    state = state.replace(params={'network': sharp(network, 1)['params']})
    after, metrics = jax.jit(method.step)(state, levels())
    value = {name: float(total / count) for name, (total, count) in metrics.items()}
    assert value['ratio'] == 1
    assert value['sampler_ratio'] == pytest.approx(1, abs=1e-4)
    assert 1 <= value['length'] <= H
    assert value['sampling/fill'] == pytest.approx(value['length'] / H)
    assert 0 < value['entropy'] < np.log(4)
    assert value['grad_norm'] > 1e-3
    apart = jax.tree.map(lambda x, y: float(jnp.abs(x - y).max()), after.params, state.params)
    assert max(jax.tree.leaves(apart)) > 1e-4


def test_data_without_levels_is_told(network):
    spec = {name: x for name, x in context(network).spec.items() if name != 'box'}
    with pytest.raises(UserError, match="levels of push have 'box', and the data have only"):
        common.drawing(context(network, spec=spec), common.Sampling(**SAMPLING))
    with pytest.raises(UserError, match=r'kd\.data\.push\.push brings it'):
        push(context(network, spec=spec))
