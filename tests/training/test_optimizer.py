"""Schedules and optimisers against NumPy formulas and against optax's own."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.errors import UserError
from kd.training import optimizer as optim

pytestmark = pytest.mark.usefixtures('compiled_quickly')

STEPS, WARMUP, PEAK = 40, 8, 0.3


def rates(name, **options):
    rate = optim.schedule(name, PEAK, STEPS, **options)
    return np.array([rate(n) for n in range(STEPS + 3)])


def test_cosine_and_linear_are_the_schedules_of_optax():
    steps = np.arange(STEPS + 3)
    cosine = optax.cosine_decay_schedule(PEAK, STEPS, alpha=0.1)
    np.testing.assert_allclose(rates('cosine', end=0.1), [cosine(n) for n in steps], rtol=1e-6)
    linear = optax.linear_schedule(PEAK, 0.1 * PEAK, STEPS)
    np.testing.assert_allclose(rates('linear', end=0.1), [linear(n) for n in steps], rtol=1e-6)


def test_step_is_the_piecewise_constant_schedule_of_optax():
    theirs = optax.piecewise_constant_schedule(PEAK, {20: 0.2, 30: 0.2})
    expected = [theirs(n) for n in range(STEPS + 3)]
    ours = rates('step', boundaries=(0.5, 0.75), factor=0.2)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)
    np.testing.assert_allclose(rates('step'), PEAK, rtol=1e-6)


def test_constant_and_rsqrt_are_their_formulas():
    steps = np.arange(STEPS + 3)
    np.testing.assert_allclose(rates('constant'), np.full(STEPS + 3, PEAK), rtol=1e-6)
    np.testing.assert_allclose(
        rates('rsqrt', timescale=4), PEAK / np.sqrt(np.maximum(steps / 4, 1)), rtol=1e-6
    )


@pytest.mark.parametrize('name', optim.SCHEDULES)
def test_warm_up_rises_linearly_to_the_decay(name):
    steps = np.arange(STEPS + 3)
    progress = np.clip((steps - WARMUP) / (STEPS - WARMUP), 0, 1)
    decay = {
        'constant': np.ones_like(progress),
        'cosine': 0.1 + 0.9 * (1 + np.cos(np.pi * progress)) / 2,
        'linear': 0.1 + 0.9 * (1 - progress),
        'step': 0.5 ** ((steps >= 0.1 * STEPS) + 0.0 + (steps >= 0.5 * STEPS)),
        'rsqrt': 1 / np.sqrt(np.maximum(steps / 4, 1)),
    }[name]
    options = {'step': {'boundaries': (0.1, 0.5), 'factor': 0.5}, 'rsqrt': {'timescale': 4}}.get(
        name, {'end': 0.1}
    )
    warm = np.minimum((steps + 1) / WARMUP, 1)
    np.testing.assert_allclose(
        rates(name, warmup_steps=WARMUP, **options), PEAK * decay * warm, rtol=1e-5, atol=1e-8
    )


def test_a_cosine_ends_at_zero_and_stays_there():
    np.testing.assert_allclose(rates('cosine', warmup_steps=WARMUP)[STEPS:], 0, atol=1e-8)


PARAMS = {
    'dense': {'kernel': np.array([[1.0, -2.0], [0.5, 3.0]], np.float32),
              'bias': np.array([1.0, -1.0], np.float32)},
    'norm': {'scale': np.array([2.0, 0.5], np.float32)},
}  # fmt: skip
GRADS = {
    'dense': {'kernel': np.array([[0.1, 0.2], [-0.3, 0.4]], np.float32),
              'bias': np.array([0.5, -0.6], np.float32)},
    'norm': {'scale': np.array([-0.7, 0.8], np.float32)},
}  # fmt: skip
MASK = {'dense': {'kernel': True, 'bias': False}, 'norm': {'scale': False}}


def train(tx, steps=3):
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(steps):
        updates, state = tx.update(GRADS, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_same(first, second):
    for block, leaves in first.items():
        for name, leaf in leaves.items():
            np.testing.assert_allclose(leaf, second[block][name], rtol=1e-6, err_msg=name)


def test_sgd_with_decay_momentum_and_schedule_is_numpys():
    tx = optim.optimizer(
        3, name='sgd', lr=0.1, momentum=0.9, weight_decay=0.01, schedule='linear', warmup_steps=1
    )
    trained = train(tx)
    for block, leaves in PARAMS.items():
        for name, value in leaves.items():
            w, velocity = value.astype(np.float64), 0.0
            for step in range(3):
                slope = GRADS[block][name] + 0.01 * w * MASK[block][name]
                velocity = slope + 0.9 * velocity
                w = w - 0.1 * (1 - max(step - 1, 0) / 2) * velocity
            np.testing.assert_allclose(trained[block][name], w, rtol=1e-6)


@pytest.mark.parametrize('name', ['adamw', 'lion', 'lamb', 'adan', 'lars'])
def test_decoupled_decay_is_optaxs_own_on_matrices_only(name):
    ours = optim.optimizer(3, name=name, lr=0.1, weight_decay=0.5)
    mask = 'weight_decay_mask' if name == 'lars' else 'mask'
    theirs = getattr(optax, name)(0.1, weight_decay=0.5, **{mask: MASK})
    assert_same(train(ours), train(theirs))


def test_the_default_is_adamw_without_decay():
    assert_same(train(optim.optimizer(3, lr=0.1)), train(optax.adam(0.1)))


def test_adam_gets_its_decay_added_to_the_gradient():
    ours = optim.optimizer(3, name='adam', lr=0.1, weight_decay=0.5, b1=0.8)
    theirs = optax.chain(optax.add_decayed_weights(0.5, mask=MASK), optax.adam(0.1, b1=0.8))
    assert_same(train(ours), train(theirs))


def test_gradients_are_clipped_to_a_global_norm_before_the_decay():
    squares = sum(float((g**2).sum()) for block in GRADS.values() for g in block.values())
    norm = np.sqrt(squares)
    trained = train(
        optim.optimizer(1, name='sgd', lr=1.0, clip_norm=0.5 * norm, weight_decay=0.1), steps=1
    )
    for block, leaves in PARAMS.items():
        for name, w in leaves.items():
            expected = w - 0.5 * GRADS[block][name] - 0.1 * w * MASK[block][name]
            np.testing.assert_allclose(trained[block][name], expected, rtol=1e-5, atol=1e-6)
    unclipped = train(optim.optimizer(1, name='sgd', lr=1.0, clip_norm=2 * norm), steps=1)
    assert_same(unclipped, train(optax.sgd(1.0), steps=1))


def test_factors_come_after_adam_and_the_first_match_wins():
    plain = optim.optimizer(3, lr=0.1, weight_decay=0.5)
    ours = optim.optimizer(
        3, lr=0.1, weight_decay=0.5, scale=(('bias', 0.25), ('dense', 0.5), ('dense/kernel', 9.0))
    )
    first, second = train(plain, steps=1), train(ours, steps=1)
    factors = {'kernel': 0.5, 'bias': 0.25, 'scale': 1.0}
    for block, leaves in PARAMS.items():
        for name, start in leaves.items():
            moved = first[block][name] - start
            np.testing.assert_allclose(
                second[block][name] - start, factors[name] * moved, rtol=1e-5, atol=1e-8
            )


def test_factor_zero_keeps_every_bit_and_no_state():
    frozen = {**PARAMS, 'norm': {'scale': np.array([2.0, -0.0], np.float32)}}
    tx = optim.optimizer(
        10, lr=0.1, weight_decay=0.1, clip_norm=1e-3, scale=(('norm|kernel', 0.0),)
    )
    params, state = frozen, tx.init(frozen)
    update = jax.jit(lambda p, s: tx.update(GRADS, s, p))
    for _ in range(10):
        updates, state = update(params, state)
        params = optax.apply_updates(params, updates)
    for block, name in (('norm', 'scale'), ('dense', 'kernel')):
        assert np.asarray(params[block][name]).tobytes() == frozen[block][name].tobytes()
    shapes = sorted(x.shape for x in jax.tree.leaves(state))
    assert shapes == [(), (), (2,), (2,)]  # Two counts and the moments of the bias.
    # The frozen gradients do not count in the norm to which the others are clipped.
    alone = optim.optimizer(10, lr=0.1, weight_decay=0.1, clip_norm=1e-3)
    bias, state = {'bias': PARAMS['dense']['bias']}, alone.init({'bias': PARAMS['dense']['bias']})
    for _ in range(10):
        updates, state = alone.update({'bias': GRADS['dense']['bias']}, state, bias)
        bias = optax.apply_updates(bias, updates)
    np.testing.assert_allclose(params['dense']['bias'], bias['bias'], atol=1e-6)


def test_layer_decay_falls_from_the_head_to_the_embedding():
    names = ('patch_embed/kernel', 'block0/mlp/up/kernel', 'block10/norm/scale', 'block1/bias',
             'encoder_norm/scale', 'head/kernel')  # fmt: skip
    pairs = optim.layer_decay(11, 0.5)
    found = [next(f for e, f in pairs if re.search(e, name)) for name in names]
    assert found == [0.5**12, 0.5**11, 0.5, 0.5**10, 1.0, 1.0]


def test_several_updates_in_a_step_share_its_rate():
    tx = optim.optimizer(4, name='sgd', lr=1.0, schedule='linear', updates=3)
    state, rates = tx.init(jnp.zeros(())), []
    for _ in range(12):
        update, state = tx.update(jnp.ones(()), state)
        rates.append(-float(update))
    np.testing.assert_allclose(rates, np.repeat([1.0, 0.75, 0.5, 0.25], 3), rtol=1e-6)


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ({'name': 'adamm'}, "optax has no optimiser 'adamm'. Did you mean 'adam'"),
        ({'schedule': 'cosin'}, "'cosin' is unknown. Did you mean 'cosine'"),
        ({'name': 'sgd', 'momentun': 0.9}, "unknown key 'momentun'. Did you mean 'momentum'"),
        ({'schedule_args': {'ent': 0.1}}, "unknown key 'ent'. Did you mean 'end'"),
        ({'schedule_args': {'steps': 5}}, "unknown key 'steps'"),
        ({'scale': (('(', 1.0),)}, 'scale must be .* pairs: missing'),
        ({'scale': (('head', -1.0),)}, r'scale must be .* from 0'),
    ],
)
def test_mistyped_arguments_are_named(arguments, message):
    with pytest.raises(UserError, match=message):
        optim.optimizer(10, lr=0.1, **arguments)


def test_a_factor_for_nothing_is_a_typing_error():
    tx = optim.optimizer(10, lr=0.1, scale=(('dens/', 0.5),))
    with pytest.raises(UserError, match="'dens/' matches no parameter"):
        tx.init(PARAMS)


def test_the_rate_is_float32_from_an_integer_step():
    assert optim.schedule('cosine', PEAK, STEPS)(jnp.int32(3)).dtype == jnp.float32
