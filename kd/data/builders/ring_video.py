"""Videos of a point that turns on a ring, a step each frame, either way: their denoiser is known.

    x_1 = m + s e_1,    x_(f + 1) = R(+-angle) x_f + s e_(f + 1)

with m one of the modes and every sign as likely: modes * 2^(F - 1) Gaussians in R^(2 F).
Turned back by its angles, each of them is a random walk from its mode: all have one spectrum.
Radii are not pulled back to the ring, so that what goes wrong in a frame stays wrong after it.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.losses.schedule import Schedule
from kd.ranges import Count
from kd.sampling.denoiser import Denoiser, Prediction

SIZES = {'train': 50_000, 'validation': 4_000, 'test': 4_000}
# How far from the ring a frame may be.
AWAY = 0.2


class RingVideo(NamedTuple):
    """See above.

    Attributes:
      frames: F.
      modes: of the first frame, evenly on a circle.
      radius: of it.
      deviation: s.
      angle: of a turn, in radians.
    """

    frames: int = 6
    modes: int = 4
    radius: float = 1.0
    deviation: float = 0.05
    angle: float = np.pi / 6

    def draw(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Videos [n, F, 2], frame by frame."""
        mode = 2 * np.pi * rng.integers(self.modes, size=n) / self.modes
        start = self.radius * np.stack([np.cos(mode), np.sin(mode)], axis=1)
        video = [start + self.deviation * rng.standard_normal((n, 2))]
        for _ in range(self.frames - 1):
            turn = self.angle * rng.choice([-1.0, 1.0], n)
            turned = np.einsum('nij,nj->ni', _rotation(turn), video[-1])
            video.append(turned + self.deviation * rng.standard_normal((n, 2)))
        return np.stack(video, axis=1)

    def components(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(means [K, 2 F], V [K, 2 F, 2 F], v [2 F]): a covariance is V diag(v) V'."""
        walk = self.deviation**2 * (1 + np.minimum.outer(*[np.arange(self.frames)] * 2))
        values, vectors = np.linalg.eigh(walk)
        means, bases = [], []
        for signs in itertools.product([-1.0, 1.0], repeat=self.frames - 1):
            turned = _rotation(self.angle * np.cumsum([0.0, *signs]))
            # Row (f, i), column (e, j): the turn of frame f in the e-th direction of the walk.
            basis = np.einsum('fij,fe->fiej', turned, vectors).reshape(2 * self.frames, -1)
            for mode in 2 * np.pi * np.arange(self.modes) / self.modes:
                centre = self.radius * np.array([np.cos(mode), np.sin(mode)])
                means.append((turned @ centre).reshape(-1))
                bases.append(basis)
        return np.stack(means), np.stack(bases), np.repeat(values, 2)


def _rotation(angle: np.ndarray) -> np.ndarray:
    """[n] -> [n, 2, 2]."""
    c, s = np.cos(angle), np.sin(angle)
    return np.stack([np.stack([c, -s], -1), np.stack([s, c], -1)], -2)


def exact_denoiser(video: RingVideo, schedule: Schedule) -> Denoiser:
    """E[x0 | x_t] of whole videos [B, F, 2] with one time for all frames, in closed form.

        sum_k r_k (m_k + V_k alpha v / (alpha^2 v + sigma^2) V_k' (x_t - alpha m_k)),
        r = softmax(-sum (V_k' (x_t - alpha m_k))^2 / (2 (alpha^2 v + sigma^2)))

    It reads no variables.
    """
    means, bases, variances = map(jnp.asarray, video.components())

    def apply(variables, x, t, condition, *, train=False, key=None, capture=()):
        del variables, train, key, condition
        if capture:
            raise ValueError('exact_denoiser: a formula has no features.')
        flat = x.reshape(len(x), -1)
        alpha, sigma = schedule.coefficients(t, flat)
        m, basis, v = (y.astype(flat.dtype) for y in (means, bases, variances))
        total = alpha**2 * v + sigma**2
        # V' (x - alpha m), without an array of every component's difference.
        along = jnp.einsum('kde,bd->bke', basis, flat)
        along -= alpha[:, None] * jnp.einsum('kde,kd->ke', basis, m)
        share = jax.nn.softmax(-0.5 * jnp.sum(along**2 / total[:, None], -1))
        pulled = share[..., None] * along * (alpha * v / total)[:, None]
        known = share @ m + jnp.einsum('kde,bke->bd', basis, pulled)
        return Prediction(known.reshape(x.shape), {})

    return Denoiser(schedule, apply)


def on_ring(points: np.ndarray) -> np.ndarray:
    """Whether all frames of videos [N, 2 F] are near the ring of radius 1, bool [N]."""
    return np.all(away(points.reshape(len(points), -1, 2)) <= AWAY, axis=1)


def away(videos: np.ndarray) -> np.ndarray:
    """| |x_f| - 1 | of videos [N, F, 2], [N, F]."""
    return np.abs(np.linalg.norm(videos, axis=-1) - 1)


def ring_video(context: SourceContext, *, frames: Count = 6) -> sources.Source:
    """Videos of the ring as a source, for the key `source` of a recipe's data.

    Args:
      context: its recipe's seed, and the split, draw them.
      frames: of a video.
    """
    if context.split not in SIZES:
        raise sources.DataError(f'ring_video has splits {list(SIZES)}, not {context.split!r}')
    rng = np.random.default_rng([context.recipe.seed, list(SIZES).index(context.split)])
    count = SIZES[context.split]
    arrays = {'input': RingVideo(frames).draw(rng, count).astype(np.float32)}
    spec = {'input': jax.ShapeDtypeStruct((frames, 2), np.float32)}
    data = sources.DataSet(
        'ring_video', {context.split: count}, lambda _: sources.in_memory(arrays), spec, None
    )
    return sources.Source(data, context.split)
