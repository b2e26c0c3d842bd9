"""What goes first from a diffusion transformer, and what must stay (arXiv:2508.04663).

    python -m kd.claims hierarchical_prune

A transformer of ten blocks is pruned by a fifth of its branches, in three ways, and by a third;
each is recovered from the whole one with all that is left moving, with what is early held (PWP),
and with each branch moving less the more it matters (SGDistill). All of these runs are one program:
what is dropped has gates of zero, which `tests/models/test_stack.py` holds to the smaller network.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import figures
from kd.claims import pruning_world
from kd.claims.claim import Check, Claim
from kd.method import Objective, minimize
from kd.methods import pruning
from kd.methods.diffusion import hierarchical_prune as hpp
from kd.metrics import mean
from kd.models import quantise
from kd.models.dit import BRANCHES, LAYOUT
from kd.models.stack import inner_of, stack
from kd.sampling import denoiser as denoisers
from kd.sampling import times

# (how it is pruned, of what share) and the ways of recovery of each.
GRID = {
    ('cosine', 0.2): ('all', 'pwp', 'sgdistill'),
    ('block', 0.2): ('all', 'pwp', 'sgdistill'),
    ('branch', 0.2): ('all', 'pwp', 'sgdistill'),
    ('branch', 0.33): ('all', 'sgdistill'),
}
SHORT = ('all', 'pwp', 'sgdistill')
RULES = {
    'cosine': 'blocks that change least',
    'block': 'blocks that cost least',
    'branch': 'branches',
}
WAYS = {'all': 'all moves', 'pwp': 'PWP', 'sgdistill': 'SGDistill'}
CHECKS = [
    Check('costs of blocks fall with depth: rank correlation below -.8', 'depth', 'teacher', -0.8,
          lower=True),
    Check('a fifth less, before recovery: branches over whole blocks', 'before', 'branch_20_all',
          'block_20_all', lower=True),
    Check('a fifth less: PWP over moving all (the paper)', 'error', 'branch_20_pwp',
          'branch_20_all', lower=True),
    Check('a third less: SGDistill over moving all (the paper)', 'error', 'branch_33_sgdistill',
          'branch_33_all', lower=True),
    Check('a fifth less, 60 steps at 1e-2: PWP over moving all', 'error', 'short_pwp',
          'short_all', lower=True),
    Check('four bits: loss of flow matching within 5 %', 'loss', 'branch_20_w4', 'branch_20_all',
          lower=True, ratio=1.05),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps of a smaller network."""
    plan = (2, 2, 2) if smoke else (1_000, 200, 60)
    grid = {key: GRID[key] for key in list(GRID)[1:3]} if smoke else GRID
    return Claim(
        paper='HierarchicalPrune 2025, arXiv:2508.04663',
        statement='What is late in a diffusion transformer costs less and is pruned by branches; '
        'what is early is held while the rest recovers.',
        setting='Digits of 8x8, told the class; a transformer of 10 blocks of width 32 trained by '
        f'flow matching for {plan[0]} steps of Adam 2e-3, one for each of 3 seeds. Costs on 1,024 '
        f'training digits with noise. Recovery: {plan[1]} steps of Adam 2e-3 without a schedule, '
        f'batches of 32, velocity and tokens of blocks, weights 1, for all alike; and {plan[2]} '
        'at 1e-2. Error: mean square of the velocity against the teacher on 512 test digits with '
        'noise. Nothing is tuned.',
        run=lambda say: run(say, plan, grid, smoke),
        checks=CHECKS[1:2] if smoke else CHECKS,
        draw=draw,
        notes='The position prior as its text intends it; as it is quoted, and without one, errors '
        'before recovery are reported. Accuracy is that of a linear classifier on samples of 8 '
        'Euler steps.',
    )  # fmt: skip


