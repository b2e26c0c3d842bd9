"""A distilled model that a base model begins for (Diversity Distillation, arXiv:2503.10637).

    python -m kd.claims diversity_distillation

Three classes of points, each in five of the nine modes of a ring, so that they overlap. The base is
the exact denoiser; the distilled model says in four steps where its guided flow ends, and has lost
modes. Nothing else is trained: arms are samplers.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import mixture_world
from kd.claims.claim import Check, Claim
from kd.data.builders.mixtures import Mixture
from kd.evaluators import distribution, fidelity
from kd.methods.diffusion import end_points
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.sampling.generator import Generator
from kd.sampling.hybrid import hybrid

GUIDANCE, LEVELS, BASE_STEPS = 4.0, (5.0, 2.4, 1.0, 0.41), 20
DEVIATION, CLASSES = 0.07, 3
TITLES = {
    'base': f'base, {BASE_STEPS} steps',
    'base_guided': f'base, {BASE_STEPS} steps, guided',
    'distilled': 'distilled, 4 steps',
    'hybrid': 'first step by the base',
    'hybrid_two': 'first two steps by the base',
    'guided': 'first step by the guided base',
    'skip': 'first step by nobody, as released',
}
CHECKS = [
    Check('distance of two samples: a first step by the base over none', 'distance', 'hybrid',
          'distilled'),
    Check('distance to the class: a first step by the base below none', 'energy', 'hybrid',
          'distilled', lower=True),
    Check('distance of two samples: a first step by the guided base below none', 'distance',
          'guided', 'distilled', lower=True),
    Check('the first prediction is closer to the end: distilled below base', 'first', 'distilled',
          'base', lower=True),
]  # fmt: skip


def mixture() -> Mixture:
    """Five of nine modes for each class; neighbours share two."""
    angle = 2 * np.pi * np.arange(9) / 9
    ring = 1.4 * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    modes = np.concatenate([(3 * c + np.arange(5)) % 9 for c in range(CLASSES)])
    shares = np.tile([0.15, 0.2, 0.3, 0.2, 0.15], CLASSES)
    return Mixture(ring[modes], DEVIATION, np.repeat(np.arange(CLASSES), 5), shares)


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps."""
    runs, steps, pretraining = (3, 2, 2) if smoke else (6, 4_000, 3_000)
    return Claim(
        paper='Gandikota and Bau 2025, arXiv:2503.10637',
        statement='A distilled model whose first step is made by its base, without guidance, has '
        'more various samples, closer to the data; by the guided base fewer.',
        setting='Three classes, each in five of nine modes of a ring of radius 1.4, deviation '
        f'{DEVIATION}; the base is their exact denoiser; a perceptron of 3 x 128, trained as a '
        f'denoiser for {pretraining} steps and then for {steps} on the end points of the base '
        f'guided by {GUIDANCE:g}, 12 DDIM steps, Adam 1e-3; times {LEVELS} of an EDM schedule, '
        f'base and distilled by the same step; {runs} seeds. Nothing is tuned.',
        run=lambda say: run(say, runs, steps, pretraining, smoke),
        checks=CHECKS,
        draw=draw,
        notes='To skip the first step is what the released script does with its defaults: its base '
        'makes no step. More diversity than the base has is not to be expected of points.',
    )


def run(say, runs, steps, pretraining, smoke):
    """Diversity, distance and hits within classes, the mean over classes."""
    world = mixture_world.World(mixture(), np.arange(runs), conditional=True)
    context = world.context(1e-3, steps=steps, optimizer=dict(schedule='cosine'))
    student = world.student(*LEVELS)
    guided = denoisers.guided(world.exact, GUIDANCE)
    solve = end_points.solver_of(guided, diffusion.ddim(), 12)
    method = end_points.regression(context, student, solve, 'x0')
    started = world.denoisers(pretraining)
    params = world.train(method, started, steps, part='network')
    n = 300 if smoke else 4_500
    measured = {}
    arms = samplers(world, student, guided)
    if smoke:
        arms = {name: arms[name] for name in ('base', 'distilled', 'hybrid', 'guided')}
    for name, sampler in arms.items():
        measured[name] = measure(world, *sampler(params, n))
        told = ', '.join(f'{key} {np.mean(value):.3f}' for key, value in measured[name].items())
        say(f'{TITLES[name]}: {told}')
    return measured


