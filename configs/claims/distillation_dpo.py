"""Preferences in the distillation of completions: points of a spiral (arXiv:2504.11447).

    python -m kd.claims distillation_dpo

A generator of one step says where on a spiral a blurred point was. A metric prefers one of its two
samples; what comes of that, in three forms, at equal updates.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.data.builders import scenes
from kd.losses.schedule import local
from kd.method import Objective, minimize
from kd.methods import start
from kd.methods.diffusion.denoising import denoising
from kd.methods.diffusion.distillation_dpo import distillation_dpo
from kd.metrics import mean
from kd.models.denoiser import Denoised
from kd.models.point_net import PointNet
from kd.network import from_linen
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.sampling.completion import Completion
from kd.sampling.generator import Generator

PATH = local()
LAST = 999.0
BATCH, DRAWS = 256, 8
ARMS = {
    'none': dict(gamma=0.0),
    'half': dict(gamma=0.5),
    'one': dict(gamma=1.0),
    'repaired': dict(form='repaired', kappa=0.3),
    'winners': dict(form='repaired', kappa=0.0),
    'released': dict(form='released'),
}
TITLES = {
    'teacher': 'teacher, 12 steps',
    'start': 'where all begin: its outputs, regressed',
    'none': 'no preference: score distillation',
    'half': 'preference, gamma .5',
    'one': 'preference, gamma 1',
    'repaired': 'sign of the release, losers .3',
    'winners': 'sign of the release, winners alone',
    'released': 'as released: no gradient',
}
CHECKS = [
    Check('distance: gamma 1 at least 5 % below score distillation', 'distance', 'one', 'none',
          lower=True, ratio=0.95),
    Check('from the curve: gamma 1 within .01 of score distillation', 'off', 'one', 'none',
          lower=True, margin=-0.01),
    Check('control: the sign of the release ends farther away than it began', 'distance',
          'repaired', 'start'),
    Check('control: as released, nothing moves', 'distance', 'released', 'start', lower=True,
          margin=-1e-6),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps, pretraining = (3, 4, 8) if smoke else (6, 600, 4_000)
    return Claim(
        paper='Distillation-DPO 2025, arXiv:2504.11447',
        statement='Samples that a metric prefers, and others, each with an assistant of its own, '
        'distil a generator closer to what it completes than score distillation does.',
        setting='A point near a spiral from itself blurred by .35; the noise schedule of the '
        f'paper; a teacher trained for {pretraining} steps; a student regressed on its 12 steps '
        f'for {pretraining // 4}; then {steps} updates with Adam 2e-4 (b1 0, its rate rising '
        f'for a quarter of them), two moves of the assistants each with Adam 1e-3, batches of '
        f'{BATCH}, times of 20 to 700; {runs} seeds. Nothing is tuned. Score distillation has two '
        'assistants as well, whose mean it follows.',
        run=lambda say: run(say, runs, steps, pretraining, smoke),
        checks=CHECKS[3:] if smoke else CHECKS,
        draw=draw,
        notes='What a preference does is to sharpen the posterior: the spread of completions of '
        'one point is measured, and no check depends on it. The form with gamma is ours, of the '
        "paper's parts; the paper's own sum is the control.",
    )


def run(say, runs, steps, pretraining, smoke):
    """Distances, and spreads, by arm."""
    seeds, data = np.arange(runs), scenes.make('spiral', 'train')
    spec = {name: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for name, x in data.items()}
    module = Denoised(PointNet(width=64, depth=2), PATH, 'eps')
    network = from_linen(module, *module.example_inputs(spec))
    own = denoisers.of_network(network)
    many = Completion(Generator(own, _grid(12), diffusion.ddim()))
    one = Completion(Generator(own, (LAST,)))

    def context(length, lr, **more):
        return seeds_lib.context(
            network=network, teacher=network, references={'start': network}, spec=spec,
            steps=length, optimizer=dict(name='adam', lr=lr) | more,
        )  # fmt: skip

    made = denoising(_fresh(network, spec, pretraining), label_dropout=0.0)
    state = seeds_lib.train(made, data, seeds, steps=pretraining, batch_size=BATCH)
    teacher = state.params['network']
    method = regression(context(pretraining // 4, 5e-4), many, one)
    state = seeds_lib.train(
        method, data, seeds, steps=pretraining // 4, batch_size=BATCH,
        frozen_per_run={'start': {'params': teacher}},
    )  # fmt: skip
    begun = state.params['network']
    measured = {'teacher': measure(teacher, many), 'start': measure(begun, one)}
    for name in ('released',) if smoke else ARMS:
        method = distillation_dpo(
            context(steps, 2e-4, b1=0.0, warmup_steps=steps // 4),
            times=(LAST,),
            optimizer=dict(name='adam', lr=1e-3),
            between=(0.02, 0.7),
            **ARMS[name],
        )
        state = seeds_lib.train(
            method, data, seeds, steps=steps, batch_size=BATCH,
            frozen_per_run={'teacher': {'params': teacher}, 'start': {'params': begun}},
        )  # fmt: skip
        measured[name] = measure(state.params['generator'], one)
        means = ', '.join(f'{key} {np.mean(value):.3f}' for key, value in measured[name].items())
        say(f'{TITLES[name]}: {means}')
    return measured


def _fresh(network, spec, length):
    """The context of a teacher, which starts from nothing."""
    optimizer = dict(name='adam', lr=1e-3, schedule='cosine')
    return seeds_lib.context(network=network, spec=spec, steps=length, optimizer=optimizer)


def _grid(count):
    return tuple(map(float, times.grid(times.even(PATH), count, last=1 / count)))


def regression(context, teacher, student):
    """The student as near as it gets to what the teacher makes of the same noise."""

    def loss(params, state, batch, key):
        condition = {'partial': batch['partial']}
        x = teacher.begin(condition, jax.random.normal(key, batch['input'].shape))
        levels = teacher.generator.times
        wanted = diffusion.sample(
            PATH, teacher.generator.denoiser.bind(state.frozen['start'], condition), x, levels, key
        )
        bound = student.generator.denoiser.bind(state.variables(params=params), condition)
        error = jnp.square(bound(x, jnp.float32(LAST)) - jax.lax.stop_gradient(wanted))
        return Objective(mean(error.sum((1, 2))))

    return minimize(loss, context.tx, start.from_reference(context.network.init, context))


def measure(params, completion):
    """Of each run: distance to the point, to the curve, and spread over the noise."""
    points = scenes.make('spiral', 'test')
    drawn = np.asarray(_drawn(completion)(params, jnp.asarray(points['partial'])))
    curve = scenes.on_spiral(np.linspace(0, 1, 400))
    away = np.linalg.norm(drawn - points['input'][:, 0], axis=-1)
    off = [np.linalg.norm(x[0, :, None] - curve, axis=-1).min(1).mean() for x in drawn]
    deviation = np.sqrt(drawn.var(1).sum(-1)).mean(1)
    return {'distance': away.mean((1, 2)).tolist(), 'off': off, 'spread': deviation.tolist()}


@functools.cache
def _drawn(completion):
    """(params [R, ...], partial [N, 1, 2]) -> [R, DRAWS, N, 2]."""

    @jax.jit
    def draw(params, partial):
        def one(params, key):
            shape = (len(partial), 1, 2)
            return completion.sample({'params': params}, {'partial': partial}, key, shape)[:, 0]

        keys = jax.random.split(jax.random.key(0), DRAWS)
        return jax.vmap(lambda p: jax.lax.map(lambda key: one(p, key), keys))(params)

    return draw


def draw(measured):
    """Every arm a row, every seed a dot; what has left the figure is at its edge."""
    figure = figures.new_figure(11, 3.6)
    for axis, (metric, label) in zip(
        figure.subplots(1, 3, sharey=True),
        (('distance', 'distance to the point'), ('off', 'distance to the curve'),
         ('spread', 'spread over the noise')), strict=True,
    ):  # fmt: skip
        rows = {name: np.asarray(found[metric]) for name, found in measured.items()}
        most = 2 * max(rows['start'].max(), rows['teacher'].max())
        figures.dots(axis, {TITLES[name]: np.minimum(row, most) for name, row in rows.items()})
        axis.set_xlabel(label)
    return figure
