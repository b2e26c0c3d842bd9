"""Channels split again and again, against a plain network (IMDN 2019, arXiv:1909.11856).

    python -m kd.claims imdn                about a quarter of an hour on two cores

Small networks of nearly as many parameters learn to double the pixels of two photographs, and are
scored on a strip in the middle of each that they have not seen. All add a tenth of what they see to
bicubic enlargement (not the paper's: fewer than a thousand steps would not reach that alone), and
all have the card of the paper's setting: patches of 24 pixels, Adam at 4e-3 with a cosine, batches
of 8.
"""

import jax
import jax.numpy as jnp
import numpy as np

from kd import figures
from kd.claims import seeds as seeds_lib
from kd.claims.claim import Check, Claim
from kd.config import Recipe
from kd.data.context import SourceContext
from kd.data.patches import patches
from kd.data.pictures import CHINA_FLOWER, pictures
from kd.evaluators import restoration as scores
from kd.methods.sr.restoration import restoration
from kd.models.imdn import IMDN
from kd.models.restorers import OverBicubic, PlainSR
from kd.network import from_linen

SCALE, SIZE, BATCH = 2, 24, 8
TITLES = {
    'bicubic': 'bicubic',
    'plain': 'plain residual network',
    'mean': 'IMDN, attention by means',
    'imdn': 'IMDN',
}
CHECKS = [
    Check('over bicubic by .5 dB', 'psnr', 'imdn', 'bicubic', margin=0.5),
    Check('not below the plain network by .02 dB', 'psnr', 'imdn', 'plain', margin=-0.02),
]


def get_claim(smoke: bool = False) -> Claim:
    """The claim; `smoke` takes few steps, patches and channels."""
    plan = (1, 16, 4, 64) if smoke else (1_000, 3_000, 16, 427)
    runs, (steps, count, *_) = 3, plan
    return Claim(
        paper='IMDN 2019, arXiv:1909.11856',
        statement='A network that splits its channels again and again restores pictures no worse '
        'than a plain one of as many parameters, and better than bicubic enlargement.',
        setting=f'Two photographs at x2, 427 x 640 pixels, their middle columns held out; {count} '
        f'patches of 24 pixels, batches of 8, {steps} steps of Adam 4e-3 with a cosine, {runs} '
        'seeds; IMDN of 3 blocks of 16 channels (24,987 parameters) with contrast or mean '
        "attention (as many), a plain residual network (25,632); PSNR of the luma by MATLAB's "
        'protocol, mean of both strips.',
        run=lambda say: run(say, 20 + np.arange(runs), *plan),
        checks=CHECKS[1:] if smoke else CHECKS,
        draw=draw,
        notes='Attention by contrast against attention by means is reported and not asserted: the '
        'card expects less than .05 dB, a tie.',
    )


def networks(channels):
    """Arms that are trained."""
    plain = max(channels - 2, 2)
    return {
        'plain': PlainSR(SCALE, channels=plain, blocks=3),
        'mean': IMDN(SCALE, channels=channels, blocks=3, attention='mean'),
        'imdn': IMDN(SCALE, channels=channels, blocks=3),
    }


def run(say, seeds, steps, count, channels, rows):
    """PSNR and SSIM of the strips, as many rows of them, per seed."""
    context = SourceContext('train', Recipe(stages={}, data={}))
    source = patches(context, of=CHINA_FLOWER, scale=SCALE, size=SIZE, count=count)
    data = source.fetch(np.arange(count))
    data.pop('index')
    shown = {name: x[:rows] for name, x in pictures(CHINA_FLOWER, 'test').items()}
    measured = {'bicubic': scored(scores.bicubic(SCALE), shown, len(seeds))}
    say(f'bicubic: {measured["bicubic"]["psnr"][0]:.3f} dB')
    for name, module in networks(channels).items():
        low = jax.ShapeDtypeStruct((1, SIZE, SIZE, 3), jnp.float32)
        network = from_linen(OverBicubic(module), low)
        method = restoration(
            seeds_lib.context(
                network=network, spec=source.spec, steps=steps,
                optimizer=dict(name='adam', lr=4e-3, schedule='cosine'),
            )
        )  # fmt: skip
        apply = jax.jit(lambda variables, low, of=network: of.apply(variables, low).logits)
        found = []
        states = seeds_lib.train_each(method, data, seeds, steps=steps, batch_size=BATCH)
        for seed, state in zip(seeds, states, strict=True):
            variables = state.variables()
            found.append(scored(lambda low, v=variables, f=apply: f(v, low), shown, 1))
            say(f'{TITLES[name]}, seed {seed}: {found[-1]["psnr"][0]:.3f} dB')
        measured[name] = {key: [one[key][0] for one in found] for key in found[0]}
    return measured


def scored(restore, shown, runs):
    """The mean score, as often as there are runs."""
    options = dict(scale=SCALE, protocol='matlab')
    mean = scores.mean_score(scores.pictures_scored(restore, shown, **options).values())
    return {'psnr': [mean.psnr] * runs, 'ssim': [mean.ssim] * runs}


def draw(measured):
    """PSNR and SSIM of each arm, every seed a dot."""
    figure = figures.new_figure(9, 2.8)
    axes = figure.subplots(1, 2, sharey=True)
    for axis, (metric, label) in zip(
        axes, (('psnr', 'PSNR of the luma, dB'), ('ssim', 'SSIM')), strict=True
    ):
        figures.dots(axis, {title: measured[arm][metric] for arm, title in TITLES.items()})
        axis.set(xlabel=label)
    return figure
