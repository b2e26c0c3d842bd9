"""Velocities that are mixtures of exponentials of time, and integrate in closed form: ArcFlow.

From one call of a network at a time t0 and a point there, the velocity until the end of a segment

    v(t) = sum_k pi_k V_k exp(g_k (t - t0)),      pi = softmax(logits),  g_1 = 0

whose integral needs no solver. With g = 0, or one mode, it is a straight line. Time 0 is noise and
1 is data; a paper that runs the other way has V of the opposite sign and the same g.

Source: ArcFlow, arXiv 2602.09014, and its code.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.losses.interpolant import expand_times

__all__ = [
    'Imitation',
    'Momentum',
    'drop_modes',
    'expm1_ratio',
    'imitation_states',
    'mean_velocity',
    'transport',
    'velocity',
]

# Below, (e^z - 1) / z is a sum: the quotient loses its digits, and its gradient more.
_SERIES = 1e-2


class Momentum(NamedTuple):
    """What a network says of a segment.

    Attributes:
      velocity: V, [B, K, ...].
      logits: of pi, [B, K, ...], of which trailing axes may be 1.
      rate: g of the modes but the first, [B, K - 1, ...], of which trailing axes may be 1.
    """

    velocity: jax.Array
    logits: jax.Array
    rate: jax.Array


def expm1_ratio(z: jax.Array) -> jax.Array:
    """(e^z - 1) / z, elementwise; 1 at 0, where its slope is 1/2."""
    small = jnp.abs(z) < _SERIES
    away = jnp.where(small, 1.0, z)
    series = 1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6))))
    return jnp.where(small, series, jnp.expm1(away) / away)


def velocity(m: Momentum, t_source: ArrayLike, t: ArrayLike) -> jax.Array:
    """v(t), [B, ...]; t_source (t0) and t are [B] or scalars."""
    return _mixed(m, jnp.exp(_rates(m) * _since(m, t_source, t)))


def mean_velocity(m: Momentum, t_source: ArrayLike, t_a: ArrayLike, t_b: ArrayLike) -> jax.Array:
    """The mean of v between t_a and t_b, [B, ...]; v(t_a) itself where they are equal.

    sum_k pi_k V_k exp(g_k (t_a - t0)) E(g_k (t_b - t_a)),      E(z) = (e^z - 1) / z
    """
    rate = _rates(m)
    since, length = _since(m, t_source, t_a), _since(m, t_a, t_b)
    return _mixed(m, jnp.exp(rate * since) * expm1_ratio(rate * length))


def transport(
    m: Momentum, t_source: ArrayLike, t_a: ArrayLike, t_b: ArrayLike, x: jax.Array
) -> jax.Array:
    """Where x at t_a is at t_b, [B, ...]: x + (t_b - t_a) times the mean velocity, exactly."""
    length = jnp.asarray(t_b) - jnp.asarray(t_a)
    return x + expand_times(length, x) * mean_velocity(m, t_source, t_a, t_b)


def drop_modes(key: jax.Array, m: Momentum, share: float) -> Momentum:
    """A mixture of fewer modes: each is left out with a probability, never all of an example.

    Where all would be, all stay. Logits of what is left out are -inf.
    """
    kept = jax.random.bernoulli(key, 1.0 - share, m.logits.shape[:2])
    kept |= ~jnp.any(kept, axis=1, keepdims=True)
    kept = kept.reshape(kept.shape + (1,) * (m.logits.ndim - 2))
    return m._replace(logits=jnp.where(kept, m.logits, -jnp.inf))


class Imitation(NamedTuple):
    """Windows of a segment in which the mean velocity is to be the teacher's, all constants.

    Attributes:
      t_a, t_b: of the windows, [states, B].
      x: points at t_a, [states, B, ...].
      target: the teacher's velocity there, [states, B, ...].
    """

    t_a: jax.Array
    t_b: jax.Array
    x: jax.Array
    target: jax.Array


def imitation_states(
    key: jax.Array,
    m: Momentum,
    x: jax.Array,
    tau: jax.Array,
    length: float,
    share: ArrayLike,
    teacher: Callable[[jax.Array, jax.Array], jax.Array],
    *,
    states: int,
    window: float,
    clock: Callable[[jax.Array], jax.Array] = lambda tau: tau,
) -> Imitation:
    """Points on a path that begins as the teacher's and becomes the student's.

    Between two states the path goes on with the student, to t_a, and from there with an Euler step
    of the teacher. Of a segment without its window the students' gaps have the part 1 - share and
    the teacher's the rest, both at random: with share 1 the states lie on the teacher's own path,
    with 0 on the student's.

    Args:
      key: of the gaps.
      m: of the segment; modes may be left out.
      x: where the segment begins, [B, ...].
      tau: raw time there, [B].
      length: of the segment, in raw time.
      share: in [0, 1].
      teacher: (t [B], x [B, ...]) -> velocity.
      states: how many.
      window: raw time from the end of the teacher's step to that of the window.
      clock: time of raw time, elementwise and increasing.

    Source: arXiv 2602.09014, as released.
    """
    m, x = jax.lax.stop_gradient((m, x))
    own_key, teacher_key = jax.random.split(key)
    free = length - window
    own = jnp.sort(jax.random.uniform(own_key, (len(x), states)), axis=1)
    cuts = jnp.sort(jax.random.uniform(teacher_key, (len(x), states - 1)), axis=1)
    own_gaps = (1 - share) * free * jnp.diff(own, axis=1, prepend=0.0)
    teacher_gaps = share * free * jnp.diff(cuts, axis=1, prepend=0.0, append=1.0)
    source = clock(tau)

    def one(carry, gaps):
        x, tau = carry
        to = tau + gaps[0]
        t_a, after = clock(to), to + gaps[1]
        x_a = transport(m, source, clock(tau), t_a, x)
        target = teacher(t_a, x_a).astype(x.dtype)
        moved = x_a + expand_times(clock(after) - t_a, x) * target
        return (moved, after), Imitation(t_a, clock(after + window), x_a, target)

    _, found = jax.lax.scan(one, (x, tau), jnp.stack([own_gaps.T, teacher_gaps.T], axis=1))
    return jax.lax.stop_gradient(found)


def _rates(m: Momentum) -> jax.Array:
    """g of all modes, [B, K, ...] with as many axes as V."""
    return jnp.concatenate([jnp.zeros_like(m.logits[:, :1]), m.rate], axis=1)


def _since(m: Momentum, start: ArrayLike, stop: ArrayLike) -> jax.Array:
    return expand_times(jnp.asarray(stop) - jnp.asarray(start), m.velocity)


def _mixed(m: Momentum, growth: jax.Array) -> jax.Array:
    return jnp.sum(jax.nn.softmax(m.logits, axis=1) * m.velocity * growth, axis=1)
