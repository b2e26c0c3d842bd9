"""Skill-SD: its bank of skills, and a step against GRPO and plain forward passes."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from playing import ACTIONS, REWARD, SAMPLING, G, H, context, decoder, levels, sharp
from scipy import special

from kd.data.builders import push as world
from kd.errors import UserError
from kd.methods.rl import bank as banks
from kd.methods.rl import common
from kd.methods.rl.grpo import grpo
from kd.methods.rl.skill_sd import skill_sd, with_skill
from kd.rewards.push import summary

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SUMMARY = dict(name='kd.rewards.push.summary')
HOW = dict(reward=REWARD, sampling=SAMPLING, chunk=32)
OFTEN = dict(**HOW, summary=SUMMARY, tasks=5, slots=2)
SLOW = dict(optimizer=dict(name='sgd', lr=1e-3))


def value(metrics, name):
    total, count = metrics[name]
    return float(total / count)


def close(first, second, atol):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), first, second)


# The bank


def filled(uses, total):
    """A bank of one task whose three slots were used so often, and earned so much in all."""
    made = banks.empty(1, 3, 2)
    for each in ([1, 2], [3, 4], [5, 6]):
        made = banks.insert(made, jnp.array([0]), jnp.array([each]))
    return made.replace(uses=jnp.array([uses], jnp.float32), total=jnp.array([total], jnp.float32))


@pytest.mark.parametrize(
    ('uses', 'total', 'explore', 'slot'),
    [
        # Never used first, whatever the others have earned.
        ([3, 0, 2], [3, 0, 2], 1.0, 1),
        # Equal means: the least used.
        ([4, 5, 2], [2, 2.5, 1], 1.0, 2),
        # Without exploration the best mean.
        ([1, 9, 3], [0.5, 8, 2], 0.0, 1),
        # By hand: .9 + sqrt(ln 12 / 10) = 1.40, .5 + sqrt(ln 12 / 1) = 2.08, 0 + 1.58.
        ([10, 1, 1], [9, 0.5, 0], 1.0, 1),
    ],
)
def test_a_skill_is_selected_by_the_upper_bound_of_its_worth(uses, total, explore, slot):
    found, there = banks.select(filled(uses, total), jnp.array([0]), explore)
    assert (int(found[0]), bool(there[0])) == (slot, True)


def test_a_bank_keeps_the_latest_skills_of_each_task_and_credits_those_that_were_used():
    bank = banks.empty(3, 2, 1)
    slot, there = banks.select(bank, jnp.array([1, 2]))
    assert not there.any()
    # Nothing was used, nothing is credited.
    bank = banks.credit(bank, jnp.array([1, 2]), slot, there, jnp.ones(2))
    assert not bank.uses.any()
    for each in (10, 11, 12):
        bank = banks.insert(bank, jnp.array([2]), jnp.array([[each]]))
    assert bank.tokens[2, :, 0].tolist() == [12, 11]
    assert bank.there.tolist() == [[False, False], [False, False], [True, True]]
    for reward in (1.0, 0.5):
        bank = banks.credit(
            bank, jnp.array([2]), jnp.array([1]), jnp.array([True]), jnp.array([reward])
        )
    assert bank.uses[2].tolist() == [0, 2]
    assert bank.total[2].tolist() == [0, 1.5]
    # A new skill in the same place begins anew.
    bank = banks.insert(bank, jnp.array([2]), jnp.array([[13]]))
    assert (bank.tokens[2, 1, 0], bank.uses[2, 1], bank.total[2, 1]) == (13, 0, 0)


# The method


@pytest.fixture(scope='module')
def network():
    return decoder()


class Run:
    """A method, compiled once."""

    def __init__(self, network, made):
        self.network = network
        self.first = jax.jit(made.init)(jax.random.key(0), {})
        self.step = jax.jit(made.step)

    def __call__(self, state=None, seed=1, **frozen):
        """State before, and state and metrics after a step."""
        if state is None:
            state = self.first.replace(params={'network': sharp(self.network, seed)['params']})
        state = state.replace(frozen=frozen)
        return state, *self.step(state, levels())


@pytest.fixture(scope='module')
def skilled(network):
    made = skill_sd(context(network, **SLOW), **OFTEN, weight=lambda state: state.frozen['weight'])
    return Run(network, made)


def test_without_a_weight_or_without_skills_it_is_grpo(network, skilled):
    plain = Run(network, grpo(context(network, **SLOW), **HOW))
    _, wanted, told = plain()
    _, further, _ = plain(wanted)
    # The bank is empty at first: the weight says nothing yet.
    for weight in (0.0, 50.0):
        _, after, metrics = skilled(weight=weight)
        close(after.params, wanted.params, atol=1e-7)
        assert value(metrics, 'kl_to_teacher') == pytest.approx(0, abs=1e-5)
        for name in ('reward', 'length', 'dead_groups', 'entropy'):
            assert value(metrics, name) == pytest.approx(value(told, name), abs=1e-6), name
        # Now there are skills, that only a weight lets in.
        _, later, metrics = skilled(after, weight=weight)
        assert abs(value(metrics, 'kl_to_teacher')) > 1e-3
        apart = jax.tree.map(lambda x, y: jnp.abs(x - y).max(), later.params, further.params)
        most = max(map(float, jax.tree.leaves(apart)))
        assert most < 1e-6 if weight == 0 else most > 1e-4


def played(network, state):
    """The episodes of the step that follows, by its own key."""
    of = context(network)
    draw = common.drawing(of, common.Sampling(**SAMPLING))
    key = jax.random.fold_in(state.step_key(), zlib.crc32(b'collect'))
    rows = {name: np.repeat(x, G, axis=0) for name, x in levels().items()}
    said = jax.jit(draw.of)(state.variables(), rows, key)
    return jax.tree.map(np.asarray, {**rows, 'tokens': said.tokens, 'mask': said.mask})


def log_probs(network, variables, rows):
    """Of actions, [B, 4 H], by one plain forward pass of rows `prompt + episode`."""
    text = np.concatenate([*rows['asked'], rows['tokens']], 1)
    logits = np.asarray(jax.jit(lambda t: network.apply(variables, t).logits)(text), np.float64)
    log_q = special.log_softmax(logits[:, -4 * H - 1 : -1, ACTIONS], -1)
    chosen = np.clip(rows['tokens'] - ACTIONS[0], 0, 3)[..., None]
    return np.where(rows['mask'], np.take_along_axis(log_q, chosen, -1)[..., 0], 0)


def test_the_teacher_reads_a_skill_of_earlier_steps_before_the_same_tokens(network, skilled):
    """Sum and skills against plain forward passes and summaries made by hand."""
    before, after, _ = skilled(weight=0.3)
    rows = played(network, before)
    bank = after.extra['skills']
    # Of each level the episode that came nearest to the goal, and of these the shortest.
    action = world.actions_of(rows['tokens'], rows['mask'])
    _, box = world.replay(rows['agent'], rows['box'], rows['goal'], action)
    done = np.asarray(world.completion(rows['goal'], box))
    order = np.lexsort((np.arange(4 * G), rows['mask'].sum(1), -done.round(5)))
    best = [next(row for row in order if row // G == level) for level in range(4)]
    wanted = np.asarray(world.skill(rows['goal'], box, action))[best]
    np.testing.assert_array_equal(bank.tokens[:4, 0], wanted)
    assert bank.there.tolist() == [[True, False]] * 4 + [[False, False]]
    # What the next step says of its own episodes, and what it is told.
    _, last, metrics = skilled(after, weight=0.3)
    rows = played(network, after)
    told = np.repeat(wanted, G, axis=0)
    own = log_probs(network, after.variables(), {**rows, 'asked': [rows['input']]})
    apart = log_probs(network, after.variables(), {**rows, 'asked': [rows['input'], told]})
    kl = (own - apart)[rows['mask']].mean()
    assert value(metrics, 'kl_to_teacher') == pytest.approx(kl, abs=1e-5)
    # L_GRPO is the sum of -A, over equal groups 0 up to the lengths; the rest is the token mean.
    d = (own - apart)[rows['mask']]
    rewards = done_of(rows).reshape(4, G)
    advantage = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, keepdims=True) + 1e-6)
    surrogate = -np.where(np.ptp(rewards, axis=1, keepdims=True) == 0, 0, advantage).mean()
    loss = surrogate + 0.3 * (np.exp(-d) - 1 + d).mean()
    assert value(metrics, 'loss') == pytest.approx(loss, abs=1e-5)
    # The skill was used once, and earned the mean of its group.
    np.testing.assert_array_equal(last.extra['skills'].uses[:4, 0], 1)
    earned = last.extra['skills'].total[:4, 0]
    np.testing.assert_allclose(earned, rewards.mean(1), atol=1e-6)


def done_of(rows):
    action = world.actions_of(rows['tokens'], rows['mask'])
    _, box = world.replay(rows['agent'], rows['box'], rows['goal'], action)
    return np.asarray(world.completion(rows['goal'], box))


def test_only_a_teacher_is_told():
    """The skill stands behind the prompt, where there is one, and leaves the answers in place."""
    batch = {
        'input': np.array([[1, 26, 40], [1, 26, 41]]),
        'prompt_mask': np.ones((2, 3), bool),
        'skill': np.array([[36, 37], [36, 38]]),
        'told': np.array([True, False]),
    }
    made = with_skill(batch)
    assert made['input'][0].tolist() == [1, 26, 40, 36, 37]
    assert made['input'][1][made['prompt_mask'][1]].tolist() == [1, 26, 41]
    assert made['prompt_mask'][1].tolist() == [False, False, True, True, True]
    assert 36 not in batch['input']


@pytest.mark.parametrize('acts', ['told', 'teacher'])
def test_controls_act_with_the_skill_in_the_prompt(network, skilled, acts):
    made = skill_sd(context(network, **SLOW), **OFTEN, weight=0.0, acts=acts)
    run = Run(network, made)
    _, wanted, _ = skilled(weight=0.0)
    # Without a skill they are GRPO.
    _, after, metrics = run()
    close(after.params, wanted.params, atol=1e-7)
    assert value(metrics, 'ratio') == pytest.approx(1, abs=1e-5)
    _, _, metrics = run(after)
    _, _, plain = skilled(after.replace(frozen={}), weight=0.0)
    assert value(metrics, 'reward') != value(plain, 'reward')
    if acts == 'told':
        # The policy has read what the teacher reads.
        assert value(metrics, 'kl_to_teacher') == pytest.approx(0, abs=1e-5)
        assert value(metrics, 'ratio') == 1
    else:
        # The ratio is to who acted, who is the teacher.
        assert value(metrics, 'ratio_max') > 1.05
        assert value(metrics, 'kl_to_teacher') < 0


def test_groups_of_equal_rewards_learn_from_the_teacher(network):
    """Nobody reaches a goal in one turn: rewards are equal, and the second term is not."""
    short = {**SAMPLING, 'environment': {**SAMPLING['environment'], 'horizon': 1}}
    how = {**OFTEN, 'sampling': short, 'reward': dict(name='kd.rewards.push.push')}
    run = Run(network, skill_sd(context(network, **SLOW), **how, weight=1.0))
    _, after, metrics = run()
    assert value(metrics, 'dead_groups') == 1
    assert value(metrics, 'grad_norm') == pytest.approx(0, abs=1e-6)
    _, _, metrics = run(after)
    assert value(metrics, 'dead_groups') == 1
    assert value(metrics, 'grad_norm') > 1e-3


def test_what_does_not_fit_is_told(network):
    with pytest.raises(UserError, match="a prompt's task is its field 'puzzle'"):
        skill_sd(context(network), **OFTEN, field='puzzle')
    with pytest.raises(UserError, match="teacher='start' needs a reference"):
        skill_sd(context(network), **OFTEN, teacher='start')
    with pytest.raises(UserError, match=r"'live', 'start' or an average .* got 'slow'"):
        skill_sd(context(network), **OFTEN, teacher='slow')
    spec = {name: x for name, x in context(network).spec.items() if name != 'goal'}
    with pytest.raises(UserError, match="levels of push have 'goal'"):
        summary(context(network, spec=spec))
