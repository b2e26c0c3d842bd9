"""Guidance as the spear, distribution matching as the shield (arXiv:2511.22677).

    python -m kd.claims decoupled_dmd

Four classes of two overlapping modes each, an exact teacher with guidance 4, generators of one step
and of two.
"""

import numpy as np

from kd import figures
from kd.claims import mixture_world
from kd.claims.claim import Check, Claim
from kd.data.builders import mixtures
from kd.methods.diffusion.decoupled_dmd import decoupled, shield
from kd.methods.diffusion.distribution_matching import distribution_matching

MIXTURE, GUIDANCE = mixtures.pairs(), 4.0
TWO = (5.0, 0.8)
# Where the deviation is looked at, in parts of the training.
PARTS = 5
ARMS = {
    'matching': 'matching alone',
    'augmentation': 'augmentation alone',
    'both': 'both: DMD with guidance',
    'moments': 'augmentation and moments',
}
LEVELS = {
    'shared': 'two steps, one time for both',
    'independent': 'two steps, any times',
    'constrained': 'two steps, both cleaner',
    'hybrid': 'two steps, augmentation cleaner',
}
CHECKS = [
    Check('augmentation alone: the deviation grows between any two parts', 'least_growth',
          'augmentation', 0.0),
    Check('and ends above five times that of the data', 'spread', 'augmentation', 5.0),
    Check('with matching it ends below 2.5 times', 'spread', 'both', 2.5, lower=True),
    Check('and the last two parts differ by less than 10 %', 'last_change', 'both', 0.1,
          lower=True),
    Check('guided: more samples are of their class than by matching alone, by .05', 'accuracy',
          'both', 'matching', margin=0.05),
    Check('both cleaner: 25 % less deviation than with one time', 'spread', 'constrained',
          'shared', lower=True, ratio=0.75),
    Check('augmentation cleaner: 25 % less deviation than with one time', 'spread', 'hybrid',
          'shared', lower=True, ratio=0.75),
    Check('one time or any: deviations differ by less than 10 %', 'from_shared', 'independent', 0.1,
          lower=True),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps, pretraining = (3, 5, 2) if smoke else (4, 1_500, 3_000)
    return Claim(
        paper='Decoupled DMD 2025, arXiv:2511.22677',
        statement='What guidance adds to score distillation drives samples outward for ever, and '
        'matching holds them; where it sees cleaner times alone, samples saturate less.',
        setting='Four classes of two modes, deviation .25; exact teacher, guidance 4; perceptrons '
        f'of 3 x 128, trained as denoisers for {pretraining} steps; {steps} moves of a generator '
        f'of one step, five critic moves each, and {steps * 8 // 15} of one of two steps with '
        f'three; Adam 3e-4, critic 1e-3, batches of 256; {runs} seeds. Nothing is tuned.',
        run=lambda say: run(say, runs, steps, pretraining, smoke),
        checks=CHECKS[2:3] if smoke else CHECKS,
        draw=draw,
        notes='The order of the last two schedules is no check. Moments are those of the batch: a '
        'point has two numbers.',
    )


def run(say, runs, steps, pretraining, smoke):
    """Deviations along training, and at the end how many samples are of their class."""
    world = mixture_world.World(MIXTURE, np.arange(runs), conditional=True)
    started = world.denoisers(pretraining)
    data = world.drawn(20_000, 2)['input']
    mean, variance = float(data.mean()), float(data.var())
    measured = {}
    parts = {
        'matching': (dict(augmentation=0.0), []),
        'augmentation': (dict(matching=0.0), []),
        'both': ({}, []),
        'moments': (dict(matching=0.0), [shield((mean, variance), 2.0, over_batch=True)]),
    }
    for name in ('both',) if smoke else ARMS:
        options, terms = parts[name]
        measured[name] = trained(world, started, steps, (5.0,), 'shared', 5, options, terms)
        say(f'{ARMS[name]}: {summary(measured[name])}')
    for name in () if smoke else LEVELS:
        measured[name] = trained(world, started, steps * 8 // 15, TWO, name, 3, {}, [])
        shared = np.asarray(measured['shared']['spread'])
        change = np.abs(np.asarray(measured[name]['spread']) / shared - 1)
        measured[name]['from_shared'] = change.tolist()
        say(f'{LEVELS[name]}: {summary(measured[name])}')
    return measured


def trained(world, started, steps, times, levels, updates, options, terms):
    """Metrics of generators; their deviations after every part of the training."""
    student, spreads = world.student(*times), []
    context = world.context(3e-4, steps=steps)
    method = distribution_matching(
        context, student=student, teacher=world.exact,
        critic=world.critic(context, updates=updates),
        direction=decoupled(world.clock, levels, GUIDANCE, **options), terms=terms,
    )  # fmt: skip

    def watch(state):
        spreads.append(world.spread(world.samples(state.params['generator'], student)))

    params = world.train(method, started, steps, watch=watch, watched=steps // PARTS)
    spreads = np.asarray(spreads)
    samples = world.samples(params, student)
    found = world.measure(samples) | {'accuracy': world.accuracy(samples)}
    return {
        **found,
        'spread': spreads[-1].tolist(),
        'least_growth': np.diff(spreads, axis=0).min(0).tolist(),
        'last_change': np.abs(spreads[-1] / spreads[-2] - 1).tolist(),
        **{f'spread_{part}': values.tolist() for part, values in enumerate(spreads)},
    }


def summary(found):
    """For the log."""
    keys = ('spread', 'accuracy', 'swd')
    return ', '.join(f'{key} {np.mean(found[key]):.3f}' for key in keys)


def draw(measured):
    """The deviation along training; schedules below each other."""
    figure = figures.new_figure(9, 3.4)
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.2))
    for colour, name in zip(figures.COLOURS, ARMS, strict=False):
        if name in measured:
            curves = np.asarray([measured[name][f'spread_{part}'] for part in range(PARTS)])
            parts = (np.arange(PARTS) + 1) / PARTS
            left.plot(parts, curves, color=colour, alpha=0.4)
            left.plot(parts, curves.mean(1), color=colour, label=ARMS[name])
    left.set(yscale='log', xlabel='part of the training', ylabel='deviation, data = 1')
    left.legend(fontsize=8)
    rows = {LEVELS[n]: measured[n]['spread'] for n in LEVELS if n in measured}
    if rows:
        figures.dots(right, rows)
        right.set_xlabel('deviation, data = 1')
    return figure
