"""The layout of rollouts: what it keeps of a sharding, and that a loop then gathers nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from kd import config as kd_config
from kd.aot import hlo
from kd.errors import UserError
from kd.method import Method
from kd.parallel import mesh as mesh_lib
from kd.parallel.sharding import rollout, rollout_rules, tree_shardings
from kd.training.stage import prepare

WIDTH, LAYERS, TOKENS, ROWS = 32, 2, 7, 4


def test_without_rules_of_its_own_a_rollout_keeps_the_tensor_axis_alone():
    rules = (
        ('a', 'fsdp'),
        ('b', (None, 'tensor')),
        ('c', ('fsdp', 'tensor')),
        ('d', (('data', 'fsdp'), ('tensor', 'fsdp'), None)),
        ('e', ()),
    )
    assert rollout_rules(rules) == (
        ('a', ()),
        ('b', (None, ('tensor',))),
        ('c', (None, ('tensor',))),
        ('d', (None, ('tensor',), None)),
        ('e', ()),
    )
    assert rollout_rules(rules, (('.', 'fsdp'),)) == (('.', 'fsdp'),)
    assert rollout_rules(()) == ()


def weights():
    rng = np.random.default_rng(0)
    layers = {
        f'layer{n}': {
            'up': rng.standard_normal((WIDTH, 2 * WIDTH), np.float32) / 8,
            'down': rng.standard_normal((2 * WIDTH, WIDTH), np.float32) / 8,
        }
        for n in range(LAYERS)
    }
    return layers | {'head': rng.standard_normal((WIDTH, WIDTH), np.float32) / 8}


def decode(params, x, choose=lambda params: params):
    """Tokens one after another, each from the last by all layers, until all rows are done."""
    params = choose(params)

    def token(x):
        for n in range(LAYERS):
            layer = params[f'layer{n}']
            x = x + jnp.tanh(x.astype(layer['up'].dtype) @ layer['up']) @ layer['down']
        return jax.nn.softmax(x @ params['head']).astype(x.dtype)

    def turn(x, _):
        x = jax.lax.cond((x > 2).all(), lambda x: x, token, x)
        return x, x

    return jax.lax.scan(turn, x, None, length=TOKENS)[1]


RULES = (('up|head', ('fsdp', 'tensor')), ('down', ('tensor', 'fsdp')))


def compiled(mesh, choose):
    """The program of `decode` for weights sharded by RULES, and what it computes."""
    params, x = weights(), np.random.default_rng(1).standard_normal((ROWS, WIDTH), np.float32)
    layouts = tree_shardings({'params': params}, RULES, mesh)['params']
    params = jax.device_put(params, layouts)
    x = jax.device_put(x, mesh_lib.batch_sharding(mesh))
    program = jax.jit(lambda params, x: decode(params, x, choose)).lower(params, x).compile()
    return hlo.collectives(program.as_text()), program(params, x)


def gathered(found, times):
    """Bytes of all weights gathered so often; those of activations are smaller."""
    sizes = [c.bytes for c in found if c.kind == 'all-gather' and c.times == times]
    return sum(size for size in sizes if size > ROWS * 2 * WIDTH * 4)


@pytest.mark.parametrize(('fsdp', 'tensor'), [(4, 1), (2, 2)])
def test_weights_in_the_layout_of_a_rollout_are_not_gathered_in_its_loop(fsdp, tensor):
    mesh = mesh_lib.make_mesh({'data': 1, 'fsdp': fsdp, 'tensor': tensor}, jax.devices()[:4])

    def laid_out(params):
        return rollout(params, 'params', rules=rollout_rules(RULES), mesh=mesh)

    def narrow(params):
        return rollout(params, rules=rollout_rules(RULES), mesh=mesh, dtype='bfloat16')

    whole = 4 * WIDTH * WIDTH * (4 * LAYERS + 1) // tensor
    sharded, tokens = compiled(mesh, lambda params: params)
    # As they lie, weights are gathered for every token.
    assert (gathered(sharded, TOKENS), gathered(sharded, 1)) == (whole, 0)
    # Laid out, they are so once, before the loop; what lies along 'tensor' stays there.
    rolled, same = compiled(mesh, laid_out)
    assert (gathered(rolled, TOKENS), gathered(rolled, 1)) == (0, whole)
    np.testing.assert_allclose(same, tokens, rtol=1e-5, atol=1e-6)
    # CPUs communicate 16-bit floats as 32.
    half, close = compiled(mesh, narrow)
    assert (gathered(half, TOKENS), gathered(half, 1)) == (0, whole)
    np.testing.assert_allclose(close, tokens, atol=2e-2)
    assert np.abs(close - tokens).max() > 1e-4


def test_only_floating_point_leaves_change_their_type():
    mesh = mesh_lib.make_mesh({'data': 1, 'fsdp': 2})
    tree = {'w': jnp.ones((2, 2)), 'n': jnp.arange(2), 'key': jax.random.key(0)}
    found = jax.jit(lambda tree: rollout(tree, rules=(), mesh=mesh, dtype='float16'))(tree)
    assert {name: str(x.dtype) for name, x in found.items()} == {
        'w': 'float16', 'n': 'int32', 'key': 'key<fry>'
    }  # fmt: skip
    for wrong in ('bfloat17', 'int8'):
        with pytest.raises(UserError, match=f"rollout_dtype='{wrong}' is no floating-point type"):
            rollout(tree, rules=(), mesh=mesh, dtype=wrong)


def nothing(context):
    """A method that is never started."""
    del context
    return Method(None, None)


@pytest.mark.parametrize(
    ('fields', 'spec', 'dtype'),
    [
        ({}, P(None, 'tensor'), jnp.float32),
        ({'rollout_dtype': 'bfloat16'}, P(None, 'tensor'), jnp.bfloat16),
        ({'rollout_sharding': (('^params/w', ('tensor',)),)}, P('tensor'), jnp.float32),
    ],
)
def test_a_recipe_says_how_its_methods_roll_out(fields, spec, dtype):
    config = kd_config.recipe(
        stages=('student',),
        data={'name': 'two_moons', 'train': 'train'},
        mesh={'data': 1, 'fsdp': 2, 'tensor': 2},
        sharding=(('params/w', ('fsdp', 'tensor')),),
        **fields,
    )
    config.student = kd_config.stage(method={'name': f'{__name__}.nothing'}, steps=1, batch_size=8)
    recipe = kd_config.parse(config)
    mesh = mesh_lib.make_mesh(recipe.mesh, jax.devices()[:4])
    stage = prepare(recipe, 'student', mesh)
    rolled = jax.jit(lambda tree: stage.context.rollout(tree, 'params'))({'w': jnp.ones((8, 8))})[
        'w'
    ]
    assert rolled.dtype == dtype
    wanted = jax.sharding.NamedSharding(mesh, spec)
    assert rolled.sharding.is_equivalent_to(wanted, 2)
