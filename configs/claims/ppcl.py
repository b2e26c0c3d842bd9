"""Runs of blocks as one block each, learnt from the teacher alone or in a row (arXiv:2511.16156).

    python -m kd.claims ppcl

The teacher is that of the claim of hierarchical_prune. Three runs, of 2, 3 and 3 of its ten blocks,
become a block each; each block has the teacher's states, or what the blocks before it make. Then
all of them are put into the teacher, or one alone.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import pruning_world
from kd.claims.claim import Check, Claim
from kd.methods import contiguous, pruning
from kd.methods.diffusion import ppcl
from kd.models.stack import restricted, stack

RUNS = ((1, 2), (3, 5), (6, 8))
ARMS = {'apart': False, 'in_a_row': True}
TITLES = {
    'untrained': 'first blocks of runs as they are',
    'apart': 'each from the teacher',
    'in_a_row': 'one after the other',
}
CHECKS = [
    Check('one run put in: learnt from the teacher over in a row', 'one', 'apart', 'in_a_row',
          lower=True),
    Check('all runs put in: learnt from the teacher over in a row (the paper)', 'all', 'apart',
          'in_a_row', lower=True),
    Check('learnt from the teacher: one run put in over all', 'one', 'apart', 'apart_all',
          lower=True),
    Check('two runs put in over all', 'two', 'apart', 'apart_all', lower=True),
    Check('three late blocks in a row dropped over three anywhere', 'dropped', 'late', 'anywhere',
          lower=True),
    Check('a linear map by least squares in place of an MLP over nothing', 'mlp', 'linear',
          'nothing', lower=True),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps of a smaller network."""
    steps = (2, 2) if smoke else (1_000, 600)
    return Claim(
        paper='PPCL 2025, arXiv:2511.16156',
        statement='A block that learns to do for a run of blocks from the teacher alone may be put '
        'in or left out; blocks that learn in a row may not.',
        setting='Digits of 8x8, told the class; a transformer of 10 blocks of width 32 trained by '
        f'flow matching for {steps[0]} steps of Adam 2e-3, one for each of 3 seeds. Runs [1, 2], '
        f'[3, 5], [6, 8], from their first blocks, {steps[1]} steps of Adam 1e-3 with a cosine, '
        'batches of 32, distance of directions. Error: mean square of the velocity against the '
        'teacher on 512 test digits with noise. Nothing is tuned.',
        run=lambda say: run(say, *steps, smoke),
        checks=CHECKS[:1] if smoke else CHECKS,
        draw=draw,
        notes='Runs that the probes find, and what similarity they cost, are told while it runs. '
        'The paper has 60 blocks, of which 25 go; with all runs put in, learning in a row was '
        'better in the prototype of ten blocks.',
    )  # fmt: skip


def run(say, pretraining, steps, smoke):
    """Errors by arm."""
    runs = RUNS[:1] if smoke else RUNS
    world = pruning_world.World(np.arange(3), **(pruning_world.SMALL if smoke else {}))
    theirs, names = world.teachers(pretraining), list(world.module.blocks)
    say('teachers are trained')
    for seed, found in enumerate(() if smoke else found_runs(world, theirs)):
        say(f'runs of seed {seed}: {found[0]}; from block 0 {np.round(found[1], 4).tolist()}')
    student = world.less(dropped=contiguous.without_runs(names, runs))
    errors = errors_of(world, theirs)
    begun = jax.jit(jax.vmap(lambda p: restricted(world.network.module, student.module)(
        {'params': p}, {'params': p})['params']))(theirs)  # fmt: skip
    measured = {'untrained': plugged_errors(world, student, errors, theirs, begun, len(runs))}
    for name, sequential in ARMS.items():
        method = ppcl.depth(world.context(student, 1e-3, steps), sequential=sequential)
        state = world.train(method, steps, frozen_per_run={'teacher': {'params': theirs}})
        found = plugged_errors(world, student, errors, theirs, state.params['network'], len(runs))
        measured[name] = found
        say(f'{TITLES[name]}: ' + ', '.join(f'{k} {np.mean(v):.4f}' for k, v in found.items()))
    if smoke:
        return measured
    # One number under several names, for checks within an arm.
    measured['apart_all'] = dict.fromkeys(('one', 'two'), measured['apart']['all'])
    return measured | dropped_errors(world, errors, theirs) | linear_errors(world, errors, theirs)


