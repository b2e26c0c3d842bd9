"""One call whose time chooses between fidelity and realism (Zhu et al. 2024, arXiv:2412.09465).

    python -m kd.claims oftsr

A flow learns 8x8 grey patches of two photographs from the means of their 4x4 squares, with a share
of noise; a student of the same layers learns to say in one call where the flow goes. Patches of a
strip in the middle of each photograph are restored.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.data.context import SourceContext
from kd.data.patches import LOW
from kd.data.transforms.low_resolution import low_resolution
from kd.evaluators.details import compared
from kd.losses.rectified import vp_mix
from kd.methods.sr.oftsr import oftsr, restoring_flow
from kd.models.conditioning import velocity_inputs
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling.flow import euler_sample, time_grid
from kd.sampling.velocity import velocity_function

SHAPE = jax.ShapeDtypeStruct((8, 8, 1), jnp.float32)
SPEC = {'input': SHAPE, LOW: SHAPE}
SHARE, COMPONENTS, MANY = 0.3, 24, 80
TIMES = (0.01, 0.25, 0.5, 0.75, 0.99)
TITLES = {
    'low': 'low resolution, as it is',
    'many': f'flow, {MANY} steps',
    'one': 'flow, 1 step',
    **{f't={t:g}': f'student, t = {t:g}' for t in TIMES},
    'short': 'student by steps of .001, t = .99',
}
CHECKS = [
    Check('PSNR rises nowhere along t by .05 dB', 'psnr_rise', 'student', 0.05, lower=True),
    Check('the distance of details grows nowhere along t by 5 %', 'growth', 'student', 1.05,
          lower=True),
    Check('distance at .99 below half of the flow in one step', 'frechet', 't=0.99', 'one',
          lower=True, ratio=0.5),
    Check('PSNR at .01 above the flow in many steps by 1 dB', 'psnr', 't=0.01', 'many',
          margin=1.0),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and patches."""
    plan = (400, 3, 3, 100) if smoke else (40_000, 6_000, 3_000, 3_000)
    return Claim(
        paper='Zhu et al. 2024, arXiv:2412.09465',
        statement='One call of a student restores images from faithful ones at t = 0 to realistic '
        'ones at t = 1, better in the first than its teacher in many steps and in the second than '
        'its teacher in one.',
        setting=f'Grey patches of 8x8 from two photographs, {plan[0]} of them, and {plan[3]} of '
        'columns held out; x4 by means of squares, share of noise .3. Perceptrons of 3 x 256: '
        f'{plan[1]} steps of Adam 2e-3 for the flow (squared error) and {plan[2]} of 5e-4 for the '
        'student, cosines, batches of 256; steps of .05 by the midpoint, weights .01 and .1; PSNR '
        'of all patches together, Frechet distance of what is left when squares lose their means, '
        f'in {COMPONENTS} principal directions; 3 seeds.',
        run=lambda say: run(say, 10 + np.arange(3), *plan),
        checks=CHECKS[2:3] if smoke else CHECKS,
        draw=draw,
        notes='Steps of .001 in place of .05 are a control, with as much training; no PSNR above '
        'that of low resolution itself is claimed at this size, nor a distance below the flow in '
        'many steps.',
    )


