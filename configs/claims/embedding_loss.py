"""Score distillation at a batch of 16, with a discrepancy in random features (arXiv:2604.22379).

    python -m kd.claims embedding_loss

A generator of one step learns a ring of eight modes from the exact denoiser of the ring, with few
samples in a step, and data beside them.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import mixture_world
from kd.claims.claim import Check, Claim
from kd.data.builders import mixtures
from kd.methods.diffusion import common
from kd.methods.diffusion.distribution_matching import distribution_matching
from kd.methods.diffusion.embedding_loss import discrepancy
from kd.models.mlp import MLP
from kd.network import from_linen
from kd.sampling import times

PARTS = 4
# Samples of the generator in a step, weight of the discrepancy, and whether it is unbiased.
ARMS = {
    'small': (16, 0.0, False),
    'small_third': (16, 0.3, False),
    'small_three': (16, 3.0, False),
    'small_unbiased': (16, 0.3, True),
    'large': (256, 0.0, False),
}
TITLES = {
    'small': 'batch 16',
    'small_third': 'batch 16, weight .3',
    'small_three': 'batch 16, weight 3',
    'small_unbiased': 'batch 16, weight .3, unbiased',
    'large': 'batch 256',
}
CHECKS = [
    Check('after a quarter of the steps: weight .3 below none', 'early', 'small_third', 'small',
          lower=True),
    Check('at the end: weight .3 below none', 'swd', 'small_third', 'small', lower=True),
]  # fmt: skip


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps and arms."""
    runs, steps, pretraining = (3, 4, 2) if smoke else (6, 1_200, 3_000)
    return Claim(
        paper='Embedding Loss 2026, arXiv:2604.22379, as its card reconstructs it',
        statement='With few samples in a step, a discrepancy from data in the features of random '
        'networks brings a generator closer to the data, above all early.',
        setting='Ring of eight Gaussians; exact teacher; perceptrons of 3 x 128, trained as '
        f'denoisers for {pretraining} steps; {steps} moves of the generator with Adam 3e-4, five '
        'critic moves each with Adam 1e-3, on 16 samples; the discrepancy compares them with 256 '
        f'examples in four perceptrons 2-64-64-32, new ones at every step; {runs} seeds. Nothing '
        'is tuned.',
        run=lambda say: run(say, runs, steps, pretraining, smoke),
        checks=CHECKS,
        draw=draw,
        notes='The kernel, the networks and the weight are of the card: this is no verdict on the '
        "paper's own loss. Distillation alone sees no data, the discrepancy does.",
    )


def run(say, runs, steps, pretraining, smoke):
    """Distance to the data along training."""
    world = mixture_world.World(mixtures.ring(), np.arange(runs))
    started, student = world.denoisers(pretraining), world.student()
    features = from_linen(MLP((64, 64), 32), jax.ShapeDtypeStruct((1, 2), jnp.float32))
    measured = {}
    for name in ('small', 'small_third') if smoke else ARMS:
        samples, weight, unbiased = ARMS[name]
        context = world.context(3e-4, optimizer=dict(b1=0.0), steps=steps)
        method = distribution_matching(
            context, student=student, teacher=world.exact, critic=world.critic(context),
            direction=common.matching(times.uniform(world.clock, 0.02, 0.98), 1.0),
            terms=[discrepancy(features, weight, 4, unbiased=unbiased)] if weight else [],
            samples=samples,
        )  # fmt: skip
        curve = []

        def watch(state, curve=curve):
            samples = world.samples(state.params['generator'], student)
            curve.append(world.measure(samples))

        world.train(method, started, steps, watch=watch, watched=steps // PARTS)
        measured[name] = dict(curve[-1]) | {
            'early': curve[0]['swd'],
            **{f'swd_{part}': found['swd'] for part, found in enumerate(curve)},
        }
        means = ', '.join(f'{key} {np.mean(measured[name][key]):.3f}' for key in ('early', 'swd'))
        say(f'{TITLES[name]}: {means}')
    return measured


def draw(measured):
    """The distance along training, and every seed at its end."""
    figure = figures.new_figure(9, 3.4)
    left, right = figure.subplots(1, 2)
    parts = (np.arange(PARTS) + 1) / PARTS
    for colour, (name, found) in zip(figures.COLOURS, measured.items(), strict=False):
        curves = np.asarray([found[f'swd_{part}'] for part in range(PARTS)])
        left.plot(parts, curves.mean(1), 'o-', color=colour, label=TITLES[name])
    left.set(xlabel='part of the training', ylabel='sliced Wasserstein distance')
    figure.legend(loc='outside lower center', ncols=5, frameon=False, fontsize=8)
    figures.dots(right, {TITLES[name]: found['swd'] for name, found in measured.items()})
    right.set_xlabel('sliced Wasserstein distance at the end')
    return figure
