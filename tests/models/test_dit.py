"""The diffusion transformer's parts: its grid, its blocks one by one, their gates and maps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.models.dit import BRANCHES, Block, DiT, grid_embedding

pytestmark = pytest.mark.usefixtures('compiled_quickly')

NETWORK = DiT(patch=2, width=8, depth=3, heads=2, num_classes=3)
S, T = jnp.array([0.1, 0.3]), jnp.array([0.6, 0.9])
X = 0.5 * jax.random.normal(jax.random.key(0), (2, 4, 6, 1))
LABEL = jnp.array([0, 2])


def draw(network):
    """Parameters of which none is zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(1), S, T, X, label=LABEL)
    return jax.tree.map(lambda p: 0.5 * rng.standard_normal(p.shape, np.float32), shapes)


@pytest.fixture(scope='module')
def params():
    return draw(NETWORK)


@pytest.fixture(scope='module')
def apply():
    """Jitted (params, gates) -> velocity."""
    return jax.jit(
        lambda params, gates=None: NETWORK.apply(params, S, T, X, label=LABEL, gates=gates)
    )


def fold(network, params, blocks):
    """The velocity by embed, the blocks named, and head."""
    tokens, condition = network.apply(params, S, T, X, label=LABEL, method='embed')
    for layer in blocks:
        tokens = network.apply(params, layer, tokens, condition, method='block')
    return network.apply(params, tokens, condition, X, method='head')


def test_the_network_is_head_after_blocks_after_embed(params, apply):
    folded = jax.jit(lambda params: fold(NETWORK, params, range(3)))(params)
    np.testing.assert_array_equal(folded, apply(params))


def test_a_block_alone_needs_its_own_parameters_alone(params):
    rng = np.random.default_rng(1)
    tokens, condition = (rng.standard_normal(s, np.float32) for s in ((2, 6, 8), (2, 8)))
    block = Block(2, 4, 0.0, qk_norm=True, fused=False, dtype=jnp.float32)
    alone = jax.jit(lambda p: block.apply({'params': p['params']['block1']}, tokens, condition))(
        params
    )
    within = jax.jit(lambda p: NETWORK.apply(p, 1, tokens, condition, method='block'))(params)
    np.testing.assert_array_equal(alone, within)


def test_gates_of_ones_change_nothing_and_of_zeros_skip_a_block(params, apply):
    whole = apply(params)
    ones = jnp.ones((3, len(BRANCHES)))
    np.testing.assert_allclose(apply(params, ones), whole, rtol=1e-5, atol=1e-6)
    without = jax.jit(lambda params: fold(NETWORK, params, (0, 2)))(params)
    np.testing.assert_allclose(apply(params, ones.at[1].set(0.0)), without, rtol=1e-5, atol=1e-6)
    # A branch without its last layer adds nothing but that layer's bias.
    for branch, layer in enumerate(('projection', 'mlp1')):
        mute = jax.tree.map(np.copy, params)
        for leaf in mute['params']['block1'][layer].values():
            leaf[:] = 0.0
        gated = apply(params, ones.at[1, branch].set(0.0))
        np.testing.assert_allclose(gated, apply(mute), rtol=1e-5, atol=1e-6)
        assert float(jnp.abs(gated - whole).max()) > 1e-2


def test_a_gate_weighs_its_branch(params):
    # The last branch of the last block enters the head linearly but for the norm: look before it.
    tokens = np.random.default_rng(2).standard_normal((2, 6, 8), np.float32)
    condition = jnp.ones((2, 8))
    block = jax.jit(
        lambda gate: NETWORK.apply(
            params, 2, tokens, condition, gates=jnp.array([1.0, gate]), method='block'
        )
    )
    none, half, one = (block(gate) for gate in (0.0, 0.5, 1.0))
    np.testing.assert_allclose(2 * (half - none), one - none, rtol=1e-4, atol=1e-5)


def test_maps_of_a_block_can_be_edited(params):
    tokens = np.random.default_rng(2).standard_normal((2, 6, 8), np.float32)

    def block(edit):
        return NETWORK.apply(params, 1, tokens, jnp.ones((2, 8)), edit=edit, method='block')

    same, uniform = block(lambda maps: maps), block(lambda maps: jnp.full_like(maps, 1 / 6))
    np.testing.assert_allclose(same, block(None), atol=1e-6)
    # With uniform maps every token gets the mean of the values, of the modulated, normed tokens.
    p = params['params']['block1']
    silu = 1 / (1 + np.exp(-1.0))
    modulation = silu * p['modulation']['kernel'].sum(0) + p['modulation']['bias']
    shift, scale, gate = modulation[:8], modulation[8:16], modulation[16:24]
    normed = (tokens - tokens.mean(-1, keepdims=True)) / tokens.std(-1, keepdims=True)
    values = (normed * (1 + scale) + shift) @ p['qkv']['kernel'][:, 16:] + p['qkv']['bias'][16:]
    added = values.mean(1, keepdims=True) @ p['projection']['kernel'] + p['projection']['bias']
    only = NETWORK.apply(
        params, 1, tokens, jnp.ones((2, 8)), gates=jnp.array([1.0, 0.0]), method='block',
        edit=lambda maps: jnp.full_like(maps, 1 / 6),
    )  # fmt: skip
    np.testing.assert_allclose(only, tokens + gate * added, rtol=1e-4, atol=1e-4)
    assert float(jnp.abs(uniform - same).max()) > 1e-2


