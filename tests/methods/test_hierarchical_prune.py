"""HierarchicalPrune: what goes first, what stays as it is, and how far the others move."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.claims import seeds
from kd.errors import UserError
from kd.io import found
from kd.losses import schedule
from kd.methods import pruning
from kd.methods.diffusion import hierarchical_prune as hpp
from kd.models.denoiser import Denoised
from kd.models.dit import DiT
from kd.models.stack import restricted, sizes, stack
from kd.network import from_linen
from kd.sampling import denoiser as denoisers
from kd.sampling import times

pytestmark = pytest.mark.usefixtures('compiled_quickly')

WHOLE = DiT(patch=2, width=8, depth=4, heads=2, num_classes=3, data_scale=1.0)
DROPPED = ('block2/attention', 'block3/mlp')
SPEC = {
    'input': jax.ShapeDtypeStruct((4, 4, 1), jnp.float32),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
}
BLOCKS = WHOLE.blocks


def network_of(**changes):
    module = Denoised(WHOLE.clone(**changes), schedule.flow(1.0), kind='flow')
    return from_linen(module, *module.example_inputs(SPEC))


TEACHER, STUDENT = network_of(), network_of(dropped=DROPPED)


@pytest.fixture(scope='module')
def variables():
    """Of the teacher, none of them zero."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(TEACHER.init, jax.random.key(0))
    return jax.tree.map(lambda p: 0.3 * rng.standard_normal(p.shape, np.float32), shapes)


@pytest.fixture(scope='module')
def batch():
    rng = np.random.default_rng(1)
    x = rng.standard_normal((6, 4, 4, 1), np.float32)
    return {'input': jnp.asarray(x), 'label': jnp.array([0, 1, 2, 0, 1, 2])}


def context_of(network=STUDENT, **optimizer):
    return seeds.context(
        network=network, teacher=TEACHER, spec=SPEC, steps=10,
        optimizer=dict(name='adam', lr=1e-2) | optimizer,
    )  # fmt: skip


def stepped(context, variables, batch, steps=1, **how):
    method = hpp.hierarchical_prune(context, **how)
    state = jax.jit(method.init)(jax.random.key(0), {'teacher': variables})
    begun, step = state, jax.jit(method.step)
    for _ in range(steps):
        state, metrics = step(state, batch)
    return begun, state, {name: float(m.total / m.count) for name, m in metrics.items()}


def test_a_whole_student_is_its_teacher(variables, batch):
    begun, _, metrics = stepped(context_of(TEACHER), variables, batch, recovery='all')
    jax.tree.map(np.testing.assert_array_equal, begun.params['network'], variables['params'])
    assert metrics['loss'] == pytest.approx(0.0, abs=1e-9)
    # No gradient but that of rounding, which Adam blows up to its rate.
    assert metrics['grad_norm'] < 1e-4
    assert stepped(context_of(), variables, batch, recovery='all')[2]['grad_norm'] > 1e-2


def test_the_loss_by_hand(variables, batch):
    """Output and tokens after each block that both have, means over elements, a sum over blocks."""
    begun, _, metrics = stepped(context_of(), variables, batch, recovery='all', feature=0.5)
    time_key, noise_key, _ = jax.random.split(begun.step_key(), 3)
    t = jax.random.uniform(time_key, (6,))
    noise = jax.random.normal(noise_key, batch['input'].shape)
    weight = t.reshape(-1, 1, 1, 1)
    x_t = (1 - weight) * batch['input'] + weight * noise
    nets = {'teacher': (TEACHER, variables), 'student': (STUDENT, begun.variables())}

    @jax.jit
    def walked(all_of):
        out = {}
        for name, (network, _) in nets.items():
            net, kept = stack(network.module.inner), {}
            carry, context = net.embed(all_of[name], t, t, x_t, label=batch['label'])
            for block in net.names:
                carry = net.block(net.params(all_of[name], block), block, carry, context)
                kept[block] = carry
            out[name] = net.head(all_of[name], carry, context), kept
        return out

    both = walked({name: v for name, (_, v) in nets.items()})
    (v, kept), (v_teacher, kept_teacher) = both['student'], both['teacher']
    output = float(jnp.mean((v - v_teacher) ** 2))
    tokens = sum(float(jnp.mean((kept[b] - kept_teacher[b]) ** 2)) for b in BLOCKS)
    assert metrics['output'] == pytest.approx(output, rel=1e-4)
    assert metrics['feature'] == pytest.approx(tokens, rel=1e-4)
    assert metrics['loss'] == pytest.approx(output + 0.5 * tokens, rel=1e-4)


