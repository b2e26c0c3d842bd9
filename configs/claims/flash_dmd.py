"""A reward alone takes a generator off the data, beside distillation it does not (2511.20549).

    python -m kd.claims flash_dmd

A generator of two steps learns a grid of Gaussians from its exact denoiser, in the two ways of
DMD2 and Flash-DMD; then a reward asks for its right half, and by a fault of its own for what is far
from the origin.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import mixture_world
from kd.claims.claim import Check, Claim
from kd.data.builders import mixtures
from kd.method import alternate
from kd.methods import start
from kd.methods.diffusion import common
from kd.methods.diffusion.critic import GENERATOR
from kd.methods.diffusion.distribution_matching import distribution_matching
from kd.methods.diffusion.flash_dmd import flash
from kd.methods.diffusion.judge import Adversary, judged_by
from kd.methods.diffusion.preferred_steps import preferring
from kd.sampling import times

GRID = mixtures.grid(4, spacing=0.8, deviation=0.08)
LEVELS, HIGH = (5.0, 0.5), 1
# Off the data: farther from every mode than so many deviations.
OFF = 4
# Weights of adversarial losses: on features of the critic, of generator and critic, and on points.
GAN, CRITIC_GAN, PIXEL_GAN = 0.3, 0.1, 0.3
BETA = 1.0
# What critics of stage 2 begin as: that of stage 1 is not at hand.
DENOISER = 'denoiser'
TITLES = {
    'dmd2': 'DMD2, one critic move',
    'dmd2_five': 'DMD2, five critic moves',
    'split': 'split by noise, one critic move',
    'flash': 'split and coupled, one critic move',
    'distilled': 'distilled further, no reward',
    'alone': 'reward alone',
    'joint': 'reward and distillation',
}
CHECKS = [
    Check('reward alone: over half off the data', 'off', 'alone', 0.5),
    Check('beside distillation: below a fifth', 'off', 'joint', 0.2, lower=True),
    Check('and wanted more often than without the reward, by .1', 'wanted', 'joint', 'distilled',
          margin=0.1),
    Check('the reward itself is higher alone', 'reward', 'alone', 'joint'),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps, rounds, pretraining = (3, 2, 2, 2) if smoke else (4, 800, 400, 3_000)
    return Claim(
        paper='Flash-DMD 2025, arXiv:2511.20549',
        statement='Preferences of a reward alone take a generator off the data; alternating with '
        'distillation they do not, and the wanted samples become more.',
        setting='Grid of 4 x 4 Gaussians, .8 apart, deviation .08; exact teacher; perceptrons of '
        f'3 x 96 with EDM preconditioning, trained as denoisers for {pretraining} steps; two steps '
        f'at the times 5 and .5; {steps} moves of the generator with Adam 3e-4, critic and '
        f'discriminator Adam 1e-3, batches of 256; then {rounds} rounds of five moves by the best '
        'and the worst of four next states with beta 1, of one move of distillation, or of both; '
        f'the reward is sigmoid(x_1) + .05 |x|. {runs} seeds. Grid and beta, of .1 and 1, are from '
        'another seed.',
        run=lambda say: run(say, runs, steps, rounds, pretraining, smoke),
        checks=CHECKS[3:] if smoke else CHECKS,
        draw=draw,
        notes='Wanted: on a mode, within three deviations, and x_1 > 0. The reward scores the next '
        'states, with their noise. How splitting by noise and coupling compare with DMD2 is '
        'reported, and no check depends on it.',
    )


def reward(z, t=None, condition=None, frozen=None):
    """Of states [..., 2]; the second term is the fault."""
    return jax.nn.sigmoid(z[..., 0]) + 0.05 * jnp.linalg.norm(z, axis=-1)


def run(say, runs, steps, rounds, pretraining, smoke):
    """Shares and distances by arm."""
    world = mixture_world.World(GRID, np.arange(runs), width=96)
    began, student = world.denoisers(pretraining), world.student(*LEVELS)
    measured = {}

    def trained(name, method, params, count):
        params = world.train(method, params, count, frozen_per_run={DENOISER: {'params': began}})
        measured[name] = measure(world, world.samples(params, student))
        means = ', '.join(f'{key} {np.mean(value):.3f}' for key, value in measured[name].items())
        say(f'{TITLES[name]}: {means}')
        return params

    for name in ('dmd2',) if smoke else ('dmd2', 'dmd2_five', 'split'):
        trained(name, distilling(world, student, name, steps), began, steps)
    started = trained('flash', distilling(world, student, 'flash', steps), began, steps)
    trained('distilled', distilling(world, student, 'distilled', rounds), started, rounds)
    for name in ('alone', 'joint'):
        trained(name, rewarding(world, student, name, rounds), started, rounds)
    return measured


def distilling(world, student, name, steps, rewarded=False, context=None):
    """The method of an arm without a reward, or the distillation beside one."""
    context = context or of_rates(world, steps)
    direction = common.matching(times.uniform(world.clock, 0.02, 0.98), 1.0)
    if name.startswith('dmd2'):
        critic = world.critic(context, updates=5 if name == 'dmd2_five' else 1)
        return distribution_matching(
            context, student=student, teacher=world.exact, critic=critic, direction=direction,
            discriminator=common.head('hidden2', critic.law, GAN, CRITIC_GAN),
        )  # fmt: skip
    coupling = 1.0 if name == 'split' else 0.97
    critic = world.critic(context, updates=1, coupling=coupling, start=DENOISER)
    head = dict(name='kd.models.discriminator.FourierHead')
    judge = judged_by(
        context, {'coarse': dict(scale=2.0, **head), 'fine': dict(scale=6.0, seed=1, **head)}, {}
    )
    adversary = Adversary(*judge, context.optimizer(name='adam', lr=1e-3, b1=0.0), PIXEL_GAN)
    return flash(
        context, student, HIGH, world.exact, critic, direction, adversary, rewarded or None
    )


def rewarding(world, student, name, rounds):
    """Preferences alone, or with a round of distillation in turn."""
    context = of_rates(world, rounds)
    player = preferring(context, student, reward, 1, 5, 4, BETA, others=name == 'joint')
    if name == 'joint':
        return distilling(world, student, name, rounds, player, context)
    begun = start.from_reference(
        lambda key: {GENERATOR: world.network.init(key)}, context,
        transform=start.to_parts(**{GENERATOR: start.whole}),
    )  # fmt: skip
    return alternate({GENERATOR: player}, begun)


def of_rates(world, steps):
    """The stage of a generator."""
    return world.context(3e-4, (DENOISER,), optimizer=dict(b1=0.0), steps=steps)


def measure(world, samples):
    """Of each run."""
    away = np.linalg.norm(samples[:, :, None] - GRID.means, axis=-1).min(-1) / GRID.deviation
    wanted = (away < 3) & (samples[..., 0] > 0)
    return {
        **world.measure(samples),
        'off': (away > OFF).mean(1).tolist(),
        'wanted': wanted.mean(1).tolist(),
        'reward': np.asarray(reward(samples)).mean(1).tolist(),
    }


def draw(measured):
    """Stage 1 above, rewards below, every seed a dot."""
    figure = figures.new_figure(11, 5)
    axes = figure.subplots(2, 3)
    first = ('dmd2', 'dmd2_five', 'split', 'flash')
    panels = (
        (first, ('swd', 'hit', 'off')),
        ([name for name in TITLES if name not in first], ('wanted', 'off', 'reward')),
    )
    labels = {
        'swd': 'sliced Wasserstein distance', 'hit': 'share on a mode', 'off': 'share off the data',
        'wanted': 'share on a mode of the right half', 'reward': 'mean reward',
    }  # fmt: skip
    for row, (names, metrics) in zip(axes, panels, strict=True):
        for axis, metric in zip(row, metrics, strict=True):
            arms = {TITLES[name]: measured[name][metric] for name in names if name in measured}
            figures.dots(axis, arms)
            axis.set_xlabel(labels[metric])
            if axis is not row[0]:
                axis.set_yticklabels([])
    return figure
