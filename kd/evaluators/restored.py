"""Patches of pictures restored by a denoiser of residuals: nearness to the original, and looks."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax
import numpy as np
from matplotlib.figure import Figure

from kd import figures
from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import distribution
from kd.evaluators.restoration import high_band_error, psnr_together
from kd.evaluators.samples import check_weights
from kd.models.shifted import ANCHOR, LOW
from kd.ranges import Count, Seed
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.state import State

# Patches shown in a figure.
_SHOWN = 10
# Numbers of a patch whose covariance is still taken.
_MOMENTS = 1024


def restored(
    context: Context,
    *,
    steps: tuple[Count, ...] = (1,),
    weights: str = 'final',
    samples: Count = 2000,
    batch: Count = 500,
    seed: Seed = 0,
) -> Probe:
    """What the stage's network makes of low patches, in each number of steps.

    Metrics: `psnr_N` in dB, of the mean squared error over all patches (which are parts of few
    pictures; values in [-1, 1], not rounded), `sliced_wasserstein_N` between patches and originals
    as points, `frechet_N` the same by their moments where a patch has up to 1,024 numbers, and
    `high_bands_N`, see `kd.evaluators.restoration.high_band_error`. The same of the low patches
    end in `_low`. Of latents these are numbers of latents. A network that says the mean of what may
    have been has the best PSNR and a bad distance: read the two together.

    Args:
      context: the stage; a denoiser of the residuals of `kd.data.transforms.residual`.
      steps: each a row of metrics, from the noisiest time to the cleanest.
      weights: 'final' for the parameters, or the name of an average.
      samples: patches, the first of the split.
      batch: of these at once.
      seed: of the noise.

    Raises:
      UserError: no such average, or another network.
    """
    check_weights(context, weights)
    own = denoisers.of_network(context.network)
    told = getattr(context.network.module, 'conditions', ())
    if LOW not in told:
        raise UserError(
            f"{context.stage}.evaluators: 'restored' asks a network that is told {LOW!r}, such as "
            f'kd.models.shifted.shifted; this one is told {list(told)}.'
        )
    anchor = ANCHOR if ANCHOR in told else LOW
    grids = {n: times.sampling(own.schedule, n) for n in steps}

    @jax.jit
    def draw(variables, condition, key):
        shape = condition[anchor].shape
        z = diffusion.noise(own.schedule, key, shape, own.schedule.high)
        denoise = own.bind(variables, condition)
        return {n: diffusion.sample(own.schedule, denoise, z, g, key) for n, g in grids.items()}

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float | Figure]:
        fields = first(batches, ('input', *told), samples)
        variables = state.variables(None if weights == 'final' else weights)
        low = fields[anchor]
        target = low + fields['input']
        parts = [
            draw(
                variables,
                {name: fields[name][at : at + batch] for name in told},
                jax.random.fold_in(jax.random.key(seed), at),
            )
            for at in range(0, len(low), batch)
        ]
        made = {n: low + np.concatenate([part[n] for part in parts]) for n in steps}
        metrics: dict[str, float | Figure] = {}
        for name, x in (*made.items(), ('low', low)):
            metrics |= {f'{key}_{name}': value for key, value in compared(x, target).items()}
        if target.shape[-1] in (1, 3):
            rows = {'low': low, **{f'{n} step{"s" * (n > 1)}': x for n, x in made.items()}}
            metrics['restored'] = page({**rows, 'original': target})
        return metrics

    return Probe(run)


def compared(x: np.ndarray, target: np.ndarray) -> dict[str, float]:
    """Metrics of patches [N, H, W, C] in [-1, 1], see `restored`."""
    if not np.isfinite(x).all():
        return {'finite': float(np.isfinite(x).mean())}
    found = {
        'psnr': psnr_together(x, target),
        'sliced_wasserstein': distribution.sliced_wasserstein(target, x),
        'high_bands': high_band_error(x, target),
    }
    if x[0].size <= _MOMENTS:
        moments = [distribution.moments(y) for y in (target, x)]
        found['frechet'] = distribution.frechet_distance(*moments)
    return found


def first(
    batches: Iterable[dict[str, jax.Array]], names: Iterable[str], count: int
) -> dict[str, np.ndarray]:
    """Fields of the first `count` examples, on the host."""
    kept: dict[str, list[np.ndarray]] = {name: [] for name in names}
    held = 0
    for batch in batches:
        mask = np.asarray(batch['mask'])
        for name, parts in kept.items():
            parts.append(np.asarray(batch[name])[mask])
        held += int(mask.sum())
        if held >= count:
            break
    return {name: np.concatenate(parts)[:count] for name, parts in kept.items()}


def page(rows: Mapping[str, np.ndarray]) -> Figure:
    """A row of patches for each name."""
    images = np.concatenate([x[:_SHOWN] for x in rows.values()])
    captions = [name for name in rows for _ in range(_SHOWN)]
    return figures.image_page(images, captions, columns=_SHOWN)
