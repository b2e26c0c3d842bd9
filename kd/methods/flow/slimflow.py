"""SlimFlow: smaller networks of one step, from few pairs of a flow (arXiv 2407.12718)."""

from __future__ import annotations

import math
from typing import Literal

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data import sampled
from kd.errors import UserError
from kd.losses.flow_map import flow_map
from kd.losses.flow_map_algorithms import get_algorithm
from kd.losses.interpolant import get_interpolant
from kd.losses.rectified import two_step_target, vp_mix
from kd.method import Batch, Method, Objective, with_collect
from kd.methods import start
from kd.methods.flow import common
from kd.metrics import mean
from kd.ranges import Count, Fraction, NonNegative, Positive
from kd.sampling.velocity import noise_scale as scale_of
from kd.sampling.velocity import velocity_function
from kd.state import PyTree, State

Schedule = Literal['linear', 'cosine', 'none']


def annealing_reflow(
    context: Context,
    *,
    anneal: Count = 300_000,
    schedule: Schedule = 'linear',
    flip: bool = False,
    noise_scale: Positive | None = None,
    label_dropout: Fraction = 0.0,
    micro_batches: Count = 1,
) -> Method:
    """Reflow of a network too small to begin as its teacher, which at first need not keep pairs.

        z_b = sqrt(1 - b^2) z + b z',   b from 1 to 0
        loss = E || v(t, t, (1 - t) z_b + t x1) - (x1 - z_b) ||^2

    over pairs of a noise z and the sample x1 that a flow has made of it (`kd.data.sampled.pairs`),
    z' fresh noise. With b = 1 it learns the flow from its samples, with 0 its pairs.

    Args:
      context: the stage; needs a velocity network and pairs.
      anneal: steps until b is 0.
      schedule: of b: 'linear', 'cosine', or 'none' for 0 always, plain reflow.
      flip: pairs of images from left to right, noise and sample together, for half of the examples.
        Not for data that have a handedness.
      noise_scale, label_dropout, micro_batches: as of
        `kd.methods.flow.flow_matching.flow_matching`. The interpolant is linear.

    Raises:
      UserError: data without pairs.
    """
    _check_pairs(context)
    scale = scale_of(context.network, noise_scale)

    def collect(state: State, batch: Batch, key: jax.Array) -> Batch:
        fresh_key, flip_key = jax.random.split(key)
        z, x1 = batch[sampled.NOISE], batch[sampled.SAMPLE]
        if flip:
            z, x1 = flipped(flip_key, z, x1)
        fresh = scale * jax.random.normal(fresh_key, z.shape, z.dtype)
        z = vp_mix(z, fresh, annealed(state.step, anneal, schedule))
        return {**batch, 'input': x1, 'noise': z}

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


def flow_guided_distillation(
    context: Context,
    *,
    two_step: NonNegative = 1.0,
    between: tuple[Fraction, Fraction] = (0.2, 0.8),
    noise_scale: Positive | None = None,
    micro_batches: Count = 1,
) -> Method:
    """One step, from pairs of the small flow and from that flow itself.

        loss = mean (z + v(0, 0, z) - x1)^2 + two_step mean (z' + v(0, 0, z') - y)^2,
        y = sg[z' + t a + (1 - t) b(t, z' + t a)],   a = v(0, 0, z'),   z' fresh noise

    The student begins as its teacher b, a flow of its own size that `annealing_reflow` has trained,
    and has pairs of that flow; name it as `references.start` too.

    Args:
      context: the stage; network, teacher and pairs.
      two_step: weight of the second term, which needs no pairs.
      between: of t, evenly.
      noise_scale, micro_batches: as of `kd.methods.flow.flow_matching.flow_matching`.

    Raises:
      UserError: data without pairs; a teacher of another path.

    The distance is the squared error; the paper's final runs have LPIPS in its place.
    """
    _check_pairs(context)
    network = context.network
    common.check_network(network, two_times=False, where=f'{context.stage}.network')
    common.check_teacher(context, get_interpolant('linear'), two_times=False)
    scale = scale_of(network, noise_scale)

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        fresh_key, time_key = jax.random.split(key)
        variables, label = common.variables_of(network, state, params), batch.get('label')
        vfn = common.one_time(velocity_function(network, variables, label))
        z, x1 = batch[sampled.NOISE], batch[sampled.SAMPLE]
        pairs = common.mean_square(flow_map(vfn, 0.0, 1.0, z) - x1)
        if not two_step:
            return Objective(mean(pairs))
        teacher = velocity_function(context.teacher, state.frozen['teacher'], label)
        fresh = scale * jax.random.normal(fresh_key, z.shape, z.dtype)
        t = jax.random.uniform(time_key, (len(z),), minval=between[0], maxval=between[1])
        end = flow_map(vfn, 0.0, 1.0, fresh)
        guided = common.mean_square(end - two_step_target(end - fresh, teacher, fresh, t))
        return Objective(
            mean(pairs + two_step * guided), {'pairs': mean(pairs), 'two_step': mean(guided)}
        )

    init = start.from_reference(network.init, context)
    return common.minimized(context, loss, init, micro_batches)


def annealed(step: jax.Array, steps: int, schedule: Schedule = 'linear') -> jax.Array | float:
    """b after `step` steps: 1 at the first, 0 from `steps` on."""
    if schedule == 'none':
        return 0.0
    gone = jnp.minimum(step / steps, 1.0)
    return 1.0 - gone if schedule == 'linear' else 0.5 * (1.0 + jnp.cos(math.pi * gone))


def flipped(key: jax.Array, noise: jax.Array, sample: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairs [B, H, W, C], each turned from left to right by a coin, both members or neither."""
    coins = jax.random.bernoulli(key, 0.5, (len(noise), 1, 1, 1))
    return tuple(jnp.where(coins, x[:, :, ::-1], x) for x in (noise, sample))  # type: ignore[return-value]


def _check_pairs(context: Context) -> None:
    if sampled.NOISE not in context.spec or sampled.SAMPLE not in context.spec:
        raise UserError(
            f'{context.stage} wants pairs of a noise and the sample that a flow has made of it; '
            "name a stage of these as the data's source (kd.data.sampled.pairs)."
        )
