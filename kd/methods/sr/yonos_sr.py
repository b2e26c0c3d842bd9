"""YONOS-SR: one-step super-resolution by distillation along scales (arXiv 2401.17258)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kd import config as config_lib
from kd.context import Context
from kd.data.patches import LOW
from kd.data.transforms.low_resolution import EASIER
from kd.errors import UserError
from kd.losses import adversarial as adversarial_lib
from kd.losses import score_distillation
from kd.losses.perceptual import feature_distance
from kd.losses.score_distillation import Weight
from kd.method import Batch, Method, Objective, Player, alternate, minimize
from kd.method.base import call_init
from kd.methods import start
from kd.methods.flow.common import mean_square
from kd.metrics import mean
from kd.network import Output, feature_names
from kd.ranges import Count, NonNegative
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, times
from kd.state import NETWORK, PyTree, State, path_name

# What decoders are tuned to, where it is another field than `input`.
IMAGE = 'image'
# The reference whose features are compared, and the part that tells images apart.
PERCEPTUAL, DISCRIMINATOR = 'perceptual', 'discriminator'


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
    context: Context,
    *,
    squared: NonNegative = 0.0,
    perceptual: NonNegative = 0.0,
    features: tuple[str, ...] = (),
    adversarial: NonNegative = 0.0,
    last: str = '',
    discriminator: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    micro_batches: Count = 1,
) -> Method:
    """A decoder learns what the one call of a frozen denoiser leaves to be mended.

        z = sg[mu(eps, low)] at the noisiest time,   y = Dec(z)
        loss = mean |y - x| + squared mean (y - x)^2 + perceptual d(y, x) - adversarial a D(y)

    with d the distance of features of a frozen network (`kd.losses.perceptual`), and D a
    discriminator that moves first, by the hinge loss; a is a constant, 1 or, as of latent
    diffusion, what brings both to one slope in the decoder's last layer, see `balance`.

    Args:
      context: the stage; its network takes what the teacher returns, its teacher is the denoiser.
        Images x are the data's `image`, or `input` where they have none. Starts from
        `references.start`, of which parts that the network lacks, an encoder, are left out.
      squared: weight of the squared error (ours).
      perceptual, features: weight of d, and names of the features of `references.perceptual`.
      adversarial: weight of D; 0 for none.
      last: path of the weights whose slopes a is of, 'decoder/conv_out/kernel'; '' for a = 1.
      discriminator: block of D; None for `kd.models.discriminator.PatchHead`.
      optimizer: of D, as of a stage; None for the stage's own.
      micro_batches: parts over which gradients are accumulated.

    Raises:
      UserError: data without what the teacher is told; features that are not there.
    """
    network = context.network
    denoise = denoisers.of_network(context.teacher, context.trained_by.get('teacher'))
    _check(context, context.teacher.module, (LOW,))
    wanted = IMAGE if IMAGE in context.spec else 'input'
    seen = _perceived(context, features) if perceptual else None

    def decoded(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Output:
        noise_key, dropout = jax.random.split(key)
        noise = jax.random.normal(noise_key, batch['input'].shape, batch['input'].dtype)
        told = denoisers.conditions(context.teacher, batch)
        z = jax.lax.stop_gradient(one_step(denoise, state.frozen['teacher'], noise, told))
        output = network.apply(state.variables(params=params), z, train=True, key=dropout)
        if output.logits.shape != batch[wanted].shape:
            raise UserError(
                f'{context.stage}.network makes images of {output.logits.shape[1:]}, and the data '
                f"have '{wanted}' of {batch[wanted].shape[1:]}."
            )
        return output

    def apart(state: State, y: jax.Array, x: jax.Array) -> tuple[jax.Array, dict[str, Any]]:
        """(losses [B], metrics) of images and originals."""
        away = y - x
        error = mean_square(away)
        losses = jnp.abs(away).mean(tuple(range(1, away.ndim))) + squared * error
        metrics = {'squared_error': mean(error)}
        if seen is not None:
            distance = feature_distance(seen(state, y), seen(state, x))
            losses, metrics = losses + perceptual * distance, metrics | {'features': mean(distance)}
        return losses, metrics

    def loss(params: PyTree, state: State, batch: Batch, key: jax.Array) -> Objective:
        output = decoded(params, state, batch, key)
        losses, metrics = apart(state, output.logits, batch[wanted])
        return Objective(mean(losses), metrics, output.mutables)

    init = start.from_reference(network.init, context, transform=part_of)
    if not adversarial:
        return minimize(loss, context.tx, init, micro_batches=micro_batches)
    head: Any = config_lib.build(
        discriminator or dict(name='kd.models.discriminator.PatchHead'),
        where=f'{context.stage}.method.discriminator',
    )
    told = Judged(decoded, apart, head, wanted, adversarial, last)
    example = jnp.zeros((1, *context.spec[wanted].shape), context.spec[wanted].dtype)

    def both(key: jax.Array, frozen: Mapping[str, PyTree]) -> dict[str, PyTree]:
        own_key, head_key = jax.random.split(key)
        return {
            NETWORK: call_init(init, own_key, frozen), DISCRIMINATOR: head.init(head_key, example)
        }  # fmt: skip

    tx = context.optimizer(**optimizer) if optimizer else context.tx
    players = {
        DISCRIMINATOR: Player(told.discriminator, tx, micro_batches=micro_batches),
        NETWORK: Player(told.decoder, context.tx, micro_batches=micro_batches),
    }
    return alternate(players, both)


class Judged(NamedTuple):
    """The two losses of a decoder and of the discriminator that it is to mislead.

    Attributes:
      decoded, apart: see `decoder_tuning`.
      head: the discriminator, logits [B] or [B, n] of images.
      wanted: field of the originals.
      weight, last: as `adversarial` and `last` there.
    """

    decoded: Callable[..., Output]
    apart: Callable[..., tuple[jax.Array, dict[str, Any]]]
    head: Any
    wanted: str
    weight: float
    last: str

    def discriminator(self, params, state, batch, key) -> Objective:
        """relu(1 - D(x)) + relu(1 + D(y)), y constant."""
        y = jax.lax.stop_gradient(self.decoded(state.params[NETWORK], state, batch, key).logits)
        variables = state.variables(part=DISCRIMINATOR, params=params)
        real, fake = (self.head.apply(variables, x) for x in (batch[self.wanted], y))
        losses = adversarial_lib.discriminator_hinge(real, fake)
        return Objective(mean(losses.reshape(len(y), -1).mean(1)))

    def decoder(self, params, state, batch, key) -> Objective:
        """That of `decoder_tuning`."""
        x = batch[self.wanted]
        output = self.decoded(params, state, batch, key)

        def misled(y: jax.Array) -> jax.Array:
            logits = self.head.apply(state.variables(part=DISCRIMINATOR), y)
            return adversarial_lib.generator_hinge(logits).reshape(len(y), -1).mean(1)

        losses, metrics = self.apart(state, output.logits, x)
        value = misled(output.logits)
        factor = jnp.float32(1.0)
        if self.last:
            factor = balance(
                lambda params: self.decoded(params, state, batch, key).logits, params, self.last,
                lambda y: self.apart(state, y, x)[0].mean(), lambda y: misled(y).mean(),
            )  # fmt: skip
        losses = losses + self.weight * factor * value
        metrics |= {'adversarial': mean(value), 'balance': mean(jnp.full(len(x), factor))}
        return Objective(mean(losses), metrics, output.mutables)


def balance(
    decode: Callable[[PyTree], jax.Array],
    params: PyTree,
    last: str,
    near: Callable[[jax.Array], jax.Array],
    misled: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """|slope of `near`| / (|slope of `misled`| + 1e-4), at most 1e4, a constant.

    Args:
      decode: (params) -> images.
      params: of the decoder.
      last: path of the leaf by which slopes are taken, 'decoder/conv_out/kernel'.
      near, misled: (images) -> a number each.

    Raises:
      UserError: no such leaf.

    Source: Esser et al. 2021, arXiv:2012.09841, eq. 7, and its release.
    """
    places = {path_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(params)}
    if last not in places:
        raise UserError(f"method.last='{last}' is none of the decoder's: {', '.join(places)}.")

    def of_leaf(leaf: jax.Array) -> jax.Array:
        return decode(
            jax.tree_util.tree_map_with_path(
                lambda path, x: leaf if path_name(path) == last else x, params
            )
        )

    y, pull = jax.vjp(of_leaf, places[last])
    sizes = [jnp.linalg.norm(jnp.ravel(pull(jax.grad(of)(y))[0])) for of in (near, misled)]
    return jax.lax.stop_gradient(jnp.clip(sizes[0] / (sizes[1] + 1e-4), 0.0, 1e4))


def _perceived(
    context: Context, features: tuple[str, ...]
) -> Callable[[State, jax.Array], list[jax.Array]]:
    """Features of images by the frozen `references.perceptual`."""
    if PERCEPTUAL not in context.references:
        raise UserError(
            f'{context.stage}.method.perceptual wants a network, {context.stage}.references.'
            f'{PERCEPTUAL}.'
        )
    network = context.references[PERCEPTUAL]
    known = feature_names(network)
    if not features or set(features) - set(known):
        raise UserError(
            f'{context.stage}.method.features={tuple(features)} must be some of the features of '
            f'{context.stage}.references.{PERCEPTUAL}, which are {", ".join(known)}.'
        )

    def seen(state: State, images: jax.Array) -> list[jax.Array]:
        found = network.apply(state.frozen[PERCEPTUAL], images, capture=features).features
        return [found[name] for name in features]

    return seen


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
