"""Sampling of flows and flow maps: jumps, ODE solvers of the diagonal, inversion, guidance.

All samplers take a velocity function v(s[B], t[B], x[B, ...]) -> [B, ...] with its parameters (and
labels) bound, and run under jit. Time 0 is noise and 1 is data.

Times, and the state between steps, are held in float32 (float64 for a float64 state) whatever the
type of the state, which is that in which the velocity is asked for and the samples are returned:
in the eight bits of bfloat16 the times .998 and 1 are one.
"""

from collections.abc import Callable, Mapping

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd.losses.flow_map import VelocityFunction, flow_map
from kd.losses.flow_map_checks import check_times

__all__ = [
    'SAMPLERS',
    'adaptive_sample',
    'draw_noise',
    'euler_sample',
    'flow_map_sample',
    'guided',
    'heun_sample',
    'network_evaluations',
    'time_grid',
]


def time_grid(steps: int, *, start: float = 0.0, end: float = 1.0) -> np.ndarray:
    """steps + 1 equidistant times from `start` to `end`; end < start runs from data to noise."""
    if steps < 1:
        raise ValueError(f'time_grid: steps={steps}, expected at least 1.')
    check_times(start, end, ordered=False)
    return np.linspace(start, end, steps + 1)


def flow_map_sample(
    vfn: VelocityFunction,
    x: jax.Array,
    times: ArrayLike,
    *,
    trajectory: bool = False,
    unroll: int | bool = 1,
) -> jax.Array:
    """x <- X_{t_i, t_{i+1}}(x) along `times`: one network evaluation for each jump.

    Args:
      vfn: two-time velocity function.
      x: noise (the state at times[0]), [B, ...].
      times: increasing times [N + 1] in [0, 1], see `time_grid`; concrete, so that they are
        checked.
      trajectory: return all states, [N + 1, B, ...], instead of the last.
      unroll: of the scan. On a CPU, networks with convolutions want True: convolutions inside a
        loop are many times slower there.

    Returns:
      The state at times[-1], [B, ...], in the type of x.

    Raises:
      ValueError: times outside [0, 1] or decreasing: the map is trained in one direction only,
        invert with `euler_sample`, `heun_sample` or `adaptive_sample`.

    Source: arXiv 2505.18825, algorithm for N-step sampling.
    """
    check_times(np.asarray(times)[:-1], np.asarray(times)[1:])
    vfn = _of_type(vfn, x.dtype)

    def jump(x, start, stop):
        return flow_map(vfn, start, stop, x)

    return _scan(jump, x, times, trajectory, unroll)


def euler_sample(
    vfn: VelocityFunction,
    x: jax.Array,
    times: ArrayLike,
    *,
    trajectory: bool = False,
    unroll: int | bool = 1,
) -> jax.Array:
    """Euler steps of dx/dt = v(t, t, x) along `times`; arguments as in `flow_map_sample`.

    Decreasing times invert: from data to noise. One network evaluation a step, error O(1/N).
    """
    check_times(np.asarray(times)[:-1], np.asarray(times)[1:], ordered=False)
    vfn = _of_type(vfn, x.dtype)

    def step(x, start, stop):
        return x + (stop - start) * _diagonal(vfn, start, x)

    return _scan(step, x, times, trajectory, unroll)


def heun_sample(
    vfn: VelocityFunction,
    x: jax.Array,
    times: ArrayLike,
    *,
    trajectory: bool = False,
    unroll: int | bool = 1,
) -> jax.Array:
    """Heun steps (trapezoid) of dx/dt = v(t, t, x); arguments as in `flow_map_sample`.

    Decreasing times invert. Two network evaluations a step, error O(1/N^2).
    """
    check_times(np.asarray(times)[:-1], np.asarray(times)[1:], ordered=False)
    vfn = _of_type(vfn, x.dtype)

    def step(x, start, stop):
        slope = _diagonal(vfn, start, x)
        predicted = x + (stop - start) * slope
        return x + 0.5 * (stop - start) * (slope + _diagonal(vfn, stop, predicted))

    return _scan(step, x, times, trajectory, unroll)


def adaptive_sample(
    vfn: VelocityFunction,
    x: jax.Array,
    *,
    start: float = 0.0,
    end: float = 1.0,
    rtol: float = 1e-5,
    atol: float = 1e-5,
    max_steps: int = 4096,
) -> tuple[jax.Array, jax.Array]:
    """Solves dx/dt = v(t, t, x) from `start` to `end` by Tsit5 with adaptive steps (diffrax).

    The batch is one system: a step is accepted on the root mean square error over all examples.
    end < start inverts: from data to noise. Not for gradients of long solves without thought: the
    derivative is that of the solver's steps (recursive checkpoints).

    Args:
      vfn: velocity function, read on its diagonal.
      x: state at `start`, [B, ...].
      start: first time.
      end: last time.
      rtol: relative tolerance of a step.
      atol: absolute tolerance of a step.
      max_steps: accepted and rejected steps before the solve fails.

    Returns:
      (state at `end` [B, ...], number of network evaluations int32).

    Raises:
      ValueError: times outside [0, 1].
      equinox.EquinoxRuntimeError: when `max_steps` do not suffice.
    """
    check_times(start, end, ordered=False)
    vfn, dtype = _of_type(vfn, x.dtype), _dtype(x)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(lambda t, x, _: _diagonal(vfn, t, x).astype(dtype)),
        diffrax.Tsit5(),
        t0=jnp.asarray(start, dtype),
        t1=jnp.asarray(end, dtype),
        dt0=jnp.asarray(0.01 * (end - start), dtype),
        y0=x.astype(dtype),
        stepsize_controller=diffrax.PIDController(rtol=rtol, atol=atol),
        max_steps=max_steps,
    )
    # The last of Tsit5's seven stages is the first of the next step.
    return solution.ys[0].astype(x.dtype), 6 * solution.stats['num_steps'] + 1


