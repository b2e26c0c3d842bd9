"""Clocks: which times there are, in which measure they are drawn, and the grids of samplers.

A clock maps u in [0, 1] to times, from the cleanest to the noisiest, and back. A law draws times
for the examples of a batch, `law(key, level) -> t [B]`, where `level` [B] is the time at which a
generator was asked, which most laws do not look at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd.losses.schedule import Schedule

TimeLaw = Callable[[jax.Array, jax.Array], jax.Array]


class Clock(NamedTuple):
    """`at(u)`, times of u in [0, 1], increasing; `rank(t)` its inverse; both elementwise."""

    at: Callable[[jax.Array], jax.Array]
    rank: Callable[[jax.Array], jax.Array]


def even(schedule: Schedule) -> Clock:
    """The times of a schedule, evenly; integers where it has these."""
    low, span = schedule.low, schedule.high - schedule.low

    def at(u: jax.Array) -> jax.Array:
        t = low + span * u
        return jnp.round(t) if schedule.steps is not None else t

    return Clock(at, lambda t: (t - low) / span)


def karras(low: float = 0.002, high: float = 80.0, rho: float = 7.0) -> Clock:
    """sigma^(1 / rho), evenly (Karras et al. 2022, arXiv:2206.00364, eq. 5)."""
    first, last = low ** (1 / rho), high ** (1 / rho)

    def at(u: jax.Array) -> jax.Array:
        return (first + u * (last - first)) ** rho

    return Clock(at, lambda t: (t ** (1 / rho) - first) / (last - first))


def natural(schedule: Schedule, rho: float = 7.0) -> Clock:
    """That of Karras et al. where times are deviations of the noise, `even` elsewhere."""
    if schedule.name == 'edm':
        return karras(schedule.low, schedule.high, rho)
    return even(schedule)


def moved(u: Any, shift: float) -> Any:
    """shift u / (1 + (shift - 1) u), elementwise; 1 / shift undoes it (SD3, arXiv:2403.03206)."""
    return shift * u / (1 + (shift - 1) * u)


def shifted(clock: Clock, shift: float) -> Clock:
    """Times `moved` towards noise, for a shift above 1."""
    return Clock(lambda u: clock.at(moved(u, shift)), lambda t: moved(clock.rank(t), 1 / shift))


def straight(shift: float = 1.0) -> Clock:
    """The times of `kd.losses.schedule.flow`, `moved` by a shift, as large models have them."""
    return Clock(lambda u: moved(u, shift), lambda t: moved(t, 1 / shift))


# Laws


def uniform(clock: Clock, low: float = 0.0, high: float = 1.0) -> TimeLaw:
    """Evenly between two ranks of the clock, independently for each example."""
    return lambda key, level: clock.at(
        jax.random.uniform(key, level.shape, minval=low, maxval=high)
    )


def cleaner(clock: Clock, low: float = 0.0) -> TimeLaw:
    """Evenly between the rank `low` and the generator's own level."""

    def law(key: jax.Array, level: jax.Array) -> jax.Array:
        u = jax.random.uniform(key, level.shape)
        return clock.at(low + u * jnp.maximum(clock.rank(level) - low, 0.0))

    return law


def noisier(clock: Clock, high: float = 1.0) -> TimeLaw:
    """Evenly between the generator's own level and the rank `high`."""

    def law(key: jax.Array, level: jax.Array) -> jax.Array:
        u, rank = jax.random.uniform(key, level.shape), clock.rank(level)
        return clock.at(rank + u * jnp.maximum(high - rank, 0.0))

    return law


def lognormal(mean: float = -1.2, deviation: float = 1.2) -> TimeLaw:
    """exp(mean + deviation N(0, 1)), in which EDM is trained."""
    return lambda key, level: jnp.exp(mean + deviation * jax.random.normal(key, level.shape))


def logit_normal(
    mean: float = 0.0, deviation: float = 1.0, low: float = 0.0, high: float = 1.0
) -> TimeLaw:
    """low + (high - low) sigmoid(mean + deviation N(0, 1)) (SD3, arXiv:2403.03206)."""

    def law(key: jax.Array, level: jax.Array) -> jax.Array:
        u = jax.nn.sigmoid(mean + deviation * jax.random.normal(key, level.shape))
        return low + (high - low) * u

    return law


