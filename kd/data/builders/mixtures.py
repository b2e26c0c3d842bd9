"""Mixtures of equal round Gaussians: data whose denoiser is known, and so a teacher for nothing."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.data import sources
from kd.data.context import SourceContext
from kd.losses.flow_map import VelocityFunction
from kd.losses.interpolant import expand_times
from kd.losses.schedule import Schedule
from kd.ranges import Count, Positive, Seed
from kd.sampling.denoiser import Denoiser, Prediction


class Mixture(NamedTuple):
    """sum_k w_k N(means_k, deviation^2 I).

    Attributes:
      means: [K, d].
      deviation: of every component.
      labels: int [K], the class of each component.
      weights: [K]; None for equal ones.
    """

    means: np.ndarray
    deviation: float
    labels: np.ndarray
    weights: np.ndarray | None = None

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1

    @property
    def shares(self) -> np.ndarray:
        """[K], summing to 1."""
        given = np.ones(len(self.means)) if self.weights is None else np.asarray(self.weights)
        return given / given.sum()

    def draw(self, rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        """(points [n, d], classes [n])."""
        component = rng.choice(len(self.means), n, p=self.shares)
        points = self.means[component]
        return points + self.deviation * rng.standard_normal(points.shape), self.labels[component]


def ring(modes: int = 8, radius: float = 1.4, deviation: float = 0.08, classes: int = 0) -> Mixture:
    """Modes evenly on a circle; of `classes` classes in turn, or each one its own."""
    angle = 2 * np.pi * np.arange(modes) / modes
    means = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    return Mixture(means, deviation, np.arange(modes) % (classes or modes))


def grid(side: int, spacing: float = 1.0, deviation: float = 0.1) -> Mixture:
    """side x side modes around the origin, each a class."""
    axis = spacing * (np.arange(side) - (side - 1) / 2)
    means = np.stack(np.meshgrid(axis, axis, indexing='ij'), axis=-1).reshape(-1, 2)
    return Mixture(means, deviation, np.arange(side * side))


def pairs(classes: int = 4, radius: float = 0.9, apart: float = 0.45, deviation: float = 0.25):
    """Two overlapping modes for each class, beside each other on a circle."""
    angle = 2 * np.pi * np.arange(classes) / classes
    centre = radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)
    tangent = np.stack([-np.sin(angle), np.cos(angle)], axis=1)
    means = np.concatenate([centre + apart * tangent, centre - apart * tangent])
    return Mixture(means, deviation, np.tile(np.arange(classes), 2))


def quadrants(modes: int = 6, deviation: float = 0.08, seed: int = 0) -> Mixture:
    """Four classes, one in each quadrant, of modes with random places and weights.

    Places are uniform in (.2, 1.8)^2 of the quadrant, weights of a class Dirichlet(1, .., 1); all
    is divided by the deviation of the coordinates, so that it is about 1.
    """
    rng = np.random.default_rng(seed)
    signs = np.repeat(np.asarray([(1, 1), (-1, 1), (-1, -1), (1, -1)]), modes, axis=0)
    means = signs * rng.uniform(0.2, 1.8, signs.shape)
    weights = rng.dirichlet(np.ones(modes), 4).reshape(-1) / 4
    size = np.sqrt(np.mean(weights @ means**2 + deviation**2))
    return Mixture(means / size, deviation / size, np.repeat(np.arange(4), modes), weights)


def quadrant_points(
    context: SourceContext, *, modes: Count = 6, deviation: Positive = 0.08, seed: Seed = 0
) -> sources.Source:
    """Points of `quadrants` and their classes: 4,000 each of 'train', 'validation' and 'test'.

    Args:
      context: a split.
      modes, deviation, seed: of the mixture.
    """
    mixture = quadrants(modes, deviation, seed)
    names = ('train', 'validation', 'test')

    def reader(name: str) -> sources.Reader:
        points, label = mixture.draw(np.random.default_rng([seed, names.index(name)]), 4_000)
        return sources.in_memory(
            {'input': points.astype(np.float32), 'label': label.astype(np.int32)}
        )

    data = sources.DataSet(
        'quadrants', dict.fromkeys(names, 4_000), reader, sources.example_spec((2,)), 4
    )
    return sources.Source(data, context.split)


def exact_denoiser(mixture: Mixture, schedule: Schedule) -> Denoiser:
    """E[x0 | x_t], and E[x0 | x_t, label] where the condition has a `label`, in closed form.

        sum_k r_k (mu_k + alpha s^2 / (alpha^2 s^2 + sigma^2) (x_t - alpha mu_k)),
        r = softmax(log w_k - |x_t - alpha mu_k|^2 / (2 (alpha^2 s^2 + sigma^2)))

    It reads no variables. A label of `num_classes` is none.
    """
    means, deviation = jnp.asarray(mixture.means), mixture.deviation
    labels = jnp.asarray(mixture.labels)
    classes = mixture.num_classes

    def apply(variables, x, t, condition, *, train=False, key=None, capture=()):
        del variables, train, key
        if capture:
            raise ValueError('exact_denoiser: a formula has no features.')
        alpha, sigma = schedule.coefficients(t, x)
        logits, away, variance = _components(mixture, alpha, sigma, x)
        if 'label' in condition:
            label = condition['label'][:, None]
            logits = jnp.where((label == labels) | (label == classes), logits, -jnp.inf)
        ratio = (alpha * deviation**2 / variance)[..., None]
        known = means + ratio * away
        return Prediction(jnp.sum(jax.nn.softmax(logits)[..., None] * known, axis=1), {})

    return Denoiser(schedule, apply, {'label': classes})


def exact_velocity(mixture: Mixture, scale: float = 1.0) -> VelocityFunction:
    """v(s, t, x), the velocity at s of the straight path from noise to the mixture, at every s.

        E[x1 - x0 | x_s] = sum_k r_k (mu_k + (s d^2 - (1 - s) R^2) / V (x - s mu_k)),
        V = s^2 d^2 + (1 - s)^2 R^2

    Args:
      mixture: the data, of deviation d.
      scale: R, of the noise.
    """

    def field(s, t, x):
        del t
        s = expand_times(s, x)
        noise = (1 - s) * scale
        logits, away, variance = _components(mixture, s, noise, x)
        ratio = (s * mixture.deviation**2 - noise * scale) / variance
        known = jnp.asarray(mixture.means, x.dtype) + ratio[..., None] * away
        return jnp.sum(jax.nn.softmax(logits)[..., None] * known, axis=1)

    return field


def _components(
    mixture: Mixture, alpha: jax.Array, sigma: jax.Array, x: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of alpha x0 + sigma eps: log r [B, K] up to a constant, x - alpha mu [B, K, d], V [B, 1]."""
    variance = (alpha * mixture.deviation) ** 2 + sigma**2
    away = x[:, None] - alpha[:, None] * jnp.asarray(mixture.means).astype(x.dtype)
    logits = jnp.log(jnp.asarray(mixture.shares)) - 0.5 * jnp.sum(away**2, -1) / variance
    return logits, away, variance