def run(say, plan, grid, smoke):
    """Errors by arm, and costs of the teachers."""
    world = pruning_world.World(np.arange(3), **(pruning_world.SMALL if smoke else {}))
    theirs, blocks = world.teachers(plan[0]), world.module.blocks
    say('teachers are trained')
    costs = costs_of(world, theirs, 1 if smoke else 4)
    each = {level: pruning.parts_of(blocks, level) for level in ('branch', 'block')}
    measured = {'teacher': of_teachers(costs, each, blocks)}
    say(f'rank correlation of costs and depth: {measured["teacher"]["depth"]}')
    gates = {
        key: np.stack([
            gates_of(key, {of: costs[of][seed] for of in costs}, blocks) for seed in range(3)
        ])
        for key in [*grid, ('quoted', 0.2), ('none', 0.2)]
    }  # fmt: skip
    arms = {f'{rule}_{100 * r:.0f}_{way}': ((rule, r), way)
            for (rule, r), ways in grid.items() for way in ways}  # fmt: skip
    errors = measure(world, theirs)
    for rule in ('quoted', 'none'):
        found = errors(theirs, gates[rule, 0.2])
        measured[f'prior_{rule}'] = {'before': found['error']}
    chosen = [gates[key] for key, _ in arms.values()]
    scales = [scales_of(costs['branch'], gates[key], way, blocks) for key, way in arms.values()]
    moved = recovered(world, theirs, chosen, scales, plan[1], 2e-3)
    for place, name in enumerate(arms):
        own = jax.tree.map(lambda x, at=place: x[3 * at : 3 * at + 3], moved)
        measured[name] = errors(own, chosen[place], sample=not smoke)
        measured[name]['before'] = errors(theirs, chosen[place])['error']
        say(f'{name}: ' + ', '.join(f'{k} {np.mean(v):.4f}' for k, v in measured[name].items()))
        if name == 'branch_20_all':
            packed = jax.vmap(four_bits)(own)
            measured['branch_20_w4'] = errors(packed, chosen[place], sample=not smoke)
    if not smoke:
        key = ('branch', 0.2)
        scales = [scales_of(costs['branch'], gates[key], way, blocks) for way in SHORT]
        moved = recovered(world, theirs, [gates[key]] * len(SHORT), scales, plan[2], 1e-2)
        for place, way in enumerate(SHORT):
            own = jax.tree.map(lambda x, at=place: x[3 * at : 3 * at + 3], moved)
            measured[f'short_{way}'] = errors(own, gates[key])
    return measured


def costs_of(world, theirs, batches):
    """{'branch', 'block', 'cosine': [3, parts]}, what the teachers lose, or how little they do."""
    network, own = world.network, denoisers.of_network(world.network)
    draw, blocks = times.uniform(times.even(own.schedule)), world.module.blocks
    found = {}
    for level in ('branch', 'block'):
        gates = np.stack([
            pruning.gates_without(blocks, [part]) for part in pruning.parts_of(blocks, level)
        ])  # fmt: skip

        def one(params, batch, key, gates=gates):
            return hpp.costs_of(network, own, {'params': params}, batch, key, gates, draw, 'flow')

        ask = jax.jit(jax.vmap(one, (0, None, None)))
        rows = [slice(256 * i, 256 * (i + 1)) for i in range(batches)]
        found[level] = np.mean([
            ask(theirs, {name: x[at] for name, x in world.data.items()}, jax.random.key(i))
            for i, at in enumerate(rows)
        ], axis=0)  # fmt: skip

    def changes(params):
        """1 - cosine of a block's input and output, mean over tokens."""
        net, out = stack(inner_of(network.module)), []
        t, x_t, label, _ = world.test
        carry, at = net.embed({'params': params}, t, t, x_t, label=label)
        for name in net.names:
            after = net.block(params[name], name, carry, at)
            cosine = jnp.sum(carry * after, -1)
            cosine = cosine / jnp.linalg.norm(carry, axis=-1) / jnp.linalg.norm(after, axis=-1)
            out.append(1 - jnp.mean(cosine))
            carry = after
        return jnp.stack(out)

    found['cosine'] = np.asarray(jax.jit(jax.vmap(changes))(theirs))
    return found


def of_teachers(costs, parts, blocks):
    """Rank correlation of a block's cost and its place, and the cost of every part."""
    places = np.arange(len(blocks))
    ranks = [np.argsort(np.argsort(cost)) for cost in costs['block']]
    found = {'depth': [float(np.corrcoef(places, rank)[0, 1]) for rank in ranks]}
    for level, names in parts.items():
        found |= {f'cost {n}': costs[level][:, i].tolist() for i, n in enumerate(names)}
    return found


def gates_of(key, costs, blocks):
    """Gates [blocks, 2] of one seed; a rule of branches has a prior of positions."""
    rule, share = key
    if rule in ('cosine', 'block'):
        names, cost, prior = list(blocks), costs[rule], 'none'
    else:
        prior = 'late' if rule == 'branch' else rule
        names, cost = pruning.parts_of(blocks), costs['branch']
    costly = dict(zip(names, map(float, cost), strict=True))
    sizes = dict.fromkeys(names, 1)
    gone = pruning.prune_to_budget(hpp.score(costly, blocks, prior), sizes, share * len(names))
    return pruning.gates_without(blocks, gone)


def scales_of(costs, gates, way, blocks):
    """Factors [3, blocks + 1, 2] of updates of branches; the last row is what is before them."""
    scales = np.ones((3, len(blocks) + 1, 2), np.float32)
    if way == 'all':
        return scales
    names = pruning.parts_of(blocks)
    for seed in range(3):
        first = int(np.argmin(gates[seed].min(1)))
        scales[seed, :first] = scales[seed, -1] = 0.0
        if way == 'sgdistill':
            table = np.abs(pruning.whole_costs(costs[seed], blocks, names))
            moves = (gates[seed] > 0) & (np.arange(len(blocks)) >= first)[:, None]
            share = table[moves].min(initial=np.inf) / np.maximum(table, 1e-30)
            share = np.where(share >= hpp.LEAST, share, 0.0)
            # What is dropped has no gradient.
            scales[seed, first:-1] = np.where(moves, share, 1.0)[first:]
    return scales


