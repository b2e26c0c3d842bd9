"""Every part of one network robust, and whether phases are needed (ProARD, arXiv:2506.07666).

    python -m kd.claims proard

Digits, 1,200 for training and 597 for measuring; residual perceptrons of three widths, depths and
inner widths, 117 networks in one. The largest is trained by TRADES, and taught to its parts by
robust distillation: in three phases of 12, 29 and 59 % of the updates, or without phases, with the
whole space from the first update on (WPS), which the paper says fails. Each arm draws a network for
every batch; those named held, as the released code, for a pass. Radius .24 and steps of .07 are for
images in [-1, 1]: .12 and .035 of the usual range.
"""

import jax
import numpy as np

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.data import catalogue
from kd.evaluators import sub_networks
from kd.methods.vision.proard import proard
from kd.methods.vision.trades import trades
from kd.models.elastic_mlp import ElasticMLP
from kd.network import from_linen
from kd.training import optimizer as optim

BATCH, CLASSES, RANDOM = 64, 10, 20
THREAT = dict(epsilon=0.24, step=0.07, jitter=0.002)
SHARES = {'width': 0.12, 'depth': 0.29, 'expansion': 0.59}
OPENED = {
    'width': dict(depth=(3,), expansion=(64,)),
    'depth': dict(expansion=(64,)),
    'expansion': {},
}
TITLES = {
    'sliced': 'parts of the teacher, not trained',
    'phases': 'phases',
    'wps': 'without phases (WPS)',
    'anew': 'WPS from random weights',
    'phases_held': 'phases, held for a pass',
    'wps_held': 'WPS, held for a pass',
    'alone': 'smallest by itself',
    'phases_long': 'phases, 5 times as long',
}
CHECKS = [
    Check('(i) parts learn: clean, by .5', 'random_clean', 'phases', 'sliced', 0.5),
    Check('(i) parts learn: robust, by .4', 'random_robust', 'phases', 'sliced', 0.4),
    Check('headline: phases over random sampling, robust', 'random_robust', 'phases', 'wps'),
    Check('(ii) robust weights to start from over random ones', 'random_robust', 'wps', 'anew'),
    Check(
        '(iii) held for a pass, phases keep the largest robust, by .03',
        'full_robust', 'phases_held', 'wps_held', 0.03,
    ),
    Check(
        '(iv) smallest, 5 times as long, at most .03 below one by itself: clean',
        'smallest_clean', 'phases_long', 'alone', -0.03,
    ),
    Check(
        '(iv) smallest, 5 times as long, at most .03 below one by itself: robust',
        'smallest_robust', 'phases_long', 'alone', -0.03,
    ),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` has the arms of the first checks, one phase, few steps and images."""
    runs, steps, teacher_steps = (3, 10, 4) if smoke else (6, 1_800, 1_500)
    arms = ('sliced', 'phases') if smoke else tuple(TITLES)
    shares, examples = ({'expansion': 1.0}, 50) if smoke else (SHARES, 597)
    return Claim(
        paper='ProARD 2025, arXiv:2506.07666',
        statement='One robust network contains robust networks of every size, for which the space '
        'has to be opened in phases: sampling all of it from the start fails.',
        setting=f'Digits; residual perceptrons of 117 architectures; TRADES ({teacher_steps} '
        f'steps, beta 6) and RSLAD ({steps} steps in all, Adam 1e-3, cosine from phase to phase, '
        f'batches of {BATCH}, attacks of 5 steps), {runs} seeds with a teacher each; accuracy, and '
        f'that under 10 steps of projected gradients, of {RANDOM} random parts in the mean, of '
        'the smallest and of the largest.',
        run=lambda say: run(
            say, arms, 10 + np.arange(runs), steps, teacher_steps, shares, examples
        ),
        checks=CHECKS[:2] if smoke else CHECKS,
        draw=draw,
        notes='The space is small and the networks have no norms, whose statistics would clash '
        'between parts: where the paper fails without phases need not be here.',
    )  # fmt: skip


def run(say, arms, seeds, steps, teacher_steps, shares=SHARES, examples=597):
    """Accuracies of parts after each arm."""
    train, held = data()
    network = from_linen(ElasticMLP(num_classes=CLASSES), _shape(train))
    whole = trades(context(network, teacher_steps), attack_steps=5, **THREAT)
    state = seeds_lib.train(whole, train, seeds, steps=teacher_steps, batch_size=BATCH)
    teacher = state.variables()
    measure, measured = measurer(network, {k: x[:examples] for k, x in held.items()}), {}
    for arm in arms:
        variables = taught(arm, network, train, teacher, seeds, steps, shares)
        measured[arm] = measure(variables)
        values = ', '.join(f'{k} {np.mean(v):.3f}' for k, v in measured[arm].items())
        say(f'{TITLES[arm]}: {values}')
    return measured


def data():
    """1,200 training images, and the 597 others."""
    splits = [catalogue.load('digits', s) for s in ('train[:1200]', 'train[1200:]', 'test')]
    train, *rest = (split.fetch(np.arange(len(split))) for split in splits)
    names = ('input', 'label')
    return {n: train[n] for n in names}, {n: np.concatenate([x[n] for x in rest]) for n in names}


def _shape(train):
    return jax.ShapeDtypeStruct((1, *train['input'].shape[1:]), np.float32)


def context(network, steps, **more):
    """Of a stage that goes on for so many steps."""
    tx = optim.optimizer(steps, name='adam', lr=1e-3, schedule='cosine')
    return seeds_lib.context(network=network, tx=tx, num_classes=CLASSES, **more)


def taught(arm, network, train, teacher, seeds, steps, shares):
    """Variables of all runs of an arm, [R, ...]."""
    if arm == 'sliced':
        return teacher
    kind = arm.partition('_')[0]
    hold = len(train['label']) // BATCH if arm.endswith('held') else 1
    total = 5 * steps if arm.endswith('long') else steps
    phases = {name: max(int(share * total), 1) for name, share in shares.items()}
    spaces = {name: OPENED[name] for name in phases}
    if kind != 'phases':
        smallest = dict(width=(16,), depth=(1,), expansion=(8,))
        phases, spaces = {'all': total}, {'all': smallest if kind == 'alone' else {}}
    variables = None if kind == 'anew' else teacher
    for name, length in phases.items():
        begun = {} if variables is None else {'start': variables}
        method = proard(
            context(network, length, teacher=network, references=dict.fromkeys(begun, network)),
            attack_steps=5, space=spaces[name], hold=hold,
            sort=() if name == 'expansion' else None, **THREAT,
        )  # fmt: skip
        variables = seeds_lib.train(
            method, train, seeds, steps=length, batch_size=BATCH,
            frozen_per_run={'teacher': teacher, **begun},
        ).variables()  # fmt: skip
    return variables


def measurer(network, held):
    """`measure(variables [R, ...]) -> {metric: one value per run}`."""
    space = network.module.space()
    drawn = sub_networks.draw(network, np.arange(RANDOM))
    archs = {
        name: np.stack([space.smallest()[name], space.largest()[name], *drawn[name]])
        for name in drawn
    }
    each = sub_networks.measurer(
        network, held['input'], held['label'], None, dict(THREAT, steps=10),
        together=RANDOM + 2, batch=len(held['label']),
    )  # fmt: skip

    def measure(variables):
        runs = len(jax.tree.leaves(variables)[0])
        found = np.stack([
            each(jax.tree.map(lambda x, i=i: x[i], variables), archs) for i in range(runs)
        ])  # fmt: skip
        sizes = {'random': found[:, 2:].mean(1), 'smallest': found[:, 0], 'full': found[:, 1]}
        return {
            f'{size}_{kind}': values[:, i]
            for size, values in sizes.items()
            for i, kind in enumerate(('clean', 'robust'))
        }

    return measure


def draw(measured):
    """Every seed, by arm, for parts of each size."""
    figure = figures.new_figure(10, 1.0 + 0.55 * len(measured))
    axes = figure.subplots(2, 3, sharey=True)
    sizes = {'random': 'mean of 20 parts', 'smallest': 'smallest part', 'full': 'largest network'}
    for row, kind in zip(axes, ('clean', 'robust'), strict=True):
        for axis, (size, label) in zip(row, sizes.items(), strict=True):
            metric = f'{size}_{kind}'
            figures.dots(axis, {TITLES[arm]: found[metric] for arm, found in measured.items()})
            axis.set_xlabel(f'{kind} accuracy, {label}')
    return figure
