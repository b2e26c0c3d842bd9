"""Images restored by the ways of `kd.evaluators.ways`: nearness to the original, and looks."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from kd import figures
from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import distribution, ways
from kd.evaluators.restoration import high_band_error, psnr_together
from kd.evaluators.samples import check_weights
from kd.evaluators.ways import Way
from kd.models.shifted import LOW
from kd.ranges import Count, Seed
from kd.sampling.flow import draw_noise
from kd.state import PyTree, State

# Images of each kind in a figure.
_SHOWN = 10
# Numbers of a patch whose covariance is still taken.
_MOMENTS = 1024
# Metrics by kind of images: 'low' for what is left of them, and by way.
Found = Mapping[str, Mapping[str, float]]


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
    begin with `low_`. Of latents these are numbers of latents. A network that says the mean of what
    may have been has the best PSNR and a bad distance: read the two together.

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
    network = context.network
    told = tuple(getattr(network.module, 'conditions', ()))
    if LOW not in told:
        raise UserError(
            f"{context.stage}.evaluators: 'restored' asks a network that is told {LOW!r}, such as "
            f'kd.models.shifted.shifted; this one is told {list(told)}.'
        )
    return probe(
        context,
        {str(n): ways.of_residuals(network, steps=n) for n in steps},
        lambda images, real: {name: compared(x, real) for name, x in images.items()},
        told=told,
        weights=weights,
        samples=samples,
        batch=batch,
        seed=seed,
        anchor=ways.anchor_of(network),
        residual=True,
    )


def probe(
    context: Context,
    by: Mapping[str, Way],
    compare: Callable[[Mapping[str, np.ndarray], np.ndarray], Found],
    *,
    told: Iterable[str],
    weights: str,
    samples: Count,
    batch: Count,
    seed: Seed,
    anchor: str = LOW,
    residual: bool = False,
    variables_of: Callable[[State, PyTree], PyTree] = lambda state, variables: variables,
    figures_of: Callable[[Found], Mapping[str, Figure]] = lambda found: {},
) -> Probe:
    """Images by each way: `METRIC_NAME` of a way NAME, `low_METRIC` of what is left, and a figure.

    Args:
      context: the stage.
      by: the ways.
      compare: metrics of images [N, ...] by name, against the originals.
      told: fields of a batch that the ways want.
      weights, samples, batch, seed: as of `restored`; sample i has the noise of (seed, i).
      anchor: the field that has what is left of images, like them.
      residual: `input` is what is to be added to that.
      variables_of: of the state and the weights, what ways take.
      figures_of: more figures, of the metrics.

    Raises:
      UserError: no such average.
    """
    check_weights(context, weights)
    names = dict.fromkeys(['input', anchor, *told])

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float | Figure]:
        variables = variables_of(state, state.variables(None if weights == 'final' else weights))
        fields = first(batches, names, samples)
        low = fields[anchor]
        real = low + fields['input'] if residual else fields['input']
        made: dict[str, list[np.ndarray]] = {name: [] for name in by}
        for at in range(0, len(low), batch):
            part = {name: jnp.asarray(x[at : at + batch]) for name, x in fields.items()}
            shape = part['input'].shape
            noise = draw_noise(jax.random.key(seed), shape[0], shape[1:], first=at)
            for name, way in by.items():
                made[name].append(np.asarray(way(variables, part, noise)))
        images = {'low': low, **{name: np.concatenate(parts) for name, parts in made.items()}}
        found = compare(images, real)
        scores: dict[str, float | Figure] = {
            f'low_{metric}' if name == 'low' else f'{metric}_{name}': value
            for name, values in found.items()
            for metric, value in values.items()
        }
        if real.shape[-1] in (1, 3):
            shown = context.source(context.splits[0]).to_pixels
            scores['images'] = page({k: shown(x) for k, x in {**images, 'original': real}.items()})
        return {**scores, **figures_of(found)}

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
    """A row of images [N, H, W, C] in [-1, 1] for each name."""
    images = np.concatenate([x[:_SHOWN] for x in rows.values()])
    captions = [
        f'{name} step{"s" * (name != "1")}' if name.isdigit() else name.replace('at_', 't = ')
        for name, x in rows.items()
        for _ in x[:_SHOWN]
    ]
    return figures.image_page(np.clip(images, -1, 1), captions, columns=_SHOWN)