def evenly(shift: float = 1.0, low: float = 0.0, high: float = 1.0) -> TimeLaw:
    """Evenly in [low, high], and then `moved` towards noise, for times between 0 and 1."""

    def law(key: jax.Array, level: jax.Array) -> jax.Array:
        return moved(jax.random.uniform(key, level.shape, minval=low, maxval=high), shift)

    return law


def among(levels: Sequence[float]) -> TimeLaw:
    """One of these times, evenly."""
    return lambda key, level: jax.random.choice(key, jnp.asarray(levels, jnp.float32), level.shape)


# Grids of samplers


def grid(clock: Clock, steps: int, *, first: float = 1.0, last: float = 0.0) -> np.ndarray:
    """`steps` times from the rank `first` down to `last`, both among them; `first` alone for 1.

    Raises:
      ValueError: no steps.
    """
    if steps < 1:
        raise ValueError(f'grid: steps={steps}, expected at least 1.')
    with jax.ensure_compile_time_eval():
        return np.asarray(clock.at(jnp.linspace(first, last, steps)))


def sampling(schedule: Schedule, steps: int, rho: float = 7.0) -> np.ndarray:
    """`steps` times of the natural clock, from the noisiest to the cleanest that has noise.

    Where the first time of a schedule has none, as of flows, the last step ends there: times are
    1, .., 1 / steps, at the last of which a sampler takes what is said of clean data.
    """
    clock = natural(schedule, rho)
    with jax.ensure_compile_time_eval():
        noisy = float(schedule.sigma(jnp.float32(schedule.low))) > 0
    return grid(clock, steps, last=0.0 if noisy else 1.0 / steps)


def spaced(schedule: Schedule, steps: int, spacing: str = 'trailing') -> np.ndarray:
    """Integer times of `steps` steps as `diffusers` has them, the noisiest first.

    | spacing | of 1000 in 4 | |
    |---|---|---|
    | leading | 751, 501, 251, 1 | DDIM and PNDM as Stable Diffusion sets them (`steps_offset=1`) |
    | trailing | 999, 749, 499, 249 | Turbo, Lightning, LCM and DMD2 |
    | linspace | 999, 666, 333, 0 | |

    Raises:
      ValueError: another spacing, or a schedule without integer times.
    """
    if schedule.steps is None:
        raise ValueError(f'spaced: the times of the schedule {schedule.name!r} are no integers.')
    total = schedule.steps
    if spacing == 'leading':
        return (np.arange(steps) * (total // steps))[::-1] + 1
    if spacing == 'trailing':
        return np.round(np.arange(total, 0, -total / steps)).astype(int) - 1
    if spacing == 'linspace':
        return np.round(np.linspace(0, total - 1, steps)[::-1]).astype(int)
    raise ValueError(f"spacing is 'leading', 'trailing' or 'linspace', got {spacing!r}.")


# Phases: parts of a grid of `grid` equal steps, from noise at index 0 to data, that none steps over


def phase_end(index: jax.Array, *, phases: int, grid: int) -> jax.Array:
    """The first end of a phase beyond an index, elementwise; that of 0 is grid / phases.

    Raises:
      ValueError: phases that do not divide the grid.
    """
    if phases < 1 or grid % phases:
        raise ValueError(f'{phases} phases do not divide a grid of {grid} steps.')
    length = grid // phases
    return (index // length + 1) * length


def phase_times(
    key: jax.Array, n: int, *, phases: int, grid: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Indices (start, middle, end), each int32 [n]: middle = start + 1 <= end <= end of its phase.

    start is uniform on 0 .. grid - 1, end uniform on what it may be. Floats would put a start at an
    edge into either phase.

    Source: Hyper-SD, arXiv:2404.13686, section 3.1.
    """
    start_key, end_key = jax.random.split(key)
    start = jax.random.randint(start_key, (n,), 0, grid)
    last = phase_end(start, phases=phases, grid=grid)
    return start, start + 1, jax.random.randint(end_key, (n,), start + 1, last + 1)
