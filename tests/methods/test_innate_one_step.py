"""Generators by a discriminator alone: a step by hand, what stays frozen, the lazy penalty."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.errors import UserError
from kd.losses.schedule import edm
from kd.methods.diffusion.innate_one_step import CONVOLUTIONS, corrected, innate_one_step
from kd.models.denoiser import Denoised
from kd.models.discriminator import FourierHead
from kd.models.mlp import MLP
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SPEC = {'input': jax.ShapeDtypeStruct((2,), jnp.float32)}
B, LR, D_LR, GAMMA, LAZY = 5, 0.1, 0.3, 0.2, 2
FOURIER = dict(name='kd.models.discriminator.FourierHead', width=6, frequencies=3)
HEADS = {
    'points': FOURIER,
    'features': dict(name='kd.models.discriminator.FeatureHead', width=4),
}


@pytest.fixture(scope='module')
def network():
    module = Denoised(VelocityMLP(width=6, depth=2), edm(0.02, 5.0), precondition='edm')
    return from_linen(module, *module.example_inputs(SPEC))


@pytest.fixture(scope='module')
def judge():
    return from_linen(MLP((4,), 3, activation='tanh'), jax.ShapeDtypeStruct((1, 2), jnp.float32))


@pytest.fixture(scope='module')
def frozen(network, judge):
    begun = jax.tree.map(lambda x: x + 0.1, jax.jit(network.init)(jax.random.key(1)))
    return {'start': begun, 'judge': jax.jit(judge.init)(jax.random.key(2))}


def method(network, judge, tx=None, **options):
    context = seeds.context(
        network=network, references={'start': network, 'judge': judge}, spec=SPEC, steps=10,
        tx=tx or optax.sgd(LR),
    )  # fmt: skip
    given = dict(
        times=(5.0,), optimizer=dict(name='sgd', lr=D_LR), heads=HEADS, gamma=GAMMA, lazy=LAZY,
        reads={'features': 'judge/hidden0'},
    )  # fmt: skip
    return innate_one_step(context, **given | options)


@pytest.fixture(scope='module')
def batch():
    return {'input': jax.random.normal(jax.random.key(3), (B, 2))}


def test_steps_against_steps_by_hand(network, judge, frozen, batch):
    """Three steps: the generator, then D on new samples of it, and at the third R1."""
    made = method(network, judge)
    state = jax.jit(made.init)(jax.random.key(0), frozen)
    jax.tree.map(
        np.testing.assert_array_equal, state.params['generator'], frozen['start']['params']
    )
    head = FourierHead(width=6, frequencies=3)
    share = LAZY / (LAZY + 1)

    def generated(params, key):
        z = 5.0 * jax.random.normal(jax.random.split(key, 4)[0], (B, 2))
        return network.apply({'params': params}, jnp.full(B, 5.0), z).logits

    def logits(params, x):
        hidden = judge.apply(frozen['judge'], x, capture=('hidden0',)).features['hidden0']
        own = params['features']
        hidden = jax.nn.silu(hidden @ own['hidden']['kernel'] + own['hidden']['bias'])
        other = (hidden @ own['logit']['kernel'] + own['logit']['bias'])[:, 0]
        return head.apply({'params': params['points']}, x), other

    def generator_loss(params, d, key):
        return sum(jnp.log1p(jnp.exp(-y)).mean() for y in logits(d, generated(params, key)))

    def d_loss(d, params, key):
        fake, real = logits(d, generated(params, key)), logits(d, batch['input'])
        both = zip(fake, real, strict=True)
        return sum((jnp.log1p(jnp.exp(a)) + jnp.log1p(jnp.exp(-b))).mean() for a, b in both)

    def penalty(d):
        slopes = jax.vmap(jax.grad(lambda x: sum(y[0] for y in logits(d, x[None]))))
        return LAZY * GAMMA / 2 * jnp.square(slopes(batch['input'])).sum(1).mean()

    @jax.jit
    def by_hand(generator, d, key, due):
        down = lambda tree, grads, rate: jax.tree.map(lambda x, g: x - rate * g, tree, grads)  # noqa: E731
        keys = [jax.random.fold_in(key, i) for i in range(2)]
        generator = down(generator, jax.grad(generator_loss)(generator, d, keys[0]), LR)
        d = down(d, jax.grad(d_loss)(d, generator, keys[1]), share * D_LR)
        return generator, down(d, jax.grad(penalty)(d), due * share * D_LR)

    step = jax.jit(made.step)
    generator, d, penalised = state.params['generator'], state.params['discriminator'], []
    for number in range(3):
        generator, d = by_hand(generator, d, state.step_key(), float(number == 2))
        state, metrics = step(state, batch)
        penalised.append(float(metrics['r1/penalty'].count))
        for part, wanted in (('generator', generator), ('discriminator', d)):
            jax.tree.map(
                lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=2e-6),
                state.params[part], wanted,
            )  # fmt: skip
    # Every second step, and not at the first.
    assert penalised == [0, 0, B]

    # An indifferent discriminator: log 2 of each logit, and no way for the generator to go.
    blind = jax.tree.map(jnp.zeros_like, state.params['discriminator'])
    state = state.replace(params=state.params | {'discriminator': blind})
    after, metrics = step(state, batch)
    loss = {name: float(x.total / x.count) for name, x in metrics.items() if name.endswith('/loss')}
    assert loss['generator/loss'] == pytest.approx(2 * np.log(2), rel=1e-6)
    assert loss['discriminator/loss'] == pytest.approx(4 * np.log(2), rel=1e-6)
    jax.tree.map(
        np.testing.assert_array_equal, after.params['generator'], state.params['generator']
    )


def test_frozen_leaves_stay_to_the_bit_and_have_neither_moments_nor_decay(
    network, judge, frozen, batch
):
    made = method(network, judge, optax.adamw(0.1, weight_decay=0.1), freeze='hidden1', gamma=0)
    state = jax.jit(made.init)(jax.random.key(0), frozen)
    begun, step = state.params['generator'], jax.jit(made.step)
    for _ in range(3):
        state, _ = step(state, batch)
    moved = jax.tree_util.tree_map_with_path(
        lambda path, x, y: (path[0].key, bool((x == y).all())), begun, state.params['generator']
    )
    found = jax.tree.leaves(moved, is_leaf=lambda x: isinstance(x, tuple))
    assert sorted(found) == sorted(
        (name, name == 'hidden1') for name in ('hidden0', 'hidden1', 'out') for _ in range(2)
    )
    sizes = [x.size for x in jax.tree.leaves(state.opt_state['generator'])]
    moving = sum(x.size for name in ('hidden0', 'out') for x in jax.tree.leaves(begun[name]))
    # Two moments and a count.
    assert sum(sizes) == 2 * moving + 1


def test_the_convolutions_of_a_unet_are_frozen_and_what_adapts_is_not():
    import re

    def frozen(path):
        return re.search(CONVOLUTIONS, path) is not None

    kept = ('enc/32x32_block0/conv0/kernel', 'dec/8x8_up/conv1/bias', 'enc/16x16_down/conv0/kernel',
            'dec/8x8_in0/proj/kernel')  # fmt: skip
    assert all(map(frozen, kept))
    for path in ('enc/32x32_block0/affine/kernel', 'enc/32x32_block0/qkv/kernel',
                 'enc/32x32_block0/norm0/scale', 'map_layer0/kernel', 'dec/aux_conv/kernel',
                 'enc/32x32_conv/kernel', 'enc/32x32_block0/skip/kernel'):  # fmt: skip
        assert not frozen(path)


def test_optimisers_of_lazy_moves():
    block = dict(name='adam', lr=1e-2, b1=0.0, b2=0.99)
    assert corrected(block, 16) == dict(
        name='adam', lr=pytest.approx(1e-2 * 16 / 17), b1=0.0, b2=pytest.approx(0.99 ** (16 / 17))
    )


def test_bad_input(network, judge):
    for options, said in (
        (dict(freeze='convolution'), r"freeze='convolution' is found in no leaf"),
        (dict(freeze='('), r"freeze='\(' is no regular expression"),
        (dict(reads={'points': 'judge/pool'}), r"reads.points='judge/pool' wants a head"),
        (dict(reads={'other': 'judge/hidden0'}), r"heads are \['features', 'points'\]"),
    ):
        with pytest.raises(UserError, match=said):
            method(network, judge, **options)
