"""YONOS-SR: one-step super-resolution by distillation along scales (arXiv 2401.17258)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.data.patches import LOW
from kd.data.transforms.low_resolution import EASIER
from kd.errors import UserError
from kd.losses import score_distillation
from kd.losses.score_distillation import Weight
from kd.method import Batch, Method, Objective, minimize
from kd.methods import start
from kd.methods.flow.common import mean_square
from kd.metrics import mean
from kd.ranges import Count, NonNegative
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.state import PyTree, State, path_name

# What decoders are tuned to, where it is another field than `input`.
IMAGE = 'image'


def scale_distillation(
    context: Context,
    *,
    law: Mapping[str, Any] | None = None,
    weight: Weight = 'truncated',
    micro_batches: Count = 1,
) -> Method:
    """A denoiser that is told a picture of low resolution learns from one that is told a better.

        loss = E w(t) mean (mu(z_t, low) - sg[mu_teacher(z_t, easier)])^2

    with the same z_t for both; without a teacher the target is the example itself: of the first
    network of a cascade, and of the paper's baseline. The example enters through z_t alone.

    Args:
      context: the stage; a denoiser (`kd.models.denoiser`) that is told `low`, and data that have
        it and, with a teacher, `easier`. Starts from `references.start`, if there is one; channels
        of its input that the reference lacks begin with weights 0.
      law: block of `kd.sampling.times` of the times; None for all of the schedule evenly.
      weight: see `kd.losses.score_distillation.denoising`; max(snr, 1) is ours.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: data without what the networks are told; another schedule than the teacher's.
    """
    network = context.network
    own = denoisers.of_network(network)
    path, teacher = own.schedule, None
    _check(context, network.module, (LOW,))
    if context.optional_teacher is not None:
        teacher = denoisers.of_network(context.teacher, context.trained_by.get('teacher'))
        _check(context, context.teacher.module, (LOW, EASIER))
        if teacher.schedule != path:
            raise UserError(
                f'{context.stage}: the teacher has the schedule {teacher.schedule.name!r}, the '
                f'student {path.name!r}; give both the same, whose noise they share.'
            )
    draw = times.uniform(times.even(path))
    if law is not None:
        draw = config_lib.build(law, where=f'{context.stage}.method.law')

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        time_key, noise_key, dropout = jax.random.split(key, 3)
        target = data = batch['input']
        told = denoisers.conditions(network, batch)
        t = jnp.clip(draw(time_key, jnp.zeros(len(data))), path.low, path.high)
        z_t = path.mix(data, jax.random.normal(noise_key, data.shape, data.dtype), t)
        if teacher is not None:
            better = {**told, LOW: batch[EASIER]}
            target = teacher.apply(state.frozen['teacher'], z_t, t, better).x0
        variables = state.variables(params=params)
        said = own.apply(variables, z_t, t, told, train=True, key=dropout).x0
        losses = score_distillation.denoising(said, target, path, t, weight)
        return Objective(mean(losses), {'squared_error': mean(mean_square(said - target))})

    init = start.from_reference(network.init, context, transform=widened)
    return minimize(loss, context.tx, init, micro_batches=micro_batches)


def decoder_tuning(
    context: Context, *, squared: NonNegative = 0.0, micro_batches: Count = 1
) -> Method:
    """A decoder learns what the one call of a frozen denoiser leaves to be mended.

        z = sg[mu(eps, low)] at the noisiest time,   loss = mean |Dec(z) - x| + squared mean (.)^2

    Args:
      context: the stage; its network takes what the teacher returns, its teacher is the denoiser.
        Images x are the data's `image`, or `input` where they have none. Starts from
        `references.start`, of which parts that the network lacks, an encoder, are left out.
      squared: weight of the squared error (ours).
      micro_batches: parts over which gradients are accumulated.

    The paper has a perceptual loss and a discriminator besides.

    Raises:
      UserError: data without what the teacher is told.
    """
    network = context.network
    denoise = denoisers.of_network(context.teacher, context.trained_by.get('teacher'))
    _check(context, context.teacher.module, (LOW,))
    wanted = IMAGE if IMAGE in context.spec else 'input'

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        noise_key, dropout = jax.random.split(key)
        noise = jax.random.normal(noise_key, batch['input'].shape, batch['input'].dtype)
        told = denoisers.conditions(context.teacher, batch)
        z = jax.lax.stop_gradient(one_step(denoise, state.frozen['teacher'], noise, told))
        variables = state.variables(params=params)
        output = network.apply(variables, z, train=True, key=dropout)
        if output.logits.shape != batch[wanted].shape:
            raise UserError(
                f'{context.stage}.network makes images of {output.logits.shape[1:]}, and the data '
                f"have '{wanted}' of {batch[wanted].shape[1:]}."
            )
        away = output.logits - batch[wanted]
        error = mean_square(away)
        losses = jnp.abs(away).mean(tuple(range(1, away.ndim))) + squared * error
        return Objective(mean(losses), {'squared_error': mean(error)}, output.mutables)

    init = start.from_reference(network.init, context, transform=part_of)
    return minimize(loss, context.tx, init, micro_batches=micro_batches)


def one_step(
    denoise: denoisers.Denoiser, variables: PyTree, noise: jax.Array, told: denoisers.Condition
) -> jax.Array:
    """What a denoiser says of noise alone, [B, ...]: DDIM in one step."""
    path = denoise.schedule
    x = path.mix(jnp.zeros_like(noise), noise, jnp.float32(path.high))
    key = jax.random.key(0)  # Of no use: nothing is drawn.
    return diffusion.sample(path, denoise.bind(variables, told), x, [path.high], key)


def widened(reference: PyTree, own: PyTree) -> PyTree:
    """The reference, with weights 0 for channels of inputs that it lacks."""

    def leaf(path: tuple, theirs: jax.Array, ours: jax.Array) -> jax.Array:
        more = ours.ndim - 2
        lacks = theirs.ndim == ours.ndim > 1 and path_name(path).endswith('kernel')
        same = lacks and theirs.shape[:more] == ours.shape[:more]
        if not same or theirs.shape[-1] != ours.shape[-1] or theirs.shape == ours.shape:
            return theirs
        pad = [(0, 0)] * ours.ndim
        pad[more] = (0, max(ours.shape[more] - theirs.shape[more], 0))
        return jnp.pad(theirs, pad)

    if len({str(jax.tree.structure(tree)) for tree in (reference, own)}) > 1:
        return reference
    return jax.tree_util.tree_map_with_path(leaf, reference, own)


def part_of(reference: PyTree, own: PyTree) -> PyTree:
    """The subtrees of the reference that the network has too, at the highest level."""
    return {
        kind: {name: reference[kind][name] for name in tree if name in reference.get(kind, {})}
        for kind, tree in own.items()
    }


def _check(context: Context, module: Any, fields: tuple[str, ...]) -> None:
    if LOW not in getattr(module, 'conditions', ()):
        raise UserError(
            f"{context.stage}: {type(module).__name__} is not told '{LOW}', and restores nothing; "
            f"give its network beside=('{LOW}',)."
        )
    if missing := [name for name in fields if name not in context.spec]:
        scales = '(2, 4)' if missing == [EASIER] else '(2,)'
        raise UserError(
            f"{context.stage} wants '{missing[0]}' beside images; name "
            f"kd.data.transforms.low_resolution.low_resolution as the data's source, with "
            f'scales={scales}.'
        )
