"""Velocities matched over end points matched (MDT-dist 2025, arXiv:2509.04406).

    python -m kd.claims mdt_dist

Students of one step of the exact flow to a ring of six Gaussians, each begun as a flow that was
trained on data: by consistency of end points, by velocity matching, by that with velocity
distillation beside it, and by velocity matching with normalised derivatives.
"""

import numpy as np

from kd import figures
from kd.claims import flow_world
from kd.claims.claim import Check, Claim
from kd.methods.flow.mdt_dist import mdt_dist

TITLES = {
    'consistency': 'consistency of end points',
    'velocity': 'velocity matching (VM)',
    'both': 'VM and velocity distillation',
    'normalised': 'VM, derivatives normalised',
}
ARMS = {
    'consistency': dict(target='consistency', distribution=0.0),
    'velocity': dict(distribution=0.0),
    'both': dict(distribution=1.0),
    'normalised': dict(distribution=0.0, constant=0.1),
}
CHECKS = [
    Check(
        'one step: error of VM at most .75 of consistency',
        'rmse_1', 'velocity', 'consistency', lower=True, ratio=0.75,
    ),
    Check('one step: VM nearer to the data', 'energy', 'velocity', 'consistency', lower=True),
    Check(
        'velocity distillation does no harm: at most 1.2 of VM',
        'rmse_1', 'both', 'velocity', lower=True, ratio=1.2,
    ),
    Check(
        'without guidance, normalised derivatives: over 3 times the error of VM',
        'rmse_1', 'normalised', 'velocity', ratio=3.0,
    ),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps of two arms."""
    runs, steps, pretraining = (3, 4, 2) if smoke else (6, 3_000, 2_000)
    return Claim(
        paper='Zhou et al. 2025, arXiv:2509.04406',
        statement='A student of one step comes closer to a flow by matching velocities than by '
        'matching end points.',
        setting='Exact flow to a ring of six Gaussians; perceptrons of 3 x 128, begun as flows '
        f'that {pretraining} steps on data have trained; {steps} steps of Adam 1e-3 with a cosine, '
        f'batches of 256, no guidance, differences over .01, average .998; {runs} seeds; errors '
        f'against 300 steps of Heun from the same {flow_world.DRAWN} noises, in units of the '
        'noise. Nothing is tuned.',
        run=lambda say: run(say, np.arange(runs), steps, pretraining, smoke),
        checks=CHECKS[:1] if smoke else CHECKS,
        draw=draw,
        notes='What velocity distillation gains in the paper, under guidance of 100, is within the '
        'noise here, so that only harm is asserted. Errors in two Euler steps, a heuristic for a '
        'network that always aims at data, are reported beside.',
    )


def run(say, seeds, steps, pretraining, smoke):
    """Errors by arm, in one step and two."""
    # The constant of normalised derivatives is one of units, which are those of the noise.
    world = flow_world.World(seeds, scale=1.0, **flow_world.SMALL if smoke else {})
    started = world.flows(pretraining)
    measured = {'start': errors(world, started)}
    say(f'the flow in one step: {np.mean(measured["start"]["rmse_1"]):.3f}')
    for name in ('consistency', 'velocity') if smoke else ARMS:
        context = world.context(world.network(), 1e-3, steps, starts=True)
        state = world.train(mdt_dist(context, **ARMS[name]), steps, average=0.998, started=started)
        measured[name] = errors(world, state.ema['slow']['network'])
        said = ', '.join(f'{key} {np.mean(x):.4f}' for key, x in measured[name].items())
        say(f'{TITLES[name]}: {said}')
    return measured


def errors(world, params):
    """Of one step and of two."""
    one, two = (world.ends(params, n) for n in (1, 2))
    found = world.apart(one)
    return {
        'rmse_1': found['rmse'],
        'median_1': found['median'],
        'energy': world.energy(one),
        'rmse_2': world.apart(two)['rmse'],
    }


def draw(measured):
    """Every seed, by arm."""
    figure = figures.new_figure(11, 3.0)
    labels = {
        'rmse_1': 'RMSE to the flow, one step',
        'energy': 'energy distance to data, one step',
        'rmse_2': 'RMSE to the flow, two steps',
    }
    axes = figure.subplots(1, len(labels), sharey=True)
    for axis, (metric, label) in zip(axes, labels.items(), strict=True):
        rows = {TITLES[name]: found[metric] for name, found in measured.items() if name in TITLES}
        figures.dots(axis, rows)
        axis.set_xlabel(label)
        if metric != 'rmse_2':
            axis.set_xscale('log')
            axis.minorticks_off()
    ticks = (0.1, 0.2, 0.4, 0.8)
    axes[0].set_xticks(ticks, [f'{tick:g}' for tick in ticks])
    return figure
