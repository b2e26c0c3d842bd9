"""Checks to run once, when a flow or a sampler is built: mistakes that would train silently."""

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd.losses.flow_map import VelocityFunction

__all__ = ['check_times', 'check_velocity_function']


def check_times(s: ArrayLike, t: ArrayLike, *, ordered: bool = True) -> None:
    """Refuses times outside [0, 1] and, if `ordered`, jumps that run backwards.

    Looks at values, so it takes concrete arrays of any shape (not traced ones).

    Raises:
      ValueError: a time outside [0, 1] or not finite, or s > t where `ordered`.
    """
    start, stop = np.broadcast_arrays(np.asarray(s), np.asarray(t))
    for label, times in (('s', start), ('t', stop)):
        bad = ~((times >= 0.0) & (times <= 1.0))
        if bad.any():
            raise ValueError(
                f'time {label} = {times[bad].flat[0]} lies outside [0, 1]; '
                '0 is noise and 1 is data.'
            )
    if ordered and (start > stop).any():
        k = int(np.argmax((start > stop).ravel()))
        raise ValueError(
            f's = {start.flat[k]} > t = {stop.flat[k]}: this jump runs from data to noise, for '
            'which the map is not trained; swap the times, or use an ODE solver of the diagonal.'
        )


def check_velocity_function(vfn: VelocityFunction, x: jax.Array, *, two_times: bool = True) -> None:
    """Refuses a function that is not v(s, t, x): wrong shape or type, or blind to a time.

    A NaN fed as a time must come out: this sees a dependence even where a zero output gain makes
    every value equal at initialisation. Where rounding or table look-up swallows the NaN, two
    values of the time are compared instead. Calls `vfn` three to seven times on `x`, not traced;
    pass one that is jitted if it is large.

    Args:
      vfn: velocity function with its parameters bound.
      x: example input [B, ...], one or two examples are enough.
      two_times: False for a flow read on its diagonal alone, v(t, t, x), which may depend on
        either argument.

    Raises:
      ValueError: saying what was returned and what was expected.
    """
    times = jnp.full(x.shape[:1], 0.25, x.dtype), jnp.full(x.shape[:1], 0.75, x.dtype)
    out = vfn(*times, x)
    if out.shape != x.shape or out.dtype != x.dtype:
        raise ValueError(
            f'the velocity function returned {out.dtype}{list(out.shape)} for an input '
            f'{x.dtype}{list(x.shape)}; a velocity has the shape and type of its input.'
        )
    if not jnp.all(jnp.isfinite(out)):
        raise ValueError('the velocity function returned a value that is not finite.')
    # The NaN is deliberate.
    with jax.debug_nans(False):
        sees_start = _depends(vfn, times, x, 0)
        sees_end = _depends(vfn, times, x, 1)
    if two_times and not (sees_start and sees_end):
        label = 'start time s' if not sees_start else 'end time t'
        raise ValueError(
            f'the network ignores its {label}: a flow map needs v(s, t, x) with both times as '
            'inputs (a one-time flow can only be a teacher or be sampled with an ODE solver).'
        )
    if not (sees_start or sees_end):
        raise ValueError('the network ignores time altogether; a flow needs v(t, t, x).')


def _depends(
    vfn: VelocityFunction, times: tuple[jax.Array, jax.Array], x: jax.Array, argument: int
) -> bool:
    def at(value):
        changed = jnp.full_like(times[argument], value)
        return vfn(changed, times[1], x) if argument == 0 else vfn(times[0], changed, x)

    if bool(jnp.any(jnp.isnan(at(jnp.nan)))):
        return True
    return bool(jnp.any(at(0.1) != at(0.8)))
