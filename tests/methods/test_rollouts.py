"""Batches of sampled answers and how networks score them, against rows without any padding."""

import jax
import numpy as np
import pytest
from answering import (
    REWARD,
    SAMPLING,
    G,
    P,
    R,
    V,
    context,
    decoder,
    log_probs,
    prompts,
    sharp,
)

from kd.methods.rl import common, scoring
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def batch():
    return prompts()


@pytest.fixture(scope='module')
def answers(network, batch):
    """A batch of answers, the variables of who gave them, and the sampler: all options at once."""
    of = context(network)
    sampling = common.Sampling(**SAMPLING, temperature=0.6, top_p=0.8)
    draw = common.drawing(of, sampling)
    collect = common.rollouts(
        of, draw, common.of_block(of, REWARD), group=G, aggregation='token_mean', overlong=2,
        recomputed=True, chunk=32, parts=4,
    )  # fmt: skip
    state = State.create(jax.random.key(0), sharp(network, 1))
    made = jax.jit(collect)(state, batch, jax.random.key(5))
    return jax.tree.map(np.asarray, made), state.variables(), draw


def test_a_batch_of_answers(answers, batch):
    made = answers[0]
    assert made['tokens'].shape == (16, R)
    np.testing.assert_array_equal(made['input'], np.repeat(batch['input'], G, axis=0))
    np.testing.assert_array_equal(made['rewards'], made['tokens'][:, 0] % 2 == 0)
    wanted = made['mask'] * 16 / made['mask'].sum()
    np.testing.assert_allclose(made['weight'], wanted, rtol=1e-6)
    # The penalty is part of what is compared, and not of the reward.
    lengths = made['mask'].sum(1)
    valued = (made['rewards'] - np.clip((lengths - 2) / 2, 0, 1)).reshape(4, G)
    centred = valued - valued.mean(1, keepdims=True)
    wanted = centred / (valued.std(1, keepdims=True) + 1e-6)
    np.testing.assert_allclose(made['advantage'].reshape(4, G), wanted, atol=1e-5)
    np.testing.assert_array_equal(made['dead'], np.repeat(np.ptp(valued, axis=1) == 0, G))
    assert len(np.unique(lengths)) > 1
    assert (made['decoded'] == lengths.max()).all()


def test_scores_are_those_of_rows_without_padding_and_of_the_sampler(network, answers):
    """Also where nuclei cut what is drawn: log-probabilities are of the whole law."""
    made, variables, draw = answers
    wanted, entropy = log_probs(network, variables, made, 0.6)
    np.testing.assert_allclose(made['old_log_probs'], wanted, atol=1e-4)
    np.testing.assert_allclose(made['sampler_log_probs'], wanted, atol=1e-4)
    # More padding, on the left of prompts and on the right of answers, changes nothing.
    wide = dict(made)
    for name, side in (
        ('input', (3, 0)),
        ('prompt_mask', (3, 0)),
        ('tokens', (0, 2)),
        ('mask', (0, 2)),
    ):
        wide[name] = np.pad(made[name], ((0, 0), side))
    found = jax.jit(lambda b: scoring.score(network, variables, b, draw))(wide)
    np.testing.assert_allclose(found.log_probs[:, :R], wanted, atol=1e-4)
    np.testing.assert_allclose(found.entropy[:, :R], entropy, atol=1e-4)
    assert not found.log_probs[:, R:].any()


def test_a_self_teacher_reads_more_and_its_scores_stay_in_place(network, answers):
    made, variables, draw = answers
    rng = np.random.default_rng(4)
    there = np.arange(3) < rng.integers(0, 4, 16)[:, None]
    block = np.where(there, rng.integers(3, V, there.shape), 0)
    told = scoring.with_prompt(made, (block, there), (made['input'], made['prompt_mask']))
    told = jax.tree.map(np.asarray, told)
    row = int(np.flatnonzero(there.sum(1) == 2)[0])
    wanted = [*block[row][:2], *made['input'][row][made['prompt_mask'][row]]]
    assert told['input'][row][told['prompt_mask'][row]].tolist() == wanted
    assert told['prompt_mask'][row].argmax() == P + 3 - len(wanted)
    found = jax.jit(lambda b: scoring.score(network, variables, b, draw))(told)
    wanted = log_probs(network, variables, told, 0.6)[0]
    np.testing.assert_allclose(found.log_probs, wanted, atol=1e-4)
    assert np.abs(wanted - made['old_log_probs']).max() > 0.1
    assert made['input'].shape == (16, P)


def test_tokens_that_a_teacher_lacks_are_never_said(network):
    draw = common.drawing(context(network), common.Sampling(**SAMPLING), decoder(num_classes=9))
    assert draw.forbidden == (0, 1, 9, 10, 11)


def test_groups_of_equal_rewards_may_be_left_out_of_what_is_averaged_over():
    mask = np.arange(R) < np.array([4, 1, 2, 3, 4, 4])[:, None]
    rewards = np.array([1, 0, 1, 1, 0, 1], np.float32)
    batch = {'mask': mask, 'rewards': rewards, 'unjudged': np.zeros(6, bool)}
    losses = np.random.default_rng(0).normal(size=mask.shape)
    for mode, wanted in (
        ('sequence_mean', np.mean([losses[i][mask[i]].mean() for i in (0, 1, 4, 5)])),
        ('token_mean', losses[[0, 1, 4, 5]][mask[[0, 1, 4, 5]]].mean()),
    ):
        made = common.valued(batch, 2, aggregation=mode, drop_dead=True)
        assert made['dead'].tolist() == [False, False, True, True, False, False]
        assert (np.asarray(made['weight']) * losses).sum(1).mean() == pytest.approx(
            wanted, rel=1e-6
        )
