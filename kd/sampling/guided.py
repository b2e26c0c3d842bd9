"""Ancestral sampling that is pulled at: the mean of a step moves, and its variance may be learned.

`ask(x_t, t, key) -> Prediction` has everything bound but its randomness, of which a step has its
own: what a denoiser is told may be drawn anew at every step. Without a pull, with the least
variance, and asking the same thing, it is `kd.sampling.diffusion.sample` by its step 'ancestral',
bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kd.losses.schedule import Schedule
from kd.sampling import diffusion
from kd.sampling.denoiser import Prediction

__all__ = ['posterior', 'sample']

Ask = Callable[[jax.Array, jax.Array, jax.Array], Prediction]


def posterior(
    schedule: Schedule, said: Prediction, x: jax.Array, t: jax.Array, to: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(mean, deviation) of the Gaussian that an ancestral step draws from, to broadcast over x.

        log variance = v log beta + (1 - v) log beta~,   v the `share` of what is said

    beta~ is the variance of q(x_to | x_t, x0), the least there can be, and beta that of
    q(x_t | x_to), the most. v is of every element, and need not lie within [0, 1]. Without a share
    it is 0.

    Args:
      schedule: of the times.
      said: of x at t.
      x: [B, ...].
      t, to: [B] or scalars; a respaced schedule is one whose times are further apart.

    Source: arXiv:2102.09672, section 3.1 (LEARNED_RANGE); DiT has it.
    """
    kernel = diffusion.ddim(1.0).kernel
    assert kernel is not None
    mean, least = kernel(schedule, said.x0, x, t, to)
    if said.share is None:
        return mean, least
    most = jnp.broadcast_to(schedule.bridge(to, t)[1], jnp.shape(t))
    most = most.reshape(most.shape + (1,) * (x.ndim - most.ndim))
    tiny = jnp.finfo(least.dtype).tiny
    low, high = (jnp.log(jnp.maximum(each, tiny)) for each in (least, most))
    return mean, jnp.exp(said.share * high + (1 - said.share) * low)


def sample(
    schedule: Schedule,
    ask: Ask,
    x: jax.Array,
    times: Sequence[float] | np.ndarray,
    key: jax.Array,
    *,
    pull: Callable[[jax.Array], jax.Array] | None = None,
    scale: float = 1.0,
    window: tuple[int, int] = (0, 2**31 - 1),
) -> jax.Array:
    """Samples through the times, and ends with what is said of clean data at the last one.

        x' = mean - scale deviation grad_{x_t} E + deviation z,   grad_{x_t} E = pull(x0) / alpha

    since x0 = (x_t - sigma eps) / alpha, and what the network says of eps is held constant: it is
    not differentiated. Early steps, whose alpha is small, are pulled at strongly.

    Args:
      schedule: of what is asked.
      ask: see above.
      x: at the first time, [B, ...].
      times: [S], decreasing.
      key: of all randomness.
      pull: `pull(x0 [B, ...]) -> [B, ...]`, the gradient of an energy of clean data; None for none.
      scale: rho.
      window: the first and the last step that is pulled at, by how many steps are left after it,
        as released code counts: S - 1 is the first step there is, 0 the last call, where nothing
        is drawn and nothing pulls.

    Raises:
      ValueError: times that do not decrease.

    Source: DMGD, arXiv:2605.03877; the form of the shift is that of arXiv:2105.05233, algorithm 1.
    """
    times = np.asarray(times)
    if not len(times) or np.any(np.diff(times) >= 0):
        raise ValueError(f'sample: times must decrease, got {times.tolist()}.')
    keys = jax.random.split(key, len(times))
    low, high = window

    def told(key: jax.Array) -> jax.Array:
        return jax.random.fold_in(key, 1)

    def body(x, given):
        t, to, left, key = given
        said = ask(x, t, told(key))
        mean, deviation = posterior(schedule, said, x, t, to)
        if pull is not None:
            alpha, _ = schedule.coefficients(t, x)
            shift = scale * deviation * pull(said.x0) / alpha
            mean = mean - jnp.where((left >= low) & (left <= high), shift, 0.0)
        moved = mean + deviation * jax.random.normal(key, x.shape, mean.dtype)
        return moved.astype(x.dtype), None

    grid = jnp.asarray(times, jnp.promote_types(x.dtype, jnp.float32))
    left = jnp.arange(len(times) - 1, 0, -1)
    last, _ = jax.lax.scan(body, x, (grid[:-1], grid[1:], left, keys[1:]))
    return ask(last, grid[-1], told(keys[0])).x0.astype(x.dtype)
