"""How near a restored picture is to the original, by protocols that papers have names for.

| protocol | the picture | its luma | seen |
|---|---|---|---|
| matlab | rounded to uint8 | not rounded | without `scale` pixels at every side |
| imdn_script | rounded to uint8 | rounded | without `scale` pixels at every side |
| float | not rounded | not rounded | without `scale` pixels at every side |

Tables of papers on super-resolution are by `matlab`; the script that IMDN (arXiv:1909.11856) came
with rounds once more, which costs .09 dB at x2. Numbers of a folder are means over pictures of each
one's own: the PSNR of the mean squared error is another.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import resample
from kd.context import Context, Probe
from kd.data.patches import degraded, to_unit
from kd.data.pictures import pictures
from kd.errors import UserError, did_you_mean
from kd.evaluators.samples import check_weights
from kd.ranges import Count
from kd.state import State

# BT.601 of R, G, B in [0, 1]: 16 for black, 235 for white.
_LUMA, _BLACK = np.array([65.481, 128.553, 24.966]), 16.0
# Of the structural similarity (Wang et al. 2004): its window and its constants.
_WINDOW, _DEVIATION, _K1, _K2 = 11, 1.5, 0.01, 0.03


class Protocol(NamedTuple):
    """What is done to a picture before it is compared."""

    whole: bool
    whole_luma: bool


PROTOCOLS = {
    'matlab': Protocol(whole=True, whole_luma=False),
    'imdn_script': Protocol(whole=True, whole_luma=True),
    'float': Protocol(whole=False, whole_luma=False),
}


class Score(NamedTuple):
    """PSNR in dB and structural similarity of a picture."""

    psnr: float
    ssim: float


def psnr(a: np.ndarray, b: np.ndarray, *, peak: float = 255.0) -> np.ndarray:
    """10 log10(peak^2 / mean (a - b)^2) in dB: [..., H, W, C] to [...]; +inf for equal pictures."""
    error = np.square(np.asarray(a, np.float64) - b).mean((-3, -2, -1))
    with np.errstate(divide='ignore'):
        return 10 * np.log10(peak**2 / error)


def psnr_together(a: np.ndarray, b: np.ndarray) -> float:
    """10 log10(4 / mean (a - b)^2) in dB, of images in [-1, 1] all together.

    Of patches of pictures, the flattest of which have no error, a mean of each one's own dB says
    little.
    """
    return float(psnr(*(np.reshape(x, (-1, 1, 1)) for x in (a, b)), peak=2.0))


def ssim(a: np.ndarray, b: np.ndarray, *, peak: float = 255.0) -> np.ndarray:
    """Mean structural similarity: [..., H, W, C] to [...], 1 for equal pictures.

        (2 m_a m_b + c1) (2 s_ab + c2) / ((m_a^2 + m_b^2 + c1) (s_aa + s_bb + c2))

    m and s are means and (population) covariances in Gaussian windows of 11 x 11 pixels and
    deviation 1.5 that lie wholly inside; c1 = (.01 peak)^2, c2 = (.03 peak)^2.

    Raises:
      ValueError: a picture smaller than the window.
    """
    a, b = (np.asarray(x, np.float64) for x in (a, b))
    if min(a.shape[-3:-1]) < _WINDOW:
        raise ValueError(f'SSIM needs {_WINDOW} pixels at least, got {a.shape[-3:-1]}')
    mean_a, mean_b = _blurred(a), _blurred(b)
    own = _blurred(a * a) - mean_a**2 + _blurred(b * b) - mean_b**2
    shared = _blurred(a * b) - mean_a * mean_b
    c1, c2 = (_K1 * peak) ** 2, (_K2 * peak) ** 2
    above = (2 * mean_a * mean_b + c1) * (2 * shared + c2)
    return (above / ((mean_a**2 + mean_b**2 + c1) * (own + c2))).mean((-3, -2, -1))


def _blurred(x: np.ndarray) -> np.ndarray:
    """Means in the windows of `ssim`, [..., H - 10, W - 10, C]."""
    place = np.arange(_WINDOW) - _WINDOW // 2
    weights = np.exp(-(place**2) / (2 * _DEVIATION**2))
    weights /= weights.sum()
    for axis in (-3, -2):
        count = x.shape[axis] - _WINDOW + 1
        parts = (x.take(range(i, i + count), axis) for i in range(_WINDOW))
        x = sum(w * part for w, part in zip(weights, parts, strict=True))
    return x


def high_bands(x: np.ndarray) -> np.ndarray:
    """Power of x [N, H, W, C] by frequency, mean over N and C, at the upper third of radii, [K]."""
    power = np.square(np.abs(np.fft.fft2(np.asarray(x, np.float64), axes=(1, 2)))).mean((0, 3))
    return power[radii(*x.shape[1:3]) > 2 / 3]


def radii(height: int, width: int) -> np.ndarray:
    """Of the frequencies of `np.fft.fft2`, [H, W]: 0 at the mean, 1 at most."""
    found = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    return found / found.max()


def high_band_error(restored: np.ndarray, target: np.ndarray) -> float:
    """mean |log P - log P'| of the powers at high frequencies of two sets of pictures.

    0 for a set with as much of what is fine as the other, be it in the wrong places.
    """
    ours, theirs = (np.log(high_bands(x)) for x in (restored, target))
    return float(np.abs(ours - theirs).mean())


def luma(rgb: np.ndarray, rounded: bool = False) -> np.ndarray:
    """BT.601's Y of R, G, B in 0 .. 255: [..., 3] to [..., 1], 16 for black and 235 for white.

    MATLAB's `rgb2ycbcr` rounds that of a uint8 picture, and papers take it of doubles.
    """
    y = _BLACK + np.asarray(rgb, np.float64) @ _LUMA[:, None] / 255
    return np.rint(y) if rounded else y


def to_bytes(picture: np.ndarray) -> np.ndarray:
    """A picture in [-1, 1] as uint8, clipped and rounded."""
    return np.rint(np.clip((np.asarray(picture, np.float64) + 1) * 127.5, 0, 255)).astype(np.uint8)


def score(restored: np.ndarray, target: np.ndarray, *, scale: int, protocol: str) -> Score:
    """PSNR and SSIM of a picture [H, W, 3] in [-1, 1] against its original.

    Args:
      restored, target: as above.
      scale: pixels that are cut off at every side.
      protocol: a key of `PROTOCOLS`.

    Raises:
      UserError: another protocol; pictures of two sizes, or too small to be seen.
    """
    steps = named(protocol)
    if restored.shape != target.shape:
        raise UserError(
            f'A restored picture has {restored.shape[:2]} pixels, its original {target.shape[:2]}.'
        )
    if min(target.shape[:2]) < 2 * scale + _WINDOW:
        raise UserError(
            f'A picture of {target.shape[0]} x {target.shape[1]} pixels is too small to be scored '
            f'at scale {scale}; that takes {2 * scale + _WINDOW}.'
        )

    def seen(picture: np.ndarray) -> np.ndarray:
        if steps.whole:
            picture = to_bytes(picture)
        else:
            picture = np.clip((np.asarray(picture, np.float64) + 1) * 127.5, 0, 255)
        height, width = picture.shape[:2]
        return luma(picture, steps.whole_luma)[scale : height - scale, scale : width - scale]

    a, b = seen(restored), seen(target)
    return Score(float(psnr(a, b)), float(ssim(a, b)))


def named(protocol: str) -> Protocol:
    """A protocol by its name.

    Raises:
      UserError: none of that name.
    """
    if protocol not in PROTOCOLS:
        near = did_you_mean(protocol, list(PROTOCOLS))
        raise UserError(f"There is no protocol '{protocol}', only {list(PROTOCOLS)}.{near}")
    return PROTOCOLS[protocol]


def mean_score(scores: Iterable[Score]) -> Score:
    """The mean of each number over pictures."""
    return Score(*np.mean(list(scores), axis=0).tolist())


# (low [1, h, w, 3]) -> [1, H, W, 3], both in [-1, 1], of NumPy or JAX.
Restore = Callable[[Any], Any]


def pictures_scored(
    restore: Restore, pictures: Mapping[str, np.ndarray], *, scale: int, protocol: str
) -> dict[str, Score]:
    """The score of each uint8 picture, made small and restored, by name."""
    found = {}
    for name, picture in pictures.items():
        low, target = map(to_unit, degraded(picture, scale))
        restored = np.asarray(restore(jnp.asarray(low[None])))[0]
        found[name] = score(restored, target, scale=scale, protocol=protocol)
    return found


def restoration(
    context: Context,
    *,
    scale: Count,
    of: str,
    folder: str = 'test',
    protocol: str = 'matlab',
    weights: str = 'final',
) -> Probe:
    """PSNR and SSIM of whole pictures, made small by MATLAB's bicubic, over the network's own.

    Metrics: `psnr`, `ssim`, and `bicubic_psnr`, what MATLAB's bicubic enlargement has. Examples of
    the stage's data are not looked at.

    Args:
      context: the stage; its network takes `low` [B, h, w, 3] of any size.
      scale: of the network.
      of, folder: which, as `of` and `split` of `kd.data.pictures.pictures`.
      protocol: a key of `PROTOCOLS`.
      weights: 'final' for the parameters, or the name of an average.

    Raises:
      UserError: no such average, pictures or protocol.
    """
    check_weights(context, weights)
    named(protocol)
    network, data_dir = context.network, context.recipe.data_dir
    apply = jax.jit(lambda variables, low: network.apply(variables, low).logits)

    def run(state: State, batches: Iterable[dict[str, jax.Array]]) -> Mapping[str, float]:
        del batches
        variables = state.variables(None if weights == 'final' else weights)
        shown = pictures(of, folder, data_dir)
        options: Any = dict(scale=scale, protocol=protocol)
        found = mean_score(
            pictures_scored(lambda low: apply(variables, low), shown, **options).values()
        )
        plain = mean_score(pictures_scored(bicubic(scale), shown, **options).values())
        return {'psnr': found.psnr, 'ssim': found.ssim, 'bicubic_psnr': plain.psnr}

    return Probe(run)


def bicubic(scale: int) -> Restore:
    """MATLAB's enlargement of uint8 pictures: what every table begins with."""

    def restore(low: Any) -> np.ndarray:
        picture = to_bytes(np.asarray(low))
        size = (picture.shape[1] * scale, picture.shape[2] * scale)
        return to_unit(resample.resize(picture, size, 'matlab'))

    return restore
