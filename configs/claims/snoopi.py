"""Guidance that is drawn, and the same for both teachers (arXiv:2412.02687).

    python -m kd.claims snoopi

A generator of one step learns four classes of points by variational score distillation, from the
exact denoiser, whose guidance is compared with that of a denoiser with adapters.
"""

import numpy as np

from kd import figures
from kd.claims import mixture_world
from kd.claims.claim import Check, Claim
from kd.data.builders import mixtures
from kd.methods.diffusion.distribution_matching import distribution_matching
from kd.methods.diffusion.snoopi import drawn
from kd.models.adapters import Adapter
from kd.sampling import times

PARTS, RANK = 8, 16
# Range of the guidance, and the denoisers that have it.
ARMS = {
    'drawn': ((0.5, 4.0), 'both'),
    'fixed': ((2.25, 2.25), 'both'),
    'fixed_real': ((4.0, 4.0), 'real'),
    'drawn_real': ((0.5, 4.0), 'real'),
}
TITLES = {
    'drawn': 'both, drawn from .5 to 4',
    'fixed': 'both, 2.25',
    'fixed_real': 'teacher alone, 4',
    'drawn_real': 'teacher alone, drawn',
}
CHECKS = [
    Check('both guided, drawn: near the data', 'late', 'drawn', 0.1, lower=True),
    Check('both guided, fixed: near the data', 'late', 'fixed', 0.1, lower=True),
    Check('the teacher alone guided: far from it', 'late', 'fixed_real', 0.3),
    Check('both over the teacher alone, drawn', 'late', 'drawn', 'drawn_real', lower=True),
]


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps, pretraining = (3, 4, 2) if smoke else (6, 2_400, 3_000)
    return Claim(
        paper='SNOOPI 2024, arXiv:2412.02687',
        statement='Guidance of both denoisers leaves the data where they are, drawn or fixed; that '
        'of the teacher alone does not.',
        setting='Four classes of two overlapping Gaussians; exact teacher; perceptrons of 3 x 128 '
        f'with classes, trained as denoisers for {pretraining} steps; {steps} moves of the '
        'generator with Adam 3e-4, one of the critic after each with Adam 1e-3, of which adapters '
        f'of rank {RANK} alone are trained, with a tenth of the classes left out; batches of 256; '
        f'{runs} seeds; mean distance over the last half of {PARTS} measurements. Nothing is '
        'tuned.',
        run=lambda say: run(say, runs, steps, pretraining, smoke),
        checks=CHECKS[3:] if smoke else CHECKS,
        draw=draw,
        notes='Drawn guidance has the mean of the fixed one: which of the two is better is '
        "reported and not asserted. The paper's other half, negative prompts by attention, is not "
        'measured here.',
    )


def run(say, runs, steps, pretraining, smoke):
    """Distances along training by arm."""
    world = mixture_world.World(mixtures.pairs(), np.arange(runs), conditional=True)
    started, student = world.denoisers(pretraining), world.student()
    measured = {}
    for name in ('drawn', 'drawn_real') if smoke else ARMS:
        guidance, sides = ARMS[name]
        context = world.context(3e-4, optimizer=dict(b1=0.0), steps=steps)
        method = distribution_matching(
            context, student=student, teacher=world.exact,
            critic=world.critic(
                context, updates=1, dropout=0.1, adapter=Adapter(RANK, 2.0 * RANK, r'hidden\d+/')
            ),
            direction=drawn(times.uniform(world.clock, 0.02, 0.98), guidance, sides),
        )  # fmt: skip
        curve = []

        def watch(state, curve=curve):
            samples = world.samples(state.params['generator'], student)
            spread = np.asarray(world.spread(samples)).tolist()
            curve.append(dict(world.measure(samples)) | {'spread': spread})

        world.train(method, started, steps, watch=watch, watched=max(steps // PARTS, 1))
        late = np.asarray([found['swd'] for found in curve[len(curve) // 2 :]])
        measured[name] = {
            'late': late.mean(0).tolist(),
            'wander': late.std(0).tolist(),
            'spread': curve[-1]['spread'],
            **{f'swd_{part}': found['swd'] for part, found in enumerate(curve)},
        }
        means = ', '.join(
            f'{key} {np.mean(measured[name][key]):.3f}' for key in ('late', 'wander', 'spread')
        )
        say(f'{TITLES[name]}: {means}')
    return measured


def draw(measured):
    """The distance along training, and every seed at its end."""
    figure = figures.new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    for colour, (name, found) in zip(figures.COLOURS, measured.items(), strict=False):
        curves = [np.mean(x) for key, x in found.items() if key.startswith('swd_')]
        parts = (np.arange(len(curves)) + 1) / len(curves)
        left.plot(parts, curves, 'o-', color=colour, label=TITLES[name])
    left.set(xlabel='part of the training', ylabel='sliced Wasserstein distance')
    left.legend(fontsize=8, loc=(0.38, 0.53))
    figures.dots(right, {TITLES[name]: found['late'] for name, found in measured.items()})
    right.set_xlabel('mean distance over the second half')
    return figure
