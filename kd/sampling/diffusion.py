"""Samplers of denoisers: from noise to data in a few calls or many.

`denoise(x_t, t) -> x0` has its variables, condition and guidance bound, see
`kd.sampling.denoiser.Denoiser.bind`. All steps are those of y = x / alpha and s = sigma / alpha,
where every schedule is the one of EDM and the probability flow is dy/ds = (y - mu) / s; they are
written so that alpha may be 0 at the first time, where nothing is left of the data.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.losses.schedule import Schedule, convert

Denoise = Callable[[jax.Array, jax.Array], jax.Array]


class Step(NamedTuple):
    """A step from a time to a cleaner one.

    Attributes:
      move: `move(schedule, denoise, x, t, to, key, memory) -> (x, memory)`.
      memory: `memory(x)` before the first step; () for a step without.
      calls: of the denoiser in a step.
      kernel: `kernel(schedule, mu, x, t, to) -> (mean, std)` of the Gaussian that a step with fresh
        noise draws from, given what the denoiser said; None where there is none.
    """

    move: Callable[..., tuple[jax.Array, tuple]]
    memory: Callable[[jax.Array], tuple] = lambda x: ()
    calls: int = 1
    kernel: Callable[..., tuple[jax.Array, jax.Array]] | None = None


def ddim(eta: float = 0.0) -> Step:
    """x0 and as much of the noise that is there, with a share of fresh noise.

        x' = alpha' [mu + s_down (y - mu) / s + s_up z],   s_up = eta s' sqrt(1 - s'^2 / s^2),
        s_down = sqrt(s'^2 - s_up^2)

    eta = 0 is Euler's step of the probability flow, in whichever kind of prediction; 1 is ancestral
    sampling, that of DDPM where there are as many steps as times.

    Source: arXiv:2010.02502, eqs. 12 and 16.
    """

    def kernel(schedule, mu, x, t, to):
        alpha, sigma, alpha2, sigma2 = _both(schedule, x, t, to)
        ratio = alpha * sigma2 / (alpha2 * sigma)
        up = eta * sigma2 * jnp.sqrt(jnp.maximum(1 - ratio**2, 0.0))
        down = jnp.sqrt(jnp.maximum(sigma2**2 - up**2, 0.0))
        return alpha2 * mu + down * convert(schedule, mu, x, t, 'x0', 'eps'), up

    def move(schedule, denoise, x, t, to, key, memory):
        moved, up = kernel(schedule, denoise(x, t), x, t, to)
        if eta:
            moved = moved + up * jax.random.normal(key, x.shape, moved.dtype)
        return moved, memory

    return Step(move, kernel=kernel if eta else None)


def restart() -> Step:
    """x0 and fresh noise: x' = alpha' mu + sigma' z, of consistency models, LCM and DMD2."""

    def move(schedule, denoise, x, t, to, key, memory):
        noise = jax.random.normal(key, x.shape, x.dtype)
        return schedule.mix(denoise(x, t), noise, to), memory

    def kernel(schedule, mu, x, t, to):
        alpha, sigma = schedule.coefficients(to, x)
        return alpha * mu, sigma

    return Step(move, kernel=kernel)


def heun() -> Step:
    """Second order: the mean of the slopes at both ends (arXiv:2206.00364, algorithm 1)."""

    def move(schedule, denoise, x, t, to, key, memory):
        alpha, sigma, alpha2, sigma2 = _both(schedule, x, t, to)
        mu = denoise(x, t)
        eps = convert(schedule, mu, x, t, 'x0', 'eps')
        ahead = alpha2 * mu + sigma2 * eps
        after = denoise(ahead.astype(x.dtype), to)
        other = convert(schedule, after, ahead, to, 'x0', 'eps')
        # (s' - s) (eps + eps') / 2 from y = mu + s eps; there is no s where nothing is left of x0.
        s = sigma / jnp.where(alpha > 0, alpha, 1.0)
        change = 0.5 * (sigma2 - alpha2 * s) * (other - eps)
        return ahead + jnp.where(alpha > 0, change, 0.0), memory

    return Step(move, calls=2)


def dpm_pp_2m() -> Step:
    """Second order from the step before, DPM-Solver++(2M), one call a step.

        y' = s'/s y + (1 - s'/s) d,  d = (1 + 1/(2r)) mu - mu_before / (2r),  r = h_before / h

    with h the step of log s.

    Source: arXiv:2211.01095, algorithm 2.
    """

    def move(schedule, denoise, x, t, to, key, memory):
        alpha, sigma, alpha2, sigma2 = _both(schedule, x, t, to)
        before, h_before, count = memory
        ratio = alpha * sigma2 / (alpha2 * sigma)
        mu, h = denoise(x, t), -jnp.log(ratio)
        r = jnp.where(count > 0, h_before, h) / h
        second = (count > 0) & jnp.isfinite(r)
        r = jnp.where(second, r, 1.0)
        d = jnp.where(second, (1 + 0.5 / r) * mu - 0.5 / r * before, mu)
        return sigma2 / sigma * x + alpha2 * (1 - ratio) * d, (mu, h, count + 1)

    def memory(x):
        wide = jnp.promote_types(x.dtype, jnp.float32)
        each = (len(x),) + (1,) * (x.ndim - 1)
        return jnp.zeros(x.shape, wide), jnp.zeros(each, wide), jnp.int32(0)

    return Step(move, memory)


STEPS: dict[str, Callable[[], Step]] = {
    'ddim': ddim,
    'ancestral': lambda: ddim(1.0),
    'restart': restart,
    'heun': heun,
    'dpm_pp_2m': dpm_pp_2m,
}


def sample(
    schedule: Schedule,
    denoise: Denoise,
    x: jax.Array,
    times: Sequence[float] | np.ndarray,
    key: jax.Array,
    *,
    step: Step | None = None,
    trajectory: bool = False,
    unroll: int | bool = 1,
) -> jax.Array:
    """Denoises x through the times and ends with what the denoiser says at the last one.

    Args:
      schedule: of the denoiser.
      denoise: see above.
      x: at the first time, [B, ...], see `noise`.
      times: [N], decreasing: N calls, or 2 N - 1 of a step of two.
      key: of fresh noise.
      step: `ddim()` if None.
      trajectory: return the states at all times and what is said at the last, [N + 1, B, ...].
      unroll: of the loop; networks with convolutions want True on CPU.

    Raises:
      ValueError: times that do not decrease.
    """
    last, states, at = _walked(
        schedule, denoise, x, times, key, step, unroll, lambda x, said, y: y if trajectory else None
    )
    end = denoise(last, at).astype(x.dtype)
    return jnp.concatenate([x[None], states, end[None]]) if trajectory else end


def recorded(
    schedule: Schedule,
    denoise: Denoise,
    x: jax.Array,
    times: Sequence[float] | np.ndarray,
    key: jax.Array,
    *,
    step: Step | None = None,
) -> tuple[jax.Array, jax.Array]:
    """What a sampler asks on its way, and what it is told: (x_t, x0), each [N, B, ...].

    Of a step of two calls the first counts; the last x0 is what `sample` ends with.

    Args:
      schedule, denoise, x, times, key, step: as of `sample`.
    """
    last, (states, said), at = _walked(
        schedule, denoise, x, times, key, step, 1, lambda x, said, y: (x, said)
    )
    end = denoise(last, at).astype(x.dtype)
    return jnp.concatenate([states, last[None]]), jnp.concatenate([said, end[None]])


def _walked(schedule, denoise, x, times, key, step, unroll, keep):
    """The state at the last time, `keep(x, said, next x)` of every step, and the last time."""
    times = np.asarray(times)
    if not len(times) or np.any(np.diff(times) >= 0):
        raise ValueError(f'sample: times must decrease, got {times.tolist()}.')
    step = step or ddim()
    keys = jax.random.split(key, len(times))

    def body(carry, given):
        x, memory = carry
        t, to, key = given
        heard = []

        def listening(x_t, t):
            heard.append(denoise(x_t, t))
            return heard[-1]

        y, memory = step.move(schedule, listening, x, t, to, key, memory)
        y = y.astype(x.dtype)
        return (y, memory), keep(x, heard[0].astype(x.dtype), y)

    grid = jnp.asarray(times, jnp.promote_types(x.dtype, jnp.float32))
    pairs = grid[:-1], grid[1:], keys[1:]
    (last, _), kept = jax.lax.scan(body, (x, step.memory(x)), pairs, unroll=unroll)
    return last, kept, grid[-1]


def said(denoise: Denoise, states: jax.Array, times: Sequence[float] | np.ndarray) -> jax.Array:
    """What a denoiser says of clean data at every step, [N, B, ...].

    Args:
      denoise: see above.
      states: a trajectory of `sample`, [N + 1, B, ...].
      times: [N] of it.

    Source: DT-Visualization of arXiv:2503.10637.
    """
    grid = jnp.asarray(times, jnp.promote_types(states.dtype, jnp.float32))
    return jax.lax.map(lambda given: denoise(*given), (states[:-1], grid))


def noise(schedule: Schedule, key: jax.Array, shape: tuple[int, ...], t: float) -> jax.Array:
    """What there is at time t of data that are lost in noise, sigma(t) N(0, I), [B, ...]."""
    return schedule.sigma(jnp.float32(t)) * jax.random.normal(key, shape, jnp.float32)


def _both(schedule, x, t, to):
    """(alpha, sigma, alpha', sigma') of two times."""
    return *schedule.coefficients(t, x), *schedule.coefficients(to, x)