def guided(
    conditional: Callable[..., jax.Array],
    condition: Mapping[str, jax.Array],
    scale: ArrayLike,
    *,
    null: Mapping[str, ArrayLike],
) -> VelocityFunction:
    """Classifier-free guidance: v_0 + scale (v_c - v_0), in one network call on a doubled batch.

    scale = 1 is the conditional velocity, 0 the unconditional one. On the diagonal this is the
    guided field of Ho & Salimans, arXiv 2207.12598 (their w is scale - 1). Guided jumps of a flow
    map are an extrapolation, not the flow map of the guided field: for that, distil the guided
    field.

    Args:
      conditional: (s[2B], t[2B], x[2B, ...], condition [2B, ...] by name) -> [2B, ...].
      condition: fields [B, ...] by name, `label` for example.
      scale: scalar or [B].
      null: what means none in the place of a field, a row or all of them; `num_classes` for the
        label of the networks here. Fields without one stay.

    Returns:
      A velocity function for batches of B.
    """
    told = {
        name: jnp.concatenate(
            [x, jnp.broadcast_to(jnp.asarray(null.get(name, x), x.dtype), x.shape)]
        )
        for name, x in condition.items()
    }

    def vfn(s, t, x):
        both = conditional(
            jnp.concatenate([s, s]), jnp.concatenate([t, t]), jnp.concatenate([x, x]), told
        )
        with_it, without = jnp.split(both, 2)
        weight = jnp.broadcast_to(jnp.asarray(scale, x.dtype), x.shape[:1])
        weight = weight.reshape(weight.shape + (1,) * (x.ndim - 1))
        return without + weight * (with_it - without)

    return vfn


def draw_noise(
    key: jax.Array, n: int, shape: tuple[int, ...], *, scale: float = 1.0, first: int = 0
) -> jax.Array:
    """Gaussian noise of standard deviation `scale`, [n, *shape] float32, samples first..first+n-1.

    Each sample has a key of its own, folded with its index, so sample i is the same whatever the
    batch size, the device count or the host that draws it.
    """
    keys = jax.vmap(lambda i: jax.random.fold_in(key, i))(first + jnp.arange(n))
    return scale * jax.vmap(lambda k: jax.random.normal(k, shape, jnp.float32))(keys)


# (vfn, x, times, *, trajectory, unroll) and the network evaluations of one step.
SAMPLERS: dict[str, Callable[..., jax.Array]] = {
    'flow_map': flow_map_sample,
    'euler': euler_sample,
    'heun': heun_sample,
}
_EVALUATIONS = {'flow_map': 1, 'euler': 1, 'heun': 2}


def network_evaluations(sampler: str, steps: int) -> int:
    """Network evaluations of `steps` steps of a sampler named in SAMPLERS."""
    if sampler not in _EVALUATIONS:
        raise ValueError(f'unknown sampler {sampler!r}, expected one of {sorted(SAMPLERS)}.')
    return _EVALUATIONS[sampler] * steps


def _dtype(x: jax.Array) -> jnp.dtype:
    """In which times are held, and the state between steps."""
    return jnp.promote_types(x.dtype, jnp.float32)


def _of_type(vfn: VelocityFunction, dtype: jnp.dtype) -> VelocityFunction:
    """`vfn`, asked about states of type `dtype`."""
    return lambda s, t, x: vfn(s, t, x.astype(dtype))


def _diagonal(vfn: VelocityFunction, t: ArrayLike, x: jax.Array) -> jax.Array:
    t = jnp.broadcast_to(jnp.asarray(t, x.dtype), x.shape[:1])
    return vfn(t, t, x)


def _scan(step, x, times, trajectory, unroll):
    dtype = _dtype(x)
    times = jnp.asarray(times, dtype)

    def body(state, pair):
        state = step(state, pair[0], pair[1])
        return state, (state.astype(x.dtype) if trajectory else None)

    pairs = jnp.stack([times[:-1], times[1:]], axis=1)
    last, states = jax.lax.scan(body, x.astype(dtype), pairs, unroll=unroll)
    return jnp.concatenate([x[None], states]) if trajectory else last.astype(x.dtype)
