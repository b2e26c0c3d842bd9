"""OFTSR: super-resolution in one step, between fidelity and realism (arXiv 2412.09465)."""

from __future__ import annotations

from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.patches import LOW
from kd.errors import UserError
from kd.losses.flow_map import diagonal_residual
from kd.losses.interpolant import expand_times, get_interpolant
from kd.losses.rectified import rk2_slope, start_slope_target, vp_mix
from kd.method import Batch, Method, Objective
from kd.methods import start
from kd.methods.flow import common
from kd.metrics import mean
from kd.ranges import Count, Fraction, NonNegative, Positive
from kd.sampling.velocity import fields_of, velocity_function
from kd.state import PyTree, State

# Of noise in where paths begin; times of the teacher begin after it.
SHARE, _FIRST = 0.2, 1e-3


def restoring_flow(
    context: Context,
    *,
    share: Fraction = SHARE,
    distance: Literal['l1', 'l2'] = 'l1',
    micro_batches: Count = 1,
) -> Method:
    """A flow from what is left of an image, with a share of noise, to the image.

        x0 = sqrt(1 - s^2) low + s noise,   x_t = (1 - t) x0 + t x1,   t ~ U[.001, 1]
        loss = E mean | v(t, [x_t, low]) - (x1 - x0) |,   or of its square

    Args:
      context: the stage; a velocity network that is told `low`, and data that have it beside
        `input` (`kd.data.transforms.low_resolution`).
      share: s, of noise in where the flow begins.
      distance: see above; the paper's is 'l1'.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: a network that is not told `low`, or data without it.
    """
    _check(context)
    network, path = context.network, get_interpolant('linear')

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        noise_key, time_key, dropout = jax.random.split(key, 3)
        x0, x1 = beginning(noise_key, batch[LOW], share), batch['input']
        t = jax.random.uniform(time_key, (len(x0),), minval=_FIRST, maxval=1.0)
        vfn = velocity_function(
            network, common.variables_of(network, state, params), batch.get('label'),
            told=fields_of(network, batch), train=True, key=dropout,
        )  # fmt: skip
        away = diagonal_residual(vfn, t, path.point(t, x0, x1), path.velocity(t, x0, x1))
        square = common.mean_square(away)
        losses = square if distance == 'l2' else jnp.abs(away).mean(tuple(range(1, away.ndim)))
        return Objective(mean(losses), {'squared_error': mean(square)})

    init = start.from_reference(network.init, context)
    return common.minimized(context, loss, init, micro_batches)


def oftsr(
    context: Context,
    *,
    share: Fraction = SHARE,
    dt: Positive = 0.05,
    ratio: Fraction = 0.5,
    align: NonNegative = 0.01,
    boundary: NonNegative = 0.1,
    between: tuple[Fraction, Fraction] = (0.01, 0.99),
    micro_batches: Count = 1,
) -> Method:
    """One call from the beginning, whose time chooses between fidelity (0) and realism (1).

        x_t = sg[x0 + t v(x0, t)],   s = min(t + dt, 1)
        distil    mean (v(x0, s) - sg[v(x0, t) + (s - t) / s (slope - v(x0, t))])^2
        align     mean (1 - t)^2 (v(x0, t) - b(x_t, t))^2
        boundary  mean (v(x0, 0) - b(x0, 0))^2
        loss = distil + align_weight align + boundary_weight boundary

    `slope` is that of a step of the teacher b from x_t to s (`kd.losses.rectified.rk2_slope`). The
    student's time is where its path from x0 shall have come to, the teacher's where it is; the
    layers are the same, and the student begins as its teacher (`references.start`). A restored
    image is x0 + v(x0, t), whatever t is.

    Args:
      context: the stage; network, teacher (`restoring_flow`) and data with `low`.
      share: of noise in where the paths begin, the teacher's.
      dt: see above.
      ratio: of the slope: .5 for the midpoint, 1 Heun, 2/3 Ralston, 0 Euler.
      align, boundary: weights.
      between: of t, evenly.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: a network or teacher that is not told `low`, or data without it; a teacher of
        another share; times from greater to smaller.
    """
    _check(context)
    if between[0] > between[1]:
        raise UserError(
            f'{context.stage}.method.between={tuple(between)} must be the least time and the '
            'greatest.'
        )
    common.check_network(context.teacher, two_times=False, where=f'{context.stage}.teacher')
    theirs = context.trained_by.get('teacher', {'share': share}).get('share', SHARE)
    if theirs != share:
        raise UserError(
            f'{context.stage}.method.share={share:g} is not that of the teacher, {theirs:g}, which '
            'knows paths from its own beginnings alone.'
        )
    network = context.network

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        noise_key, time_key = jax.random.split(key)
        label, told = batch.get('label'), fields_of(network, batch)
        vfn = velocity_function(
            network, common.variables_of(network, state, params), label, told=told
        )
        field = velocity_function(context.teacher, state.frozen['teacher'], label, told=told)
        x0 = beginning(noise_key, batch[LOW], share)
        t = jax.random.uniform(time_key, (len(x0),), minval=between[0], maxval=between[1])
        s, zero = jnp.minimum(t + dt, 1.0), jnp.zeros_like(t)
        said = vfn(t, t, x0)
        x_t = jax.lax.stop_gradient(x0 + expand_times(t, x0) * said)
        slope = rk2_slope(field, x_t, t, s - t, ratio)
        parts = {
            'distil': vfn(s, s, x0) - start_slope_target(said, slope, t, s - t),
            'align': expand_times(1 - t, x0) * (said - jax.lax.stop_gradient(field(t, t, x_t))),
            'boundary': vfn(zero, zero, x0) - jax.lax.stop_gradient(field(zero, zero, x0)),
        }
        errors = {name: common.mean_square(part) for name, part in parts.items()}
        whole = errors['distil'] + align * errors['align'] + boundary * errors['boundary']
        return Objective(mean(whole), {name: mean(error) for name, error in errors.items()})

    init = start.from_reference(network.init, context)
    return common.minimized(context, loss, init, micro_batches)


def beginning(key: jax.Array, low: jax.Array, share: float) -> jax.Array:
    """Where paths begin: what is left of images [B, ...], with a share of noise."""
    return vp_mix(low, jax.random.normal(key, low.shape, low.dtype), share)


def _check(context: Context) -> None:
    common.check_network(context.network, two_times=False, where=f'{context.stage}.network')
    if LOW not in context.spec:
        raise UserError(
            f"{context.stage} wants images and what is left of them, 'input' and '{LOW}'; name "
            "kd.data.transforms.low_resolution.low_resolution as the data's source."
        )
    for player, network in (('network', context.network), ('teacher', context.optional_teacher)):
        if network and LOW not in getattr(network.module, 'conditions', ()):
            raise UserError(
                f"{context.stage}.{player} is not told '{LOW}', and restores nothing; give it "
                f"beside=('{LOW}',)."
            )
