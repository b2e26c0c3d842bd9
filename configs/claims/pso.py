"""Tuning a distilled generator by pairs of samples (PSO, arXiv:2410.03190).

    python -m kd.claims pso

A generator of four steps makes points on a ring of eight modes, and is to keep to four of them. Its
own step from one time to the next is what is made more or less likely; the other way, to go on with
denoising of the wanted data at its four times, blurs it.
"""

import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import mixture_world
from kd.claims.claim import Check, Claim
from kd.data.builders import mixtures
from kd.evaluators import distribution
from kd.methods.diffusion import end_points, pso
from kd.sampling import diffusion

# The card's ring, of radius 4 and deviation .15, at the scale of the networks.
RING = mixtures.ring(deviation=0.0525)
WANTED = RING._replace(means=RING.means[:4], labels=RING.labels[:4])
LEVELS = (5.0, 2.4, 1.0, 0.41)
TITLES = {
    'start': 'before',
    'denoising': 'denoising at the four times',
    'offline': 'offline, kappa .1',
    'offline_whole': 'offline, kappa 1',
    'online': 'online, clipped',
}
CHECKS = [
    Check('off the modes: offline below half of denoising', 'off', 'offline', 'denoising',
          lower=True, ratio=0.5),
    Check('off the modes: online below half of denoising', 'off', 'online', 'denoising',
          lower=True, ratio=0.5),
    Check('offline: nearest to a wanted mode over .95', 'wanted', 'offline', 0.95),
    Check('online: nearest to a wanted mode over .95', 'wanted', 'online', 0.95),
    Check('control, off the modes: kappa 1 over kappa .1', 'off', 'offline_whole', 'offline'),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps, pretraining, distilling = (3, 2, 2, 2) if smoke else (6, 1_500, 3_000, 4_000)
    return Claim(
        paper='Miao et al. 2024 (PSO), arXiv:2410.03190',
        statement='A generator of few steps that is tuned by pairs of samples reaches what is '
        'preferred and stays sharp; denoising of the preferred data takes it off the modes.',
        setting='Ring of eight Gaussians of deviation .0525, radius 1.4, of which four are '
        f'preferred; perceptrons of 3 x 128, trained as denoisers for {pretraining} steps, then '
        f'for {distilling} on end points of the exact flow (12 DDIM steps) at the times {LEVELS}; '
        f'{steps} steps of each arm, Adam 1e-3, batches of 256. Offline: beta 5, targets of the '
        'preferred modes over fresh samples of the generator before; online: beta 50, clip .1, '
        f'reward minus the distance to the nearest preferred mode; {runs} seeds. Off the modes is '
        'farther than four deviations from all eight. Nothing is tuned.',
        run=lambda say: run(say, runs, steps, pretraining, distilling, smoke),
        checks=CHECKS[:1] + CHECKS[2:3] if smoke else CHECKS,
        draw=draw,
        notes='The control has an error of the rejected without bound: no prior, no clip.',
    )


def reward(x, condition, frozen):
    """Minus the distance to the nearest of the wanted modes."""
    del condition, frozen
    away = jnp.linalg.norm(x[:, None] - jnp.asarray(WANTED.means, x.dtype), axis=-1)
    return -away.min(1)


def run(say, runs, steps, pretraining, distilling, smoke):
    """Shares of samples by arm."""
    world = mixture_world.World(RING, np.arange(runs))
    student = world.student(*LEVELS)
    context = world.context(1e-3, steps=distilling, optimizer=dict(schedule='cosine'))
    solve = end_points.solver_of(world.exact, diffusion.ddim(), 12)
    distil = end_points.regression(context, student, solve, 'x0')
    started = world.train(distil, world.denoisers(pretraining), distilling, part='network')
    measured = {'start': measure(world, world.samples(started, student))}
    # From here on data are the wanted ones.
    points = WANTED.draw(np.random.default_rng(3), 50_000)[0]
    world.data = {'input': points.astype(np.float32)}
    context = world.context(1e-3, steps=steps)
    methods = {
        'denoising': lambda: pso.offline(context, student, 'denoising'),
        'offline': lambda: pso.offline(context, student),
        'offline_whole': lambda: pso.offline(context, student, kappa=1.0),
        'online': lambda: pso.online(context, student, reward),
    }
    if smoke:
        methods = {name: methods[name] for name in ('denoising', 'offline')}
    for name, method in methods.items():
        params = world.train(method(), started, steps, part='network')
        measured[name] = measure(world, world.samples(params, student))
        told = ', '.join(f'{key} {np.mean(value):.3f}' for key, value in measured[name].items())
        say(f'{TITLES[name]}: {told}')
    return measured


def measure(world, samples):
    """Of each run."""
    real = WANTED.draw(np.random.default_rng(1), samples.shape[1])[0]
    away = np.linalg.norm(samples[:, :, None] - RING.means, axis=-1)
    nearest = away.argmin(-1)
    return {
        'wanted': (nearest < len(WANTED.means)).mean(1).tolist(),
        'off': (away.min(-1) > 4 * RING.deviation).mean(1).tolist(),
        'within': (away.min(-1).mean(1) / RING.deviation).tolist(),
        'energy': [distribution.energy_distance(real, x) for x in samples],
    }


def draw(measured):
    """Shares of every arm, a dot for each seed."""
    figure = figures.new_figure(11, 2.8)
    axes = figure.subplots(1, 3, sharey=True)
    for axis, metric, label in zip(
        axes,
        ('wanted', 'off', 'within'),
        ('share at a wanted mode', 'share off the modes', 'mean distance to the mode, deviations'),
        strict=True,
    ):
        figures.dots(axis, {TITLES[name]: found[metric] for name, found in measured.items()})
        axis.set_xlabel(label)
    return figure