def samplers(world, student, guided):
    """{arm: `(params [R, ...], n) -> (samples [R, n, 2], what is said [R, S, n, 2])`}."""
    grid = tuple(map(float, times.sampling(world.path, BASE_STEPS)))
    plain, first = (Generator(d, LEVELS, student.step) for d in (world.exact, guided))

    def alone(made):
        def draw(params, condition, n):
            noise_key, key = jax.random.split(jax.random.key(0))
            z = diffusion.noise(world.path, noise_key, (n, 2), made.times[0])
            denoise = made.denoiser.bind({'params': params}, condition)
            states = diffusion.sample(
                world.path, denoise, z, made.times, key, step=made.step, trajectory=True
            )
            return states[-1], diffusion.said(denoise, states, made.times)

        return draw

    def begun(base, switch=1, skip=False):
        made = hybrid(base, student, switch, skip=skip, where='claim')

        def draw(params, condition, n):
            x = made.sample({}, {'params': params}, condition, jax.random.key(0), (n, 2))
            return x, x[None]

        return draw

    def together(draw):
        def of_all(params, n):
            condition = {'label': jnp.arange(n) % CLASSES}
            return jax.jit(jax.vmap(lambda p: draw(p, condition, n)))(params)

        return of_all

    return {
        name: together(draw)
        for name, draw in {
            'base': alone(Generator(world.exact, grid, diffusion.ddim())),
            'base_guided': alone(Generator(guided, grid, diffusion.ddim())),
            'distilled': alone(student),
            'hybrid': begun(plain),
            'hybrid_two': begun(plain, 2),
            'guided': begun(first),
            'skip': begun(plain, skip=True),
        }.items()
    }


def measure(world, samples, said):
    """Of each run, the mean over classes."""
    samples, said = np.asarray(samples), np.asarray(said)
    data, known = mixture().draw(np.random.default_rng(1), samples.shape[1])
    label = np.arange(samples.shape[1]) % CLASSES
    found = {name: [] for name in ('distance', 'entropy', 'energy', 'off')}
    for x in samples:
        of_classes = []
        for c in range(CLASSES):
            own, real = x[label == c], data[known == c]
            modes = fidelity.modes(
                own, world.mixture.means[world.mixture.labels == c], 4 * DEVIATION
            )
            distance = fidelity.pairwise_distance(own)
            energy = distribution.energy_distance(real, own)
            of_classes.append((distance, modes.entropy, energy, 1 - modes.hit))
        for name, value in zip(found, np.mean(of_classes, 0), strict=True):
            found[name].append(float(value))
    curves = np.asarray([fidelity.commitment(s, x) for s, x in zip(said, samples, strict=True)])
    if curves.shape[1] == 1:
        return found
    places = np.linspace(0, curves.shape[1] - 1, 4).round().astype(int)
    named = zip(('first', 'third', 'two_thirds', 'last'), curves[:, places].T, strict=True)
    return found | {name: values.tolist() for name, values in named}


def draw(measured):
    """Diversity and distance of every sampler, and when what is said is what comes out."""
    figure = figures.new_figure(12, 3.2)
    left, middle, right = figure.subplots(1, 3, width_ratios=(1, 1, 1.1))
    rows = {TITLES[name]: found for name, found in measured.items()}
    for axis, metric, label in (
        (left, 'distance', 'distance of two samples of a class'),
        (middle, 'energy', 'energy distance to the class'),
    ):
        figures.dots(axis, {title: found[metric] for title, found in rows.items()})
        axis.set_xlabel(label)
    middle.set_yticklabels([])
    for colour, name in zip(figures.COLOURS, ('base', 'base_guided', 'distilled'), strict=False):
        if name not in measured:
            continue
        parts = ('first', 'third', 'two_thirds', 'last')
        curve = [np.mean(measured[name][part]) for part in parts]
        right.plot((0, 1 / 3, 2 / 3, 1), curve, 'o-', color=colour, label=TITLES[name])
    right.set(xlabel='part of the steps', ylabel='distance of the prediction\nfrom the end')
    right.legend(fontsize=8)
    return figure
