"""What the methods of dataset distillation share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd import networks
from kd.context import Context
from kd.data.distilled import synthetic
from kd.data.transforms import standardised
from kd.errors import UserError
from kd.io import trajectories
from kd.models import convnet
from kd.network import Network, from_linen
from kd.state import PyTree, State


def in_loops(network: Network, context: Context) -> Network:
    """The same function as it is best computed inside of a loop on the stage's devices."""
    on = context.mesh.devices.flat[0].platform if context.mesh else jax.default_backend()
    module = convnet.in_loops(network.module, on)
    return network if module is network.module else from_linen(module, *network.inputs)


def student(context: Context) -> Network:
    """The network that the inner loop trains: the stage's, or that of its trajectories."""
    if context.optional_network is not None:
        return context.optional_network
    source = context.config.data.get('source', {})
    if 'network' not in source:
        raise UserError(
            f'{context.stage}.data.source must be kd.data.distilled.trajectories.segments '
            'and name the network of the trajectories.'
        )
    return build_network(context, source['network'], where=f'{context.stage}.data.source.network')


def build_network(context: Context, block: Mapping[str, Any], *, where: str) -> Network:
    """A network for the recipe's data from its config block."""
    network = networks.build_network(block, context.recipe_source('train'), where=where)
    if network is None:
        raise UserError(f'{where} names no network.')
    return network


def unraveller(network: Network) -> Callable[[jax.Array], PyTree]:
    """`unravel([P]) -> params`, the inverse of `jax.flatten_util.ravel_pytree`."""
    abstract = jax.eval_shape(network.init, jax.random.key(0))['params']
    leaves, treedef = jax.tree.flatten(abstract)
    ends = np.cumsum([x.size for x in leaves])

    def unravel(vector: jax.Array) -> PyTree:
        parts = jnp.split(vector, ends[:-1])
        shaped = [
            part.reshape(x.shape).astype(x.dtype) for part, x in zip(parts, leaves, strict=True)
        ]
        return jax.tree.unflatten(treedef, shaped)

    return unravel


def real_start(
    context: Context,
    images_per_class: int,
    kind: str,
    *,
    experts: str = '',
    network: Network | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Images and labels a synthetic set starts from, ordered by class.

    Args:
      context: the stage; the images are those of the recipe's 'train' split.
      images_per_class: of every class.
      kind: 'random' or 'noise', or 'kmeans' or 'herding' in the space of the pixels or, with
        `experts`, of the logits of the first expert's last snapshot.
      experts: stage of the experts; '' for pixels.
      network: of the experts.

    Raises:
      UserError: unlabelled data, an unknown kind, or a class smaller than `images_per_class`.
    """
    source, classes = context.recipe_source('train'), context.num_classes
    if classes is None:
        raise UserError(f'{context.stage}: dataset distillation needs data with class labels.')
    if kind not in synthetic.STARTS:
        known = ', '.join(synthetic.STARTS)
        raise UserError(f'{context.stage}: a synthetic set starts from {known}; got {kind!r}.')
    labels = synthetic.class_ordered(classes, images_per_class)
    if len(labels) > len(source):
        raise UserError(
            f'{context.stage}: {images_per_class} images of each of {classes} classes are more '
            f'than the {len(source)} there are; lower images_per_class.'
        )
    shape = (len(labels), *source.spec['input'].shape)
    if context.locate is None:  # A recipe that is only checked.
        return np.zeros(shape, np.float32), labels
    seed = context.recipe.seed
    if kind == 'noise':
        return np.random.default_rng(seed).standard_normal(shape, np.float32), labels
    features = None
    if kind == 'random':
        of_source = synthetic.labels_of(source)
    else:
        real = standardised.everything(source)
        of_source, features = real['label'], real['input'].reshape(len(source), -1)
        if experts:
            assert network is not None
            features = expert_logits(context, experts, network, real['input'])
    try:
        chosen = synthetic.start_indices(
            kind, of_source, images_per_class, features=features, seed=seed, num_classes=classes
        )
    except ValueError as error:
        raise UserError(f'{context.stage}: {error}') from error
    real = source.fetch(chosen)
    return real['input'], real['label']


def expert_logits(
    context: Context, experts: str, network: Network, images: np.ndarray
) -> np.ndarray:
    """Logits [N, classes] of the first expert after its last epoch."""
    assert context.locate is not None
    buffer = trajectories.Buffer(context.locate(experts))
    params = unraveller(network)(jnp.asarray(buffer.snapshot(0, buffer.manifest.epochs)))
    apply = jax.jit(lambda x: network.apply({'params': params}, x).logits)
    parts = [apply(images[i : i + 1000]) for i in range(0, len(images), 1000)]
    return np.concatenate([np.asarray(part) for part in parts])


def optimiser(
    context: Context, params: Mapping[str, Any], step_size_optimizer: Mapping[str, Any] | None
) -> optax.GradientTransformation:
    """The stage's optimiser for images and labels, another one for the step size if given."""
    if not step_size_optimizer:
        return context.tx
    kinds = {name: 'step_size' if 'step_size' in name else 'images' for name in params}
    rate = context.optimizer(**step_size_optimizer)
    return optax.partition({'images': context.tx, 'step_size': rate}, kinds)


def with_gradient(value: jax.Array, params: PyTree, grads: PyTree) -> jax.Array:
    """`value`, with `grads` for its derivative with respect to `params`."""
    stop = jax.lax.stop_gradient

    def term(p, g):
        return jnp.sum(stop(g) * (p - stop(p)))

    terms = jax.tree.leaves(jax.tree.map(term, params, grads))
    return stop(value) + sum(terms, start=jnp.float32(0.0))


def fixed_set(context: Context, images: np.ndarray, labels: np.ndarray) -> Callable[..., State]:
    """`init(key, frozen)` of a state that holds a set as it is."""

    def init(key, frozen=None):
        variables = {'params': {'images': jnp.asarray(images)}, 'label': jnp.asarray(labels)}
        return State.create(key, variables, frozen=dict(frozen or {}))

    return init
