"""ArcFlow: few steps along curves, by imitation of a teacher's velocity (arXiv 2602.09014)."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.losses import momentum
from kd.losses.interpolant import get_interpolant
from kd.method import Batch, Method, Objective
from kd.methods import start
from kd.methods.flow import common
from kd.metrics import mean
from kd.models import momentum_mmdit
from kd.models.adapters import MOMENTUM, adapter_of
from kd.ranges import Count, Decay, Finite, Fraction, Positive
from kd.sampling import denoiser, times
from kd.sampling.velocity import NULL
from kd.sampling.velocity import noise_scale as scale_of
from kd.state import PyTree, State


def arcflow(
    context: Context,
    *,
    segments: Count = 2,
    states: Count = 4,
    window: Fraction = 3 / 128,
    decay: Count = 2000,
    mode_dropout: Decay = 0.1,
    shift: Positive = 1.0,
    data_free: bool = True,
    guidance: Finite = 1.0,
    noise_scale: Positive | None = None,
    micro_batches: Count = 1,
) -> Method:
    """A student that says a mixture of momenta for each segment, where its teacher says a velocity.

        loss = sum_j 1/n E_i mean (vbar_j(t_a, t_b) - b(t_a, x_a))^2 / 2

    over n segments of equal raw time, with `states` points x_a in each, found on the way by steps
    of the student and of the teacher b in turn (`kd.losses.momentum.imitation_states`). The steps
    are the teacher's at the beginning, and the student's after `decay` steps of training. A segment
    begins where the student has come to by the one before. Only vbar, the student's mean velocity
    from t_a to a window later, has a gradient.

    The student is sampled as a flow map, in `segments` jumps: one call each, and no solver.

    Args:
      context: the stage; its network is a `kd.models.momentum_mlp.MomentumMLP` or a
        `kd.models.momentum_mmdit.MomentumMMDiT`, its teacher a flow on the linear path or a
        denoiser of it. With `references.start`, a network of the same layers, each mode begins as a
        copy of its head.
      segments: n.
      states: of a segment.
      window: at the end of the mean, in raw time.
      decay: steps until all states are the student's own.
      mode_dropout: of the path, not of what is trained.
      shift: of noise levels, above 1 towards noise: raw time u is u / (h - (h - 1) u). The paper
        has 3.2.
      data_free: begin in noise, and learn all segments in turn; without, begin on the paths of
        data, in a segment that is drawn.
      guidance: of the teacher; one that is told its scale by the data is asked as they say.
      noise_scale, micro_batches: as of `kd.methods.flow.flow_matching.flow_matching`.

    Raises:
      UserError: another network, a teacher of another path, a window as long as a segment.

    The released loss is 30 times this, which Adam does not see and clipping does.
    """
    network = context.network
    if not getattr(network.module, 'modes', 0):
        raise UserError(
            f'{context.stage}.network: arcflow trains a MomentumMLP or MomentumMMDiT, which says a '
            f'velocity for a whole segment; {type(network.module).__name__} says one for a time.'
        )
    if window * segments >= 1:
        raise UserError(
            f'{context.stage}.method.window={window:g} leaves nothing of a segment, which has '
            f'{1 / segments:g}.'
        )
    path = get_interpolant('linear')
    common.check_teacher(context, path, two_times=False)
    common.check_guidance(context, guidance)
    scale, length = scale_of(network, noise_scale), 1.0 / segments

    def clock(tau: jax.Array) -> jax.Array:
        return times.moved(tau, 1 / shift)

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        noise_key, place_key, key = jax.random.split(key, 3)
        data, told = batch['input'], denoiser.conditions(network, batch)
        condition = {name: x for name, x in told.items() if not name.startswith(NULL)}
        variables = common.variables_of(network, state, params)
        field = common.teacher_field(context, state.frozen['teacher'], batch, guidance)
        share = jnp.maximum(1.0 - state.step / decay, 0.0)
        x = scale * jax.random.normal(noise_key, data.shape, data.dtype)
        tau = jnp.zeros(len(x))
        if not data_free:
            tau = length * jax.random.randint(place_key, (len(x),), 0, segments)
            x = path.point(clock(tau), x, data)
        errors = []
        for j in range(segments if data_free else 1):
            of_network, of_modes, of_states = jax.random.split(jax.random.fold_in(key, j), 3)
            source = clock(tau)
            m: Any = network.apply(
                variables, source, source, x, train=True, key=of_network, momenta=True, **condition
            ).logits
            found = momentum.imitation_states(
                of_states,
                momentum.drop_modes(of_modes, jax.lax.stop_gradient(m), mode_dropout),
                *(x, tau, length, share, lambda t, x: field(t, t, x)),
                states=states,
                window=window,
                clock=clock,
            )
            said = jax.vmap(lambda a, b, m=m, s=source: momentum.mean_velocity(m, s, a, b))(
                found.t_a, found.t_b
            )
            square = jnp.square(said - found.target)
            errors.append(square.mean((0, *range(2, square.ndim))))
            x = jax.lax.stop_gradient(momentum.transport(m, source, source, clock(tau + length), x))
            tau = tau + length
        each = {f'error_{j}': mean(error) for j, error in enumerate(errors)}
        return Objective(mean(0.5 * sum(errors) / len(errors)), each)

    init = start.from_reference(network.init, context, **_begun(network.module))
    return common.minimized(context, loss, init, micro_batches)


def _begun(module: Any) -> dict[str, Any]:
    """How it starts from a flow."""
    if adapter_of(module) is not None:
        return {'beside': copied_beside}
    return {'transform': copied_whole if hasattr(module, 'inner') else copied_head}


def copied_head(reference: PyTree, own: PyTree) -> PyTree:
    """Layers of a flow, and its head once for each mode, beside what heads begin with."""
    theirs, ours = reference['params'], own['params']
    params = {**ours, **{name: theirs[name] for name in ours if name in theirs and name != 'out'}}

    def modes(theirs: jax.Array, ours: jax.Array) -> jax.Array:
        return ours + jnp.tile(theirs, ours.shape[-1] // theirs.shape[-1])

    params['out'] = jax.tree.map(modes, theirs['out'], ours['out'])
    return {**own, 'params': params}


def copied_beside(reference: PyTree, own: PyTree) -> PyTree:
    """Adapters as they are drawn, and copies of the head of a network without momenta."""
    params = dict(own['params'])
    params[MOMENTUM] = momentum_mmdit.copied_head(reference['params'], params[MOMENTUM])
    return {**own, 'params': params}


def copied_whole(reference: PyTree, own: PyTree) -> PyTree:
    """The layers of a network without momenta, and copies of its head."""
    beside = copied_beside(reference, {'params': {MOMENTUM: own['params'][MOMENTUM]}})
    return {**own, 'params': {**reference['params'], **beside['params']}}
