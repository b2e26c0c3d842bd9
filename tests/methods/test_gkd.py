"""Distillation of own answers, and means over sequences: against steps and sums by hand."""

import dataclasses
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import toy_decoders as toys
from toy_decoders import EOS, P, R, V

from kd import config as kd_config
from kd.claims import seeds
from kd.data.sources import Source
from kd.errors import UserError
from kd.losses import divergence
from kd.method import with_nonfinite_guard
from kd.methods.lm import answering
from kd.methods.lm.distillation import distillation

pytestmark = pytest.mark.usefixtures('compiled_quickly')

LR = 0.3
ROLLOUT = dict(max_new=R, stop=(EOS,))


@pytest.fixture(scope='module')
def network():
    return toys.decoder()


def context(network, spec=toys.PROMPTS):
    made = seeds.context(
        network=network, teacher=network, tx=optax.sgd(LR), num_classes=V, spec=spec
    )
    return dataclasses.replace(made, source=lambda split: Source)


@pytest.fixture(scope='module')
def prompts():
    return toys.prompts()


@pytest.fixture(scope='module')
def state(network):
    made = distillation(context(network))
    state = jax.jit(made.init)(jax.random.key(0), {'teacher': toys.drawn(network, 1)})
    return state.with_params(toys.drawn(network, 0)['params'])


def close(first, second, atol=1e-6):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=atol), first, second)


@pytest.mark.parametrize('mode', ['sequence_mean', 'constant'])
def test_means_over_sequences_are_those_by_hand_for_any_micro_batches(
    network, prompts, state, mode
):
    constant = 5.0 if mode == 'constant' else None
    batch = {n: np.array(x) for n, x in jax.jit(answering.as_text)(prompts).items()}
    # A row without a token that counts is no sequence.
    batch['response_mask'][1] = False
    lengths = batch['response_mask'].sum(1)
    assert list(lengths) == [1, 0, 3, 3]

    def objective(params):
        logits = network.apply({'params': params}, batch['input']).logits
        said = network.apply(state.frozen['teacher'], batch['input']).logits
        losses = divergence.forward_kl(logits, said)[:, :-1]
        sums = jnp.where(batch['response_mask'][:, 1:], losses, 0.0).sum(1)
        if mode == 'sequence_mean':
            return (sums[0] + sums[2] / 3 + sums[3] / 3) / 3
        return sums.sum() / 3 / (constant or 1.0)

    value, gradient = jax.jit(jax.value_and_grad(objective))(state.params['network'])
    for parts in (1, 4):
        method = distillation(
            context(network), mean_over=mode, constant=constant, chunk=4, micro_batches=parts
        )
        stepped, metrics = jax.jit(method.step)(state, batch)
        total, count = metrics['loss']
        assert float(total / count) == pytest.approx(float(value), rel=1e-5)
        moved = jax.tree.map(
            lambda x, y: (x - y) / LR, state.params['network'], stepped.params['network']
        )
        close(moved, gradient, atol=3e-5)
        # Metrics of tokens stay means over tokens.
        assert float(metrics['soft_loss'].count) == 7


def test_with_no_sequence_at_all_there_is_no_step_and_no_nan(network, prompts, state):
    batch = {n: np.array(x) for n, x in answering.as_text(prompts).items()}
    batch['response_mask'][:] = False
    method = with_nonfinite_guard(distillation(context(network), mean_over='sequence_mean'), 'skip')
    begun = jax.jit(method.init)(jax.random.key(0), state.frozen)
    stepped, metrics = jax.jit(method.step)(begun, batch)
    assert float(metrics['nonfinite'].total) == 0
    assert float(metrics['loss'].total) == 0
    jax.tree.map(np.testing.assert_array_equal, stepped.params, begun.params)


def test_a_share_of_steps_is_of_the_students_answers_the_others_of_the_datas(
    network, prompts, state
):
    made = context(network)
    mixed = jax.jit(distillation(made, on_policy=0.5, rollout=ROLLOUT).step)
    plain = jax.jit(distillation(made).step)
    answer = jax.jit(answering.on_policy(made, share=1.0, **ROLLOUT))
    of_data = jax.jit(answering.as_text)(prompts)
    own = 0
    for number in range(10):
        now = state.replace(step=jnp.int32(number))
        # The key that `with_collect` gives, by its own words.
        key = jax.random.fold_in(now.step_key(), zlib.crc32(b'collect'))
        found = mixed(now, prompts)[0].params
        wanted = [plain(now, text)[0].params for text in (of_data, answer(now, prompts, key))]
        fits = [
            all(
                np.allclose(x, y, atol=1e-6)
                for x, y in zip(jax.tree.leaves(found), jax.tree.leaves(one), strict=True)
            )
            for one in wanted
        ]
        assert sum(fits) == 1
        own += fits[1]
    assert 2 <= own <= 8


def test_what_does_not_fit_is_told(network):
    made = context(network)
    with pytest.raises(
        UserError, match=r'method\.on_policy=0\.5 needs `rollout`, a block with max'
    ):
        distillation(made, on_policy=0.5)
    block = dict(name='kd.methods.lm.distillation.distillation')

    def built(**rollout):
        kd_config.build(block | dict(rollout=rollout), made, where='stage.method')

    with pytest.raises(UserError, match=r"method\.rollout has an unknown key 'max_ne'"):
        built(max_new=3, max_ne=3)
    with pytest.raises(
        UserError, match=r'stage\.method\.rollout\.max_new must be an integer from 1'
    ):
        built(max_new=0)
    cached = {**toys.PROMPTS, 'teacher_tail': jax.ShapeDtypeStruct((P,), jnp.float32)}
    with pytest.raises(UserError, match=r'the data bring what a teacher has said of their own te'):
        distillation(context(network, cached), rollout=ROLLOUT)
    with pytest.raises(ValueError, match='constant goes with mode constant alone'):
        distillation(made, mean_over='constant')