@pytest.fixture(scope='module')
def held(variables, batch):
    """States at the start, after a step and after five, with weight decay."""
    context = context_of(name='adamw', weight_decay=0.1)
    begun, state, _ = stepped(context, variables, batch, recovery='pwp')
    return begun, state, *stepped(context, variables, batch, steps=5, recovery='pwp')[1:2]


def test_what_is_before_the_first_that_is_gone_keeps_every_bit(held):
    """Trap: weight decay moves what has no gradient."""
    begun, _, state = held
    before, after = begun.params['network'], state.params['network']
    for name in before:
        same = jax.tree.map(lambda a, b: bool(np.all(a == b)), before[name], after[name])
        stays = name in ('block0', 'block1', 'patches', 'start0', 'jump1', 'label')
        if stays or name in ('block2', 'block3', 'modulation', 'out'):
            assert all(jax.tree.leaves(same)) == stays, name
    kept = jax.tree.leaves(state.opt_state)
    size = sum(x.size for name in ('block2', 'block3', 'modulation', 'out')
               for x in jax.tree.leaves(before[name]))  # fmt: skip
    # Two moments of what moves, and a counter or two.
    assert 2 * size <= sum(x.size for x in kept) <= 2 * size + 4


def test_a_costly_branch_moves_less_after_adam(held, variables, batch, tmp_path):
    """Trap: a factor before Adam leaves the first update as it is."""
    costs = dict.fromkeys(pruning.parts_of(BLOCKS), 9.0)
    costs |= {'block2/mlp': 0.2, 'block3/attention': 0.1}
    less = WHOLE.clone(dropped=DROPPED)
    pairs = hpp.factors(costs, less)
    wanted = {'block2/mlp0/kernel': 0.5, 'block2/modulation/bias': 0.5, 'block3/qkv/kernel': 1.0}
    for path, a in wanted.items():
        assert next(f for e, f in pairs if re.search(e, path)) == pytest.approx(a)
    # What costs fifty times the least stays as it is.
    stays = hpp.factors(costs | {'block2/mlp': 5.1}, less)
    assert dict(stays)[r'^block2/(mlp0|mlp1)/'] == 0.0
    found.write(tmp_path, {'costs': costs})
    context = context_of(name='adamw', weight_decay=0.1)
    context = dataclasses.replace(context, locate=lambda stage: tmp_path)
    begun, scaled, _ = stepped(context, variables, batch, recovery='sgdistill', costs='map')
    plain = held[1]
    for block, layer, a in (('block2', 'mlp0', 0.5), ('block3', 'qkv', 1.0)):
        first, one, other = (
            np.asarray(state.params['network'][block][layer]['kernel'])
            for state in (begun, scaled, plain)
        )
        np.testing.assert_allclose(one - first, a * (other - first), rtol=1e-3, atol=1e-6)
        assert np.abs(other - first).max() == pytest.approx(1e-2, rel=0.2)
    for other in ({}, {'costs': {'block0': 1.0}}):
        found.write(tmp_path, other)
        with pytest.raises(UserError, match="stage 'map' has found no cost of block0/attention"):
            hpp.hierarchical_prune(context, recovery='sgdistill', costs='map')
    with pytest.raises(UserError, match='and a stage of costs go together'):
        hpp.hierarchical_prune(context_of(), recovery='sgdistill')


def test_of_equal_costs_the_later_goes_first_and_as_quoted_the_earlier():
    equal = dict.fromkeys(pruning.parts_of(BLOCKS), 0.5)
    late, quoted, none = (list(hpp.score(equal, BLOCKS, p).values())[::2]
                          for p in ('late', 'quoted', 'none'))  # fmt: skip
    assert (np.diff(late) > 0).all()
    assert (np.diff(quoted) < 0).all()
    assert set(none) == {-0.5}
    # A removal that helps counts by its size.
    assert hpp.score({'block0/mlp': -0.5}, BLOCKS) == hpp.score({'block0/mlp': 0.5}, BLOCKS)
    assert late[0] == pytest.approx(-0.5 * np.e)


