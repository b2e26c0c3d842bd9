"""DMD2: the critic's time scale, and what a discriminator repairs (arXiv:2405.14867).

    python -m kd.claims dmd

A generator of one step learns a ring of eight modes from the exact denoiser of the ring.
"""

import numpy as np

from kd import figures
from kd.claims import mixture_world
from kd.claims.claim import Check, Claim
from kd.data.builders import mixtures
from kd.methods.diffusion import common
from kd.methods.diffusion.distribution_matching import distribution_matching
from kd.sampling import times

RING = mixtures.ring()
# One mode of the biased teacher lies elsewhere.
SHIFT = 0.3
# Weights of the adversarial losses of generator and critic.
GAN, CRITIC_GAN = 0.3, 0.1
CHECKS = [
    Check('five critic moves over one, at equal generator moves', 'swd', 'five', 'one', lower=True),
    Check('a biased teacher: with a discriminator over without', 'swd', 'biased_gan', 'biased',
          lower=True),
]  # fmt: skip
TITLES = {
    'start': 'before: the mean of the data',
    'one': 'one critic move',
    'five': 'five critic moves',
    'five_fresh': "five, none on the generator's own sample",
    'biased': 'biased teacher',
    'biased_gan': 'biased teacher, discriminator',
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps."""
    runs, steps, pretraining = (3, 2, 2) if smoke else (6, 800, 3_000)
    return Claim(
        paper='Yin et al. 2024 (DMD2), arXiv:2405.14867',
        statement='A generator of one step comes closer to the data where its critic moves five '
        'times for each of its moves, and past its teacher where a discriminator sees data.',
        setting=f'Ring of eight Gaussians, radius 1.4, deviation .08; exact teacher; perceptrons '
        f'of 3 x 128 with EDM preconditioning, trained as denoisers for {pretraining} steps; '
        f'{steps} moves of the generator with Adam 3e-4, critic Adam 1e-3, batches of 256; '
        f'{runs} seeds. The biased teacher has one mode {SHIFT} off; the weights '
        f'of the discriminator, {GAN} and {CRITIC_GAN}, were chosen among five on two other seeds.',
        run=lambda say: run(say, runs, steps, pretraining, smoke),
        checks=CHECKS[:1] if smoke else CHECKS,
        draw=draw,
        notes='One critic move takes less time than five: the comparison is at equal moves of the '
        'generator, as in the paper.',
    )


def run(say, runs, steps, pretraining, smoke):
    """Distances and shares by arm."""
    world = mixture_world.World(RING, np.arange(runs))
    started = world.denoisers(pretraining)
    student = world.student()
    measured = {'start': world.measure(world.samples(started, student))}
    shifted = RING.means.copy()
    shifted[0] *= 1 + SHIFT / np.linalg.norm(shifted[0])
    biased = mixtures.exact_denoiser(RING._replace(means=shifted), world.path)
    arms = {
        'one': (world.exact, dict(updates=1), 0.0),
        'five': (world.exact, {}, 0.0),
        'five_fresh': (world.exact, dict(sample='fresh'), 0.0),
        'biased': (biased, {}, 0.0),
        'biased_gan': (biased, {}, GAN),
    }
    if smoke:
        arms = {name: arms[name] for name in ('one', 'five')}
    for name, (teacher, critic, gan) in arms.items():
        context = world.context(3e-4, optimizer=dict(b1=0.0), steps=steps)
        made = world.critic(context, **critic)
        method = distribution_matching(
            context, student=student, teacher=teacher, critic=made,
            direction=common.matching(times.uniform(world.clock, 0.02, 0.98), 1.0),
            discriminator=common.head('hidden2', made.law, gan, CRITIC_GAN) if gan else None,
        )  # fmt: skip
        params = world.train(method, started, steps)
        measured[name] = world.measure(world.samples(params, student))
        means = ', '.join(f'{key} {np.mean(value):.3f}' for key, value in measured[name].items())
        say(f'{TITLES[name]}: {means}')
    return measured


def draw(measured):
    """Every arm a row, every seed a dot."""
    figure = figures.new_figure(9, 3.2)
    left, right = figure.subplots(1, 2, sharey=True)
    arms = [name for name in TITLES if name in measured and name != 'start']
    for axis, metric, label in (
        (left, 'swd', 'sliced Wasserstein distance to the data'),
        (right, 'hit', 'share of samples on a mode'),
    ):
        figures.dots(axis, {TITLES[name]: measured[name][metric] for name in arms})
        axis.set_xlabel(label)
    return figure