def errors_of(world, theirs):
    """(network, params [3, ...], gates) -> errors [3] of velocities."""
    t, x_t, label, _ = world.test
    of_teacher = world.velocity(world.network)
    wanted = jax.jit(jax.vmap(lambda p: of_teacher(p, t, x_t, label)))(theirs)

    def errors(network, params, gates=None):
        said = world.velocity(network)
        gates = None if gates is None else jnp.asarray(gates)
        apply = jax.jit(jax.vmap(lambda p: said(p, t, x_t, label, gates)))
        return np.mean((np.asarray(apply(params)) - wanted) ** 2, axis=(1, 2, 3, 4))

    return errors


def plugged_errors(world, student, errors, theirs, own, count):
    """Errors with one of the runs put in, with two, and with all; the mean over which."""
    found = {'one': [], 'two': [], 'all': []}
    sizes = {1: 'one', 2: 'two'} | {count: 'all'}
    for mask in range(1, 2**count):
        active = [bool(mask >> i & 1) for i in range(count)]

        def mixed(params, ours, active=active):
            both = {'params': params}, {'params': ours}
            return ppcl.plugged(world.network.module, student.module, both, active)[1]['params']

        names = list(world.module.blocks)
        kept = [run for run, on in zip(RUNS, active, strict=False) if on]
        network = world.less(dropped=contiguous.without_runs(names, kept))
        made = jax.jit(jax.vmap(mixed))(theirs, own)
        found[sizes[sum(active)]].append(errors(network, made))
    if count == 1:
        found['one'] = found['all']
    return {kind: np.mean(values, axis=0).tolist() for kind, values in found.items() if values}


def dropped_errors(world, errors, theirs):
    """Three late blocks in a row dropped, and three anywhere, at the same count; untrained."""
    blocks, rng = list(world.module.blocks), np.random.default_rng(0)

    def error(chosen):
        parts = [blocks[i] for i in chosen]
        return errors(world.network, theirs, pruning.gates_without(world.module.blocks, parts))

    late = [error(range(u, u + 3)) for u in (5, 6, 7)]
    anywhere = [error(rng.choice(10, 3, replace=False)) for _ in range(9)]
    return {
        'late': {'dropped': np.median(late, axis=0).tolist()},
        'anywhere': {'dropped': np.median(anywhere, axis=0).tolist()},
    }


def linear_errors(world, errors, theirs):
    """A linear map in the place of the MLP of block 7, by least squares on 256 digits, or none."""
    network = world.less(linear=('block7/mlp',))
    context = world.context(network, 1e-3, 1)
    batch = {name: jnp.asarray(x[:256]) for name, x in world.data.items()}
    begin = jax.jit(network.init)(jax.random.key(0))

    def fitted(params):
        made = restricted(world.network.module, network.module)({'params': params}, begin)
        return ppcl.least_squares(
            context, [('block7', 'block7')], made, {'params': params}, batch, jax.random.key(1),
            1e-6,
        )['params']  # fmt: skip

    made = jax.jit(jax.vmap(fitted))(theirs)
    without = pruning.gates_without(world.module.blocks, ['block7/mlp'])
    return {
        'linear': {'mlp': errors(network, made).tolist()},
        'nothing': {'mlp': errors(world.network, theirs, without).tolist()},
    }


def found_runs(world, theirs):
    """(runs, first differences from block 0) of each teacher, of at most four blocks."""
    net, (t, x_t, label, _) = stack(world.network.module.inner), world.test

    @jax.jit
    @jax.vmap
    def states(params):
        carry, at = net.embed({'params': params}, t, t, x_t, label=label)
        kept = [carry]
        for name in net.names:
            kept.append(net.block(params[name], name, kept[-1], at))
        return jnp.stack(kept).reshape(len(kept), -1, carry.shape[-1])

    for of_seed in states(theirs):
        fitted, count = contiguous.probes(of_seed), len(net.names)

        def deltas(u, fitted=fitted, of_seed=of_seed, count=count):
            return contiguous.cka_deltas(fitted, of_seed, u, min(4, count - u) - 1)

        yield contiguous.contiguous_runs(deltas, count, 4), deltas(0)


def draw(measured):
    """Errors by how many runs are put in, every seed."""
    figure = figures.new_figure(8, 3.4)
    axis = figure.subplots()
    rows = {}
    for kind in ('one', 'two', 'all'):
        for name, title in TITLES.items():
            if kind in measured[name]:
                rows[f'{kind}: {title}'] = measured[name][kind]
    figures.dots(axis, rows)
    axis.set(xlabel='error of the velocity, by how many runs are put in', xscale='log')
    return figure
