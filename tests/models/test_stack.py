"""Stacks of blocks: folding them is the network, and less of one is really smaller and faster."""

import jax
import jax.numpy as jnp
import latent_cases
import numpy as np
import pytest

from kd.errors import UserError
from kd.methods.pruning import gates_without
from kd.models import mmdit
from kd.models.dit import BRANCHES, DiT
from kd.models.mlp import MLP
from kd.models.stack import branches_there, restricted, sizes, stack
from kd.network import parameter_count

pytestmark = pytest.mark.usefixtures('compiled_quickly')

NETWORK = DiT(patch=2, width=8, depth=4, heads=2, num_classes=3)
S, T = jnp.array([0.1, 0.3]), jnp.array([0.6, 0.9])
X = 0.5 * jax.random.normal(jax.random.key(0), (2, 4, 6, 1))
INPUTS, TOLD = (S, T, X), dict(label=jnp.array([0, 2]))
DROPPED = ('block1', 'block2/attention', 'block3/mlp')


def draw(network, inputs=INPUTS, told=TOLD):
    """Parameters of which none is zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(1), *inputs, **told)
    return jax.tree.map(lambda p: 0.5 * rng.standard_normal(p.shape, np.float32), shapes)


def folded(module, variables, inputs, told, gates=None):
    net = stack(module)
    carry, context = net.embed(variables, *inputs, **told)
    for i, name in enumerate(net.names):
        own = None if gates is None else gates[i]
        carry = net.block(net.params(variables, name), name, carry, context, gates=own)
    return net.head(variables, carry, context)


def said(module, variables, **more):
    return jax.jit(lambda v: module.apply(v, *INPUTS, **TOLD, **more))(variables)


def small_of(module, variables, **changes):
    """A smaller network with weights of a larger one."""
    own = module.clone(**changes)
    begun = draw(own)
    made = restricted(module, own)(variables, begun)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a.shape, b.shape), made, begun)
    return own, made


def test_folding_the_blocks_is_the_network_bit_for_bit():
    variables = draw(NETWORK)
    fold = jax.jit(lambda v: folded(NETWORK, v, INPUTS, TOLD))
    np.testing.assert_array_equal(fold(variables), said(NETWORK, variables))


def test_less_of_a_network_is_the_network_with_gates_of_zero():
    variables = draw(NETWORK)
    own, made = small_of(NETWORK, variables, dropped=DROPPED)
    gates = jnp.array([[1, 1], [0, 0], [0, 1], [1, 0]], jnp.float32)
    gated = said(NETWORK, variables, gates=gates)
    np.testing.assert_allclose(said(own, made), gated, rtol=1e-4, atol=1e-5)
    assert np.abs(gated - said(NETWORK, variables)).max() > 1e-2
    # Names of blocks stay; nothing of what is dropped is left.
    names = {name for name in made['params'] if name.startswith('block')}
    assert names == {'block0', 'block2', 'block3'}
    assert set(made['params']['block3']) == {'modulation', 'qkv', 'q_norm', 'k_norm', 'projection'}
    assert made['params']['block2']['modulation']['kernel'].shape == (8, 24)
    # It is a stack too, and more may go.
    fold = jax.jit(lambda v: folded(own, v, INPUTS, TOLD))
    np.testing.assert_array_equal(fold(made), said(own, made))
    again, twice = small_of(own, made, dropped=(*DROPPED, 'block0/mlp'))
    less = said(NETWORK, variables, gates=gates.at[0, 1].set(0))
    np.testing.assert_allclose(said(again, twice), less, rtol=1e-4, atol=1e-5)


def test_sizes_are_what_a_smaller_network_lacks():
    variables = draw(NETWORK)
    found = sizes(NETWORK, variables)
    assert list(found) == [f'block{i}/{branch}' for i in range(4) for branch in BRANCHES]
    # qkv, projection, norms of queries and keys, half of the modulation; two layers and a half.
    assert found['block0/attention'] == (8 * 24 + 24) + (8 * 8 + 8) + 8 + (8 * 24 + 24)
    assert found['block0/mlp'] == (8 * 32 + 32) + (32 * 8 + 8) + (8 * 24 + 24)
    own, made = small_of(NETWORK, variables, dropped=DROPPED)
    gone = ('block1/attention', 'block1/mlp', *DROPPED[1:])
    lost = parameter_count(variables) - parameter_count(made)
    assert lost == sum(found[name] for name in gone)
    assert sum(sizes(own, made).values()) == sum(found.values()) - lost


def test_linear_maps_in_place_of_a_branch_and_after_a_block():
    variables = draw(NETWORK)
    own, made = small_of(NETWORK, variables, dropped=('block3',), linear=('block1/mlp', 'block2'))
    assert set(made['params']['block1']) == {
        'modulation', 'qkv', 'q_norm', 'k_norm', 'projection', 'mlp_linear',
    }  # fmt: skip
    assert 'after' in made['params']['block2']
    # Where they are zero a branch is skipped, and nothing comes after a block.
    zero = jax.tree.map(np.copy, made)
    for name, layer in (('block1', 'mlp_linear'), ('block2', 'after')):
        zero['params'][name][layer] = jax.tree.map(np.zeros_like, made['params'][name][layer])
    gates = jnp.ones((4, 2)).at[3].set(0).at[1, 1].set(0)
    gated = said(NETWORK, variables, gates=gates)
    np.testing.assert_allclose(said(own, zero), gated, rtol=1e-4, atol=1e-5)
    # And a map is x + l(x), by hand.
    net = stack(own)
    tokens, context = net.embed(made, *INPUTS, **TOLD)
    after = net.block(net.params(made, 'block2'), 'block2', tokens, context)
    before = net.block(net.params(zero, 'block2'), 'block2', tokens, context)
    layer = made['params']['block2']['after']
    wanted = before + before @ layer['kernel'] + layer['bias']
    np.testing.assert_allclose(after, wanted, rtol=1e-4, atol=1e-4)


def test_what_is_not_there():
    with pytest.raises(ValueError, match=r"there is no 'block9': blocks are block0, block1,"):
        branches_there(NETWORK.blocks, ('block9',))
    with pytest.raises(ValueError, match=r"'block1/ff'.*with \['attention', 'mlp'\]"):
        NETWORK.clone(dropped=('block1/ff',)).init(jax.random.key(0), *INPUTS)
    with pytest.raises(UserError, match=r'the blocks of a MLP cannot be addressed'):
        stack(MLP(widths=(4,), num_classes=2))
    with pytest.raises(UserError, match=r'is no part of the one .* which has no whole block1'):
        restricted(NETWORK.clone(dropped=('block1',)), NETWORK)


# Transformers of text and tokens


@pytest.fixture(scope='module')
def joint():
    """{name: (module, variables, inputs, told)} of SD 3.5, Flux and Qwen-Image, tiny."""
    return {
        name: (latent_cases.module_of(name), latent_cases.variables_of(name),
               *latent_cases.INPUTS[name])
        for name in ('sd35', 'flux', 'qwen')
    }  # fmt: skip


@pytest.mark.parametrize('name', ['flux', 'qwen'])
def test_folding_text_and_tokens_is_the_network_bit_for_bit(name, joint):
    module, variables, inputs, told = joint[name]
    net = stack(module)

    @jax.jit
    def all_of(variables):
        carry, context = net.embed(variables, *inputs, **told)
        whole = net.fold(variables, net.names, carry, context)
        one_by_one = carry
        for block in net.names:
            one_by_one = net.block(net.params(variables, block), block, one_by_one, context)
        outs = [net.head(variables, end, context) for end in (whole, one_by_one)]
        return module.apply(variables, *inputs, **told), *outs

    wanted, whole, one_by_one = all_of(variables)
    np.testing.assert_array_equal(whole, wanted)
    np.testing.assert_allclose(one_by_one, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('name', 'dropped'),
    [
        ('sd35', ('transformer_blocks_0/attention', 'transformer_blocks_1/context_mlp',
                  'transformer_blocks_2/mlp')),
        ('flux', ('transformer_blocks_0/mlp', 'single_transformer_blocks_0')),
        ('qwen', ('transformer_blocks_1',)),
    ],
)  # fmt: skip
def test_less_of_text_and_tokens_is_the_network_with_gates_of_zero(name, dropped, joint):
    module, variables, inputs, told = joint[name]
    own = module.clone(dropped=dropped)
    shapes = jax.eval_shape(
        lambda: own.init(jax.random.key(0), *(jnp.zeros(s) for s in latent_cases.shapes_of(name)))
    )
    made = restricted(module, own)(variables, shapes)
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), made, shapes)
    gates = gates_without(module.blocks, dropped)
    gated, less, whole = jax.jit(
        lambda v, m: (
            module.apply(v, *inputs, **told, gates=gates),
            own.apply(m, *inputs, **told),
            module.apply(v, *inputs, **told),
        )
    )(variables, made)
    np.testing.assert_allclose(less, gated, rtol=1e-4, atol=1e-4)
    assert np.abs(gated - whole).max() > 1e-2
    found = sizes(module, variables)
    gone = [p for d in dropped for p in found if p == d or p.startswith(f'{d}/')]
    lost = parameter_count(variables) - parameter_count(made)
    assert lost == sum(found[part] for part in gone)


def test_a_block_before_a_gap_lies_alone():
    whole = mmdit.preset('qwen_image')
    own = whole.clone(dropped=('transformer_blocks_4', 'transformer_blocks_6'))
    groups = {name: len(members) for name, members in own.groups.items()}
    assert groups == {
        'transformer_blocks': 3,
        'transformer_blocks_from_3': 1,
        'transformer_blocks_from_5': 1,
        'transformer_blocks_from_7': 53,
    }
    assert {name: len(m) for name, m in whole.groups.items()} == {'transformer_blocks': 60}
    assert list(mmdit.preset('sd35_large').groups) == [
        'transformer_blocks', 'transformer_blocks_37',
    ]  # fmt: skip
    with pytest.raises(ValueError, match='are not blocks one after the other'):
        stack(whole).fold({}, ('transformer_blocks_0', 'transformer_blocks_2'), None, None)
