"""Dataset condensation by matching of gradients (Zhao et al. 2020, arXiv 2006.05929), with siamese
augmentation (Zhao and Bilen 2021, arXiv 2102.08259).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.siamese import siamese
from kd.losses import classification
from kd.losses import gradient_matching as losses
from kd.method import Batch, Method, Objective, minimize
from kd.methods.dataset import common
from kd.metrics import Metrics, mean
from kd.state import State


def gradient_matching(
    context: Context,
    *,
    images_per_class: int,
    network: Mapping[str, Any] | None = None,
    kind: str = 'units',
    restart_every: int = 10,
    network_steps: int = 50,
    network_lr: float = 0.01,
    start: str = 'random',
    augmentation: str = '',
) -> Method:
    """Trains images whose gradients are those of real images, along the training of a network.

        loss = sum_c D( grad CE(synthetic of class c; theta), grad CE(real of class c; theta) )

    After every step the network theta is trained on the synthetic set; it begins anew after
    `restart_every` steps. Both sides of a class are augmented alike.

    Args:
      context: the stage, whose data are `kd.data.groups.one_of_each_class`; a batch of m groups
        has m real images of every class.
      images_per_class: of the synthetic set.
      network: block of the network theta; the stage's by default.
      kind: see `kd.losses.gradient_matching.gradient_distance`.
      restart_every: steps from one initialisation to the next.
      network_steps, network_lr: of full-batch descent on the synthetic set after each step.
      start: see `common.real_start`.
      augmentation: families of siamese augmentation, joined by '_'; '' for none.
    """
    net = common.build_network(context, network, where='network') if network else context.network
    images, labels = common.real_start(context, images_per_class, start)
    classes = len(labels) // images_per_class
    names = tuple(augmentation.split('_')) if augmentation else ()

    def cross_entropy(params, images, labels):
        logits = net.apply({'params': params}, images, train=True).logits
        return classification.cross_entropy(logits, labels).mean()

    def init_images(key):
        del key
        return {'params': {'images': jnp.asarray(images)}, 'label': jnp.asarray(labels)}

    def loss(params, state, batch, key) -> Objective:
        family_key, key = jax.random.split(key)
        family = jax.random.randint(family_key, (), 0, max(len(names), 1))

        def of_class(theta, examples):
            x = examples['input']
            if names:
                x = siamese(examples['key'], x, names, shared=True, family=family)
            return cross_entropy(theta, x, jnp.full(len(x), examples['label']))

        shared = {'key': jax.random.split(key, classes), 'label': jnp.arange(classes)}
        ours = params['images'].reshape(classes, images_per_class, *images.shape[1:])
        distances = losses.gradient_matching(
            of_class,
            state.extra['network'],
            {**shared, 'input': ours},
            {**shared, 'input': jnp.swapaxes(batch['input'], 0, 1)},
            kind=kind,
        )
        return Objective(mean(distances))

    base = minimize(loss, context.tx, init_images)

    def fresh(key):
        return net.init(key)['params']

    def init(key, frozen=None):
        state = base.init(key, frozen)
        return state.replace(extra={'network': fresh(jax.random.fold_in(key, 0))})

    def trained(params, state, key):
        def body(params, key):
            x = state.params['images']
            x = siamese(key, x, names) if names else x
            grads = jax.grad(cross_entropy)(params, x, state.mutables['label'])
            return jax.tree.map(lambda p, g: p - network_lr * g, params, grads), None

        return jax.lax.scan(body, params, jax.random.split(key, network_steps))[0]

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.step_key(), 1)
        due = (state.step % restart_every == 0) & (state.step > 0)
        network = jax.lax.cond(due, lambda: fresh(key), lambda: state.extra['network'])
        state, metrics = base.step(state.replace(extra={**state.extra, 'network': network}), batch)
        network = trained(network, state, jax.random.fold_in(key, 1))
        return state.replace(extra={**state.extra, 'network': network}), metrics

    return Method(init, step)