def test_queries_and_keys_are_normalised_unless_told_otherwise():
    plain = NETWORK.copy(qk_norm=False)
    names = set(draw(plain)['params']['block0'])
    assert names == {'modulation', 'qkv', 'projection', 'mlp0', 'mlp1'}
    assert set(draw(NETWORK)['params']['block0']) == names | {'q_norm', 'k_norm'}
    params = draw(plain)
    tokens = np.random.default_rng(2).standard_normal((2, 6, 8), np.float32)

    def maps(network, params):
        kept = []
        network.apply(
            params, 0, tokens, jnp.ones((2, 8)), edit=lambda m: kept.append(m) or m, method='block'
        )
        return kept[0]

    grown = jax.tree.map(np.copy, params)
    grown['params']['block0']['qkv']['kernel'] *= 10
    grown['params']['block0']['qkv']['bias'] *= 10
    # Logits grow by a hundred: maps become certain, where normalised ones would not change.
    assert float(maps(plain, grown).max(-1).min()) > float(maps(plain, params).max(-1).min())
    normed = jax.tree.map(np.copy, grown)
    ones = {'scale': np.ones(4, np.float32)}
    for p in (normed, params):
        p['params']['block0'] |= {'q_norm': ones, 'k_norm': ones}
    np.testing.assert_allclose(maps(NETWORK, normed), maps(NETWORK, params), rtol=1e-3, atol=1e-5)


def test_fused_attention_is_the_same_where_there_is_no_kernel(params, apply):
    fused = NETWORK.copy(fused=True)
    found = jax.jit(lambda params: fused.apply(params, S, T, X, label=LABEL))(params)
    np.testing.assert_array_equal(found, apply(params))


def test_the_grid_has_the_order_of_released_weights():
    # Column first, then row; of each the sines, then the cosines. Row 1 and column 2 of 3:
    # sin 2, sin .02, cos 2, cos .02, sin 1, sin .01, cos 1, cos .01.
    patch = grid_embedding(2, 3, 8)[5]
    assert patch[0] == pytest.approx(0.9092974, abs=1e-6)
    assert patch[2] == pytest.approx(-0.4161468, abs=1e-6)
    assert patch[4] == pytest.approx(0.8414710, abs=1e-6)
    wanted = [0.9092974, 0.0199987, -0.4161468, 0.9998000, 0.8414710, 0.0099998, 0.5403023, 0.99995]
    np.testing.assert_allclose(patch, wanted, atol=1e-6)


def test_dit_without_blocks_is_local_to_patches():
    network = DiT(patch=2, width=8, depth=0, heads=1, dtype=jnp.float32)
    s, t, x = jnp.array([0.2]), jnp.array([0.8]), jnp.zeros((1, 4, 6, 3))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(network.init, jax.random.key(0), s, t, x)
    params = jax.tree.map(lambda p: np.asarray(rng.standard_normal(p.shape)), shapes)
    apply = jax.jit(network.apply)
    change = apply(params, s, t, x.at[0, 3, 2, 1].set(1.0)) - apply(params, s, t, x)
    touched = np.abs(np.asarray(change[0])).max(axis=-1) > 1e-6
    wanted = np.zeros((4, 6), bool)
    wanted[2:4, 2:4] = True
    np.testing.assert_array_equal(touched, wanted)


def test_grid_embedding_tells_patches_apart():
    table = grid_embedding(3, 5, 8)
    assert table.shape == (15, 8)
    np.testing.assert_allclose(np.sum(table**2, axis=1), 4.0, rtol=1e-6)
    assert np.unique(table.round(6), axis=0).shape[0] == 15
    # Columns and rows use their own halves.
    np.testing.assert_array_equal(table[0, :4], table[5, :4])
    np.testing.assert_array_equal(table[0, 4:], table[1, 4:])
    with pytest.raises(ValueError, match='multiple of 4'):
        grid_embedding(2, 2, 6)
