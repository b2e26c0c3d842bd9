"""Guidance in one call, by adapters that learn on guided trajectories (arXiv:2503.07274).

    python -m kd.claims agd

Four classes of points, of two modes each; a conditional denoiser stays as it is, and adapters
beside its layers learn what guidance says.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import mixture_world
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.data.builders import mixtures
from kd.evaluators import distribution
from kd.method import with_base
from kd.methods.diffusion import agd
from kd.models.guided import GuidanceAdapter, Guided
from kd.network import from_linen, parameter_count
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times

STEPS, SCALES, RANGE = 20, (2.0, 4.0, 6.0), (1.0, 6.0)
# Units of an adapter: few, so that the adapters are fewer than the network's own weights.
WIDTH = 6
TITLES = {
    'unguided': 'without guidance',
    'noised': 'examples with noise',
    'stored': 'states on trajectories',
}
CHECKS = [
    *(
        Check(f'scale {scale:g}: trajectories over examples with noise', f'rmse_{scale:g}',
              'stored', 'noised', lower=True)
        for scale in SCALES[1:]
    ),
    *(
        Check(f'scale {scale:g}: below a third of no guidance', f'rmse_{scale:g}', 'stored',
              'unguided', lower=True, ratio=1 / 3)
        for scale in SCALES[1:]
    ),
    Check('scale 6: examples with noise over no guidance', 'rmse_6', 'noised', 'unguided',
          lower=True),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps."""
    runs, steps, pretraining, rows = (3, 2, 2, 256) if smoke else (6, 2_500, 2_000, 4_000)
    calls, scales = (3, SCALES[2:]) if smoke else (STEPS, SCALES)
    return Claim(
        paper='AGD 2025, arXiv:2503.07274',
        statement='Adapters beside a network that stays as it is say in one call what guidance '
        'says in two, and learn it better on guided trajectories than on examples with noise.',
        setting='Four classes of two overlapping Gaussians; a perceptron of 3 x 96 with EDM '
        f'preconditioning and classes, trained as a denoiser for {pretraining} steps; {rows:,} '
        f'guided trajectories of {STEPS} steps of Euler, their scale evenly in 1 .. 6; adapters of '
        f'width {WIDTH} beside its hidden layers, {steps} steps with Adam 1e-3, batches of 256; '
        f'{runs} seeds. Error of samples in one call a step against those of guidance from the '
        'same noise, in units of the data. Nothing is tuned.',
        run=lambda say: run(say, runs, steps, pretraining, rows, calls, scales),
        checks=CHECKS[-1:] if smoke else CHECKS,
        draw=draw,
        notes='The adapters see the layer (kind mixed), as in the prototype of the card; both '
        'arms have the same, and the teacher is asked as often for each state.',
    )


