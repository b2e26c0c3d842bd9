"""Losses of generators that follow a difference of denoisers: DMD, VSD and what is made of them.

A generator's sample x is moved against

    g ~ E_{t, eps} [mu_fake(x_t, t) - mu_real(x_t, t)]

which is, up to a weight of the time, the gradient of KL(fake || real) in x: mu_real is a frozen
teacher's denoiser, mu_fake one that is trained on the generator's samples alone. What a direction
is made of are constants: all of these stop gradients, and `surrogate` passes a direction on.

The kinds of a prediction, and why guidance may be taken in any, stand in `kd.losses.schedule`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from kd.losses.interpolant import expand_times
from kd.losses.numerics import wide
from kd.losses.schedule import Schedule, convert

__all__ = [
    'augmentation',
    'denoising',
    'direction',
    'hsd_gap',
    'mean_variance_kl',
    'preferred',
    'residual',
    'subinterval',
    'surrogate',
    'vsd',
]

Weight = Literal['x0', 'eps', 'v', 'flow', 'edm', 'alpha2', 'truncated']


def direction(x: jax.Array, real: jax.Array, fake: jax.Array, floor: float = 1e-6) -> jax.Array:
    """g = (mu_fake - mu_real) / mean |x - mu_real|, [B, ...], in float32 at least.

    The mean is that of each example alone, whatever else is in the batch.

    Args:
      x: the generator's samples, [B, ...], not noised.
      real, fake: denoisers of the noised samples, [B, ...]; the real one guided, where it is.
      floor: least denominator.

    Source: DMD, arXiv:2311.18828, eqs. 7 and 8, without the factor alpha_t that its code and all
    that follow it leave out.
    """
    return jax.lax.stop_gradient((wide(fake) - wide(real)) / residual(x, real, floor))


def residual(x: jax.Array, real: jax.Array, floor: float = 1e-6) -> jax.Array:
    """mean |x - mu_real| of each example, at least `floor`, [B, 1, ...]; a direction is over it."""
    apart = jnp.abs(wide(x) - wide(real))
    scale = jnp.mean(apart, axis=tuple(range(1, x.ndim)), keepdims=True)
    return jax.lax.stop_gradient(jnp.maximum(scale, floor))


def vsd(real: jax.Array, fake: jax.Array, weight: jax.Array | float = 1.0) -> jax.Array:
    """g = w (eps_real - eps_fake), [B, ...]: variational score distillation.

    Args:
      real, fake: predictions of the noise, [B, ...]. With a draw of the noise in place of `fake`
        it is score distillation sampling.
      weight: [B] or a scalar.

    Source: ProlificDreamer, arXiv:2305.16213, eq. 9.
    """
    weight = jnp.asarray(weight)
    weight = weight.reshape(weight.shape + (1,) * (real.ndim - weight.ndim))
    return jax.lax.stop_gradient(weight * (wide(real) - wide(fake)))


def hsd_gap(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    target: jax.Array,
    schedule: Schedule,
    t: jax.Array,
    noise: jax.Array,
) -> jax.Array:
    """g = eps(x_t) - eps(y_t), [B, ...]: high-frequency score distillation.

        = alpha_t / sigma_t [x - y - (mu(x_t) - mu(y_t))]

    with one noise in x_t and in y_t. Where x is y it is 0 whatever the denoiser says, which score
    distillation is not. A denoiser that takes what is fine for noise follows little of x - y there,
    so that g is large where there are high frequencies, more so at small times.

    Args:
      denoise: mu(x_t, t) of the frozen teacher.
      x: the student's examples, [B, ...].
      target: y, the teacher's own, made of the same start.
      schedule, t: of the noise; t is [B].
      noise: [B, ...], normal.

    Source: TAD-SR, arXiv:2408.07476; its code draws the noise evenly in [0, 1], and divides x_t by
    sqrt(sigma^2 + 1) once more than its networks want.
    """

    def eps(clean: jax.Array) -> jax.Array:
        noised = schedule.mix(jax.lax.stop_gradient(clean), noise, t)
        return convert(schedule, denoise(noised, t), noised, t, 'x0', 'eps')

    return vsd(eps(x), eps(target))


def augmentation(conditional: jax.Array, unconditional: jax.Array, scale: float) -> jax.Array:
    """g = -(scale - 1) (mu_c - mu_u), [B, ...]: what guidance of the teacher adds to `fake - real`.

    With mu_c the real denoiser it is the part of the DMD direction that no sample can undo.

    Source: Decoupled DMD, arXiv:2511.22677, eqs. 3 and 4.
    """
    return jax.lax.stop_gradient((1 - scale) * (wide(conditional) - wide(unconditional)))


def preferred(
    real: jax.Array, winner: jax.Array, loser: jax.Array, gamma: float = 1.0
) -> jax.Array:
    """g = eps_real - (eps_w + eps_l) / 2 + gamma (eps_w - eps_l), [B, ...].

    x moves against g, along the score of the teacher less that of all samples, and gamma times
    that of winners less that of losers.

    Args:
      real, winner, loser: predictions of the noise, [B, ...], by the teacher, and by denoisers of
        samples that were preferred and that were not.
      gamma: of the preference; 0 is score distillation.

    Source: of the parts of Distillation-DPO, arXiv:2504.11447, whose own sum undoes the preference
    where generator and teacher agree.
    """
    real, winner, loser = wide(real), wide(winner), wide(loser)
    return jax.lax.stop_gradient(real - 0.5 * (winner + loser) + gamma * (winner - loser))


def surrogate(x: jax.Array, direction: jax.Array) -> jax.Array:
    """mean (x - sg[x - g])^2 / 2 of each example, [B]; its gradient in x is g / size of one.

    Args:
      x: samples with gradient, [B, ...].
      direction: g, [B, ...], a constant.

    Source: DMD, arXiv:2311.18828, as released.
    """
    x = wide(x)
    target = jax.lax.stop_gradient(x - direction)
    return 0.5 * _mean(jnp.square(x - target))


def denoising(
    prediction: jax.Array,
    x0: jax.Array,
    schedule: Schedule,
    t: jax.Array,
    weight: Weight = 'x0',
    sigma_data: float = 0.5,
) -> jax.Array:
    """w(t) mean (mu - x0)^2 of each example, [B], in float32 at least.

    | weight | w | so that it is the squared error of |
    |---|---|---|
    | x0 | 1 | x0 |
    | eps | (alpha / sigma)^2 | the noise: the 'simple' loss of DDPM |
    | v | (alpha^2 + sigma^2)^2 / sigma^2 | v |
    | flow | ((alpha + sigma) / sigma)^2 | eps - x0 |
    | edm | (alpha / sigma)^2 + 1 / sigma_data^2 | what an EDM network itself computes |
    | alpha2 | alpha^4 / sigma^2 | the noise, times alpha^2: SwiftBrush |
    | truncated | max((alpha / sigma)^2, 1) | x0 or the noise: arXiv:2202.00512 |

    Args:
      prediction: mu, of x0, [B, ...].
      x0: [B, ...], stop-gradiented.
      schedule, t: of the noised x0; t is [B].
      weight: see above.
      sigma_data: of the weight 'edm'.
    """
    alpha, sigma = schedule.alpha(wide(t)), schedule.sigma(wide(t))
    error = _mean(jnp.square(wide(prediction) - jax.lax.stop_gradient(wide(x0))))
    weights: dict[str, Callable[[], jax.Array]] = {
        'x0': lambda: jnp.ones_like(alpha),
        'eps': lambda: (alpha / sigma) ** 2,
        'v': lambda: (alpha**2 + sigma**2) ** 2 / sigma**2,
        'flow': lambda: ((alpha + sigma) / sigma) ** 2,
        'edm': lambda: (alpha / sigma) ** 2 + sigma_data**-2,
        'alpha2': lambda: alpha**4 / sigma**2,
        'truncated': lambda: jnp.maximum((alpha / sigma) ** 2, 1.0),
    }
    if weight not in weights:
        raise ValueError(f'denoising: weight is one of {list(weights)}, got {weight!r}.')
    return weights[weight]() * error


def subinterval(
    prediction: jax.Array,
    x_s: jax.Array,
    eps: jax.Array,
    schedule: Schedule,
    s: jax.Array,
    t: jax.Array,
    clamp: float = 10.0,
) -> jax.Array:
    """Denoising where no clean example is known, only x_s at a time s: of each example, [B].

        min(1 / b^2, clamp) mean (b u - [(alpha_s^2 sigma_t + alpha_t sigma_s^2) / alpha_s^2 eps
        - b / alpha_s x_s])^2,      x_t = a x_s + b eps,      a, b of `Schedule.bridge(s, t)`

    Its minimiser is u = E[eps' - x0 | x_t], with eps' the noise of x_t as a whole, for every law of
    x_s; `eps - x_s` in its place is biased. With s = 0 it is the squared error of u.

    Args:
      prediction: u, of the kind 'flow' (see `kd.losses.schedule`), [B, ...].
      x_s: [B, ...], stop-gradiented.
      eps: the noise between the times, [B, ...].
      schedule, s, t: s and t are [B], s < t.
      clamp: of the weight, which has a pole at t = s.

    Source: Phased DMD, arXiv:2510.27684, eqs. 9-11.
    """
    u, x_s, eps = (wide(y) for y in (prediction, jax.lax.stop_gradient(x_s), eps))
    _, b = (expand_times(y, u) for y in schedule.bridge(s, t))
    alpha_s, sigma_s = schedule.coefficients(s, u)
    alpha_t, sigma_t = schedule.coefficients(t, u)
    share = (alpha_s**2 * sigma_t + alpha_t * sigma_s**2) / alpha_s**2
    error = _mean(jnp.square(b * u - (share * eps - b / alpha_s * x_s)))
    return jnp.minimum(1.0 / jnp.maximum(b.reshape(-1) ** 2, 1e-12), clamp) * error


def mean_variance_kl(
    x: jax.Array, mean: float, variance: float, *, axes: tuple[int, ...] | None = None
) -> jax.Array:
    """KL(N(m, s^2) || N(mean, variance)) of the moments of x over `axes`.

        [(s^2 + (m - mean)^2) / variance - 1 - log(s^2 / variance)] / 2

    Args:
      x: [B, ...].
      mean, variance: of real data.
      axes: None for all but the first: [B].

    Source: Decoupled DMD, arXiv:2511.22677, eq. 7.
    """
    x = wide(x)
    axes = tuple(range(1, x.ndim)) if axes is None else axes
    m, s2 = jnp.mean(x, axes), jnp.var(x, axes)
    return 0.5 * ((s2 + (m - mean) ** 2) / variance - 1 - jnp.log(s2) + math.log(variance))


def _mean(x: jax.Array) -> jax.Array:
    return jnp.mean(x, axis=tuple(range(1, x.ndim)))
