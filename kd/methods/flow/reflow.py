"""Rectified flow: training on the pairs of an earlier flow (Liu et al. 2022, arXiv 2209.03003)."""

from __future__ import annotations

import jax

from kd.context import Context
from kd.errors import UserError
from kd.losses.flow_map_algorithms import get_algorithm
from kd.losses.interpolant import get_interpolant
from kd.method import Batch, Method, with_collect
from kd.methods.flow import common
from kd.ranges import Count, Finite, Fraction, Positive
from kd.sampling.flow import SAMPLERS, time_grid
from kd.sampling.velocity import noise_scale as scale_of
from kd.sampling.velocity import velocity_function
from kd.state import State


def reflow(
    context: Context,
    *,
    sampler: str = 'heun',
    sampler_steps: Count = 16,
    guidance: Finite = 1.0,
    unroll: bool = False,
    noise_scale: Positive | None = None,
    label_dropout: Fraction = 0.1,
    micro_batches: Count = 1,
) -> Method:
    """Flow matching between noise and the samples that the teacher makes of it.

        x0 ~ N(0, R^2 I),   x1 = ODE solution of the teacher from x0
        loss = E || v(t, t, (1 - t) x0 + t x1) - (x1 - x0) ||^2

    Paths of such pairs do not cross, so the new flow is straighter and needs fewer steps. The pairs
    are new at every step; of the batch only its size, shape and labels are used.

    Args:
      context: the stage; needs a velocity network v(s, t, x), a teacher and an optimiser.
      sampler: 'euler' or 'heun' for the teacher's field, 'flow_map' for a teacher that is a map.
      sampler_steps: of the sampler.
      guidance: scale of the classifier-free guidance of the teacher.
      unroll: the sampler's loop; for convolutions on CPU, which are slow inside a loop.
      noise_scale, label_dropout, micro_batches: as of
        `kd.methods.flow.flow_matching.flow_matching`. The interpolant is linear.
    """
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler '{sampler}', expected one of {sorted(SAMPLERS)}.")
    network = context.teacher
    # The teacher may come from any interpolant: only its ends are used.
    common.check_network(network, two_times=sampler == 'flow_map', where=f'{context.stage}.teacher')
    scale = scale_of(network, noise_scale)
    common.check_noise(context, scale)
    common.check_guidance(context, guidance)
    times = time_grid(sampler_steps)

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        noise = scale * jax.random.normal(key, batch['input'].shape, batch['input'].dtype)
        vfn = velocity_function(
            network, state.frozen['teacher'], batch.get('label'), guidance=guidance
        )
        samples = SAMPLERS[sampler](vfn, noise, times, unroll=unroll)
        return {**batch, 'input': samples, 'noise': noise}

    method = common.flow_method(
        context,
        algorithm=get_algorithm('lsd'),
        diagonal_fraction=1.0,
        interpolant=get_interpolant('linear'),
        noise=scale,
        label_dropout=label_dropout,
        augmentation=(),
        micro_batches=micro_batches,
    )
    return with_collect(method, collect)