def run(say, seeds, count, teacher_steps, student_steps, shown):
    """PSNR and distance of details per seed, by arm."""
    source, data = examples('train', count)
    _, test = examples('test', shown)
    net = from_linen(VelocityMLP(width=256, depth=3, beside=(LOW,)), *velocity_inputs(SPEC))
    flow = restoring_flow(context_of(net, 2e-3, teacher_steps), share=SHARE, distance='l2')
    state = seeds_lib.train(flow, data, seeds, steps=teacher_steps, batch_size=256)
    teacher = {'params': state.params['network']}
    noise = np.random.default_rng(99).standard_normal(test[LOW].shape).astype(np.float32)
    x0 = vp_mix(test[LOW], noise, SHARE)
    measured = {}

    def measure(arm, images):
        found = [
            compared({arm: x}, test['input'], source.lowered, COMPONENTS)[arm]
            for x in np.asarray(images)
        ]
        measured[arm] = {name: [one[name] for one in found] for name in ('psnr', 'frechet')}
        psnr, distance = (np.mean(x) for x in measured[arm].values())
        say(f'{TITLES[arm]}: {psnr:.2f} dB, distance {distance:.3f}')

    measure('low', np.repeat(test[LOW][None], len(seeds), 0))
    for arm, steps in (('many', MANY), ('one', 1)):
        measure(arm, sampled(net, steps)(teacher, x0, test[LOW]))
    frozen, call = {'teacher': teacher, 'start': teacher}, called(net)
    for kind, dt, times in (('student', 0.05, TIMES), ('short', 0.001, TIMES[-1:])):
        context = context_of(net, 5e-4, student_steps, start=net)
        state = seeds_lib.train(
            oftsr(context, share=SHARE, dt=dt), data, seeds,
            steps=student_steps, batch_size=256, frozen_per_run=frozen,
        )  # fmt: skip
        variables = {'params': state.params['network']}
        for t in times:
            arm = f't={t:g}' if kind == 'student' else kind
            measure(arm, call(variables, x0, test[LOW], t))
    curve = {
        name: np.array([measured[f't={t:g}'][name] for t in TIMES]) for name in ('psnr', 'frechet')
    }
    measured['student'] = {
        'psnr_rise': np.diff(curve['psnr'], axis=0).max(0).tolist(),
        'growth': (curve['frechet'][1:] / curve['frechet'][:-1]).max(0).tolist(),
    }
    return measured


def examples(split, count):
    """The source of patches, and the first of them."""
    crops = dict(
        name='kd.data.patches.crops', of='china_flower', size=8, channels='grey', count=count
    )
    source = low_resolution(SourceContext(split), of=crops, down='box', up='repeat')
    batch = source.fetch(np.arange(count))
    return source, {name: batch[name] for name in SPEC}


def context_of(net, lr, steps, start=None):
    """Of a stage; the student's teacher and beginning have its own form."""
    return seeds_lib.context(
        network=net, teacher=start, references={'start': start} if start else {}, spec=SPEC,
        steps=steps, optimizer=dict(name='adam', lr=lr, schedule='cosine'),
    )  # fmt: skip


def sampled(net, steps):
    """(variables [R, ...], x0, low) -> images [R, N, 8, 8, 1] by Euler's steps."""

    def solve(variables, x0, low):
        vfn = velocity_function(net, variables, told={LOW: low})
        return euler_sample(vfn, x0, time_grid(steps))

    return jax.jit(jax.vmap(solve, (0, None, None)))


def called(net):
    """(variables [R, ...], x0, low, t) -> images by one call."""

    def call(variables, x0, low, t):
        then = jnp.full(len(x0), t)
        return x0 + velocity_function(net, variables, told={LOW: low})(then, then, x0)

    return jax.jit(jax.vmap(call, (0, None, None, None)))


def draw(measured):
    """Distance of details against PSNR, every seed a dot."""
    figure = figures.new_figure(7.5, 3.8)
    axis = figure.subplots()
    line = [(np.mean(measured[f't={t:g}']['psnr']), np.mean(measured[f't={t:g}']['frechet']))
            for t in TIMES]  # fmt: skip
    axis.plot(*zip(*line, strict=True), color='grey', linewidth=1, zorder=0)
    for colour, (arm, title) in zip(figures.COLOURS * 2, TITLES.items(), strict=False):
        found = measured[arm]
        marker = {'t': 'o', 's': '^'}.get(arm[0], 's')
        axis.plot(found['psnr'], found['frechet'], marker, color=colour, label=title)
    axis.set(xlabel='PSNR, dB', ylabel='Frechet distance of details')
    figure.legend(loc='outside right center', frameon=False)
    return figure
