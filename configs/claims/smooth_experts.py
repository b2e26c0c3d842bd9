"""Smooth experts and representative starts (Shen et al. 2023, arXiv:2310.10541).

    python -m kd.claims smooth_experts            about 4 minutes on two cores

Setting of mtt.py. Experts with momentum and weight decay, with and without their loss faded in over
the first ten epochs, and with a penalty on input gradients besides; then sets that start from
representative instead of random images. Checks compare the faded-in experts with the others.
"""

import jax.numpy as jnp
import numpy as np
import optax

from kd import figures
from kd.claims import dataset_seeds
from kd.claims.claim import Check, Claim
from kd.data.distilled import coreset
from kd.methods.dataset import common
from kd.methods.dataset.mtt import mtt

EXPERTS = {
    'sgd': ('plain descent', {}),
    'momentum': ('momentum', dict(weight_decay=1e-3)),
    'ramp': ('momentum, faded in', dict(weight_decay=1e-3, ramp_epochs=10)),
    'penalty': (
        'momentum, faded in, penalty', dict(weight_decay=1e-3, ramp_epochs=10, penalty=0.1),
    ),
}  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` shortens it to a few steps and two kinds of experts."""
    seeds, steps, epochs, judged = (3, 3, 3, 4) if smoke else (5, 600, 20, 300)
    sizes, kinds = ((1,), ('ramp',)) if smoke else ((1, 10), tuple(EXPERTS))
    against = lambda arm: 1.0 if smoke else arm  # noqa: E731
    starts = [] if smoke else [
        Check('representative start, 10 per class, before any step', 'accuracy',
              'representative_10_0', 'random_10_0', margin=0.01),
        Check('representative start, 1 per class, after 50 steps', 'accuracy',
              'representative_1_50', 'random_1_50'),
    ]  # fmt: skip
    return Claim(
        paper='Shen et al. 2023, arXiv:2310.10541',
        statement='Experts with momentum are easier to match when their loss is faded in, and '
        'representative images are the better start.',
        setting=f'Digits; MLP 64-64-64-10; 20 experts of {epochs} epochs, {steps} outer steps, '
        f'{seeds} seeds of 5 networks; momentum 0.9, weight decay 1e-3 for the experts.',
        run=lambda say: run(say, seeds, steps, epochs, judged, sizes, kinds),
        checks=[
            *(
                Check(f'experts move at most 0.7 times as far in epoch {e}', f'moved_{e}',
                      'ramp_experts', against('momentum_experts'), lower=True, ratio=0.7)
                for e in ((0,) if smoke else (0, 2))
            ),
            *(
                Check(f'smaller distance, {n} per class', 'distance', f'ramp_{n}',
                      against(f'momentum_{n}'), lower=True)
                for n in sizes
            ),
            Check('higher accuracy, 1 per class', 'accuracy', 'ramp_1', against('momentum_1')),
            *starts,
        ],
        draw=draw,
        notes='How far experts move is compared expert by expert. The penalty acts pixel by pixel '
        'here, since the images have one channel.',
    )  # fmt: skip


def run(say, seeds, steps, epochs, judged, sizes, kinds):
    """Trains every kind of expert, and sets for each; then the two starts."""
    task = dataset_seeds.digits()
    judge = dataset_seeds.Judge(task, epochs=judged)
    context = dataset_seeds.context(task, tx=optax.adam(0.02), batch_size=1)
    methods = {
        size: mtt(context, images_per_class=size, student_steps=20, step_size=0.05,
                  log_step_size=True)
        for size in sizes
    }  # fmt: skip
    runs, measured, faded = np.arange(seeds), {}, None
    for kind in kinds:
        tx = optax.sgd(0.05) if kind == 'sgd' else optax.sgd(0.01, momentum=0.9)
        experts = dataset_seeds.train_experts(task, tx, epochs=epochs, **EXPERTS[kind][1])
        moved = np.linalg.norm(np.diff(experts, axis=1), axis=-1)
        measured[f'{kind}_experts'] = {
            'accuracy': dataset_seeds.accuracy_of(task, experts),
            **{f'moved_{e}': moved[:, e] for e in range(min(3, epochs))},
        }
        data = dataset_seeds.segments(experts, min(10, epochs - 2), 2 if epochs > 2 else 1)
        if kind == 'ramp':
            faded = experts, data
        for size, method in methods.items():
            start = lambda key, n=size: dataset_seeds.random_start(task, n, key)  # noqa: E731
            state = dataset_seeds.distil(method, data, runs, steps, start)
            measured[f'{kind}_{size}'] = {
                'accuracy': judge.learned(state),
                'distance': dataset_seeds.outer_loss(method, state, data),
            }
            values = measured[f'{kind}_{size}']
            say(f'{kind}, {size}: ' + ', '.join(f'{k} {v.mean():.4f}' for k, v in values.items()))
    if len(kinds) > 2:
        measured |= starts(say, task, judge, methods, *faded, runs)
    return measured


def starts(say, task, judge, methods, experts, data, runs):
    """Random and representative starts after a few steps, with the faded-in experts."""
    measured = {}
    params = common.unraveller(task.network)(jnp.asarray(experts[0, -1]))
    logits = np.asarray(task.network.apply({'params': params}, task.train['input']).logits)
    for size, steps in ((1, 50), (10, 0), (10, 50)):
        rows = [coreset.kmeans(logits, task.train['label'], size, seed=int(seed)) for seed in runs]
        images = jnp.asarray(np.stack([task.train['input'][r] for r in rows]))
        kinds = {
            'random': lambda key, n=size: dataset_seeds.random_start(task, n, key),
            'representative': lambda key, images=images: images[dataset_seeds.seed_of(key)],
        }
        for kind, start in kinds.items():
            state = dataset_seeds.distil(methods[size], data, runs, steps, start)
            accuracy = judge.learned(state)
            measured[f'{kind}_{size}_{steps}'] = {'accuracy': accuracy}
            say(f'{kind} start, {size} per class, {steps} steps: {accuracy.mean():.4f}')
    return measured


def draw(measured):
    """Distance and accuracy per kind of expert, every seed a dot."""
    sizes = sorted({int(arm.split('_')[1]) for arm in measured if arm.split('_')[1].isdigit()})
    kinds = [kind for kind in EXPERTS if f'{kind}_experts' in measured]
    figure = figures.new_figure(9, 2.4 * len(sizes))
    axes = figure.subplots(len(sizes), 2, sharey=True, squeeze=False)
    for panels, size in zip(axes, sizes, strict=True):
        for axis, metric in zip(panels, ('distance', 'accuracy'), strict=True):
            rows = {EXPERTS[kind][0]: measured[f'{kind}_{size}'][metric] for kind in kinds}
            figures.dots(axis, rows)
            axis.set(xlabel=metric, title=f'{size} per class')
    return figure
