"""MDT-dist: one call from any time to data, by velocities and by distributions (2509.04406)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import score_distillation
from kd.losses.flow_map import VelocityFunction, flow_map
from kd.losses.flow_map_family import (
    consistency_distillation_residual,
    consistency_trajectory_residual,
)
from kd.losses.interpolant import get_interpolant
from kd.method import Batch, Method, Objective
from kd.methods import start
from kd.methods.flow import common
from kd.metrics import mean
from kd.ranges import Count, Finite, NonNegative, Positive
from kd.sampling import times
from kd.sampling.velocity import fields_of, velocity_function
from kd.sampling.velocity import noise_scale as scale_of
from kd.state import PyTree, State

# Of the rest of noise that the released path keeps at the data.
_LEAST = 1e-5


def mdt_dist(
    context: Context,
    *,
    target: Literal['velocity', 'consistency'] = 'velocity',
    step: Positive = 0.01,
    constant: NonNegative | None = None,
    distribution: NonNegative = 1.0,
    guidance: Finite = 1.0,
    distribution_guidance: Finite = 1.0,
    phases: Count = 1,
    mean_logit: Finite = 1.0,
    deviation: Positive = 1.0,
    noise_scale: Positive | None = None,
    micro_batches: Count = 1,
) -> Method:
    """A student v(s, s, x) that is the mean velocity from s to data, x + (1 - s) v = x1.

        VM: mean |v - sg[b + (1 - s) Dv]|^2,  D along the teacher's field b
        VD: d/dx1 = 2 (v - b - (1 - s) Dv) at x1 noised to s,  x1 = z + v(0, 0, z)
        loss = VM + distribution VD

    u = v - (1 - s) Dv is the velocity that such a student has as a flow; VD pulls its samples along
    the difference to the teacher's, as score distillation does with a fake network, which here is
    the student itself. VM is `kd.losses.flow_map_family.consistency_distillation_residual`. Sample
    it by Euler steps of its diagonal, one or a few.

    Args:
      context: the stage; a velocity network and a flow as teacher, on the linear path. Starts from
        `references.start`, if there is one. Of a network of voxels (`kd.models.shape_dit`) means
        are over those that there are.
      target: of the first term; 'consistency' is the plain regression of end points,
        |X(x_s) - sg X(x_{s + step})|^2, to the end of the phase, which the paper compares with.
      step: of the derivative in time, and of consistency.
      constant: normalises Dv, as the released configs do with .1; None does not. It takes the fixed
        point away, and pays only where guidance is large.
      distribution: weight of VD; 0 leaves it out.
      guidance, distribution_guidance: of the teacher in VM and in VD; the paper's 40 and 100, of
        v_c + w (v_c - v_u), are 41 and 101 here.
      phases: of 'consistency': ends are the multiples of 1 / phases.
      mean_logit, deviation: of the noise level of a time, sigmoid(N(mean, deviation^2)).
      noise_scale, micro_batches: as of `kd.methods.flow.flow_matching.flow_matching`.

    Raises:
      UserError: a teacher of another path; phases of velocity matching, which has none.
    """
    if phases > 1 and target == 'velocity':
        raise UserError(
            f"{context.stage}.method.phases={phases} are of target='consistency'; velocities are "
            'matched on the way to data.'
        )
    network, path = context.network, get_interpolant('linear')
    common.check_network(network, two_times=False, where=f'{context.stage}.network')
    common.check_teacher(context, path, two_times=False)
    for scale in (guidance, distribution_guidance):
        common.check_guidance(context, scale)
    deviation_of_noise, valid = scale_of(network, noise_scale), getattr(network.module, 'valid', '')
    law = times.logit_normal(mean_logit, deviation, _LEAST + step, 1.0)

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        keys = jax.random.split(key, 4)
        data, variables = batch['input'], common.variables_of(network, state, params)
        told = fields_of(network, batch)
        vfn = common.one_time(velocity_function(network, variables, batch.get('label'), told=told))

        def teacher(scale: float) -> VelocityFunction:
            return common.teacher_field(context, state.frozen['teacher'], batch, scale)

        # Rows that are not there have residuals of 0, and the mean is of those that are.
        share = 1.0 if not valid else batch[valid].size / len(data) / batch[valid].sum(-1)

        s = 1.0 - law(keys[0], jnp.zeros(len(data)))
        noise = deviation_of_noise * jax.random.normal(keys[1], data.shape, data.dtype)
        x_s = path.point(s, noise, data)
        if target == 'velocity':
            residual = consistency_distillation_residual(
                vfn, s, x_s, teacher=teacher(guidance), step=step, constant=constant
            )
        else:
            residual = _consistency(vfn, s, x_s, teacher(guidance), step, phases)
        matched = share * common.mean_square(residual)
        if not distribution:
            return Objective(mean(matched))
        z = deviation_of_noise * jax.random.normal(keys[2], data.shape, data.dtype)
        distilled = share * distribution_loss(
            vfn, z, s, noise, teacher(distribution_guidance), path.point, step, constant
        )
        return Objective(
            mean(matched + distribution * distilled),
            {'matching': mean(matched), 'distribution': mean(distilled)},
        )

    init = start.from_reference(network.init, context)
    return common.minimized(context, loss, init, micro_batches)


def distribution_loss(
    vfn: VelocityFunction,
    z: jax.Array,
    s: jax.Array,
    noise: jax.Array,
    teacher: VelocityFunction,
    point: Callable[..., jax.Array],
    step: float,
    constant: float | None,
) -> jax.Array:
    """VD of each example, [B]: mean r^2 in value, of gradient -2 r / size in v(0, 0, z).

    r is the residual of VM at x1 = z + v(0, 0, z), noised to s; the student is a constant there.
    The chain rule's factor, 1 - t of noise, is left out, as released.

    Args:
      vfn: the student.
      z: noise that it makes samples of, [B, ...].
      s, noise: of what is noised, [B] and [B, ...].
      teacher: its field, guided.
      point: of the path.
      step, constant: as of `mdt_dist`.
    """
    x = flow_map(vfn, jnp.zeros_like(s), jnp.ones_like(s), z)
    x_s = jax.lax.stop_gradient(point(s, noise, x))
    r = consistency_distillation_residual(
        vfn, s, x_s, teacher=teacher, step=step, constant=constant
    )
    return 2.0 * score_distillation.surrogate(x, -jax.lax.stop_gradient(r))


def _consistency(vfn, s, x_s, teacher, step, phases):
    """X_{s,e}(x_s) - sg X_{s + h, e}(x_s + h b), e the end of the phase beyond s + h."""
    u = s + step
    end = jnp.minimum((jnp.floor(u * phases) + 1) / phases, 1.0)
    x_u = x_s + step * jax.lax.stop_gradient(teacher(s, s, x_s))
    return consistency_trajectory_residual(vfn, s, u, end, x_s, x_u)