def test_the_fewest_parts_of_highest_score_have_the_budget():
    rng = np.random.default_rng(0)
    names = pruning.parts_of(BLOCKS)
    score = dict(zip(names, rng.permutation(8).astype(float), strict=True))
    weights = dict(zip(names, rng.integers(1, 9, 8).tolist(), strict=True))
    order, before = sorted(names, key=lambda n: -score[n]), ()
    for budget in range(sum(weights.values()) + 1):
        gone = pruning.prune_to_budget(score, weights, budget)
        count = next(k for k in range(9) if sum(weights[n] for n in order[:k]) >= budget)
        assert set(gone) == set(order[:count])
        assert list(gone) == [name for name in names if name in gone]
        assert set(before) <= set(gone)
        before = gone
    with pytest.raises(ValueError, match='parameters are to go, and all parts have'):
        pruning.prune_to_budget(score, weights, 1_000)


def test_costs_are_those_of_smaller_networks(variables, batch):
    """Each removal against the network that lacks the branch, with the same noise and times."""
    parts = pruning.parts_of(BLOCKS)
    gates = np.stack([pruning.gates_without(BLOCKS, [part]) for part in parts])
    own, key = denoisers.of_network(TEACHER), jax.random.key(3)
    draw = times.uniform(times.even(own.schedule))
    costs = jax.jit(lambda v: hpp.costs_of(TEACHER, own, v, batch, key, gates, draw, 'flow'))(
        variables
    )
    time_key, noise_key = jax.random.split(key)
    t = draw(time_key, jnp.zeros(6))
    noise = jax.random.normal(noise_key, batch['input'].shape)
    x_t = own.schedule.mix(batch['input'], noise, t)

    def loss(dropped):
        module = WHOLE.clone(dropped=dropped)
        tree = restricted(WHOLE, module)(
            variables, jax.eval_shape(network_of(dropped=dropped).init, jax.random.key(0))
        )
        said = module.apply(tree, t, t, x_t, label=batch['label'])
        return float(jnp.mean((said - (noise - batch['input'])) ** 2))

    whole = loss(())
    for part in ('block0/attention', 'block2/mlp', 'block3/attention'):
        wanted = loss((part,)) - whole
        assert float(costs[parts.index(part)]) == pytest.approx(wanted, rel=1e-3, abs=1e-5)
    assert pruning.gates_without(BLOCKS, ['block1', 'block2/mlp']).tolist() == [
        [1, 1], [0, 0], [1, 0], [1, 1],
    ]  # fmt: skip
    weights = sizes(WHOLE, variables)
    whole_blocks = pruning.sizes_of(weights, 'block')
    assert whole_blocks['block1'] == weights['block1/attention'] + weights['block1/mlp']


def test_networks_are_made_by_what_a_stage_has_found(tmp_path):
    (tmp_path / 'map').mkdir()
    found.write(tmp_path / 'map', {'dropped': ['block1', 'block2/mlp'], 'costs': {}})
    block = dict(name='x', network=dict(
        depth=4, dropped=dict(found_by='map', otherwise=['block3'])))  # fmt: skip
    resolved = functools.partial(found.resolved, block, where='student.network')
    assert resolved(lambda stage: tmp_path / stage)['network'] == {
        'depth': 4, 'dropped': ('block1', 'block2/mlp'),
    }  # fmt: skip
    assert resolved(None)['network']['dropped'] == ('block3',)
    with pytest.raises(UserError, match=r"has no found\.json: run the stage 'other' first"):
        found.resolved(
            dict(dropped=dict(found_by='other')), lambda stage: tmp_path / stage, 'network'
        )
    with pytest.raises(UserError, match=r"network\.linear: 'map' has found no 'linear'"):
        found.resolved(dict(linear=dict(found_by='map')), lambda stage: tmp_path / stage, 'network')
