"""Restored images against the originals, by distortion and by the details that they have.

metrics = {'psnr_1': ..., 'frechet_1': ..., 'psnr_at_0.50': ..., 'frechet_at_0.50': ...}
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from kd import figures
from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators import distribution, ways
from kd.evaluators.restoration import psnr_together
from kd.evaluators.restored import probe
from kd.evaluators.samples import check_weights
from kd.methods.sr.oftsr import SHARE
from kd.ranges import Count, Fraction, Seed
from kd.state import PyTree, State

# Of the squares whose details are compared.
_SIDE = 8
# (images [N, H, W, C]) -> what is left of them
Lowered = Callable[[Any], np.ndarray]


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
    by = {f'{n}': ways.of_flow(network, share=share, steps=n) for n in steps}
    by |= {f'at_{t:.2f}': ways.of_one_call(network, share=share, time=t) for t in times}
    told = getattr(network.module, 'conditions', ())
    settings = dict(weights=weights, samples=samples, batch=batch, seed=seed)
    return _probe(context, by, components, told=told, **settings)


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
    asked = context.teacher if decoded else context.network
    by = {
        f'{n}': ways.of_denoiser(
            asked,
            steps=n,
            trained_by=context.trained_by.get('teacher') if decoded else None,
            mend=context.network if decoded else None,
        )
        for n in steps
    }

    def variables_of(state: State, own: PyTree) -> PyTree:
        return {'of': state.frozen['teacher'], 'mend': own} if decoded else own

    told = getattr(asked.module, 'conditions', ())
    settings = dict(weights=weights, samples=samples, batch=batch, seed=seed)
    return _probe(context, by, components, told=told, variables_of=variables_of, **settings)


def _probe(context: Context, by: Mapping[str, ways.Way], components: int, **settings: Any) -> Probe:
    """The probe of these ways, whose metrics are of details; see `kd.evaluators.restored.probe`."""
    check_weights(context, settings['weights'])
    lowered = lowering(context)
    return probe(
        context,
        by,
        lambda images, real: compared(images, real, lowered, components),
        figures_of=lambda found: {'curve': curve(found)} if len(found) > 2 else {},
        **settings,
    )


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
