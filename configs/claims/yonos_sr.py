"""A denoiser that is told more is the quieter teacher (YONOS-SR 2024, arXiv:2401.17258).

    python -m kd.claims yonos_sr

A denoiser of 8x8 grey patches is told the means of their 2x2 squares. Others that are told those of
4x4 begin as it, and learn from patches, or from what it says of them; all have as many steps at x4.
What the two targets have the same mean of, one has less noise in.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.data.context import SourceContext
from kd.data.patches import LOW
from kd.data.transforms.low_resolution import EASIER, low_resolution
from kd.evaluators.details import compared
from kd.losses.schedule import cosine
from kd.methods.sr.yonos_sr import decoder_tuning, scale_distillation
from kd.models.denoiser import Denoised
from kd.models.refiner import Refiner
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times

SHAPE = jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)
SPEC = {'input': SHAPE, LOW: SHAPE, EASIER: SHAPE}
STEPS = (1, 4, 16)
TITLES = {
    'low': 'low resolution, as it is',
    'scratch': 'by patches, from nothing',
    'direct': 'by patches, from x2',
    'distilled': 'by what x2 says, from x2',
    'mended': 'the same, mended',
}
CHECKS = [
    Check('gradients at the start: distillation has the smaller variance', 'variance_start',
          'distilled', 'direct', lower=True),
    Check('gradients where patches have led: it has the smaller variance', 'variance_end',
          'distilled', 'direct', lower=True),
    Check('mending adds to the PSNR of one step', 'psnr_1', 'mended', 'distilled'),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and patches."""
    plan = (40_000, 3_000, 1_500, 1_500, 3_000, 1_024, STEPS)
    if smoke:
        plan = (300, 2, 2, 2, 100, 16, STEPS[:1])
    return Claim(
        paper='YONOS-SR 2024, arXiv:2401.17258',
        statement='A denoiser at x4 that learns from one at x2 has quieter gradients than one that '
        'learns from images, and a network tuned to its one step adds to it.',
        setting=f'Grey patches of 8x8 from two photographs, {plan[0]} of them, and {plan[4]} of '
        f'columns held out. Perceptrons of 3 x 256, v-prediction, weight max(snr, 1): {plan[1]} '
        f'steps at x2, then {plan[2]} at x4 of Adam 1e-3 with a cosine, batches of 256; a '
        f'perceptron of 2 x 256 beside the identity mends by L1, {plan[3]} steps. Variance of the '
        f'gradients of {plan[5]} single patches at the weights at which both begin, and where '
        'patches have led, over the square of their mean too; PSNR of all patches together in 1, '
        '4 and 16 steps of DDIM, Frechet distance of details; 5 seeds.',
        run=lambda say: run(say, 10 + np.arange(3 if smoke else 5), *plan),
        checks=CHECKS[:1] if smoke else CHECKS,
        draw=draw,
        notes='PSNR of distillation against patches is reported and not asserted: both have one '
        'optimum, and the paper has a gain where training is short.',
    )


def run(say, seeds, count, first_steps, steps, mending, shown, gradients, sampling):
    """Variances of gradients, and PSNR and distance of details by steps, per seed and arm."""
    source, data = examples('train', count)
    _, test = examples('test', shown)
    easy = {'input': data['input'], LOW: data[EASIER]}
    net = from_linen(
        Denoised(VelocityMLP(width=256, depth=3, beside=(LOW,)), cosine(), kind='v'),
        jax.ShapeDtypeStruct((1,), jnp.float32), jax.ShapeDtypeStruct((1, *SHAPE.shape), 'float32'),
    )  # fmt: skip
    measured = {arm: {} for arm in TITLES}

    def note(arm, found):
        for name, values in found.items():
            measured[arm][name] = [float(value) for value in values]
        told = ', '.join(f'{name} {np.mean(values):.4g}' for name, values in found.items())
        say(f'{TITLES[arm]}: {told}')

    def scored(images, n):
        found = [compared({'': x}, test['input'], source.lowered, 24)[''] for x in images]
        return {f'{k}_{n}': [one[k] for one in found] for k in ('psnr', 'frechet')}

    def trained(method, data, steps, **more):
        return seeds_lib.train(method, data, seeds, steps=steps, batch_size=256, **more)

    state = trained(scale_distillation(context_of(net, first_steps)), easy, first_steps)
    teacher = {'params': state.params['network']}
    say('x2 is trained')
    frozen = {'teacher': teacher, 'start': teacher}

    def of(arm, **more):
        start = {} if arm == 'scratch' else dict(start=net)
        by = dict(teacher=net) if arm == 'distilled' else {}
        return scale_distillation(context_of(net, steps, **start, **by, **more))

    draws = {n: sampled(net, n) for n in sampling}
    note('low', scored(np.repeat(test[LOW][None], len(seeds), 0), 1))
    few = {name: x[:gradients] for name, x in data.items()}
    for arm in ('scratch', 'direct', 'distilled'):
        state = trained(of(arm), data, steps, frozen_per_run=frozen)
        variables = {'params': state.params['network']}
        if arm == 'direct':
            at_end = variables
        for n in sampling:
            note(arm, scored(np.asarray(draws[n](variables, test)), n))
    for arm in ('direct', 'distilled'):
        measure = spread(of(arm, tx=optax.sgd(1.0)), teacher, few, seeds)
        for place, weights in (('start', teacher), ('end', at_end)):
            note(arm, {f'{k}_{place}': x for k, x in measure(weights).items()})
    context = context_of(from_linen(Refiner(), *Refiner().example_inputs(SPEC)), mending,
                         teacher=net)  # fmt: skip
    state = trained(decoder_tuning(context), data, mending, frozen_per_run={'teacher': variables})
    mend = jax.jit(jax.vmap(lambda params, x: context.network.apply({'params': params}, x).logits))
    once = draws[1](variables, test)
    note('mended', scored(np.asarray(mend(state.params['network'], once)), 1))
    return measured


