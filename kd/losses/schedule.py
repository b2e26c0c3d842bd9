"""Noise schedules of diffusion models, and the one table of what networks predict.

    x_t = alpha(t) x0 + sigma(t) eps,      eps ~ N(0, I)

Time grows with noise, always. What a network says of x_t is one of

| kind | is | used by |
|---|---|---|
| x0 | E[x0 | x_t] | EDM, after its preconditioning |
| eps | E[eps | x_t] | DDPM, Stable Diffusion 1.5 and XL, DiT, PixArt |
| v | alpha E[eps | x_t] - sigma E[x0 | x_t] | Stable Diffusion 2.1 at 768 (arXiv:2202.00512) |
| flow | E[eps | x_t] - E[x0 | x_t] | SD3, Flux, Wan: rectified flow |
| score | grad log p_t(x_t) = -E[eps | x_t] / sigma | |

and `convert` turns each into each; no other conversion stands anywhere in `kd`.

| schedule | alpha, sigma | times | what the network is told |
|---|---|---|---|
| edm | 1, t | [.002, 80] | ln(t) / 4 |
| discrete | sqrt(abar_t), sqrt(1 - abar_t) | 0 .. T - 1 | t, or `scale` t |
| flow | 1 - t, t | [0, 1] | 1000 t |
| cosine | cos(pi t / 2), sin(pi t / 2) | [.001, 1] | t |
| local | 1, sqrt(1 - abar_t) | 0 .. T - 1 | t |
| residual_shift | 1 - eta_t, kappa sqrt(eta_t) | 0 .. T - 1 | t |
| of_interpolant | c(1 - t), a(1 - t) | [0, 1] | 1 - t |
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from kd.losses.interpolant import Interpolant, expand_times, get_interpolant
from kd.losses.numerics import wide

__all__ = [
    *('KINDS', 'Kind', 'Schedule', 'convert', 'cosine', 'discrete', 'edm', 'flow', 'local'),
    *('of_interpolant', 'residual_shift'),
]

Kind = Literal['x0', 'eps', 'v', 'flow', 'score']
KINDS: tuple[Kind, ...] = ('x0', 'eps', 'v', 'flow', 'score')


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How much of the data and of the noise there is at a time.

    Two calls with equal arguments give one object, so that networks that hold it are equal.

    Attributes:
      name: what messages call it.
      low, high: first and last time, the cleanest and the noisiest.
      steps: T where times are the integers 0 .. T - 1; None where they are continuous.
      alpha, sigma: coefficients of data and noise, elementwise in t; float32 at least.
      condition: what a network is told of t.
    """

    name: str
    low: float
    high: float
    steps: int | None
    alpha: Callable[[jax.Array], jax.Array]
    sigma: Callable[[jax.Array], jax.Array]
    condition: Callable[[jax.Array], jax.Array]

    def coefficients(self, t: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(alpha, sigma) of times [B] (or a scalar), to broadcast over x [B, ...]."""
        t = expand_times(wide(t), x)
        return self.alpha(t), self.sigma(t)

    def mix(self, x0: jax.Array, eps: jax.Array, t: jax.Array) -> jax.Array:
        """x_t = alpha x0 + sigma eps, [B, ...]."""
        alpha, sigma = self.coefficients(t, x0)
        return (alpha * x0 + sigma * eps).astype(x0.dtype)

    def noise_to_signal(self, t: jax.Array) -> jax.Array:
        """sigma / alpha, elementwise: the time of the EDM schedule with as much noise."""
        t = wide(t)
        return self.sigma(t) / self.alpha(t)

    def bridge(self, low: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
        """(a, s) such that x_t = a x_low + s eps with fresh noise, from a time to a noisier one.

            a = alpha_t / alpha_low,   s^2 = sigma_t^2 - a^2 sigma_low^2

        Source: arXiv:2202.00512, appendix; arXiv:2510.27684 between the phases of a student.
        """
        low, t = wide(low), wide(t)
        a = self.alpha(t) / self.alpha(low)
        return a, jnp.sqrt(jnp.maximum(self.sigma(t) ** 2 - (a * self.sigma(low)) ** 2, 0.0))


def convert(
    schedule: Schedule, prediction: jax.Array, x_t: jax.Array, t: jax.Array, kind: Kind, to: Kind
) -> jax.Array:
    """One kind of prediction as another, [B, ...], in float32 at least.

    All are affine in each other at a fixed x_t with coefficients that add up: a mean of predictions
    with weights that sum to 1, guidance for example, is the same in whichever kind it is taken.

    Args:
      schedule: of the times.
      prediction: what the network says of x_t, [B, ...].
      x_t: what it was asked about, [B, ...].
      t: [B] or a scalar.
      kind, to: of `KINDS`. There is no eps or score where sigma is 0, and no x0 from these where
        alpha is 0.
    """
    if kind == to:
        return wide(prediction)
    alpha, sigma = schedule.coefficients(t, x_t)
    p, x = wide(prediction), wide(x_t)
    if kind == 'x0':
        x0, eps = p, (x - alpha * p) / sigma
    elif kind in ('eps', 'score'):
        eps = p if kind == 'eps' else -sigma * p
        x0 = (x - sigma * eps) / alpha
    elif kind == 'v':
        norm = alpha**2 + sigma**2
        x0, eps = (alpha * x - sigma * p) / norm, (sigma * x + alpha * p) / norm
    else:
        x0, eps = (x - sigma * p) / (alpha + sigma), (x + alpha * p) / (alpha + sigma)
    return {
        'x0': lambda: x0,
        'eps': lambda: eps,
        'v': lambda: alpha * eps - sigma * x0,
        'flow': lambda: eps - x0,
        'score': lambda: -eps / sigma,
    }[to]()


@functools.cache
def edm(low: float = 0.002, high: float = 80.0) -> Schedule:
    """Time is the deviation of the noise (Karras et al. 2022, arXiv:2206.00364)."""
    return Schedule('edm', low, high, None, jnp.ones_like, lambda t: t, lambda t: jnp.log(t) / 4)


@functools.cache
def flow(scale: float = 1000.0) -> Schedule:
    """The straight path of rectified flow, (1 - t) x0 + t eps; networks are told `scale` t."""
    return Schedule('flow', 0.0, 1.0, None, lambda t: 1 - t, lambda t: t, lambda t: scale * t)


@functools.cache
def cosine(low: float = 1e-3) -> Schedule:
    """cos(pi t / 2) x0 + sin(pi t / 2) eps; nothing of the data is left at 1, where eps is vain.

    Source: arXiv:2202.00512, whose time is 1 at the end of the noise too.
    """

    def alpha(t: jax.Array) -> jax.Array:
        # The sine of what is left is 0 at 1, which a cosine in float32 is not.
        return jnp.sin(0.5 * jnp.pi * (1 - t))

    return Schedule('cosine', low, 1.0, None, alpha, lambda t: jnp.sin(0.5 * jnp.pi * t), wide)


@functools.cache
def discrete(
    kind: Literal['linear', 'scaled_linear', 'cosine'] = 'scaled_linear',
    start: float = 0.00085,
    end: float = 0.012,
    steps: int = 1000,
    zero_terminal: bool = False,
    scale: float = 1.0,
) -> Schedule:
    """abar_t = prod_{s <= t} (1 - beta_s), at integer times 0 .. T - 1.

    | kind | beta | |
    |---|---|---|
    | linear | from start to end | DDPM, DiT: 1e-4, .02 |
    | scaled_linear | squares of what lies evenly between their roots | Stable Diffusion |
    | cosine | of abar = cos^2(pi/2 (t/T + .008) / 1.008), at most .999 | arXiv:2102.09672 |

    Args:
      kind: see above.
      start, end: first and last beta; not of 'cosine'.
      steps: T.
      zero_terminal: moved and scaled so that the last alpha is 0 (arXiv:2305.08891); there eps
        says nothing, take v.
      scale: networks are told `scale` t; for small ones 1 / T.
    """
    if kind == 'linear':
        betas = np.linspace(start, end, steps)
    elif kind == 'scaled_linear':
        betas = np.linspace(start**0.5, end**0.5, steps) ** 2
    elif kind == 'cosine':
        bar = np.cos((np.arange(steps + 1) / steps + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - bar[1:] / bar[:-1], 0.999)
    else:
        raise ValueError(f"betas are 'linear', 'scaled_linear' or 'cosine', got {kind!r}.")
    alphas = np.sqrt(np.cumprod(1 - betas))
    if zero_terminal:
        alphas = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    sigmas = np.sqrt(1 - alphas**2)
    return Schedule(
        kind,
        0.0,
        steps - 1.0,
        steps,
        _table(alphas),
        _table(sigmas),
        lambda t: scale * wide(t),
    )


def _table(values: np.ndarray) -> Callable[[jax.Array], jax.Array]:
    """A function of integer times by its values."""
    return lambda t: jnp.asarray(values, wide(t).dtype)[jnp.asarray(t, jnp.int32)]


@functools.cache
def local(start: float = 3.5e-5, end: float = 0.007, steps: int = 1000) -> Schedule:
    """x0 + sqrt(1 - abar_t) eps, of linear betas: points that move, and do not shrink.

    Source: LiDiff, arXiv:2403.13470, for scenes of points in metres.
    """
    sigmas = discrete('linear', start, end, steps).sigma
    return Schedule(
        'local',
        0.0,
        steps - 1.0,
        steps,
        lambda t: jnp.ones_like(wide(t)),
        sigmas,
        wide,
    )


@functools.cache
def residual_shift(
    steps: int = 15,
    kappa: float = 2.0,
    least: float = 0.04,
    power: float = 0.3,
    last: float = 0.99,
) -> Schedule:
    """That of residuals r = x0 - y while a picture x0 is shifted to another, y.

        x_t = x0 + eta_t (y - x0) + kappa sqrt(eta_t) eps,   r_t = x_t - y
        sqrt(eta_t) = a (last / a)^((t / (T - 1))^power),   a = least / max(kappa, 1)

    In residuals it is a diffusion like others: r_t = (1 - eta_t) r + kappa sqrt(eta_t) eps, and the
    sampler that is released for it is DDIM.

    Args:
      steps: T, at least 2.
      kappa: of the noise.
      least: kappa sqrt(eta_0), for kappa from 1 on.
      power: below 1, little noise takes few of the steps.
      last: sqrt(eta_(T - 1)).

    Source: ResShift, arXiv:2307.12348.
    """
    if steps < 2:
        raise ValueError(f'residual_shift: steps={steps}, expected at least 2.')
    first = least / max(kappa, 1.0)
    roots = first * (last / first) ** (np.linspace(0, 1, steps) ** power)
    return Schedule(
        'residual_shift', 0.0, steps - 1.0, steps, _table(1 - roots**2), _table(kappa * roots),
        lambda t: wide(t),
    )  # fmt: skip


@functools.cache
def of_interpolant(name: str = 'linear', scale: float = 1.0) -> Schedule:
    """The path of a flow of `kd`, whose own time is 1 - t: only here the direction turns.

    Args:
      name: of the interpolant, see `kd.losses.interpolant`.
      scale: deviation of the noise that the flow starts from.
    """
    path: Interpolant = get_interpolant(name)
    return Schedule(
        name, 1 - path.end, 1.0, None, lambda t: path.c(1 - t), lambda t: scale * path.a(1 - t),
        lambda t: 1 - t,
    )  # fmt: skip
