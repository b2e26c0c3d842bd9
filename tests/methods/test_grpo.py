"""GRPO and what methods on rollouts share, against plain forward passes and NumPy."""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answering import (
    SAMPLING,
    SPEC,
    G,
    P,
    Run,
    close,
    context,
    decoder,
    forced,
    prompts,
    sharp,
    value,
)

from kd.errors import UserError
from kd.methods.rl import common
from kd.methods.rl.grpo import grpo
from kd.models.structured import BottleneckLM
from kd.network import from_linen
from kd.parallel import mesh as mesh_lib

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LR = 0.5


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def batch():
    return prompts()


@pytest.fixture(scope='module')
def plain(network):
    return Run(grpo, network, chunk=32)


MANY = dict(
    chunk=32, updates=4, parts=2, aggregation='token_mean', low=0.01, high=0.02,
    teacher_weight=0.03, kl_weight=0.01, kl='k3+', old='sampler',
)  # fmt: skip
SLOW = {'optimizer': dict(name='sgd', lr=0.02)}


@pytest.fixture(scope='module')
def many(network):
    """Four updates on two parts, beside a teacher and a reference."""
    fields = {'teacher': network, 'references': {'reference': network}, **SLOW}
    return Run(grpo, network, fields=fields, **MANY)


def beside(teacher, reference=None):
    return {'teacher': teacher, 'reference': teacher if reference is None else reference}


@pytest.mark.parametrize('unreadable', [False, True])
def test_a_step_is_reinforce_with_advantages_of_the_group(network, batch, plain, unreadable):
    """The gradient at rho = 1 is that of -mean_i mean_t A_i log p_it, by a plain forward pass.

    An answer that a verifier could not judge is as if it had not been given.
    """
    if unreadable:
        batch = {**batch, 'unreadable': np.array([5, 4, 7, 10])}
    before, after, metrics = plain(batch)
    # What the step has sampled, by its own key.
    of = context(network)
    draw = common.drawing(of, common.Sampling(**SAMPLING))
    key = jax.random.fold_in(before.step_key(), zlib.crc32(b'collect'))
    rows = {name: np.repeat(x, G, axis=0) for name, x in batch.items()}
    said = jax.jit(draw)(before.variables(), rows['input'], rows['prompt_mask'], key)
    first = np.asarray(said.tokens)[:, 0]
    judged, rewards = first != rows['unreadable'], (first % 2 == 0).astype(float)
    assert judged.all() or (unreadable and judged.any())
    advantage, dead = np.zeros(4 * G), np.ones(4 * G, bool)
    for group in np.split(np.arange(4 * G), 4):
        of = group[judged[group]]
        if len(of) and np.ptp(rewards[of]):
            advantage[of] = (rewards[of] - rewards[of].mean()) / (rewards[of].std() + 1e-6)
            dead[group] = False

    @jax.jit
    @jax.grad
    def slope(params):
        tokens = jnp.concatenate([rows['input'], said.tokens], 1)
        there = jnp.concatenate([rows['prompt_mask'], said.mask], 1)
        logits = network.apply(
            {'params': params}, tokens, jnp.maximum(there.cumsum(1) - 1, 0), there.astype(int)
        ).logits[:, P - 1 : -1]
        log_q = jax.nn.log_softmax(logits.at[..., :2].set(-jnp.inf))
        log_p = jnp.take_along_axis(log_q, said.tokens[..., None], -1)[..., 0]
        log_p = jnp.where(said.mask, log_p, 0)
        each = advantage * log_p.sum(1) / said.mask.sum(1)
        return -jnp.where(judged, each, 0).sum() / judged.sum()

    wanted = slope(before.params['network'])
    moved = jax.tree.map(lambda x, y: (x - y) / LR, before.params, after.params)['network']
    close(moved, wanted)
    assert max(float(jnp.abs(x).max()) for x in jax.tree.leaves(wanted)) > 1e-2
    lengths = np.asarray(said.mask).sum(1)
    assert value(metrics, 'reward') == pytest.approx(np.where(judged, rewards, 0).mean())
    assert value(metrics, 'unjudged') == pytest.approx(1 - judged.mean())
    assert value(metrics, 'dead_groups') == pytest.approx(dead.mean())
    assert value(metrics, 'length') == pytest.approx(lengths.mean())
    assert value(metrics, 'truncated') == pytest.approx(np.asarray(said.truncated).mean())
    assert value(metrics, 'sampling/fill') == pytest.approx(lengths.mean() / lengths.max())
    assert value(metrics, 'ratio') == value(metrics, 'ratio_max') == 1
    assert value(metrics, 'clip_fraction') == 0
    assert value(metrics, 'sampler_ratio') == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize('verdict', [0.0, 1.0, np.nan])
