"""High-frequency score distillation beside a teacher's solutions (TAD-SR 2024, arXiv:2408.07476).

    python -m kd.claims tad_sr

A diffusion of residuals in fifteen steps restores grey patches of 8x8 pixels of two photographs
that were made small to 2x2. Students of one step begin as it and learn its solutions, with further
terms or without. All stop after 300 steps, which was fixed before the run, and are looked at once
more after 900. Two numbers say how good they are, and only together: PSNR, which is best for a
blurred mean, and the Frechet distance of patches, which is best for what looks right.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.config import Recipe
from kd.data.context import SourceContext
from kd.data.patches import crops
from kd.data.transforms.low_resolution import lowered
from kd.evaluators.restoration import radii
from kd.evaluators.restored import compared
from kd.losses.schedule import residual_shift
from kd.methods.diffusion.denoising import denoising
from kd.methods.sr.tad_sr import gap, tad_sr
from kd.models.shifted import Shifted, ShiftedMLP
from kd.network import from_linen
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times

SIDE, SCALE, PATH = 8, 4, residual_shift()
SHAPE = jax.ShapeDtypeStruct((SIDE, SIDE, 1), jnp.float32)
SPEC = dict.fromkeys(('input', 'low', 'noise', 'sample'), SHAPE)
FEATURES = ('feature0', 'feature1', 'feature2')
ALONE = dict(hsd=0.0, adversarial=0.0)
ARMS = {
    'reg': ALONE,
    'sds': dict(score='sds', adversarial=0.0),
    'hsd': dict(adversarial=0.0),
    'uniform': dict(times=tuple(range(15)), adversarial=0.0),
    'full': dict(features=FEATURES, optimizer=dict(name='adam', lr=5e-4)),
}
TITLES = {
    'low': 'bicubic',
    'teacher': 'teacher, 15 steps',
    'reg': 'solutions alone',
    'sds': 'and score distillation',
    'hsd': 'and high-frequency distillation',
    'uniform': 'the same at all times',
    'full': 'and a discriminator: TAD-SR',
}
CHECKS = [
    Check('its gradient tilts to high frequencies', 'tilt', 'hsd', 'reg'),
    Check('at the teacher it is 0, and score distillation is not', 'pull', 'sds', 'hsd', 0.1),
    Check('TAD-SR at the stop: a smaller distance', 'frechet', 'full', 'reg', lower=True),
    Check('TAD-SR at the stop: PSNR not lower by .1 dB', 'psnr', 'full', 'reg', margin=-0.1),
]


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and patches."""
    plan = (5, 10_000, 2_000, 5_000, 300, 900) if not smoke else (3, 64, 40, 2, 1, 2)
    runs, patches, tested, taught, stop, end = plan
    arms = ('full',) if smoke else tuple(ARMS)
    return Claim(
        paper='TAD-SR 2024, arXiv:2408.07476',
        statement='Where noise is little, the difference of what a teacher says of a student and '
        'of itself is one of fine detail, and makes a restorer of one step look better.',
        setting=f'{patches} grey patches of 8x8 pixels of two photographs, made small by 4; '
        f'{tested} of their middle columns held out. Perceptrons of 3 x 128. Teacher: {taught} '
        f'steps of Adam 2e-3 with a cosine, batches of 128, one for each seed; students {stop} '
        'steps of Adam 5e-4 in batches of 64 from one recorded solution a patch, then on to '
        f'{end}. Weights and times of the paper. {runs} seeds; none was used to choose anything.',
        run=lambda say: run(say, 20 + np.arange(runs), *plan[1:], arms),
        checks=CHECKS[:2] if smoke else CHECKS,
        draw=draw,
        notes=f'Reported and not asserted: all arms after {end} steps (`_end`; none of one that '
        'diverges), and errors of the upper third of frequencies (`high_bands`), which can be won '
        'while all else is lost.',
    )


def run(say, seeds, patches, tested, taught, stop, end, arms=tuple(ARMS)):
    """Numbers of all arms by seed."""
    train, test = data('train', patches), data('test', tested)
    net = from_linen(
        Shifted(ShiftedMLP(width=128), PATH), *Shifted(None, PATH).example_inputs(SPEC)
    )
    teacher = taught_by_seed(net, train, seeds, taught)
    say('teachers are trained')
    noise = [noises(seeds, len(x['low']), part) for part, x in enumerate((train, test))]
    solve, once = solved(net, 15), solved(net, 1)
    made = [
        np.asarray(solve(teacher, z, x['low'])) for z, x in zip(noise, (train, test), strict=True)
    ]
    measured = {
        'low': scores(np.zeros((len(seeds), *test['low'].shape)), test),
        'teacher': scores(made[1], test),
    }
    per_run = {'noise': noise[0], 'sample': made[0]}
    first = gradients(net, teacher, noise[1], made[1], test)
    for name, options in ARMS.items():
        found = {}
        measured[name] = first.get(name, {})
        if name not in arms:
            continue

        def watch(state, found=found):
            key = '' if int(state.step) == stop else '_end'
            if int(state.step) not in (stop, end):
                return
            ends = np.asarray(once({'params': state.params['network']}, noise[1], test['low']))
            # Residuals lie within 2.
            if np.abs(ends).max() < 10:
                found |= {f'{k}{key}': x for k, x in scores(ends, test).items()}

        method = tad_sr(context_of(net, end), **options)
        seeds_lib.train(
            method, train, seeds, steps=end, batch_size=64, per_run=per_run, watch=watch,
            watched=stop, frozen_per_run={'teacher': teacher, 'start': teacher},
        )  # fmt: skip
        measured[name] |= found
        say(f'{TITLES[name]}: ' + ', '.join(f'{k} {np.mean(x):.3f}' for k, x in found.items()))
    return measured


