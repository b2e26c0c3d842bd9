"""Experts: who computes what, by NumPy; copies of a dense MLP; drops, padding and decoding."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd import export
from kd.aot import hlo
from kd.claims import seeds
from kd.losses import routing
from kd.methods.lm import common
from kd.methods.lm.distillation import distillation
from kd.models import moe
from kd.models.decoder import SHARDING, Decoder, init_cache
from kd.network import from_linen
from kd.parallel import layout
from kd.parallel.mesh import make_mesh
from kd.parallel.sharding import tree_shardings

pytestmark = pytest.mark.usefixtures('compiled_quickly')

V, T, D = 13, 8, 8
SIZES = dict(num_classes=V, width=D, depth=3, heads=2, mlp_hidden=12, max_length=16, deviation=None)
TOKENS = np.random.default_rng(0).integers(0, V, (2, T)).astype(np.int32)


def network(experts=None, **changes):
    module = Decoder(**{**SIZES, **changes}, experts=experts)
    return from_linen(module, jax.ShapeDtypeStruct((1, T), jnp.int32))


def drawn(of, seed=0):
    return jax.jit(of.init)(jax.random.key(seed))


def logits(of, variables, tokens=TOKENS, segments=None):
    return np.asarray(applied(of.module)(variables, tokens, segments))


@functools.cache
def applied(module):
    return jax.jit(lambda v, t, s: module.apply(v, t, segments=s))


def plain_routing(probabilities, top_k, capacity):
    """{(token, expert): weight}, by counting."""
    used, kept = dict.fromkeys(range(probabilities.shape[1]), 0), {}
    for choice in range(top_k):
        for token, row in enumerate(probabilities):
            expert = int(np.argsort(-row, kind='stable')[choice])
            if used[expert] < capacity:
                used[expert] += 1
                kept[token, expert] = row[expert]
    totals = {t: sum(w for (u, _), w in kept.items() if u == t) for t, _ in kept}
    return {(t, e): w / totals[t] for (t, e), w in kept.items()}


@pytest.mark.parametrize('capacity', [1, 3, 20])
def test_routing_is_that_of_counting(capacity):
    rng = np.random.default_rng(capacity)
    probabilities = rng.dirichlet(np.full(5, 0.5), 20).astype(np.float32)
    found = jax.jit(moe.route, static_argnums=(1, 2))(probabilities, 2, capacity)
    wanted = plain_routing(probabilities, 2, capacity)
    made = {}
    for token in range(20):
        for slot, weight in zip(found.slots[token], found.weights[token], strict=True):
            if slot < 5 * capacity:
                made[token, int(slot) // capacity] = float(weight)
                assert found.tokens.reshape(-1)[slot] == token
            else:
                assert weight == 0
    assert made == pytest.approx(wanted, abs=1e-6)
    loads = np.bincount([e for _, e in wanted], minlength=5)
    np.testing.assert_array_equal(found.load, loads)
    # Ample slots drop nothing, scarce ones as many as there are too many.
    assert (len(wanted) == 40) == (capacity == 20)


def test_the_layer_computes_what_was_routed_and_drops_the_rest():
    of = network(dict(count=3, top_k=2, capacity=0.3, every=1)).module.architecture
    layer = moe.Moe(of)
    x = jax.random.normal(jax.random.key(1), (2, T, D))
    variables = jax.jit(layer.init)(jax.random.key(0), x)
    tree = jax.tree.map(lambda x: np.asarray(x, np.float64), variables['params'])
    # Six slots for eight tokens.
    slots = math.ceil(0.3 * 2 * T / 3)
    found = np.asarray(jax.jit(layer.apply)(variables, x))
    rows_dropped = 0
    for row in range(2):
        g = np.exp(np.asarray(x[row], np.float64) @ tree['router']['kernel'])
        kept = plain_routing(g / g.sum(1, keepdims=True), 2, slots)
        wanted = np.zeros((T, D))
        for (token, expert), weight in kept.items():
            gate, up, down = (
                tree['experts'][name]['kernel'][expert] for name in ('gate', 'up', 'down')
            )
            a = x[row, token] @ gate
            wanted[token] += weight * ((a / (1 + np.exp(-a)) * (x[row, token] @ up)) @ down)
        np.testing.assert_allclose(found[row], wanted, atol=1e-5)
        lost = set(range(T)) - {token for token, _ in kept}
        rows_dropped += len(lost)
        assert (found[row][sorted(lost)] == 0).all()
    assert rows_dropped >= 4


@pytest.mark.parametrize('stacked', [False, True])
def test_copies_of_a_dense_mlp_compute_what_it_does_for_any_router(stacked):
    every = 1 if stacked else 2
    dense = network(stacked=stacked, bias=True, remat='block')
    sparse = network(
        dict(count=4, top_k=2, capacity=None, every=every), stacked=stacked, bias=True,
        remat='block',
    )  # fmt: skip
    reference = jax.tree.map(lambda x: x + 0.1, drawn(dense))
    for seed in (1, 2):
        own = jax.tree.map(lambda x: 3 * x, drawn(sparse, seed))
        made = {'params': moe.upcycle(reference['params'], own['params'])}
        jax.tree.map(lambda x, y: np.testing.assert_equal(x.shape, y.shape), made, own)
        np.testing.assert_allclose(logits(sparse, made), logits(dense, reference), atol=2e-5)
    # What has experts stays, and what the reference lacks is not made up.
    jax.tree.map(
        np.testing.assert_array_equal, moe.upcycle(made['params'], own['params']), made['params']
    )
    lacking = {name: x for name, x in reference['params'].items() if name != 'final_norm'}
    assert 'final_norm' not in moe.upcycle(lacking, own['params'])


def test_experts_that_begin_as_copies_differ_after_ten_steps():
    dense, sparse = network(), network(dict(count=3, top_k=2, every=2))
    frozen = {'start': drawn(dense)}
    context = seeds.context(
        network=sparse, tx=optax.adam(1e-2), references={'start': dense}, num_classes=V
    )
    method = distillation(context, soft_weight=0.0)
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    batch = {'input': TOKENS, 'response_mask': np.ones(TOKENS.shape, bool)}

    def apart(state):
        tree = state.params['network']
        assert 'experts' not in tree['block1']['mlp']
        return [
            float(np.abs(x - x[:1]).max())
            for block in ('block0', 'block2')
            for x in jax.tree.leaves(tree[block]['mlp']['experts'])
        ]

    assert max(apart(state)) == 0
    step = jax.jit(method.step)
    for _ in range(10):
        state, _ = step(state, batch)
    assert min(apart(state)) > 1e-3


def test_padding_takes_no_slot_and_rows_do_not_see_each_other():
    sparse = network(dict(count=3, top_k=1, capacity=1.0, every=1))
    variables = jax.tree.map(lambda x: 2 * x, drawn(sparse))
    segments = np.repeat([[1], [1]], T, 1).astype(np.int32)
    segments[:, 5:] = 0
    both = logits(sparse, variables, segments=jnp.asarray(segments))
    other = TOKENS.copy()
    other[:, 5:] = 1
    other[1] = 2
    changed = logits(sparse, variables, other, segments=jnp.asarray(segments))
    np.testing.assert_array_equal(both[0, :5], changed[0, :5])
    alone = logits(sparse, variables, TOKENS[:1], segments=jnp.asarray(segments[:1]))
    np.testing.assert_allclose(both[:1], alone, atol=1e-6)


def test_decoding_goes_through_the_experts_that_a_whole_row_does():
    sparse = network(dict(count=3, top_k=2, capacity=None, every=2))
    variables = drawn(sparse)
    whole = np.asarray(
        jax.jit(lambda v, t: sparse.module.apply(v, t, method='hidden'))(variables, TOKENS)
    )
    step = jax.jit(lambda v, t, p, c: sparse.module.apply(v, t, p, c, method='step'))
    cache, outputs = init_cache(sparse.module, 2, T), []
    for first, last in ((0, 4), (4, 5), (5, 6), (6, 7), (7, 8)):
        positions = np.broadcast_to(np.arange(first, last), (2, last - first))
        hidden, cache = step(variables, TOKENS[:, first:last], positions, cache)
        outputs.append(hidden)
    np.testing.assert_allclose(np.concatenate(outputs, 1), whole, atol=1e-5)


def test_the_balance_loss_is_1_where_all_get_the_same_and_e_where_one_gets_all():
    uniform = np.full((3, 8, 4), 0.25) + 0.01 * np.tile(np.eye(4), (2, 1))
    uniform /= uniform.sum(-1, keepdims=True)
    np.testing.assert_allclose(routing.balance(uniform), 1, rtol=1e-6)
    np.testing.assert_allclose(routing.balance(np.eye(4)[[2] * 8]), 4)
    rng = np.random.default_rng(0)
    g, where = rng.dirichlet(np.ones(4), (2, 8)), rng.random((2, 8)) < 0.6
    wanted, slope = [], np.zeros_like(g)
    for row in range(2):
        kept = g[row][where[row]]
        share = np.bincount(kept.argmax(-1), minlength=4) / len(kept)
        wanted.append(4 * (share * kept.mean(0)).sum())
        slope[row][where[row]] = 4 * share / len(kept)
    np.testing.assert_allclose(routing.balance(g, where=where), wanted, rtol=1e-6)
    # Only the mean of the probabilities is differentiated.
    found = jax.grad(lambda g: routing.balance(g, where=where).sum())(jnp.asarray(g))
    np.testing.assert_allclose(found, slope, rtol=1e-5)
    assert routing.balance(g[0], where=np.zeros(8, bool)) == 0


@pytest.mark.parametrize('stacked', [False, True])
def test_loads_and_drops_are_counted(stacked):
    experts = dict(count=3, top_k=2, capacity=0.5, every=1)
    sparse = network(experts, stacked=stacked, remat='block')
    variables = jax.tree.map(lambda x: 2 * x, drawn(sparse))
    segments = np.where(np.arange(T) < [[T], [5]], 1, 0).astype(np.int32)
    batch = {
        'input': TOKENS, 'response_mask': np.ones(TOKENS.shape, bool), 'segments': segments
    }  # fmt: skip

    @jax.jit
    def measured(variables):
        found = common.token_losses(
            sparse, variables, batch, lambda z, t, labels: (z[:, 0], ()), train=False
        )
        return found.routers, *common.balanced(sparse, batch, found.routers)

    routers, losses, metrics = measured(variables)
    layers = np.concatenate([np.reshape(x, (-1, 2, T, 3)) for x in routers])
    assert len(layers) == 3
    loads, asked = np.zeros(3), 0
    for layer in layers:
        for row in range(2):
            kept = plain_routing(layer[row][segments[row] > 0], 2, math.ceil(0.5 * 2 * T / 3))
            loads += np.bincount([e for _, e in kept], minlength=3)
            asked += 2 * segments[row].sum()
    found = {name: float(x.total / x.count) for name, x in metrics.items()}
    assert 0 < found['dropped'] < 1
    assert found['dropped'] == pytest.approx(1 - loads.sum() / asked)
    for e in range(3):
        assert found[f'load_{e}'] == pytest.approx(loads[e] / loads.sum())
    wanted = [routing.balance(layer, where=segments > 0) for layer in layers]
    np.testing.assert_allclose(losses, sum(wanted), rtol=1e-6)
    assert found['balance'] == pytest.approx(float(np.mean(wanted)))


def test_experts_lie_over_an_axis():
    sparse = network(dict(count=4, every=1), stacked=True, num_classes=V + 1)
    mesh = make_mesh({'data': 1, 'fsdp': 2, 'tensor': 2}, jax.devices()[:4])
    found = tree_shardings(jax.eval_shape(sparse.init, jax.random.key(0)), SHARDING, mesh)
    mlp = found['params']['blocks']['mlp']
    P = jax.sharding.PartitionSpec
    for name in ('gate', 'up', 'down'):
        assert mlp['experts'][name]['kernel'].spec == P(None, 'tensor', 'fsdp')
    assert mlp['router']['kernel'].spec == P()
    # And the same is computed.
    variables = drawn(sparse)
    spread = jax.device_put(variables, found)
    np.testing.assert_allclose(logits(sparse, spread), logits(sparse, variables), atol=1e-5)


def test_a_token_moves_once_between_devices_that_share_its_experts():
    of = network(dict(count=4, top_k=3, every=1)).module.architecture
    layer, mesh = moe.Moe(of), make_mesh({'data': 1, 'fsdp': 1, 'tensor': 2}, jax.devices()[:2])
    x = jax.random.normal(jax.random.key(1), (2, T, D))
    variables = jax.jit(layer.init)(jax.random.key(0), x)

    def over_devices(variables, x):
        with layout.inside(mesh):
            return layer.apply(variables, x)

    spread = jax.device_put(variables, tree_shardings(variables, SHARDING, mesh))
    x_there = jax.device_put(x, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    program = jax.jit(over_devices).lower(spread, x_there).compile()
    np.testing.assert_allclose(
        program(spread, x_there), jax.jit(layer.apply)(variables, x), atol=1e-6
    )
    moved = [each for each in hlo.collectives(program.as_text()) if each.kind != 'all-gather']
    assert [(each.times, each.bytes) for each in moved] == [(1, 2 * T * D * 4)]


def test_what_cannot_be_is_told(tmp_path):
    for experts, message in (
        (dict(count=2, top_k=3), r'top_k=3 exceeds experts\.count=2'),
        (dict(count=0), r'experts\.count must be an integer from 1, got 0'),
        (dict(capacity=0.0), r'experts\.capacity must be above 0'),
    ):
        with pytest.raises(ValueError, match=message):
            network(experts)
    with pytest.raises(ValueError, match=r'experts in one block of 2 cannot be stacked'):
        network(dict(count=2), stacked=True)
    sparse = network(dict(count=2))
    with pytest.raises(Exception, match=r'transformers has no such decoder'):
        export.export(sparse.module, drawn(sparse), tmp_path)
