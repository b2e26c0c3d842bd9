"""Curves where a straight line cannot follow (ArcFlow 2026, arXiv:2602.09014).

    python -m kd.claims arcflow

Students say the velocity of half a path in one call, as a mixture of 1, 2 or 8 momenta, and learn
it from the exact flow to a ring of six Gaussians. With one momentum it is a straight line, which
can end anywhere; inside the segment it is off.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import flow_world
from kd.claims.claim import Check, Claim
from kd.losses.flow_map import flow_map
from kd.methods.flow.arcflow import arcflow
from kd.sampling.flow import flow_map_sample, time_grid

MODES = {'one': 1, 'two': 2, 'eight': 8}
TITLES = {'one': '1 momentum (straight)', 'two': '2 momenta', 'eight': '8 momenta'}
# Middles of the two segments, and the end.
TIMES = (0.25, 0.75)
CHECKS = [
    Check(
        'within the first segment: error of 8 at most a fifth of 1',
        'rmse_25', 'eight', 'one', lower=True, ratio=0.2,
    ),
    Check(
        'at the end: median error of 8 at most .7 of 1',
        'median', 'eight', 'one', lower=True, ratio=0.7,
    ),
    Check('loss of 8 at most .4 of 1', 'loss', 'eight', 'one', lower=True, ratio=0.4),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps of one arm."""
    runs, steps = (3, 4) if smoke else (6, 3_000)
    return Claim(
        paper='Yang et al. 2026, arXiv:2602.09014',
        statement='In two calls a mixture of momenta follows a flow inside its segments, where a '
        'straight line does not, and comes closer to its end.',
        setting='Exact flow to a ring of six Gaussians; perceptrons of 3 x 128 with heads for 1, 2 '
        f'and 8 momenta, two segments of four states, no dropout of modes; {steps} steps of Adam '
        '2e-3 with a cosine, of which the first 30 % move from the states of the teacher to those '
        'of the student; '
        f'batches of 256; {runs} seeds; errors against 300 steps of Heun from the same '
        f'{flow_world.DRAWN} noises, in units of the noise. Nothing is tuned.',
        run=lambda say: run(say, np.arange(runs), steps, smoke),
        checks=[Check('', 'loss', 'eight', 1.0, lower=True)] if smoke else CHECKS,
        draw=draw,
        notes='The root mean square at the end is not asserted: few points at the borders of '
        'basins make it, and a straight line can end anywhere.',
    )


def run(say, seeds, steps, smoke):
    """Errors by arm at the middles of segments and at the end."""
    world = flow_world.World(seeds, **flow_world.SMALL if smoke else {})
    measured = {}
    for name in ('eight',) if smoke else MODES:
        network = world.network(MODES[name])
        context = world.context(network, 2e-3, steps)
        method = arcflow(context, decay=max(int(0.3 * steps), 1), mode_dropout=0.0)
        state = world.train(method, steps)
        found = world.samples(network, state.params['network'], inside)
        ends = world.apart(found[:, -1])
        measured[name] = {
            'loss': last_loss(method, state, world.data['input'][:4096]),
            **{
                f'rmse_{round(100 * t)}': world.apart(found[:, i], t)['rmse']
                for i, t in enumerate(TIMES)
            },
            **ends,
            'off_modes': world.off_modes(found[:, -1]),
        }
        say(
            f'{TITLES[name]}: '
            + ', '.join(f'{key} {np.mean(x):.4f}' for key, x in measured[name].items())
        )
    return measured


def inside(vfn, noise):
    """The middles of both segments and the end, [3, B, 2]."""
    half = flow_map(vfn, 0.0, 0.5, noise)
    return jnp.stack([
        flow_map(vfn, 0.0, TIMES[0], noise),
        flow_map(vfn, 0.5, TIMES[1], half),
        flow_map_sample(vfn, noise, time_grid(2)),
    ])  # fmt: skip


def last_loss(method, state, data):
    """The loss of each run, all states being its own."""

    @jax.jit
    @jax.vmap
    def of_run(state):
        state = state.replace(frozen={'teacher': {}})
        loss = method.step(state, {'input': data})[1]['loss']
        return loss.total / loss.count

    return np.asarray(of_run(state)).tolist()


def draw(measured):
    """Errors along the path, and every seed's median and loss."""
    figure = figures.new_figure(11, 3.2)
    left, *others = figure.subplots(1, 3)
    for colour, (name, found) in zip(figures.COLOURS, measured.items(), strict=False):
        curve = [found[key] for key in ('rmse_25', 'rmse_75', 'rmse')]
        left.plot((*TIMES, 1.0), curve, color=colour, linewidth=0.5, alpha=0.5)
        left.plot((*TIMES, 1.0), np.mean(curve, 1), 'o-', color=colour, label=TITLES[name])
    left.set(xlabel='time', ylabel='RMSE to the flow', yscale='log', xticks=(*TIMES, 1.0))
    left.legend(fontsize=7, loc='lower right')
    for axis, (metric, label) in zip(
        others, {'median': 'median error at the end', 'loss': 'loss'}.items(), strict=True
    ):
        figures.dots(axis, {TITLES[name]: found[metric] for name, found in measured.items()})
        axis.set_xlabel(label)
    return figure
