"""What a stage starts from, leaf by leaf."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.claims import seeds
from kd.errors import UserError
from kd.method import Objective, minimize
from kd.methods import start
from kd.metrics import mean

pytestmark = pytest.mark.usefixtures('compiled_quickly')


def block(value, size=2):
    return {'kernel': jnp.full((size, size), value), 'bias': jnp.full(size, value)}


def variables(**blocks):
    """A network of blocks, with running statistics of the first."""
    first = next(iter(blocks))
    return {'params': blocks, 'stats': {first: {'mean': blocks[first]['bias'] + 0.5}}}


OWN = variables(block0=block(0.0), block1=block(0.1), head=block(0.2))
REFERENCE = variables(block0=block(5.0), block1=block(6.0), head=block(7.0))
# A deeper network, and an autoencoder.
DEEP = variables(block0=block(5.0), block1=block(6.0), block2=block(7.0), head=block(8.0, 3))
AUTOENCODER = {
    'params': {'encoder': REFERENCE['params'], 'decoder': {'out': block(9.0)}},
    'stats': {'encoder': REFERENCE['stats']},
}


@pytest.fixture(scope='module')
def context():
    made = seeds.context(tx=optax.adam(0.1))
    return dataclasses.replace(made, references={'start': object()})


def begun(context, own, reference, transform=None):
    """The state of a method that starts from `reference`, and after a step."""

    def loss(params, state, batch, key):
        return Objective(mean(sum(x.sum() for x in jax.tree.leaves(params)) * batch['x']))

    init = start.from_reference(lambda key: own, context, transform=transform)
    method = minimize(loss, context.tx, init)
    state = jax.jit(method.init)(jax.random.key(0), {'start': reference})
    after = jax.jit(method.step, donate_argnums=0)(state, {'x': np.ones(2, np.float32)})[0]
    return jax.jit(method.init)(jax.random.key(0), {'start': reference}), after


def same(first, second):
    jax.tree.map(np.testing.assert_array_equal, first, second)


def test_the_reference_is_the_network_and_the_optimiser_starts_anew(context):
    state, after = begun(context, OWN, REFERENCE)
    same(state.variables(), REFERENCE)
    same(after.frozen['start'], REFERENCE)
    assert int(state.opt_state[0].count) == 0
    np.testing.assert_allclose(after.variables()['params']['head']['bias'], 6.9, rtol=1e-6)


def test_without_a_reference_nothing_changes():
    init = lambda key: OWN  # noqa: E731
    assert start.from_reference(init, seeds.context()) is init


def test_of_several_parts_the_result_starts_from_the_reference(context):
    state, _ = begun(context, {'network': OWN, 'projector': {'params': block(3.0)}}, REFERENCE)
    same(state.variables(), REFERENCE)
    same(state.params['projector'], block(3.0))


def test_an_encoder_is_picked_out_of_an_autoencoder(context):
    state, _ = begun(context, OWN, AUTOENCODER, start.pick('encoder'))
    same(state.variables(), REFERENCE)


def test_blocks_of_a_deeper_network_and_a_head_of_its_own(context):
    copied = start.copy_blocks({'block0': 'block0', 'block1': 'block2'}, keep='^head')
    state, _ = begun(context, OWN, DEEP, copied)
    params = state.variables()['params']
    same(params, {'block0': block(5.0), 'block1': block(7.0), 'head': block(0.2)})
    same(state.variables()['stats']['block0']['mean'], np.full(2, 5.5))


def test_one_tree_becomes_several_parts_and_a_transform_is_any_function(context):
    def doubled(reference, own):
        assert jax.tree.structure(own) == jax.tree.structure(OWN)
        return jax.tree.map(lambda x: 2 * x, reference)

    own = {'generator': OWN, 'fake': OWN, 'head': {'params': block(3.0)}}
    transform = start.to_parts(generator=start.whole, fake=doubled)
    state, after = begun(context, own, REFERENCE, transform)
    same(state.variables(part='generator'), REFERENCE)
    same(state.variables(part='fake'), jax.tree.map(lambda x: 2 * x, REFERENCE))
    same(state.params['head'], block(3.0))
    same(after.frozen['start'], REFERENCE)


def test_weights_of_another_type_take_the_stages_own(context):
    halves = jax.tree.map(lambda x: x.astype(jnp.bfloat16), REFERENCE)
    state, _ = begun(context, OWN, halves)
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype('float32')}
    same(state.variables(), REFERENCE)


def test_a_head_begins_anew_whatever_its_shape(context):
    """What is matched comes from neither side's place in the other; all else is the reference."""
    reference = variables(block0=block(5.0), block1=block(6.0), head=block(8.0, 3), norm=block(9.0))
    own = {**OWN, 'params': {**OWN['params'], 'places': block(0.3)}}
    state, after = begun(context, own, reference, start.all_but('^(head|norm|places)'))
    found = state.variables()['params']
    same(found, {**own['params'], 'block0': block(5.0), 'block1': block(6.0)})
    same(state.variables()['stats'], reference['stats'])
    assert float(after.params['network']['places']['bias'][0]) != pytest.approx(0.3)


ALL = start.copy_blocks({'': ''})
BUT_ONE = start.copy_blocks({'': ''}, drop='block2')


@pytest.mark.parametrize(
    ('reference', 'transform', 'message'),
    [
        (DEEP, None, r"\.start: 'params/block2/bias' is \(2,\) in what .* and nothing in"),
        (DEEP, BUT_ONE, r"'params/head/bias' is \(3,\) .* and \(2,\)"),
        (DEEP, ALL, "'params/block2/.*' of the reference goes nowhere"),
        (DEEP, start.copy_blocks({'block0': 'block0'}), "'params/block1/bias' the reference has"),
        (DEEP, start.all_but('^head'), "'params/block2/.*' of the reference goes nowhere"),
        (AUTOENCODER, start.all_but('^head'), "the own 'params/block0/bias' the reference has"),
        (REFERENCE, start.pick('encoder'), "'params/block0/bias' the reference has nothing"),
        (REFERENCE, lambda reference, own: {'params': {}}, "'params/block0/bias' is nothing in"),
    ],
)
def test_what_does_not_fit_is_named(context, reference, transform, message):
    with pytest.raises(UserError, match=message):
        begun(context, OWN, reference, transform)
