"""Generators of one step by a discriminator alone, from a diffusion model (arXiv:2405.20750).

    python -m kd.claims innate_one_step

Points of two grids of Gaussians. On the large one the network is too small for its teacher, and
what matches the teacher's outputs noise by noise ends where the teacher ends.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import figures
from kd.claims import mixture_world
from kd.claims.claim import Check, Claim
from kd.data.builders import mixtures
from kd.losses.schedule import flow
from kd.method import Objective, minimize, with_ema
from kd.methods import start
from kd.methods.diffusion.innate_one_step import innate_one_step
from kd.metrics import mean
from kd.sampling import diffusion, times

# Name: (grid, width, whether all arms are run).
GRIDS = {
    'large': (mixtures.grid(8, spacing=0.5, deviation=0.04), 32),
    'small': (mixtures.grid(4, spacing=0.8, deviation=0.05), 48),
}
# The time at which a generator of one step is asked, and the steps of the teacher.
LEVEL, STEPS = 0.99, 40
AVERAGE = {'slow': dict(decay=0.995, of='generator')}
ARMS = ('random', 'gdd', 'frozen', 'instance')
TITLES = {
    'teacher': f'teacher, {STEPS} steps',
    'random': 'discriminator, from random weights',
    'gdd': 'discriminator, from the teacher',
    'frozen': 'the same, hidden layers frozen',
    'instance': "the teacher's output for each noise",
}
CHECKS = [
    Check('8x8: distance of GDD below instance distillation', 'swd', 'large_gdd', 'large_instance',
          lower=True),
    Check('8x8: hits of GDD over instance distillation by .03', 'hit', 'large_gdd',
          'large_instance', margin=0.03),
    Check('4x4: distance from the teacher below that from random weights', 'swd', 'small_gdd',
          'small_random', lower=True),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps of one grid."""
    runs, steps, pretraining = (3, 2, 2) if smoke else (3, 1_500, 4_000)
    return Claim(
        paper='Diffusion Models Are Innate One-Step Generators 2024, arXiv:2405.20750',
        statement='A diffusion model becomes a better generator of one step by a discriminator '
        'alone than by matching of its own outputs.',
        setting='Grids of 8 x 8 Gaussians (deviation .04, perceptrons of 3 x 32) and 4 x 4 '
        f'(deviation .05, 3 x 48); teachers trained for {pretraining} steps; generators called at '
        f'time {LEVEL} of a straight path; two heads on random Fourier features of scales 2 and 6, '
        f'R1 .05 at every step, Adam 3e-4 with b1 0 and b2 .99, batches of 256, {steps} steps, an '
        f'average of .995; instance distillation by the {STEPS} steps of the teacher with the same '
        f'optimiser and as many steps; {runs} seeds. Nothing is tuned.',
        run=lambda say: run(say, runs, steps, pretraining, smoke),
        checks=[CHECKS[2]._replace(worse='small_teacher')] if smoke else CHECKS,
        draw=draw,
        notes='Freezing is reported, and no check depends on it: perceptrons have no convolutions, '
        'and the layers between the first and the last stand for them. Instance distillation sees '
        'no data, a discriminator does.',
    )


def run(say, runs, steps, pretraining, smoke):
    """Distances and shares by grid and arm."""
    measured = {}
    for grid in ('small',) if smoke else GRIDS:
        mixture, width = GRIDS[grid]
        world = mixture_world.World(mixture, np.arange(runs), path=flow(1.0), width=width)
        started = world.denoisers(pretraining)
        teacher = world.student(*map(float, times.sampling(world.path, STEPS)))
        found = world.measure(world.samples(started, teacher, step='ddim'))
        measured[f'{grid}_teacher'] = found
        for name in ('gdd',) if smoke else ARMS:
            method = with_ema(arm(world, name, steps), AVERAGE)
            began = started
            if name == 'random':
                keys = jax.vmap(jax.random.key)(jnp.arange(100, 100 + runs))
                began = jax.jit(jax.vmap(world.network.init))(keys)['params']
            # The teacher is where all but one begin.
            params = world.train(method, began, steps, average='slow')
            found = world.measure(world.samples(params, world.student(LEVEL)))
            measured[f'{grid}_{name}'] = found
            means = ', '.join(f'{key} {np.mean(value):.3f}' for key, value in found.items())
            say(f'{grid} grid, {TITLES[name]}: {means}')
    return measured


def arm(world, name, steps):
    """The method of an arm."""
    context = world.context(3e-4, optimizer=dict(b1=0.0, b2=0.99), steps=steps)
    if name == 'instance':
        return instance(context, world)
    head = dict(name='kd.models.discriminator.FourierHead')
    return innate_one_step(
        context,
        times=(LEVEL,),
        optimizer=dict(name='adam', lr=3e-4, b1=0.0, b2=0.99),
        heads={'coarse': dict(scale=2.0, **head), 'fine': dict(scale=6.0, seed=1, **head)},
        gamma=0.05,
        lazy=1,
        freeze='hidden[1-9]' if name == 'frozen' else '',
    )


def instance(context, world):
    """The squared distance from what the teacher makes of the same noise in its many steps."""
    levels = times.sampling(world.path, STEPS)

    def loss(params, state, batch, key):
        z = jax.random.normal(key, batch['input'].shape)
        teach = world.denoiser.bind(state.frozen['start'])
        wanted = jax.lax.stop_gradient(diffusion.sample(world.path, teach, z, levels, key))
        own = state.variables(part='generator', params=params)
        said = world.denoiser.bind(own)(z, jnp.float32(LEVEL))
        return Objective(mean(jnp.square(said - wanted).sum(-1)), {})

    init = start.from_reference(
        lambda key: {'generator': context.network.init(key)}, context,
        transform=start.to_parts(generator=start.whole),
    )  # fmt: skip
    return minimize(loss, optax.adam(3e-4, b1=0.0, b2=0.99), init)


def draw(measured):
    """Every grid a panel, every arm a row, every seed a dot."""
    figure = figures.new_figure(10, 5)
    grids = sorted({name.partition('_')[0] for name in measured})
    axes = np.atleast_2d(figure.subplots(len(grids), 2, sharey=True))
    for row, grid in zip(axes, grids, strict=True):
        own = {name: measured[f'{grid}_{name}'] for name in TITLES if f'{grid}_{name}' in measured}
        for axis, metric, label in (
            (row[0], 'swd', 'sliced Wasserstein distance'),
            (row[1], 'hit', 'share of samples on a mode'),
        ):
            figures.dots(axis, {TITLES[name]: found[metric] for name, found in own.items()})
            axis.set_xlabel(f'{grid} grid: {label}')
    return figure