def test_groups_of_equal_rewards_teach_nothing(batch, plain, verdict):
    before, after, metrics = plain(forced(batch, verdict))
    for name in ('loss', 'grad_norm', 'nonfinite'):
        assert value(metrics, name) == 0, name
    assert value(metrics, 'dead_groups') == 1
    # What nobody can judge is 0, and counted.
    assert value(metrics, 'unjudged') == np.isnan(verdict)
    assert value(metrics, 'reward') == np.nan_to_num(verdict)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)


def test_answers_are_those_of_the_present_policy_and_new_at_every_step(batch, plain):
    lengths = {value(plain(batch, seed)[2], 'entropy') for seed in (1, 2, 3)}
    assert len(lengths) == 3
    state, found = plain(batch)[0], []
    for step in range(3):
        # The same law at other steps.
        _, metrics = plain.step(state.replace(step=jnp.int32(step)), batch)
        found.append(value(metrics, 'length'))
    assert len(set(found)) > 1


def test_later_updates_are_clipped_against_the_policy_that_answered(batch, many, network):
    _, _, metrics = many(batch, frozen=beside(sharp(network, 1)))
    assert value(metrics, 'clip_fraction') > 0
    assert value(metrics, 'ratio_max') > 1.02


def test_micro_batches_and_devices_change_nothing(network, batch, many):
    fields = {'teacher': network, 'references': {'reference': network}, **SLOW}
    torn = Run(grpo, network, fields=fields, micro_batches=4, **MANY)
    frozen = beside(sharp(network, 7), sharp(network, 8))
    mesh = mesh_lib.make_mesh({'data': 4})
    spread = mesh_lib.put_batch(batch, mesh_lib.batch_sharding(mesh))
    _, one, whole = many(batch, frozen=frozen)
    _, other, parts = torn(spread, frozen=frozen)
    assert len(other.step.sharding.device_set) == 4
    close(one.params, other.params)
    for name in set(whole) - {'grad_norm'}:
        assert value(whole, name) == pytest.approx(value(parts, name), abs=1e-4), name


def test_dead_groups_learn_from_a_teacher_and_not_from_one_that_is_the_student(
    network, batch, many
):
    same, right = sharp(network, 1), forced(batch, 1.0)
    before, after, metrics = many(right, frozen=beside(same))
    assert value(metrics, 'loss') == pytest.approx(0, abs=1e-9)
    close(before.params, after.params, atol=1e-5)
    _, _, metrics = many(right, frozen=beside(sharp(network, 7), same))
    assert value(metrics, 'grad_norm') > 0
    # Of what nobody could judge nothing is learnt, from a teacher either.
    before, after, metrics = many(forced(batch, np.nan), frozen=beside(sharp(network, 7), same))
    assert value(metrics, 'unjudged') == 1
    assert value(metrics, 'loss') == value(metrics, 'grad_norm') == 0
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    # A reference that is perturbed says something else too.
    _, _, moved = many(right, frozen=beside(same, jax.tree.map(lambda x: x + 0.1, same)))
    assert value(moved, 'loss') > 1e-5


def test_a_step_is_one_program_without_the_host(network, batch, plain):
    text = plain.step.lower(plain.first, batch).as_text()
    assert 'callback' not in text
    # The sampler's loop is in it.
    assert 'stablehlo.while' in text


def test_what_does_not_fit_is_told(network):
    other = from_linen(BottleneckLM(width=4), jax.ShapeDtypeStruct((1, 2), jnp.int32))
    with pytest.raises(UserError, match=r'sampled from a decoder .* the network is BottleneckLM'):
        Run(grpo, other)
    with pytest.raises(UserError, match=r"the data has no 'prompt_mask'; give data\.source"):
        Run(grpo, network, fields={'spec': {'input': SPEC['input']}})
    with pytest.raises(UserError, match=r"the reward goes by 'printed', and the data have only"):
        Run(grpo, network, dict(name='kd.rewards.printed.printed'))
    with pytest.raises(UserError, match=r'kl_weight=0\.1 needs a reference of'):
        Run(grpo, network, kl_weight=0.1)
    with pytest.raises(UserError, match=r'teacher_weight=0\.1 needs a teacher'):
        Run(grpo, network, teacher_weight=0.1)
