"""Inter-class feature compensators (Zhang et al. 2024, arXiv 2408.06927)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd.context import Context
from kd.data.distilled import compensator, synthetic
from kd.data.transforms import augment
from kd.errors import UserError
from kd.losses import batch_statistics, classification
from kd.losses.batch_statistics import LayerStatistics
from kd.method import Batch, Change, Method, stepwise
from kd.metrics import Metrics, mean, scalar
from kd.network import Network
from kd.ranges import Count, NonNegative, Size
from kd.state import PyTree, State


def infer_ufc(
    context: Context,
    *,
    images_per_class: Count,
    statistics_weight: NonNegative = 1.0,
    first_weight: NonNegative = 10.0,
    shift: Size = 4,
    augmentation: Sequence[Any] = (),
    groups: Size = 0,
    together: Size = 0,
) -> Method:
    """Trains one additive image per group of real images and per network, shared by all classes.

        min over u  CE( f_m( J(P_k + u) ), classes )
                    + statistics_weight sum_l w_l ( || var_l - var^_l ||_2 + || mu_l - mu^_l ||_2 )

    for every group P_k of one real image per class and every frozen network f_m, apart from all
    others; J is `augmentation` and then a random cyclic shift, drawn anew for every step and group.
    The state's parameters are {network: compensators [k, 1, ...]}, its mutables the `groups`
    [k, C, ...]; `kd.evaluators.compensated_set` makes the training set of them.

    A step computes with k C images, all of a group being normalised together. Where there are many
    devices, shard the classes: `sharding=((r'groups$', (None, 'data')),)`.

    Args:
      context: the stage; its references are the networks, trained, with batch normalisation. Its
        batches are not used.
      images_per_class: the storage that groups and compensators share.
      statistics_weight: weight of the feature statistics.
      first_weight: w of the first normalisation layer; all others weigh 1.
      shift: largest shift in pixels, the same for a group.
      augmentation: of `kd.data.transforms.augment`, differentiable; the paper's are the same for a
        group, `shared`.
      groups: k, instead of as many as fit.
      together: groups computed at a time, to save memory; 0 for all.

    Raises:
      UserError: no references, a class too small, or too little storage for a group.

    Source: arXiv 2408.06927, as released; the compensator stored is the last one.
    """
    networks = context.references
    if not networks:
        raise UserError(f'{context.stage}.references must name the trained networks.')
    real = real_groups(context, images_per_class, len(networks), groups)
    count = len(real)
    transform = augment.compose(augmentation)

    def loss(u, variables, net, group, key):
        images = transform(jax.random.fold_in(key, 1), {'input': group + u})['input']
        images = compensator.cyclic_shift(key, images, shift)
        return objective(
            net, variables, images, statistics_weight=statistics_weight, first_weight=first_weight
        )

    def init(key, frozen=None):
        u = {name: jnp.zeros((count, 1, *real.shape[2:])) for name in networks}
        # From the host when it runs: as a constant, gigabytes would be compiled into the program.
        groups = jax.pure_callback(
            lambda: real, jax.ShapeDtypeStruct(real.shape, real.dtype), vmap_method='sequential'
        )
        variables = {'params': u, 'groups': groups}
        return State.create(key, variables, context.tx.init(u), frozen=dict(frozen or {}))

    def propose(state: State, batch: Batch) -> tuple[Change, Metrics]:
        del batch
        keys = jax.random.split(state.step_key(), count)
        grads, metrics = _gradients(loss, networks, state, keys, together or count)

        def change(state: State) -> State:
            params = state.variables()['params']
            updates, opt_state = context.tx.update(grads, state.opt_state, params)
            state = state.with_params(optax.apply_updates(params, updates))
            return state.replace(opt_state=opt_state)

        return change, {**metrics, 'grad_norm': scalar(optax.tree.norm(grads))}

    return stepwise(init, propose)


def objective(
    network: Network,
    variables: PyTree,
    images: jax.Array,
    *,
    statistics_weight: float,
    first_weight: float = 10.0,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss of one image per class, in order, and its two parts; see `infer_ufc`."""
    logits, layers = normalisation_inputs(network, variables, images)
    distance = batch_statistics.statistics_distance(layers, first_weight=first_weight)
    labels = jnp.arange(len(images))
    cross_entropy = classification.cross_entropy(logits, labels).mean()
    return cross_entropy + statistics_weight * distance, (cross_entropy, distance)


def _gradients(
    loss: Callable, networks: Mapping[str, Network], state: State, keys: jax.Array, together: int
) -> tuple[dict[str, PyTree], Metrics]:
    """Gradients of all compensators, and the mean parts of their losses by network."""
    grads: dict[str, PyTree] = {}
    metrics: Metrics = {}
    made = state.variables()
    for name, net in networks.items():

        def one(given, net=net, variables=state.frozen[name]):
            u, group, key = given
            return jax.grad(loss, has_aux=True)(u, variables, net, group, key)

        given = made['params'][name], made['groups'], keys
        # Without a loop where all go together: XLA for CPU runs convolutions slowly in one.
        grads[name], (cross_entropy, distance) = (
            jax.vmap(one)(given)
            if together >= len(keys)
            else jax.lax.map(one, given, batch_size=together)
        )
        metrics[f'{name}/cross_entropy'] = mean(cross_entropy)
        metrics[f'{name}/statistics'] = mean(distance)
    return grads, metrics


def real_groups(
    context: Context, images_per_class: int, networks: int, groups: int = 0
) -> np.ndarray:
    """The groups [k, C, ...] of the recipe's training data; see `infer_ufc`."""
    source, classes = context.recipe_source('train'), context.num_classes
    if classes is None:
        raise UserError(f'{context.stage}: compensators need data with class labels.')
    try:
        count = groups or compensator.group_count(images_per_class, networks, classes)
        if context.locate is None:  # A recipe that is only checked.
            return np.broadcast_to(np.float32(0), (count, classes, *source.spec['input'].shape))
        rng = np.random.default_rng(context.recipe.seed)
        chosen = compensator.group_indices(rng, synthetic.labels_of(source), count, classes)
    except ValueError as error:
        raise UserError(f'{context.stage}: {error}') from error
    images = source.fetch(chosen.reshape(-1))['input']
    return images.reshape(*chosen.shape, *images.shape[1:])


def normalisation_inputs(
    network: Network, variables: PyTree, images: jax.Array
) -> tuple[jax.Array, list[LayerStatistics]]:
    """Logits in evaluation mode, and what enters every layer of batch normalisation, in order.

    Raises:
      ValueError: a network without batch normalisation.
    """
    seen: list[tuple[tuple[str, ...], jax.Array]] = []

    def record(next_function, args, kwargs, context):
        if isinstance(context.module, nn.BatchNorm) and context.method_name == '__call__':
            seen.append((context.module.path, args[0]))
        return next_function(*args, **kwargs)

    with nn.intercept_methods(record):
        logits = network.apply(variables, images).logits
    if not seen:
        raise ValueError("The network has no batch normalisation; build it with norm='batch'.")
    layers = []
    for path, features in seen:
        running = variables['batch_stats']
        for name in path:
            running = running[name]
        layers.append(
            LayerStatistics(
                *batch_statistics.statistics_of(features), running['mean'], running['var']
            )
        )
    return logits, layers
