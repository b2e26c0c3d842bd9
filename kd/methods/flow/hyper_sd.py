"""Hyper-SD: consistency within phases of time, of which there are fewer and fewer (2404.13686)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses.flow_map import VelocityFunction, flow_map
from kd.losses.flow_map_family import consistency_trajectory_residual
from kd.losses.interpolant import expand_times, get_interpolant
from kd.losses.schedule import Schedule, convert
from kd.method import Batch, Method, Objective
from kd.methods import start
from kd.methods.flow import common
from kd.metrics import mean
from kd.network import Network
from kd.ranges import Count, Finite, Positive
from kd.sampling import denoiser, times
from kd.sampling.velocity import fields_of, velocity_function
from kd.sampling.velocity import noise_scale as scale_of
from kd.state import PyTree, State


def tscd(
    context: Context,
    *,
    phases: Count = 8,
    grid: Count = 64,
    ends: Literal['drawn', 'last'] = 'drawn',
    target: str = 'final',
    guidance: Finite = 1.0,
    noise_scale: Positive | None = None,
    micro_batches: Count = 1,
) -> Method:
    """Trajectory-segmented consistency distillation, one stage of it: of `phases` segments.

        loss = mean |X_{s,e}(x_s) - sg X'_{u,e}(x_u)|^2,   X_{s,e}(x) = x + (e - s) v(s, s, x)

    s is a time of the grid, u the next one, x_u an Euler step of the guided teacher from x_s, and e
    a time of the grid from u to the end of the phase of s; where e = u it is regression of that
    step. The network is told no end, so one velocity serves all ends of a phase: few for many
    phases. A recipe has stages of 8, 4, 2 and 1, each of which starts from the one before
    (`references.start`); sample the stage of k phases by k Euler steps of its diagonal, or by DDIM.
    With one phase it is the consistency trajectory loss (arXiv 2310.02279) of a network that is
    told no end.

    Args:
      context: the stage; a velocity network and a flow as teacher, on the linear path, or two
        denoisers of one schedule.
      phases: k, which divides the grid.
      grid: steps of the teacher from noise to data.
      ends: 'drawn', or 'last' for the end of the phase always: discrete consistency distillation,
        in phases.
      target: the average of the stage's `ema` that is X', as it is before the step; 'final' for the
        parameters themselves.
      guidance: of the teacher; the student learns the guided flow.
      noise_scale, micro_batches: as of `kd.methods.flow.flow_matching.flow_matching`.

    Raises:
      UserError: phases that do not divide the grid, an average that the stage does not keep, a
        teacher of another path or schedule, a schedule that leaves nothing of the data.

    The paper's adversarial term, whose weights it does not give, its rewards and its last stage,
    which is `kd.methods.diffusion.dmd`, are not part of this.
    """
    network = context.network
    try:
        times.phase_end(jnp.int32(0), phases=phases, grid=grid)
    except ValueError as error:
        raise UserError(f'{context.stage}.method: {error}') from error
    if target != 'final' and target not in context.config.ema:
        raise UserError(
            f"{context.stage}.method.target='{target}' is no average of the stage, which keeps "
            f'{sorted(context.config.ema)}.'
        )
    denoises = isinstance(getattr(network.module, 'schedule', None), Schedule)
    make = _of_denoisers if denoises else _of_flows
    world = make(context, grid, guidance, noise_scale)

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        times_key, noise_key = jax.random.split(key)
        data = batch['input']
        first, middle, end = times.phase_times(times_key, len(data), phases=phases, grid=grid)
        if ends == 'last':
            end = times.phase_end(first, phases=phases, grid=grid)
        s, u, e = (world.time(index) for index in (first, middle, end))
        noise = jax.random.normal(noise_key, data.shape, data.dtype)
        x_s = world.point(first, noise, data)
        teacher = world.field(context.teacher, state.frozen['teacher'], first, batch, guidance)
        x_u = jax.lax.stop_gradient(flow_map(teacher, s, u, x_s))
        own = common.variables_of(network, state, params)
        averaged = own
        if target != 'final':
            average = state.variables(target)['params']
            averaged = common.variables_of(network, state, average)
        residual = consistency_trajectory_residual(
            world.field(network, own, first, batch, 1.0), s, u, e, x_s, x_u,
            target=world.field(network, averaged, middle, batch, 1.0),
        )  # fmt: skip
        weight = expand_times(world.scale(end), residual)
        return Objective(mean(common.mean_square(weight * residual)))

    init = start.from_reference(network.init, context)
    return common.minimized(context, loss, init, micro_batches)


class _World(NamedTuple):
    """Trajectories as straight as the network says: at indices of the grid, 0 the noise.

    Attributes:
      time: of indices [B], increasing.
      point: (indices, noise of unit variance, data) -> x.
      field: (network, variables, indices, batch, guidance) -> its velocity there.
      scale: what a distance between points is to be multiplied with.
    """

    time: Callable[[jax.Array], jax.Array]
    point: Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
    field: Callable[[Network, PyTree, jax.Array, Batch, float], VelocityFunction]
    scale: Callable[[jax.Array], jax.Array]


def _of_flows(context: Context, grid: int, guidance: float, noise_scale: float | None) -> _World:
    path = get_interpolant('linear')
    common.check_network(context.network, two_times=False, where=f'{context.stage}.network')
    common.check_teacher(context, path, two_times=False)
    common.check_guidance(context, guidance)
    scale = scale_of(context.network, noise_scale)

    def field(network, variables, index, batch, guidance):
        del index
        return common.one_time(
            velocity_function(
                network, variables, batch.get('label'), told=fields_of(network, batch),
                guidance=guidance,
            )
        )  # fmt: skip

    return _World(
        time=lambda index: index / grid,
        point=lambda index, noise, data: path.point(index / grid, scale * noise, data),
        field=field,
        scale=lambda index: jnp.ones(index.shape),
    )


def _of_denoisers(
    context: Context, grid: int, guidance: float, noise_scale: float | None
) -> _World:
    schedule = _schedule_of(context)
    if noise_scale is not None:
        raise UserError(f'{context.stage}.method.noise_scale is of flows; a schedule has its own.')
    clock = times.natural(schedule)

    def at(index: jax.Array) -> jax.Array:
        return clock.at(1.0 - index / grid)

    def field(network, variables, index, batch, guidance):
        t, own = at(index), denoiser.guided(denoiser.of_network(network), guidance)
        condition = denoiser.conditions(network, batch)

        def velocity(s, e, x):
            x_t = (expand_times(schedule.alpha(t), x) * x).astype(x.dtype)
            x0 = own.apply(variables, x_t, t, condition).x0
            return -convert(schedule, x0, x_t, t, 'x0', 'eps').astype(x.dtype)

        return velocity

    def point(index, noise, data):
        ratio = expand_times(schedule.noise_to_signal(at(index)), data)
        return (data + ratio * noise).astype(data.dtype)

    return _World(
        time=lambda index: -schedule.noise_to_signal(at(index)),
        point=point,
        field=field,
        scale=lambda index: schedule.alpha(at(index)),
    )


def _schedule_of(context: Context) -> Schedule:
    """That of both denoisers."""
    module: Any = context.network.module
    schedule: Schedule = module.schedule
    teacher = context.teacher.module
    if getattr(teacher, 'schedule', None) is not schedule:
        raise UserError(
            f'{context.stage}: the teacher is a {type(teacher).__name__} of another schedule than '
            f"the network's {schedule.name!r}; give both the same."
        )
    with jax.ensure_compile_time_eval():
        left = float(schedule.alpha(jnp.float32(schedule.high)))
    if left <= 0:
        raise UserError(
            f'{context.stage}: the schedule {schedule.name!r} leaves nothing of the data at its '
            'last time, where a step is no multiple of them; take one that does, or a flow.'
        )
    return schedule