def examples(split, count):
    """The source of patches, and the first of them."""
    crops = dict(
        name='kd.data.patches.crops', of='china_flower', size=8, channels='grey', count=count
    )
    source = low_resolution(SourceContext(split), of=crops, scales=(2, 4), down='box', up='repeat')
    batch = source.fetch(np.arange(count))
    return source, {name: batch[name] for name in SPEC}


def context_of(net, steps, *, start=None, teacher=None, tx=None):
    """Of a stage, by Adam unless another optimiser is given."""
    adam = dict(name='adam', lr=1e-3, schedule='cosine')
    return seeds_lib.context(
        network=net, teacher=teacher, references={'start': start} if start else {}, spec=SPEC,
        steps=steps, tx=tx, optimizer=None if tx else adam,
    )  # fmt: skip


def spread(method, teacher, data, seeds):
    """(weights) -> variance of the gradient of one patch there, and over the square of its mean.

    A step of plain descent moves by the gradient; arms see the same noises and times.
    """

    def of_run(teacher, params, seed):
        frozen = {'teacher': teacher, 'start': teacher}
        state = method.init(jax.random.key(seed), frozen).replace(params={'network': params})

        def add(sums, row):
            number, patch = row
            one = {name: x[None] for name, x in patch.items()}
            at = state.replace(step=number)
            after = method.step(at, one)[0].params['network']
            grads = jax.tree.map(jnp.subtract, params, after)
            square = sum(jnp.sum(g**2) for g in jax.tree.leaves(grads))
            return (jax.tree.map(jnp.add, sums[0], grads), sums[1] + square), None

        count = len(data['input'])
        rows = jnp.arange(count), {name: jnp.asarray(x) for name, x in data.items()}
        zeros = jax.tree.map(jnp.zeros_like, params)
        (total, square), _ = jax.lax.scan(add, (zeros, 0.0), rows)
        mean = sum(jnp.sum((g / count) ** 2) for g in jax.tree.leaves(total))
        variance = (square - count * mean) / (count - 1)
        return variance, variance / mean

    each = jax.jit(jax.vmap(of_run))

    def measure(weights):
        found = each(teacher, weights['params'], np.asarray(seeds, np.uint32))
        return dict(zip(('variance', 'noise_to_signal'), found, strict=True))

    return measure


def sampled(net, n):
    """(variables [R, ...], fields) -> images [R, N, 8, 8, 1] by n steps of DDIM; one noise."""
    denoiser = denoisers.of_network(net)
    path = denoiser.schedule
    grid = times.grid(times.even(path), n, last=1 / n)

    def draw(variables, fields):
        noise = jax.random.normal(jax.random.key(99), fields['input'].shape)
        x = path.mix(jnp.zeros_like(noise), noise, jnp.float32(path.high))
        bound = denoiser.bind(variables, {LOW: fields[LOW]})
        return diffusion.sample(path, bound, x, grid, jax.random.key(0))

    return jax.jit(jax.vmap(draw, (0, None)))


def draw(measured):
    """Variance, PSNR and distance of details, every seed a dot."""
    figure = figures.new_figure(11, 2.6)
    axes = figure.subplots(1, 3)
    shown = (
        ('variance_end', 'variance of the gradient'),
        ('psnr_1', 'PSNR in one step, dB'),
        ('frechet_1', 'Frechet distance, one step'),
    )
    for axis, (metric, label) in zip(axes, shown, strict=True):
        rows = {TITLES[arm]: x[metric] for arm, x in measured.items() if metric in x}
        figures.dots(axis, rows)
        axis.set(xlabel=label)
    return figure