def data(split, count):
    """Residuals and low patches of a split."""
    context = SourceContext(split, Recipe(stages={}, data={}))
    source = crops(context, of='china_flower', size=SIDE, channels='grey', count=count)
    image = source.fetch(np.arange(count))['input']
    low = lowered(image, (SCALE,), 'torch_antialias', 'torch')[-1].astype(np.float32)
    return {'input': image - low, 'low': low}


def context_of(net, steps):
    """Of a stage whose teacher and beginning have the student's own form."""
    return seeds_lib.context(
        network=net, teacher=net, references={'start': net}, spec=SPEC, steps=steps,
        optimizer=dict(name='adam', lr=5e-4),
    )  # fmt: skip


def taught_by_seed(net, train, seeds, steps):
    """Variables of a teacher for each seed."""
    context = seeds_lib.context(
        network=net, spec=SPEC, steps=steps, optimizer=dict(name='adam', lr=2e-3, schedule='cosine')
    )
    method = denoising(context, weight='x0', label_dropout=0.0)
    state = seeds_lib.train(method, train, seeds, steps=steps, batch_size=128)
    return {'params': state.params['network']}


def noises(seeds, count, part):
    """Of each seed, at the noisiest time, [R, count, ...]."""
    sigma = float(PATH.sigma(jnp.float32(PATH.high)))
    return np.stack([
        sigma * np.random.default_rng([seed, part]).standard_normal((count, *SHAPE.shape))
        for seed in seeds
    ]).astype(np.float32)  # fmt: skip


def solved(net, steps):
    """(variables [R, ...], noises [R, n, ...], low [n, ...]) -> residuals [R, n, ...]."""
    own, grid = denoisers.of_network(net), times.sampling(PATH, steps)

    def solve(variables, z, low):
        denoise = own.bind(variables, {'low': low})
        return diffusion.sample(PATH, denoise, z, grid, jax.random.key(0))

    return jax.jit(jax.vmap(solve, in_axes=(0, 0, None)))


def scores(found, test):
    """PSNR, distance and error of high frequencies of residuals [R, n, ...], by seed."""
    each = [compared(test['low'] + x, test['low'] + test['input']) for x in found]
    return {name: [one[name] for one in each] for name in ('psnr', 'frechet', 'high_bands')}


def gradients(net, teacher, z, made, test):
    """What moves a student that begins: `tilt` of its gradient; and `pull`, |g| at the teacher.

    The tilt is the logarithm of the power of the upper third of frequencies over that of the lower.
    """
    own, level = denoisers.of_network(net), 3

    @jax.jit
    @jax.vmap
    def moved(variables, z, made, key):
        denoise = own.bind(variables, {'low': test['low']})
        r = denoise(z, jnp.float32(PATH.high))
        t = jnp.arange(len(z)) % level * 1.0
        noise = jax.random.normal(key, r.shape)
        of = lambda x, score: gap(denoise, x, made, PATH, t, noise, score)  # noqa: E731
        pull = {score: jnp.abs(of(made, score)).mean() for score in ('hsd', 'sds')}
        return r - made, of(r, 'hsd'), pull

    keys = jax.vmap(jax.random.key)(jnp.arange(len(z)))
    error, g, pull = jax.device_get(moved(teacher, z, made, keys))
    return {
        'reg': {'tilt': [tilt(x) for x in error]},
        'hsd': {'tilt': [tilt(x) for x in g], 'pull': pull['hsd'].tolist()},
        'sds': {'pull': pull['sds'].tolist()},
    }


def tilt(x):
    """log of the power of x [n, H, W, C] at high frequencies over that at low ones."""
    power = np.square(np.abs(np.fft.fft2(x.astype(np.float64), axes=(1, 2)))).mean((0, 3))
    place = radii(SIDE, SIDE)
    return float(np.log(power[place > 2 / 3].mean() / power[place < 1 / 3].mean()))


def draw(measured):
    """Every seed, by arm: nearness and distance at the stop, and the distance at the end."""
    figure = figures.new_figure(12, 3.4)
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (metric, label) in zip(
        axes,
        (
            ('psnr', 'PSNR at the stop, dB'),
            ('frechet', 'Frechet distance at the stop'),
            ('frechet_end', 'the same after three times as long'),
        ),
        strict=True,
    ):
        rows = {
            TITLES[arm]: found.get(metric, [np.nan] if arm in ARMS else found['frechet'])
            for arm, found in measured.items()
            if 'psnr' in found
        }
        figures.dots(axis, rows)
        axis.set(xlabel=label)
    return figure