def recovered(world, theirs, gates, scales, steps, lr):
    """Parameters [arms * 3, ...] after recovery; all arms at once."""
    own = denoisers.of_network(world.network)
    names, path = tuple(world.module.blocks), own.schedule

    def loss(params, state, batch, key):
        time_key, noise_key = jax.random.split(key)
        gates, data = state.frozen['gates'], batch['input']
        t = jax.random.uniform(time_key, (len(data),))
        x_t = path.mix(data, jax.random.normal(noise_key, data.shape), t)
        label = {'label': batch['label']}
        told = own.apply({'params': state.frozen['teacher']}, x_t, t, label, capture=names)
        said = own.apply({'params': params}, x_t, t, label | {'gates': gates}, capture=names)
        # Both are eps - x0 up to a factor of t, which the weight 'flow' undoes.
        output = jnp.mean(jnp.square(said.x0 - told.x0), (1, 2, 3)) / jnp.maximum(t, 1e-3) ** 2
        there = {n: jnp.any(gates[i] > 0) for i, n in enumerate(names)}
        tokens = hpp.feature_loss(
            {n: [jnp.where(there[n], x, told.features[n])] for n, x in said.features.items()},
            {n: [x] for n, x in told.features.items()},
        )
        return Objective(mean(output + tokens))

    def transformation(scales):
        def factor(path, u):
            name = path[0].key
            row = scales[names.index(name)] if name in names else None
            if row is None:
                return u * (1.0 if name in ('modulation', 'out') else scales[-1, 0])
            branch = LAYOUT.modules.get(path[1].key)
            return u * (jnp.min(row) if branch is None else row[BRANCHES.index(branch)])

        scaled = optax.stateless(lambda updates, _: jax.tree_util.tree_map_with_path(
            factor, updates))  # fmt: skip
        return optax.chain(optax.adam(lr), scaled)

    tx = optax.inject_hyperparams(transformation)(scales=np.ones_like(scales[0][0]))

    def init(key, frozen):
        return {'params': frozen['teacher']}

    arms = len(gates)
    repeated = jax.tree.map(lambda x: jnp.concatenate([x] * arms), theirs)
    return world.train(
        minimize(loss, tx, init), steps, seeds=np.tile(world.seeds, arms),
        frozen_per_run={'teacher': repeated, 'gates': np.concatenate(gates)},
        hyperparameters={'scales': np.concatenate(scales)},
    ).params['network']  # fmt: skip


def four_bits(params):
    """Parameters whose matrices, but modulations and embedders, have been through four bits."""
    return quantise.dequantised(quantise.quantise_tree(params, r'(qkv|projection|mlp\d)/kernel$'))


def measure(world, theirs):
    """(params [3, ...], gates [3, ...], sample) -> errors, and what samples are like."""
    said = world.velocity(world.network)
    t, x_t, label, target = world.test

    @jax.jit
    @jax.vmap
    def errors(teacher, params, gates):
        v, wanted = (said(p, t, x_t, label, g) for p, g in ((params, gates), (teacher, None)))
        return jnp.mean((v - wanted) ** 2), jnp.mean((v - target) ** 2)

    drawn = jax.jit(jax.vmap(world.sampled(world.network, 100, 8)))

    def found(params, gates, sample=False):
        error, loss = errors(theirs, params, jnp.asarray(gates))
        out = {'error': error.tolist(), 'loss': loss.tolist()}
        if sample:
            made = np.asarray(drawn(params, jnp.asarray(gates)))
            out |= world.judged(made, np.arange(100) % 10)
        return out

    return found


def draw(measured):
    """The costs by depth, and errors before and after recovery."""
    figure = figures.new_figure(10, 5.2)
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    for place, branch in enumerate(('attention', 'mlp')):
        values = [np.asarray(v) for name, v in measured['teacher'].items()
                  if name.startswith('cost') and name.endswith(f'/{branch}')]  # fmt: skip
        table = np.maximum(np.abs(np.array(values)), 1e-6)
        left.plot(table.mean(1), 'o-', color=figures.COLOURS[place], label=branch)
        left.plot(table, '.', color=figures.COLOURS[place], alpha=0.5)
    left.set(xlabel='block', ylabel='cost of its removal', yscale='log')
    left.legend(fontsize=8)
    rows, titles = {}, {'short': '60 steps at 1e-2'}
    for name, found in measured.items():
        if 'error' in found:
            rule, _, rest = name.partition('_')
            share, _, way = rest.rpartition('_')
            title = titles.get(rule) or f'{RULES[rule]}, {share} %'
            rows[f'{title}: {WAYS.get(way, "four bits")}'] = found['error']
    figures.dots(right, rows)
    right.set(xlabel='error of the velocity after recovery', xscale='log')
    right.xaxis.set_minor_formatter('')
    right.tick_params(axis='y', labelsize=7)
    return figure
