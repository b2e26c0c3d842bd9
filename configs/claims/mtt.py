"""Matching of training trajectories against real images of the same number (Cazenavette et al.
2022, arXiv:2203.11932).

    python -m kd.claims mtt            about 2 minutes on two cores

Digits, perceptron 64-64-64-10, 20 experts of 20 epochs. Every set is judged by training five fresh
networks on it, by one protocol: 300 full-batch steps of momentum. Random images and K-means
representatives get the best of four learning rates by validation accuracy; distilled sets use the
learning rate that was learned with them. TESLA drops the Hessian of the inner loop.
"""

import jax
import numpy as np
import optax

from kd import figures
from kd.claims import Check, Claim
from kd.data import coreset
from kd.methods.dataset import pilot
from kd.methods.dataset.mtt import mtt

SIZES = (1, 10)
ARMS = {
    'random': 'random images',
    'kmeans': 'K-means images',
    'tesla': 'TESLA',
    'mtt': 'trajectory matching',
}


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` shortens it to a few steps."""
    seeds, steps, epochs, judged = (3, 4, 3, 4) if smoke else (5, 800, 20, 300)
    sizes, arms = (SIZES[:1], ('random', 'mtt')) if smoke else (SIZES, tuple(ARMS))
    margins = {1: 0.15, 10: 0.02}
    return Claim(
        paper='Cazenavette et al. 2022, arXiv:2203.11932',
        statement='Images trained to match the training trajectories of experts teach a fresh '
        'network more than as many real images.',
        setting=f'Digits; MLP 64-64-64-10; 20 experts of {epochs} epochs, {steps} outer steps, '
        f'{seeds} seeds of 5 networks; real images at the best of four learning rates by '
        'validation accuracy.',
        run=lambda say: run(say, seeds, steps, epochs, judged, sizes, arms),
        checks=[
            *(
                Check(
                    f'over random images by {margins[n]:g}, {n} per class', 'accuracy',
                    f'mtt_{n}', f'random_{n}', margin=margins[n],
                )
                for n in sizes
            ),
            *(
                Check(f'over K-means images, {n} per class', 'accuracy', f'mtt_{n}', f'kmeans_{n}')
                for n in sizes
                if 'kmeans' in arms
            ),
        ],
        draw=draw,
        notes='All seeds share the experts. The margins over random images were set before the '
        'run, from a smaller experiment.',
    )  # fmt: skip


def run(say, seeds, steps, epochs, judged, sizes, arms):
    """Trains experts, then every arm; returns test accuracies per seed."""
    splits, runs = pilot.digits(), np.arange(seeds)
    trajectories = pilot.train_experts(splits, optax.sgd(0.05), epochs=epochs)
    say(f'experts: test accuracy {pilot.accuracy_of(trajectories, splits).mean():.3f}')
    data = pilot.segments(trajectories, min(10, epochs - 1), min(2, epochs - 1))
    judge = pilot.Judge(splits, epochs=judged)
    tx = optax.adam(0.02)
    context = pilot.context(splits, network=pilot.network(), tx=tx, batch_size=1)
    features = splits.train['input'].reshape(len(splits.train['input']), -1)
    label = splits.train['label']
    measured = {}
    for size in sizes:
        chosen = {
            'random': lambda s, n=size: coreset.random_subset(np.random.default_rng(s), label, n),
            'kmeans': lambda s, n=size: coreset.kmeans(features, label, n, seed=s),
        }
        for arm in [arm for arm in arms if arm in chosen]:
            rows = [chosen[arm](int(seed)) for seed in runs]
            sets = [{k: splits.train[k][row] for k in ('input', 'label')} for row in rows]
            accuracy, rate = judge.tuned(sets)
            say(f'{ARMS[arm]}, {size} per class: {accuracy.mean():.4f} at {rate:g}')
            measured[f'{arm}_{size}'] = {'accuracy': accuracy, 'step_size': [rate] * seeds}
        for arm in [arm for arm in arms if arm not in chosen]:
            method = mtt(
                context, images_per_class=size, student_steps=20, step_size=0.03,
                log_step_size=True, gradient='exact' if arm == 'mtt' else 'tesla',
            )  # fmt: skip
            start = lambda key, n=size: pilot.random_start(splits, n, key)  # noqa: E731
            state = pilot.distil(method, data, runs, steps, start)
            accuracy = judge.learned(state)
            loss = pilot.outer_loss(method, state, data)
            say(f'{ARMS[arm]}, {size} per class: {accuracy.mean():.4f}, distance {loss.mean():.3f}')
            rates = np.asarray(jax.numpy.exp(state.params['log_step_size']))
            measured[f'{arm}_{size}'] = {'accuracy': accuracy, 'step_size': rates, 'distance': loss}
    return measured


def draw(measured):
    """Test accuracy per arm, every seed a dot, a panel per size."""
    sizes = sorted({int(arm.rpartition('_')[2]) for arm in measured})
    arms = [arm for arm in ARMS if f'{arm}_{sizes[0]}' in measured]
    figure = figures.new_figure(4.5 * len(sizes), 2.6)
    axes = np.atleast_1d(figure.subplots(1, len(sizes), sharey=True))
    for axis, size in zip(axes, sizes, strict=True):
        for row, arm in enumerate(arms):
            values = np.asarray(measured[f'{arm}_{size}']['accuracy'])
            axis.plot(values, np.full(len(values), row), 'o', color=figures.COLOURS[5], ms=4)
            axis.plot(values.mean(), row, '|', color=figures.COLOURS[0], ms=18, mew=2.5)
        axis.set(
            xlabel='test accuracy', title=f'{size} image{"s" * (size > 1)} per class',
            yticks=range(len(arms)),
        )  # fmt: skip
        axis.grid(alpha=0.3)
        axis.margins(y=0.15)
    axes[0].set_yticklabels([ARMS[arm] for arm in arms])
    axes[0].invert_yaxis()
    return figure