def run(say, runs, steps, pretraining, rows, calls, scales):
    """Errors by arm."""
    world = mixture_world.World(mixtures.pairs(), np.arange(runs), width=96, conditional=True)
    base = world.denoisers(pretraining)
    module = world.network.module
    told = module.clone(inner=Guided(module.inner, GuidanceAdapter('mixed', WIDTH, r'^hidden\d+$')))
    network = from_linen(told, *world.network.inputs)
    own = denoisers.of_network(network)
    grid = times.sampling(world.path, calls)

    def walked(denoiser, params, label, scale, key):
        """(x_t, x0) at all steps, [N, n, d]."""
        z = diffusion.noise(world.path, key, (len(label), 2), grid[0])
        denoise = denoisers.guided(denoiser, scale).bind({'params': params}, {'label': label})
        return diffusion.recorded(world.path, denoise, z, grid, key)

    def collected(params, seed):
        keys = jax.random.split(jax.random.key(seed), 3)
        label = jax.random.randint(keys[0], (rows,), 0, world.mixture.num_classes)
        omega = jax.random.uniform(keys[1], (rows,), minval=RANGE[0], maxval=RANGE[1])
        asked, said = walked(world.denoiser, params, label, omega, keys[2])
        fields = {'label': label, 'guidance': omega}
        fields = {name: jnp.broadcast_to(x, (calls, rows)) for name, x in fields.items()}
        at = jnp.broadcast_to(jnp.asarray(grid, jnp.float32)[:, None], (calls, rows))
        found = {'input': asked, 'target': said, 'time': at, **fields}
        return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), found)

    stored = jax.jit(jax.vmap(collected))(base, jnp.arange(runs) + 1_000)
    spec = {name: jax.ShapeDtypeStruct(x.shape[2:], x.dtype) for name, x in stored.items()}
    optimizer = dict(name='adam', lr=1e-3, warmup_steps=steps // 10, schedule='cosine')
    started, trained = {'params': base}, {}
    for name, fields in (('stored', spec), ('noised', world.spec)):
        context = seeds_lib.context(
            network=network, teacher=world.network, references={'start': world.network},
            spec=fields, steps=steps, optimizer=optimizer,
        )  # fmt: skip
        method = agd.agd(context, states=name, guidance=RANGE, weight='edm')
        data = dict(data={}, per_run=stored) if name == 'stored' else dict(data=world.data)
        trained[name] = seeds_lib.train(
            with_base(method, 'start'), seeds=world.seeds, steps=steps,
            batch_size=mixture_world.BATCH,
            frozen_per_run={'start': started, 'teacher': started}, **data,
        ).params['network']  # fmt: skip
    say(f'adapters: {share(trained["stored"], base):.2f} of the parameters of the network')
    return measure(say, walked, world.denoiser, own, base, trained, scales)


def share(adapters, base):
    """Parameters of the adapters over those of the network."""
    return parameter_count({'params': adapters}) / parameter_count({'params': base})


def measure(say, walked, two_calls, one_call, base, trained, scales):
    """Error and distance of samples against those of guidance, from the same noise."""
    label = jnp.arange(2_000) % 4

    def ends(denoiser):
        def of_run(params, scale):
            return walked(denoiser, params, label, scale, jax.random.key(7))[1][-1]

        return jax.jit(jax.vmap(of_run, (0, None)))

    guided, told = ends(two_calls), ends(one_call)
    measured = {name: {} for name in TITLES}
    for scale in scales:
        wanted = np.asarray(guided(base, scale))
        found = {'unguided': guided(base, 1.0)}
        found |= {name: told({**base, **own}, scale) for name, own in trained.items()}
        for name, samples in found.items():
            x = np.asarray(samples)
            error = np.sqrt(np.mean(np.sum((x - wanted) ** 2, -1), -1))
            away = [distribution.sliced_wasserstein(*two) for two in zip(wanted, x, strict=True)]
            measured[name] |= {f'rmse_{scale:g}': error.tolist(), f'swd_{scale:g}': away}
    for name, found in measured.items():
        say(f'{TITLES[name]}: ' + ', '.join(f'{k} {np.mean(v):.4f}' for k, v in found.items()))
    return measured


def draw(measured):
    """The error by the scale, and every seed at the largest."""
    figure = figures.new_figure(9, 3.2)
    left, right = figure.subplots(1, 2)
    scales = [scale for scale in SCALES if f'rmse_{scale:g}' in measured['stored']]
    for colour, (name, found) in zip(figures.COLOURS, measured.items(), strict=False):
        errors = [np.mean(found[f'rmse_{scale:g}']) for scale in scales]
        left.plot(scales, errors, 'o-', color=colour, label=TITLES[name])
    left.set(xlabel='scale of the guidance', ylabel='error against two calls', yscale='log')
    left.legend(fontsize=8, loc='center left')
    figures.dots(right, {TITLES[name]: found['rmse_6'] for name, found in measured.items()})
    right.set(xlabel='error at scale 6', xscale='log')
    return figure
