"""Sets sampled with a pull towards clusters of their classes (DMGD, arXiv:2605.03877).

    python -m kd.claims dmgd            about 2 minutes of one core

Points of four classes, each of six modes; a perceptron is trained to denoise them, and everything
else is sampling. The paper's window, early steps of latents, is an arm of its own: points in the
plane are decided late.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.data.builders import mixtures
from kd.data.distilled import coreset
from kd.evaluators import class_transport
from kd.losses import schedule
from kd.methods.dataset import dmgd
from kd.methods.diffusion.denoising import denoising
from kd.models.denoiser import Denoised
from kd.models.velocity_mlp import VelocityMLP
from kd.network import from_linen
from kd.sampling import denoiser as denoisers

CLASSES, COUNT, CLUSTERS, EXAMPLES = 4, 10, 10, 4_000
SPEC = {
    'input': jax.ShapeDtypeStruct((2,), jnp.float32),
    'label': jax.ShapeDtypeStruct((), jnp.int32),
}
PATH = schedule.discrete('linear', 1e-4, 0.02, scale=1e-3)
PLAIN = dmgd.Settings(transport=0.0, soft=(), sphere=False, mix_null=False)


LATE = dict(transport=3.0, window=(5, 20))
SOFT = dict(soft=(400.0, 100.0), noise=2.0, semantic=0.33)
# Settings of arms by name; the second number is of clusters.
ARMS = {
    'plain': (PLAIN, CLUSTERS),
    'transport': (dataclasses.replace(PLAIN, **LATE), CLUSTERS),
    'mean': (dataclasses.replace(PLAIN, **LATE), 1),
    'middle': (dataclasses.replace(PLAIN, transport=1.0, window=(10, 30)), CLUSTERS),
    'early_weak': (dataclasses.replace(PLAIN, transport=0.05, window=(30, 45)), CLUSTERS),
    'early': (dataclasses.replace(PLAIN, transport=0.5, window=(30, 45)), CLUSTERS),
    'soft': (dataclasses.replace(PLAIN, **SOFT), CLUSTERS),
    'both': (dataclasses.replace(PLAIN, **LATE, **SOFT), CLUSTERS),
    'unguided': (dataclasses.replace(PLAIN, guidance=1.0), CLUSTERS),
}
TITLES = {
    'random': 'random real points',
    'centroids': 'the clusters themselves',
    'plain': 'guidance 4',
    'transport': 'transport, late',
    'mean': 'to the mean of the class, late',
    'middle': 'transport, middle, weaker',
    'early_weak': "transport, the paper's window, .05",
    'early': "transport, the paper's window, .5",
    'soft': 'soft labels',
    'both': 'soft labels, transport late',
    'unguided': 'guidance 1',
}
CHECKS = [
    Check('W1 within classes: late transport at most .8 of guidance alone', 'w1', 'transport',
          'plain', lower=True, ratio=0.8),
    Check('labels kept: nearest points as right as of guidance alone, within .01', 'nearest',
          'transport', 'plain', margin=-0.01),
    Check('W1: to ten clusters below to the mean', 'w1', 'transport', 'mean', lower=True),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps = (3, 2) if smoke else (6, 6_000)
    arms = ('plain', 'transport') if smoke else tuple(ARMS)
    shown = {}
    return Claim(
        paper='DMGD 2026, arXiv:2605.03877',
        statement='Points sampled one after the other, each pulled towards clusters of its class '
        'by optimal transport, lie nearer to their classes than those of guidance alone.',
        setting='Four classes in quadrants, each of six modes with Dirichlet weights, '
        f'{EXAMPLES:,} points for training and as many for tests; a perceptron of 3 x 128 that '
        f'predicts the noise, 1,000 linear times, {steps:,} steps of Adam 1e-3, cosine, batches of '
        f'256, labels left out for a tenth; {COUNT} points of each class in 50 ancestral steps, '
        f'{CLUSTERS} clusters, no projection to the sphere. W1 of a class is exact, against 400 '
        f'points of the test. {runs} seeds, each with a mixture, a network and samples of its '
        "own. Windows and weights are those of the card's pilot, and not tuned.",
        run=lambda say: run(say, runs, steps, arms, shown),
        checks=CHECKS[:2] if smoke else CHECKS,
        draw=lambda measured: draw(measured, **shown),
        notes="Controls without a check: random real points at equal size, the paper's window "
        '(steps 45 to 30) at .05 and .5, guidance 1, and the clusters as points. `novelty` is the '
        'distance to the nearest training point over that of test points.',
    )


def run(say, runs, steps, arms, shown):
    """Scores of every set; some of the first seed are left in `shown`."""
    seeds = np.arange(runs)
    worlds = [drawn(seed) for seed in seeds]
    network, params = trained(worlds, seeds, steps)
    say('networks are trained')
    measured, sets = {}, {}
    for name in ('random', 'centroids', *arms):
        sets[name] = made(name, network, params, worlds, seeds)
        found = [score(*each) for each in zip(sets[name], worlds, strict=True)]
        measured[name] = {key: [one[key] for one in found] for key in found[0]}
        told = ', '.join(f'{key} {np.mean(x):.3f}' for key, x in measured[name].items())
        say(f'{TITLES[name]}: {told}')
    shown.update(
        data=worlds[0]['test'],
        sets={TITLES[name]: labelled(sets[name][0]) for name in ('random', 'plain', 'transport')},
    )
    return measured


def drawn(seed):
    """Points of a mixture of this seed, by split, and room for their clusters."""
    mixture = mixtures.quadrants(seed=int(seed))
    world = {'clusters': {}}
    for part, name in enumerate(('train', 'test')):
        points, label = mixture.draw(np.random.default_rng([seed, part]), EXAMPLES)
        world[name] = {'input': points.astype(np.float32), 'label': label.astype(np.int32)}
    return world


def trained(worlds, seeds, steps):
    """A network, and its parameters [R, ...]."""
    inner = VelocityMLP(width=128, depth=3, num_classes=CLASSES)
    module = Denoised(inner, PATH, 'eps')
    network = from_linen(module, *module.example_inputs(SPEC))
    context = seeds_lib.context(
        network=network, spec=SPEC, steps=steps,
        optimizer=dict(name='adam', lr=1e-3, schedule='cosine'),
    )  # fmt: skip
    data = {
        name: np.stack([world['train'][name] for world in worlds]) for name in ('input', 'label')
    }
    state = seeds_lib.train(
        denoising(context), {}, seeds, steps=steps, batch_size=256, per_run=data
    )
    return network, state.params['network']


def clusters_of(world, count):
    """(centroids [C, K, 2], mass [C, K]), computed once."""
    if count not in world['clusters']:
        points, label = world['train']['input'], world['train']['label']
        found = [coreset.clusters(points[label == c], count) for c in range(CLASSES)]
        world['clusters'][count] = tuple(np.stack(parts) for parts in zip(*found, strict=True))
    return world['clusters'][count]


def made(name, network, params, worlds, seeds):
    """The sets [R, C, COUNT, 2] of an arm."""
    if name == 'random':
        return np.stack([
            world['train']['input'][
                coreset.random_subset(np.random.default_rng(seed), world['train']['label'], COUNT)
            ].reshape(CLASSES, COUNT, 2)
            for seed, world in zip(seeds, worlds, strict=True)
        ])  # fmt: skip
    settings, count = ARMS.get(name, (PLAIN, CLUSTERS))
    centroids, mass = map(
        np.stack, zip(*(clusters_of(world, count) for world in worlds), strict=True)
    )
    if name == 'centroids':
        return centroids
    draw_sets = sampler(network, settings)
    return np.asarray(draw_sets(params, centroids, mass, jnp.asarray(seeds)))


def sampler(network, settings):
    """`draw(params [R, ...], centroids, mass, seeds) -> [R, C, COUNT, 2]`, as the method does."""
    one_more = dmgd.generator(denoisers.of_network(network), settings)

    def of_class(params, seed, label, centroids, mass):
        def body(memory, number):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), label), number)
            other_key, key = jax.random.split(key)
            other = dmgd.other(other_key, label, np.arange(CLASSES))
            target = dmgd.Target(label, other, centroids, mass, memory, number)
            x, _ = one_more({'params': params}, target, key)
            return memory.at[number].set(x), None

        return jax.lax.scan(body, jnp.zeros((COUNT, 2)), jnp.arange(COUNT))[0]

    classes = jax.vmap(of_class, (None, None, 0, 0, 0))

    @jax.jit
    def draw_sets(params, centroids, mass, seeds):
        labels = jnp.arange(CLASSES)

        def of_run(params, seed, centroids, mass):
            return classes(params, seed, labels, centroids, mass)

        return jax.vmap(of_run)(params, seeds, centroids, mass)

    return draw_sets


def labelled(points):
    """A set [C, COUNT, 2] as examples."""
    return {
        'input': points.reshape(-1, 2),
        'label': np.repeat(np.arange(CLASSES), points.shape[1]),
    }


def score(points, world):
    """Scores of one set."""
    one, test = labelled(points), world['test']
    found = class_transport.scores(one, test)._asdict()
    train = world['train']['input']
    return found | {'novelty': class_transport.novelty(one['input'], train, test['input'])}


def draw(measured, data, sets):
    """Every seed by arm, and three sets of the first."""
    figure = figures.new_figure(12, 6.4)
    above, below = figure.subfigures(2, 1, height_ratios=(1.1, 1))
    axes = above.subplots(1, 2, sharey=True)
    for axis, metric, label in (
        (axes[0], 'w1', 'exact W1 within classes'),
        (axes[1], 'nearest', 'accuracy of the nearest point'),
    ):
        figures.dots(axis, {TITLES[name]: found[metric] for name, found in measured.items()})
        axis.set_xlabel(label)
    class_transport.picture(sets, data, below)
    return figure
