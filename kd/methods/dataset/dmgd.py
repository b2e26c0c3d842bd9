"""DMGD: training sets sampled one by one from a frozen diffusion model (arXiv 2605.03877)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kd import ranges
from kd.context import Context
from kd.data.distilled import clusters, synthetic
from kd.errors import UserError
from kd.losses.transport import transport_energy
from kd.method import Batch, Change, Method, stepwise
from kd.methods.dataset.class_clusters import AUTOENCODER
from kd.metrics import Metrics, mean
from kd.ranges import Count, Finite, NonNegative, Positive, Size
from kd.sampling import denoiser as denoisers
from kd.sampling import diffusion, guided, soft_label, times
from kd.sampling.denoiser import Denoiser, Prediction
from kd.state import PyTree, State


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """How an image is sampled; the defaults are those of the released code.

    Attributes:
      steps: S of the sampler.
      guidance: omega + 1, of eps_none + guidance (eps_class - eps_none).
      guided_channels: that guidance acts on, the first ones; others are as the class has them, 0
        for all. The released DiT guides 3 of the 4 of a latent.
      transport: rho of the pull towards the class's clusters; 0 for none.
      window: first and last step that is pulled at, by the steps left: S - 1 is the first step.
      sphere, epsilon, iterations, through_plan: of `kd.losses.transport.transport_energy`.
      soft: (high, low), the times between which labels are soft, in the schedule's own times and
        not in steps; () for labels as they are.
      noise, semantic, form: see `kd.sampling.soft_label.mixed`.
      mix_null: whether the row without a class is mixed too, and measured together with the other,
        as released; the paper's equation leaves it.
      embedding: the network's module that embeds labels.
    """

    steps: Count = 50
    guidance: Finite = 4.0
    guided_channels: Size = 0
    transport: NonNegative = 0.5
    window: tuple[Size, Size] = (30, 45)
    sphere: bool = True
    epsilon: Positive = 0.1
    iterations: Count = 5
    through_plan: bool = True
    soft: tuple[Finite, ...] = (900.0, 500.0)
    noise: NonNegative = 0.06
    semantic: NonNegative = 0.01
    form: soft_label.Form = 'released'
    mix_null: bool = True
    embedding: str = 'label'


class Target(NamedTuple):
    """What an image is of, and what there is of its class already.

    Attributes:
      told: the class as the network knows it, int [].
      other: another class.
      centroids, mass: of the class, [K, ...] and [K].
      memory: [M, ...], images that have been made, and room for others.
      number: int [], how many there are.
    """

    told: jax.Array
    other: jax.Array
    centroids: jax.Array
    mass: jax.Array
    memory: jax.Array
    number: jax.Array


def dmgd(context: Context, *, images_per_class: Count, **settings: Any) -> Method:
    """Samples a training set from the teacher; nothing is trained.

    A step makes the next image of every class of its batch, given those that have been made: of
    image i only itself moves, the others are constants.

        x0 = (z_t - sigma eps^) / alpha,   E = sum_ij plan_ij | p(x_i) - p(k_j) |,
        z' = mean - transport deviation grad_{z_t} E + deviation noise       in the window

    with eps^ guided, of soft labels. The state's parameters are `images` [classes * M, ...], in
    order of class, which evaluators and reports of synthetic sets read; `made`, [classes, M, ...],
    are those before they are decoded, and `count` how many there are. An image depends on the
    stage's key, its class and its number, not on batches.

    Args:
      context: the stage: a teacher, a denoiser that is told classes, data of classes
        (`kd.data.distilled.clusters.classes`), and the reference `autoencoder` where the teacher's
        are latents. Its steps times its batch are classes * M.
      images_per_class: M.
      **settings: see `Settings`.

    Raises:
      UserError: other data, a teacher without classes, steps that do not make the set, or a window
        and times that are no interval.

    Source: arXiv 2605.03877; corrections of its description are those of the released code. Its
    variance is learned, where the network says it, and e of a clean label is exactly its own.
    """
    how = _settings(context, settings)
    denoiser = _checked(context, images_per_class)
    source: Any = context.source('train')
    known, shape = np.asarray(source.told), context.spec['input'].shape
    classes, count = len(known), images_per_class
    learned = getattr(context.teacher.module, 'variance', False)
    draw = generator(denoiser, how, learned=learned)
    encoder: Any = context.references.get(AUTOENCODER)
    pixels = shape if encoder is None else encoder.inputs[0].shape[1:]

    def decoded(state: State, made: jax.Array) -> jax.Array:
        if encoder is None:
            return made
        latents = encoder.module.unscaled(made)
        return encoder.module.apply(state.frozen[AUTOENCODER], latents, method='decode')

    def init(key, frozen=None):
        variables = {
            'params': {'images': jnp.zeros((classes * count, *pixels))},
            'label': jnp.asarray(synthetic.class_ordered(classes, count)),
            'made': jnp.zeros((classes, count, *shape)),
            'count': jnp.zeros(classes, jnp.int32),
        }
        return State.create(key, variables, frozen=dict(frozen or {}))

    def propose(state: State, batch: Batch) -> tuple[Change, Metrics]:
        found, label = state.variables(), batch['label']
        number = found['count'][label]

        def one(label, told, centroids, mass, memory, number):
            key = jax.random.fold_in(jax.random.fold_in(state.key, label), number)
            other_key, key = jax.random.split(key)
            target = Target(told, other(other_key, label, known), centroids, mass, memory, number)
            return draw(state.frozen['teacher'], target, key)

        made, energy = jax.vmap(one)(
            label, batch['told'], batch['centroids'], batch['mass'], found['made'][label], number
        )
        images = jnp.clip(decoded(state, made), -1.0, 1.0) if encoder is not None else made

        def change(state: State) -> State:
            # Where a class is full nothing is written.
            rows = jnp.where(number < count, label * count + number, classes * count)
            mutables = {
                **{name: x for name, x in found.items() if name != 'params'},
                'made': found['made'].at[label, number].set(made, mode='drop'),
                'count': found['count'].at[label].add(1),
            }
            state = state.replace(mutables={**state.mutables, state.result: mutables})
            kept = found['params']['images'].at[rows].set(images, mode='drop')
            return state.with_params({'images': kept})

        return change, {'transport': mean(energy)}

    return stepwise(init, propose)


def generator(
    denoiser: Denoiser, settings: Settings, *, learned: bool = False
) -> Callable[[PyTree, Target, jax.Array], tuple[jax.Array, jax.Array]]:
    """`draw(variables, target, key) -> (image [...], energy [])`: the next image of a class.

    One program whatever there is in the memory. The energy is that of the finished image among the
    others. vmap it over classes.

    Args:
      denoiser: told a `label`, with a null one.
      settings: see above.
      learned: whether the network says variances.
    """
    path, grid = denoiser.schedule, times.sampling(denoiser.schedule, settings.steps)
    how: dict[str, Any] = {'variances': True} if learned else {}

    def draw(variables: PyTree, target: Target, key: jax.Array) -> tuple[jax.Array, jax.Array]:
        noise_key, key = jax.random.split(key)
        shape = target.memory.shape[1:]
        z = diffusion.noise(path, noise_key, (1, *shape), float(grid[0]))
        there = jnp.arange(len(target.memory)) <= target.number
        memory = jax.lax.stop_gradient(target.memory)

        def energy(x0: jax.Array) -> jax.Array:
            return transport_energy(
                memory.at[target.number].set(x0, mode='drop'),
                target.centroids, target.mass,
                epsilon=settings.epsilon, iterations=settings.iterations, where=there,
                sphere=settings.sphere, through_plan=settings.through_plan,
            )  # fmt: skip

        ask = _asking(denoiser, variables, target, settings, grid, how)
        x = guided.sample(
            path, ask, z, grid, key,
            pull=jax.vmap(jax.grad(energy)) if settings.transport else None,
            scale=settings.transport, window=settings.window,
        )[0]  # fmt: skip
        return x, energy(x)

    return draw


def _asking(
    denoiser: Denoiser,
    variables: PyTree,
    target: Target,
    settings: Settings,
    grid: np.ndarray,
    how: Mapping[str, Any],
) -> guided.Ask:
    """What the sampler asks: both rows of guidance in one call, and what they say together."""
    assert denoiser.null is not None
    null = jnp.asarray(denoiser.null['label'], target.told.dtype)
    label = jnp.stack([target.told, null])
    shape = target.memory.shape[1:]

    def plain(x: jax.Array, t: jax.Array, key: jax.Array) -> Prediction:
        del key
        return denoiser.apply(variables, x, jnp.broadcast_to(t, (2,)), {'label': label}, **how)

    both = plain
    if settings.soft:
        (high, low), name = settings.soft, settings.embedding
        named = jnp.concatenate([label, target.other[None]])
        found = soft_label.embeddings(
            denoiser, variables, jnp.zeros(shape), grid[0], named, name
        )  # fmt: skip
        rows = 2 if settings.mix_null else 1
        others = jnp.broadcast_to(found[2], found[:rows].shape)

        def softly(x: jax.Array, t: jax.Array, key: jax.Array) -> Prediction:
            mixed = soft_label.mixed(
                key, found[:rows], others, t, high=high, low=low, noise=settings.noise,
                semantic=settings.semantic, form=settings.form,
            )  # fmt: skip
            told, at = found[:2].at[:rows].set(mixed), jnp.broadcast_to(t, (2,))
            return soft_label.told_embeddings(
                denoiser, variables, x, at, {'label': label}, told, name, **how
            )

        both = softly

    channels = jnp.arange(shape[-1])
    weight = jnp.where(
        channels < (settings.guided_channels or shape[-1]), settings.guidance, 1.0
    ).astype(jnp.float32)

    def ask(x: jax.Array, t: jax.Array, key: jax.Array) -> Prediction:
        said = both(jnp.concatenate([x, x]), t, key)
        of_class, of_none = said.x0[:1], said.x0[1:]
        share = None if said.share is None else said.share[:1]
        return Prediction(of_none + weight * (of_class - of_none), {}, share)

    return ask


def other(key: jax.Array, label: jax.Array, known: np.ndarray) -> jax.Array:
    """One of the classes `known` [C] at random, not that of `label`; itself where it is alone."""
    classes = len(known)
    step = jax.random.randint(key, (), 1, max(classes, 2))
    return jnp.asarray(known)[(label + step) % classes]


def _settings(context: Context, given: Mapping[str, Any]) -> Settings:
    where = f'{context.stage}.method'
    ranges.check(Settings, given, where=where)
    try:
        settings = Settings(**given)
    except TypeError as error:
        raise UserError(f'{where}: {error}') from error
    soft, (low, high) = settings.soft, settings.window
    if low > high or len(soft) not in (0, 2) or sorted(soft, reverse=True) != list(soft):
        raise UserError(
            f'{where}: window is (first, last) with first <= last, and soft is (high, low) or (); '
            f'got {tuple(settings.window)} and {tuple(soft)}.'
        )
    if soft and soft[0] == soft[1]:
        raise UserError(f'{where}.soft: its times must differ, got {tuple(soft)}.')
    return settings


def _checked(context: Context, images_per_class: int) -> Denoiser:
    """The teacher as a denoiser that is told classes, of a stage that makes the whole set."""
    stage, source = context.stage, context.source('train')
    if not isinstance(source, clusters.Classes):
        raise UserError(
            f'{stage}.data.source must be kd.data.distilled.clusters.classes, of a stage that '
            'writes clusters.'
        )
    denoiser = denoisers.of_network(context.teacher, context.trained_by.get('teacher'))
    if denoiser.null is None:
        raise UserError(f'{stage}.teacher is told no classes; it must be trained with labels.')
    classes, together = len(source), context.batch_size
    images = classes * images_per_class
    if classes % together or context.steps * together != images:
        raise UserError(
            f'{stage}: a step makes an image of each of {together} classes; {images} images of '
            f'{classes} classes need a batch_size that divides {classes}, and {images} / '
            f'batch_size steps, not {context.steps}.'
        )
    return denoiser
