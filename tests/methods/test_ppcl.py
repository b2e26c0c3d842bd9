"""PPCL: where runs break off, blocks that learn for whole runs, and what is plugged in."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LinearRegression

from kd.claims import seeds
from kd.data import sources
from kd.errors import UserError
from kd.losses import schedule
from kd.losses.feature import linear_cka
from kd.losses.feature_maps import direction
from kd.methods import contiguous
from kd.methods.diffusion import ppcl
from kd.models import mmdit
from kd.models.denoiser import Denoised
from kd.models.dit import DiT
from kd.models.stack import stack
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

WHOLE = DiT(patch=2, width=8, depth=5, heads=2, data_scale=1.0)
RUNS = [('block1', 'block2'), ('block3', 'block4')]
DROPPED = ('block2', 'block4')
SPEC = {'input': jax.ShapeDtypeStruct((4, 4, 1), jnp.float32)}


def network_of(**changes):
    module = Denoised(WHOLE.clone(**changes), schedule.flow(1.0), kind='flow')
    return from_linen(module, *module.example_inputs(SPEC))


TEACHER, STUDENT = network_of(), network_of(dropped=DROPPED)
NETS = stack(TEACHER.module), stack(STUDENT.module)


def numbers(network, seed):
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(network.init, jax.random.key(0))
    return jax.tree.map(lambda p: 0.3 * rng.standard_normal(p.shape, np.float32), shapes)


@pytest.fixture(scope='module')
def both():
    return numbers(TEACHER, 0), numbers(STUDENT, 1)


DATA = np.random.default_rng(2).standard_normal((8, 4, 4, 1)).astype(np.float32)
ASKED = jnp.linspace(0.1, 0.9, 8), jnp.asarray(DATA)


def context_of(network=STUDENT, **more):
    return seeds.context(
        network=network, teacher=TEACHER, spec=SPEC, steps=10,
        optimizer=dict(name='adamw', lr=1e-2, weight_decay=0.1), **more,
    )  # fmt: skip


# Runs


def test_a_probe_is_least_squares():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((2, 50, 5)).astype(np.float32)
    w, b = contiguous.residual_probe(x, y)
    other = LinearRegression().fit(x, y - x)
    np.testing.assert_allclose(w.T, other.coef_, atol=1e-4)
    np.testing.assert_allclose(b, other.intercept_, atol=1e-4)
    # What is left is orthogonal to the inputs and to ones.
    rest = x + x @ np.asarray(w) + np.asarray(b) - y
    assert np.abs(x.T @ rest).max() < 1e-3
    assert np.abs(rest.sum(0)).max() < 1e-3
    # Of a part: the others are not read.
    there = np.arange(50) % 3 > 0
    some = contiguous.residual_probe(np.where(there[:, None], x, np.nan), y, where=there)
    other = LinearRegression().fit(x[there], (y - x)[there])
    np.testing.assert_allclose(some[0].T, other.coef_, atol=1e-4)
    np.testing.assert_allclose(some[1], other.intercept_, atol=1e-4)


def states_of(linear):
    """States [7, 200, 4]: blocks 1 and 2 are linear where asked, others are not."""
    rng = np.random.default_rng(0)
    x = [rng.standard_normal((200, 4)).astype(np.float32)]
    for block in range(6):
        w = 0.5 * rng.standard_normal((4, 4)).astype(np.float32)
        change = x[-1] @ w + 0.3
        x.append(x[-1] + (change if block in linear else 2 * np.abs(change) ** 1.5))
    return jnp.asarray(np.stack(x))


def test_a_linear_span_costs_no_similarity_and_is_one_run():
    states = states_of((1, 2, 3))
    fitted = contiguous.probes(states)
    deltas = contiguous.cka_deltas(fitted, states, 0, 5)
    np.testing.assert_allclose(deltas[:3], 0.0, atol=1e-5)
    assert deltas[3] > 1e-3
    for i in (1, 2, 3):
        said = states[i] + states[i] @ fitted[0][i] + fitted[1][i]
        assert float(jnp.abs(said - states[i + 1]).max()) < 1e-2
    # By hand, where blocks are not linear: two probes one after the other.
    z = states[4] + states[4] @ fitted[0][4] + fitted[1][4]
    first = float(linear_cka(z, states[5]))
    z = z + z @ fitted[0][5] + fitted[1][5]
    wanted = [1 - first, first - float(linear_cka(z, states[6]))]
    np.testing.assert_allclose(contiguous.cka_deltas(fitted, states, 3, 2), wanted, atol=1e-5)
    # Ties do not end a run.
    runs = contiguous.contiguous_runs(
        lambda u: contiguous.cka_deltas(fitted, states, u, 5 - u), 6, 6
    )
    assert runs[0] == (0, 3)


def test_a_run_ends_before_the_first_rise_or_at_its_longest():
    table = {0: [0.3, 0.2, 0.1, 0.4, 0.0], 4: [0.5], 3: [0.2, 0.3]}
    of = table.__getitem__
    # Delta(0, 4) is the first that rises: v = 3.
    assert contiguous.contiguous_runs(of, 6, 6) == [(0, 3), (4, 5)]
    assert contiguous.contiguous_runs(of, 6, 3) == [(0, 2), (3, 4)]
    # An odd block at the end stays alone.
    assert contiguous.contiguous_runs(lambda u: [0.0] * 9, 5, 2) == [(0, 1), (2, 3)]
    names = [f'block{i}' for i in range(6)]
    assert contiguous.without_runs(names, [(0, 2), (4, 5)]) == ('block1', 'block2', 'block5')
    assert contiguous.runs_of(STUDENT.module) == RUNS
    three = WHOLE.clone(depth=6, dropped=('block2', 'block3', 'block5'))
    assert contiguous.runs_of(three) == [('block1', 'block3'), ('block4', 'block5')]
    for dropped in (('block0',), ('block2/mlp',)):
        with pytest.raises(UserError, match=r'network\.dropped: a run is replaced by its first'):
            contiguous.runs_of(WHOLE.clone(dropped=dropped))


def test_the_published_runs_leave_out_25_of_60_blocks():
    runs = [(3, 4), (5, 7), (8, 10), (11, 12), (15, 24), (25, 27), (29, 30), (42, 43), (45, 47),
            (48, 49), (52, 53), (54, 55), (56, 57)]  # fmt: skip
    names = list(mmdit.preset('qwen_image').blocks)
    dropped = contiguous.without_runs(names, runs)
    assert len(dropped) == sum(v - u for u, v in runs) == 25
    found = contiguous.runs_of(mmdit.preset('qwen_image', dropped=dropped))
    assert [(names.index(u), names.index(v)) for u, v in found] == runs


# Learning


def losses_of(both, **how):
    return ppcl.contiguous_losses(NETS, both, RUNS, ASKED, {}, **how)


def test_a_run_is_compared_with_what_the_teacher_has_after_it(both):
    theirs, ours = both
    teacher, student = NETS
    found, sequential = jax.jit(lambda b: (losses_of(b), losses_of(b, sequential=True)))(both)

    @jax.jit
    def walked(theirs, ours):
        state, context = teacher.embed(theirs, *ASKED)
        states = [state]
        for name in teacher.names:
            state = teacher.block(teacher.params(theirs, name), name, state, context)
            states.append(state)

        def mine(name, x):
            return student.block(student.params(ours, name), name, x, context)

        first = mine('block1', states[1])
        return states, first, mine('block3', states[3]), mine('block3', first)

    states, first, second, chained = walked(theirs, ours)
    for run, x, y in ((RUNS[0], first, states[3]), (RUNS[1], second, states[5])):
        np.testing.assert_allclose(found[run], direction(x, y).mean(-1), rtol=1e-4)
        cosine = np.sum(x * y, -1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
        np.testing.assert_allclose(found[run], (2 - 2 * cosine).mean(-1), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(sequential[RUNS[0]], found[RUNS[0]], rtol=1e-6)
    np.testing.assert_allclose(
        sequential[RUNS[1]], direction(chained, states[5]).mean(-1), rtol=1e-4
    )


def test_no_run_learns_from_another_and_the_teacher_from_none(both):
    """Trap: a student that is fed by the student."""
    theirs, ours = both

    def second(ours, theirs, sequential):
        return losses_of((theirs, ours), sequential=sequential)[RUNS[1]].sum()

    slopes = {
        sequential: jax.jit(jax.grad(lambda o, t, s=sequential: second(o, t, s), (0, 1)))(
            ours, theirs
        )
        for sequential in (False, True)
    }

    def largest(tree):
        return max(float(jnp.abs(x).max()) for x in jax.tree.leaves(tree))

    for sequential, (slope, of_teacher) in slopes.items():
        assert largest(of_teacher) == 0.0
        assert largest(slope['params']['block3']) > 1e-4
        assert (largest(slope['params']['block1']) > 1e-6) == sequential
    # Not by one bit does another run's block matter.
    other = {**ours['params'], 'block1': jax.tree.map(lambda x: x + 1, ours['params']['block1'])}
    value = jax.jit(lambda o: second(o, theirs, False))
    assert float(value(ours)) == float(value({'params': other}))


def stepped(method, frozen, steps=3):
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    begun, step = state, jax.jit(method.step)
    for _ in range(steps):
        state, metrics = step(state, {'input': jnp.asarray(DATA)})
    return begun.params['network'], state.params['network'], metrics


def test_the_first_blocks_of_runs_move_and_nothing_else(both):
    frozen = {'teacher': both[0]}
    begun, after, metrics = stepped(ppcl.depth(context_of()), frozen)
    assert {'run_block1', 'run_block3'} <= set(metrics)
    for name in begun:
        same = jax.tree.map(lambda a, b: bool(np.all(a == b)), begun[name], after[name])
        if name in ('block1', 'block3'):
            assert not any(jax.tree.leaves(same)), name
        else:
            assert all(jax.tree.leaves(same)), name
    jax.tree.map(np.testing.assert_array_equal, begun['block1'], both[0]['params']['block1'])
    # As released: the middle of the run, (1 + 4) // 2.
    long = network_of(dropped=('block2', 'block3', 'block4'))
    method = ppcl.depth(context_of(long), initial='middle')
    started = jax.jit(method.init)(jax.random.key(0), frozen).params['network']
    jax.tree.map(np.testing.assert_array_equal, started['block1'], both[0]['params']['block2'])
    with pytest.raises(UserError, match='no blocks are dropped'):
        ppcl.depth(context_of(TEACHER))


def test_maps_begin_with_least_squares_and_move_alone(both):
    theirs, ours = both
    wide = network_of(dropped=DROPPED, linear=('block1', 'block0/mlp'))
    context = context_of(wide, references={'start': STUDENT})
    split = sources.Source(
        sources.DataSet(
            'x', {'train': 8}, lambda _: lambda rows: {'input': DATA[rows]}, SPEC, None
        ),
        'train',
    )
    located = dataclasses.replace(context, locate=lambda stage: None, source=lambda _: split)
    frozen = {'teacher': theirs, 'start': ours}
    zero = jax.jit(ppcl.width(context).init)(jax.random.key(0), frozen).params['network']
    assert float(jnp.abs(zero['block1']['after']['kernel']).max()) == 0.0
    begun, after, _ = stepped(ppcl.width(located), frozen)
    for name in begun:
        for layer, x in begun[name].items():
            moves = layer in ('after', 'mlp_linear')
            same = jax.tree.map(lambda a, b: bool(np.all(a == b)), x, after[name][layer])
            assert all(jax.tree.leaves(same)) != moves, (name, layer)
    # What block 0 says with its map against one by scikit-learn, on the same noised examples.
    own, teacher = stack(wide.module), NETS[0]
    key = jax.random.split(jax.random.key(0))[0]

    @jax.jit
    def walked(params):
        t, x_t = ppcl.noised(schedule.flow(1.0), lambda key, level: jax.random.uniform(
            key, level.shape), jnp.asarray(DATA), key)  # fmt: skip
        before, at = teacher.embed(theirs, t, x_t)
        after = teacher.fold(theirs, ('block0',), before, at)
        block = own.params({'params': params}, 'block0')
        empty = {**block, 'mlp_linear': jax.tree.map(jnp.zeros_like, block['mlp_linear'])}
        return [own.block(p, 'block0', before, at) for p in (empty, block)], after

    (x, said), y = walked(begun)
    x, said, y = (np.asarray(z).reshape(-1, 8) for z in (x, said, y))
    wanted = x + LinearRegression().fit(x, y - x).predict(x)
    np.testing.assert_allclose(said, wanted, atol=2e-3)
    with pytest.raises(UserError, match='has no `linear` maps to learn'):
        ppcl.width(context_of())


def test_two_maps_of_one_block_do_not_make_up_for_the_same_twice(both):
    batch, key, left = {'input': jnp.asarray(DATA)}, jax.random.key(1), {}
    teacher = NETS[0]
    t, x_t = ppcl.noised(
        schedule.flow(1.0), lambda key, level: jax.random.uniform(key, level.shape), batch['input'],
        key,
    )  # fmt: skip
    before, at = teacher.embed(both[0], t, x_t)
    after = teacher.fold(both[0], teacher.names[:2], before, at)
    for linear in (('block0/mlp',), ('block0/mlp', 'block0')):
        wide = network_of(linear=linear)
        # Of one student, whatever its maps have been.
        params = dict(numbers(network_of(linear=('block0/mlp', 'block0')), 3)['params'])
        params['block0'] = {
            name: x for name, x in params['block0'].items() if name != 'after' or len(linear) > 1
        }
        begun, own = {'params': params}, stack(wide.module)
        fitted = ppcl.least_squares(
            context_of(wide), [('block0', 'block1')], begun, both[0], batch, key, 1e-6
        )
        said = own.block(own.params(fitted, 'block0'), 'block0', before, at)
        left[linear] = float(jnp.mean((said - after) ** 2))
    alone, together = left.values()
    assert together <= 1.001 * alone


def test_a_width_needs_maps():
    with pytest.raises(UserError, match='has no `linear` maps to learn'):
        ppcl.width(context_of())


def test_runs_are_put_in_and_left_out(both):
    theirs, ours = both
    apply = {}
    for active in ((False, False), (True, False), (True, True)):
        module, variables = ppcl.plugged(TEACHER.module, STUDENT.module, both, active)
        apply[active] = jax.jit(module.apply)(variables, *ASKED)
        gone = tuple(v for (_, v), on in zip(RUNS, active, strict=True) if on)
        assert module.inner.dropped == gone
    np.testing.assert_array_equal(
        apply[False, False], jax.jit(TEACHER.module.apply)(theirs, *ASKED)
    )
    # All of them in the teacher: its embedders and other blocks, the student's first ones.
    mixed = {**{k: x for k, x in theirs['params'].items() if k not in DROPPED},
             **{u: ours['params'][u] for u, _ in RUNS}}  # fmt: skip
    wanted = jax.jit(STUDENT.module.apply)({'params': mixed}, *ASKED)
    np.testing.assert_array_equal(apply[True, True], wanted)
    assert float(jnp.abs(apply[True, False] - wanted).max()) > 1e-3
    # A block that is the teacher's, for a run of one, changes nothing: there is no such run.
    assert contiguous.runs_of(TEACHER.module) == []
