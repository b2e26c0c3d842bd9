"""Fewer and fewer phases of consistency (Hyper-SD 2024, arXiv:2404.13686).

    python -m kd.claims hyper_sd

Students of the exact flow to a ring of six Gaussians, whose networks are told no end: consistency
within 8 phases of time, then 4, 2 and 1, each stage begun as the one before; the same with one
phase from the start, as CTM and TCD; and consistency with the end fixed at data.
"""

import numpy as np

from kd import figures
from kd.claims import flow_world
from kd.claims.claim import Check, Claim
from kd.methods.flow.hyper_sd import tscd

PHASES = (8, 4, 2, 1)
STEPS = (1, 2, 4, 8)
TITLES = {
    **{f'phases_{k}': f'{k} phase{"s" * (k > 1)}, after more' for k in PHASES},
    'one_phase': 'one phase from the start (CTM)',
    'fixed': 'end fixed at data',
    'start': 'the flow, Euler',
}
CHECKS = [
    *(
        Check(
            f'{k} steps: {k} phases at most half the error of one from the start',
            f'rmse_{k}', f'phases_{k}', 'one_phase', lower=True, ratio=0.5,
        )
        for k in (4, 8)
    ),
    Check(
        '2 steps: 2 phases within 35 % of one from the start',
        'rmse_2', 'phases_2', 'one_phase', lower=True, ratio=1.35,
    ),
    *(
        Check(f'1 step: the fixed end below {what}', 'rmse_1', 'fixed', arm, lower=True)
        for what, arm in (('CTM', 'one_phase'), ('the last stage', 'phases_1'))
    ),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps."""
    runs, steps, pretraining = (3, 2, 2) if smoke else (6, 2_000, 2_000)
    return Claim(
        paper='Ren et al. 2024, arXiv:2404.13686',
        statement='Consistency within k phases makes a better student of k steps than consistency '
        'over the whole path, where the network is told no end.',
        setting='Exact flow to a ring of six Gaussians on a grid of 64 steps; perceptrons of '
        f'3 x 128, begun as flows that {pretraining} steps on data have trained; {steps} steps of '
        f'Adam 1e-3 with a cosine for each of the four stages, {4 * steps} for the others; targets '
        f'by the average .99, which is measured; batches of 256; {runs} seeds; errors against 300 '
        f'steps of Heun from the same {flow_world.DRAWN} noises, in units of the noise. Nothing is '
        'tuned.',
        run=lambda say: run(say, np.arange(runs), steps, pretraining, smoke),
        checks=CHECKS[3:] if smoke else CHECKS,
        draw=draw,
        notes='Squared errors alone: no adversarial term, whose weights the paper does not give, '
        'no rewards. The last stage against CTM in one step is reported and not asserted: what the '
        'paper gains there is by these.',
    )


def run(say, seeds, steps, pretraining, smoke):
    """Errors by arm and number of steps."""
    world = flow_world.World(seeds, **flow_world.SMALL if smoke else {})
    measured = {}

    def measure(name, params):
        measured[name] = {f'rmse_{n}': world.apart(world.ends(params, n))['rmse'] for n in STEPS}
        said = ', '.join(f'{key} {np.mean(x):.4f}' for key, x in measured[name].items())
        say(f'{TITLES[name]}: {said}')
        return params

    def trained(params, steps, **options):
        context = world.context(world.network(), 1e-3, steps, starts=True, ema={'slow': 0.99})
        method = tscd(context, target='slow', **options)
        state = world.train(method, steps, average=0.99, started=params)
        return state.ema['slow']['network']

    started = measure('start', world.flows(pretraining))
    params = started
    for k in PHASES[-1:] if smoke else PHASES:
        params = measure(f'phases_{k}', trained(params, steps, phases=k))
    measure('one_phase', trained(started, 4 * steps, phases=1))
    measure('fixed', trained(started, 4 * steps, phases=1, ends='last'))
    return measured


def draw(measured):
    """Errors by number of steps."""
    figure = figures.new_figure(7, 4.2)
    axis = figure.subplots()
    for colour, (name, found) in zip(figures.COLOURS, measured.items(), strict=False):
        curves = np.asarray([found[f'rmse_{n}'] for n in STEPS])
        axis.plot(STEPS, curves, color=colour, linewidth=0.4, alpha=0.5)
        style = 'o-' if name.startswith('phases') else 's--'
        axis.plot(STEPS, curves.mean(1), style, color=colour, label=TITLES[name])
    axis.set(xscale='log', yscale='log', xlabel='steps', ylabel='RMSE to the flow')
    axis.set_xticks(STEPS, [str(n) for n in STEPS])
    ticks = (0.05, 0.1, 0.2, 0.5, 1.0)
    axis.set_yticks(ticks, [f'{tick:g}' for tick in ticks])
    axis.minorticks_off()
    axis.legend(fontsize=8, loc='upper left', bbox_to_anchor=(1, 1))
    axis.grid(alpha=0.3)
    return figure
