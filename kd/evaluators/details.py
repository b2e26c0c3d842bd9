"""Restored images against the originals, by distortion and by the details that they have.

metrics = {'psnr_1': ..., 'frechet_1': ..., 'psnr_at_0.50': ..., 'frechet_at_0.50': ...}
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from kd import figures
from kd.context import Context, Probe
from kd.data.patches import LOW
from kd.errors import UserError
from kd.evaluators import distribution
from kd.evaluators.flow_samples import advance_of
from kd.evaluators.restoration import psnr_together
from kd.evaluators.restored import first
from kd.evaluators.samples import check_weights
from kd.losses.rectified import vp_mix
from kd.methods.sr.oftsr import SHARE
from kd.ranges import Count, Fraction, Seed
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion
from kd.sampling import times as sampling_times
from kd.sampling.flow import draw_noise, time_grid
from kd.sampling.velocity import fields_of, velocity_function
from kd.state import PyTree, State

# Examples shown in a figure.
_SHOWN = 8
# Of the squares whose details are compared.
_SIDE = 8
# (images [N, H, W, C]) -> what is left of them
Lowered = Callable[[Any], np.ndarray]
# (state, variables, fields [B, ...] by name, noise [B, ...]) -> images [B, ...]
Way = Callable[[State, PyTree, Mapping[str, jax.Array], jax.Array], jax.Array]


def restored(
    context: Context,
    *,
    times: tuple[Fraction, ...] = (),
    steps: tuple[Count, ...] = (),
    weights: str = 'final',
    samples: Count = 1000,
    batch: Count = 250,
    components: Count = 24,
    seed: Seed = 0,
) -> Probe:
    """Images by a flow that begins at what is left of them, see `kd.methods.sr.oftsr`.

    Metrics `psnr` and `frechet`, see `psnr_together` and `detail_distance`: `psnr_4` in so many
    steps of Euler, `psnr_at_0.50` in one call with that time; `low_psnr` and `low_frechet` of what
    is left, as it is. And figures: images, and the distance against the PSNR.

    Args:
      context: the stage; a velocity network that is told `low`, and data of
        `kd.data.transforms.low_resolution`.
      times: of students of one call.
      steps: of Euler, each a call.
      weights: 'final' for the parameters, or the name of an average.
      samples: how many of the first examples, and as many noises.
      batch: restored at a time.
      components: see `detail_distance`.
      seed: of the noise.

    Raises:
      UserError: no such average, or other data.
    """
    network, share = context.network, context.config.method.get('share', SHARE)
    advance = jax.jit(advance_of(network, 'euler', 1.0))

    @jax.jit
    def one_call(variables, x0, label, told, t):
        vfn = velocity_function(network, variables, label, told=told)
        then = jnp.full(len(x0), t)
        return x0 + vfn(then, then, x0)

    def way(of: Callable[..., jax.Array]) -> Way:
        def restore(state, variables, part, noise):
            x0 = vp_mix(part[LOW], noise, share)
            return of(variables, x0, part.get('label'), fields_of(network, part))

        return restore

    def euler(n):
        def run(variables, x, label, told):
            for s, t in itertools.pairwise(time_grid(n)):
                x = advance(variables, s, t, x, label, told)
            return x

        return run

    ways = {f'{n}': way(euler(n)) for n in steps}
    ways |= {f'at_{t:.2f}': way(lambda v, x, a, b, t=t: one_call(v, x, a, b, t)) for t in times}
    told = getattr(network.module, 'conditions', ())
    return _probe(context, ways, told, weights, samples, batch, components, seed)


def denoised(
    context: Context,
    *,
    steps: tuple[Count, ...] = (1, 4, 16),
    decoded: bool = False,
    weights: str = 'final',
    samples: Count = 1000,
    batch: Count = 250,
    components: Count = 24,
    seed: Seed = 0,
) -> Probe:
    """Images by a denoiser that is told what is left of them, from noise alone, by steps of DDIM.

    Metrics and figures are those of `restored`, `psnr_4` in so many steps.

    Args:
      context: the stage; a denoiser that is told `low`, and data as of `restored`.
      steps: of DDIM, each a call.
      decoded: the denoiser is the stage's teacher, and its network mends the images of that, see
        `kd.methods.sr.yonos_sr.decoder_tuning`.
      weights, samples, batch, components, seed: as of `restored`.

    Raises:
      UserError: no such average, or other data.
    """
    network = context.network
    asked = context.teacher if decoded else network
    denoiser = denoisers.of_network(asked, context.trained_by.get('teacher') if decoded else None)
    path = denoiser.schedule

    def way(n: int) -> Way:
        grid = sampling_times.grid(sampling_times.even(path), n, last=1 / n)

        @jax.jit
        def sampled(variables, own, told, noise):
            x = path.mix(jnp.zeros_like(noise), noise, jnp.float32(path.high))
            bound = denoiser.bind(variables, told)
            # Unrolled: convolutions in loops are slow on CPU.
            made = diffusion.sample(path, bound, x, grid, jax.random.key(0), unroll=True)
            return network.apply(own, made).logits if decoded else made

        def restore(state, variables, part, noise):
            told = denoisers.conditions(asked, part)
            of = state.frozen['teacher'] if decoded else variables
            return sampled(of, variables, told, noise)

        return restore

    ways = {f'{n}': way(n) for n in steps}
    told = getattr(asked.module, 'conditions', ())
    return _probe(context, ways, told, weights, samples, batch, components, seed)


def _probe(
    context: Context,
    ways: Mapping[str, Way],
    told: Iterable[str],
    weights: str,
    samples: int,
    batch: int,
    components: int,
    seed: int,
) -> Probe:
    """Of ways to restore, by the names of their metrics."""
    check_weights(context, weights)
    lowered, names = lowering(context), dict.fromkeys(['input', LOW, *told])

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float | Figure]:
        variables = state.variables(None if weights == 'final' else weights)
        shown = first(batches, names, samples)
        made: dict[str, list[np.ndarray]] = {name: [] for name in ways}
        for at in range(0, len(shown['input']), batch):
            part = {name: jnp.asarray(x[at : at + batch]) for name, x in shown.items()}
            shape = part['input'].shape
            noise = draw_noise(jax.random.key(seed), shape[0], shape[1:], first=at)
            for name, restore in ways.items():
                made[name].append(np.asarray(restore(state, variables, part, noise)))
        images = {name: np.concatenate(parts) for name, parts in made.items()}
        found = compared(images | {'low': shown[LOW]}, shown['input'], lowered, components)
        scores = {
            'low_' + metric if name == 'low' else f'{metric}_{name}': value
            for name, values in found.items()
            for metric, value in values.items()
        }
        pages = {'images': page(context, {'low': shown[LOW], **images, 'original': shown['input']})}
        if len(found) > 2:
            pages['curve'] = curve(found)
        return scores | pages

    return Probe(run)


def lowering(context: Context) -> Lowered:
    """What the data leave of an image, without noise.

    Raises:
      UserError: other data, or images smaller than the squares that are compared.
    """
    found = getattr(context.source('train'), 'lowered', None)
    if found is None:
        raise UserError(
            f'{context.stage}: its evaluator wants images and what is left of them; name '
            "kd.data.transforms.low_resolution.low_resolution as the data's source."
        )
    shape = context.spec['input'].shape
    if min(shape[:2]) < _SIDE:
        raise UserError(
            f'{context.stage}: its evaluator compares squares of {_SIDE} pixels, and images have '
            f'{shape[0]} x {shape[1]}.'
        )
    return found


def compared(
    images: Mapping[str, np.ndarray], real: np.ndarray, lowered: Lowered, components: int
) -> dict[str, dict[str, float]]:
    """{name: {'psnr': ..., 'frechet': ...}} of images [N, H, W, C] by name, against the real."""
    own = real - lowered(real)
    return {
        name: {
            'psnr': psnr_together(made, real),
            'frechet': detail_distance(own, made - lowered(made), components),
        }
        for name, made in images.items()
    }


def detail_distance(
    real: np.ndarray, made: np.ndarray, components: int, side: int = _SIDE
) -> float:
    """Frechet distance between details, in the first principal components of the real ones.

    Args:
      real, made: [N, H, W, C], images less what is left of them; they are cut in squares.
      components: how many directions; all where there are fewer.
      side: of a square.
    """
    first, second = squares(real, side), squares(made, side)
    centred = first - first.mean(0)
    _, vectors = np.linalg.eigh(centred.T @ centred)
    basis = vectors[:, ::-1][:, :components]
    return distribution.frechet_distance(
        distribution.moments(first @ basis), distribution.moments(second @ basis)
    )


def squares(images: np.ndarray, side: int) -> np.ndarray:
    """The squares of images [N, H, W, C] that lie side by side, [M, side * side * C] float64."""
    count, height, width, channels = images.shape
    down, right = height // side, width // side
    cut = images[:, : down * side, : right * side].astype(np.float64)
    parts = cut.reshape(count, down, side, right, side, channels).swapaxes(2, 3)
    return parts.reshape(count * down * right, -1)


def page(context: Context, rows: Mapping[str, np.ndarray]) -> Figure:
    """Some examples, a row of each kind."""
    images = np.concatenate([x[:_SHOWN] for x in rows.values()])
    captions = [title.replace('at_', 't = ') for title in rows for _ in range(_SHOWN)]
    shown = np.clip(context.source('train').to_pixels(images), -1, 1)
    return figures.image_page(shown, captions, columns=_SHOWN)


def curve(found: Mapping[str, Mapping[str, float]]) -> Figure:
    """Distance of details against PSNR, a point for each way."""
    figure = figures.new_figure(5, 3.6)
    axis = figure.subplots()
    for name, values in found.items():
        axis.plot(values['psnr'], values['frechet'], 'o', color='C1' if name == 'low' else 'C0')
        axis.annotate(
            name.replace('at_', 't = '), (values['psnr'], values['frechet']),
            textcoords='offset points', xytext=(5, 5),
        )  # fmt: skip
    axis.margins(0.2)
    axis.set(xlabel='PSNR, dB (fidelity)', ylabel='Frechet distance of details (realism)')
    return figure
