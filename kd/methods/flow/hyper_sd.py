"""Hyper-SD: consistency within phases of time, of which there are fewer and fewer (2404.13686)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses.flow_map import flow_map
from kd.losses.flow_map_family import consistency_trajectory_residual
from kd.losses.interpolant import get_interpolant
from kd.method import Batch, Method, Objective
from kd.methods import start
from kd.methods.flow import common
from kd.metrics import mean
from kd.ranges import Count, Finite, Positive
from kd.sampling import denoiser, times
from kd.sampling.velocity import noise_scale as scale_of
from kd.sampling.velocity import velocity_function
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
    (`references.start`); sample the stage of k phases by k Euler steps of its diagonal. With one
    phase it is the consistency trajectory loss (arXiv 2310.02279) of a network without an end.

    Args:
      context: the stage; a velocity network and a flow as teacher, on the linear path.
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
        teacher of another path.

    The paper's adversarial term, whose weights it does not give, its rewards and its last stage,
    which is `kd.methods.diffusion.dmd`, are not part of this.
    """
    network, path = context.network, get_interpolant('linear')
    try:
        times.phase_end(jnp.int32(0), phases=phases, grid=grid)
    except ValueError as error:
        raise UserError(f'{context.stage}.method: {error}') from error
    if target != 'final' and target not in context.config.ema:
        raise UserError(
            f"{context.stage}.method.target='{target}' is no average of the stage, which keeps "
            f'{sorted(context.config.ema)}.'
        )
    common.check_network(network, two_times=False, where=f'{context.stage}.network')
    common.check_teacher(context, path, two_times=False)
    common.check_guidance(context, guidance)
    scale = scale_of(network, noise_scale)

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        times_key, noise_key = jax.random.split(key)
        data, label = batch['input'], denoiser.conditions(network, batch).get('label')

        def bound(variables: PyTree):
            return common.one_time(velocity_function(network, variables, label))

        first, middle, end = times.phase_times(times_key, len(data), phases=phases, grid=grid)
        if ends == 'last':
            end = times.phase_end(first, phases=phases, grid=grid)
        s, u, e = first / grid, middle / grid, end / grid
        noise = scale * jax.random.normal(noise_key, data.shape, data.dtype)
        x_s = path.point(s, noise, data)
        teacher = velocity_function(
            context.teacher, state.frozen['teacher'], batch.get('label'), guidance=guidance
        )
        x_u = jax.lax.stop_gradient(flow_map(common.one_time(teacher), s, u, x_s))
        own = common.variables_of(network, state, params)
        averaged = own
        if target != 'final':
            average = state.variables(target)['params']
            averaged = common.variables_of(network, state, average)
        residual = consistency_trajectory_residual(
            bound(own), s, u, e, x_s, x_u, target=bound(averaged)
        )
        return Objective(mean(common.mean_square(residual)))

    init = start.from_reference(network.init, context)
    return common.minimized(context, loss, init, micro_batches)
