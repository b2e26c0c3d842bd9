"""RLAD against plain forward passes and NumPy; its ratio itself: tests/losses/test_policy.py."""

import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from answering import (
    REWARD,
    SAMPLING,
    G,
    Run,
    close,
    context,
    decoder,
    forced,
    log_probs,
    prompts,
    sharp,
    value,
)

from kd import config
from kd.errors import UserError
from kd.methods.rl import common
from kd.methods.rl.grpo import grpo
from kd.methods.rl.rlad import rlad
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.fixture(scope='module')
def network():
    return decoder()


@pytest.fixture(scope='module')
def batch():
    return prompts()


@pytest.fixture(scope='module')
def once(network):
    """One update."""
    return Run(rlad, network, chunk=32, fields={'teacher': network})


def moved(before, after):
    return jax.tree.map(lambda x, y: x - y, before.params, after.params)['network']


def largest(tree):
    return float(max(jnp.abs(x).max() for x in jax.tree.leaves(tree)))


def test_the_loss_is_that_of_the_equation(network, batch, once):
    """Values by NumPy from plain forward passes of both, on the answers that the step samples."""
    teacher = sharp(network, 7)
    before, _, metrics = once(batch, frozen={'teacher': teacher})
    of = context(network)
    draw = common.drawing(of, common.Sampling(**SAMPLING))
    roll = common.rollouts(of, draw, common.of_block(of, REWARD), group=G)
    # By the step's own key.
    key = jax.random.fold_in(before.step_key(), zlib.crc32(b'collect'))
    state = State.create(jax.random.key(0), sharp(network, 1))
    made = jax.tree.map(np.asarray, jax.jit(roll)(state, batch, key))
    own = log_probs(network, sharp(network, 1), made)[0]
    theirs = log_probs(network, teacher, made)[0]
    ratio = np.exp(0.5 * np.clip(own - theirs, -1, 1))
    advantage = made['advantage'][:, None]
    losses = -np.minimum(ratio * advantage, np.clip(ratio, 0.8, 1.28) * advantage)
    rows = (losses * made['mask']).sum(1) / made['mask'].sum(1)
    assert value(metrics, 'loss') == pytest.approx(rows.mean(), abs=1e-5)
    clipped = np.where(advantage > 0, ratio > 1.28, (ratio < 0.8) & (advantage < 0))[made['mask']]
    assert clipped.mean() > 0.1
    # A large share of tokens is clipped though the answers are fresh.
    assert value(metrics, 'clip_fraction') == pytest.approx(clipped.mean(), abs=1e-6)
    assert value(metrics, 'kl_to_teacher') == pytest.approx(
        (own - theirs)[made['mask']].mean(), abs=1e-5
    )


@pytest.mark.parametrize('verdict', [0.0, 1.0])
def test_groups_of_equal_rewards_learn_nothing_from_a_teacher(network, batch, once, verdict):
    before, after, metrics = once(forced(batch, verdict), frozen={'teacher': sharp(network, 7)})
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    assert value(metrics, 'grad_norm') == 0
    assert value(metrics, 'nonfinite') == 0


def test_the_step_depends_on_the_teacher(network, batch, once):
    steps = [once(batch, frozen={'teacher': sharp(network, seed)})[1] for seed in (7, 8)]
    assert largest(moved(*steps)) > 1e-3


@pytest.fixture(scope='module')
def together(network):
    """The claim's program, for any of its methods."""
    claim = config.load_module(Path('configs/claims/rlad.py'))

    def build(of, *, reward, sampling):
        return claim.side_by_side(of, 1, reward, sampling)

    return Run(build, network, fields={'teacher': network})


def as_arm(beta=0.0, anchored=False):
    return {'beta': np.float32(beta), 'anchored': np.bool_(anchored)}


def test_a_teacher_that_is_the_student_is_grpo(network, batch, once, together):
    teacher = {'teacher': sharp(network, 1)}
    before, after, metrics = once(batch, frozen=teacher)
    _, wanted, _ = together(batch, frozen={**teacher, **as_arm()})
    close(after.params, wanted.params, atol=1e-6)
    assert largest(moved(before, after)) > 1e-2
    assert value(metrics, 'clip_fraction') == 0


def test_the_claim_has_these_methods_in_one_program(network, batch, once, together):
    pulled = Run(grpo, network, chunk=32, high=0.28, teacher_weight=0.3,
                 fields={'teacher': network})  # fmt: skip
    teacher = {'teacher': sharp(network, 7)}
    for method, arm in ((once, as_arm(anchored=True)), (pulled, as_arm(beta=0.3))):
        _, found, _ = together(batch, frozen={**teacher, **arm})
        _, wanted, _ = method(batch, frozen=teacher)
        close(found.params, wanted.params, atol=1e-6)


def test_what_does_not_fit_is_told(network):
    with pytest.raises(UserError, match=r'needs stage\.teacher'):
        Run(rlad, network)
    with pytest.raises(UserError, match=r'kl_weight=0\.1 needs a reference of'):
        Run(rlad, network, kl_weight=0.1, fields={'teacher': network})
