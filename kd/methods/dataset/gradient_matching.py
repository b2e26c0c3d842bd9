"""Dataset condensation by matching of gradients (Zhao et al. 2020, arXiv 2006.05929), with siamese
augmentation (Zhao and Bilen 2021, arXiv 2102.08259).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.transforms.siamese import siamese
from kd.losses import classification
from kd.losses import gradient_matching as losses
from kd.losses.segments import inner_batches
from kd.method import Batch, Method, Objective, minimize
from kd.methods.dataset import common
from kd.metrics import Metrics, mean
from kd.ranges import Count, NonNegative, Size
from kd.state import PyTree, State


def gradient_matching(
    context: Context,
    *,
    images_per_class: Count,
    network: Mapping[str, Any] | None = None,
    kind: str = 'units',
    restart_every: Count = 10,
    network_steps: Size = 50,
    network_lr: NonNegative = 0.01,
    network_batch: Size = 0,
    start: str = 'random',
    augmentation: str = '',
) -> Method:
    """Trains images whose gradients are those of real images, along the training of a network.

        loss = sum_c D( grad CE(synthetic of class c; theta), grad CE(real of class c; theta) )

    After every step the network theta is trained on the synthetic set; it begins anew after
    `restart_every` steps (with 1, it is not trained). Both sides of a class are augmented alike.

    Args:
      context: the stage, whose data are `kd.data.distilled.groups.one_of_each_class`; a batch of m
        groups has m real images of every class.
      images_per_class: of the synthetic set.
      network: block of the network theta; the stage's by default.
      kind: see `kd.losses.gradient_matching.gradient_distance`.
      restart_every: steps from one initialisation to the next.
      network_steps, network_lr: of descent on the synthetic set after each step.
      network_batch: synthetic examples per step of it, each once per pass; 0 for all.
      start: see `common.real_start`.
      augmentation: families of siamese augmentation, joined by '_'; '' for none.
    """
    net = common.build_network(context, network, where='network') if network else context.network
    net = common.in_loops(net, context)
    images, labels = common.real_start(context, images_per_class, start)
    names = tuple(augmentation.split('_')) if augmentation else ()

    def cross_entropy(params, images, labels, where=None):
        logits = net.apply({'params': params}, images, train=True).logits
        return jnp.mean(classification.cross_entropy(logits, labels), where=where)

    def init(key):
        del key  # The images are chosen on the host.
        return {'params': {'images': jnp.asarray(images)}, 'label': jnp.asarray(labels)}

    base = minimize(_matched(cross_entropy, names, images_per_class, kind), context.tx, init)
    train = _descent(cross_entropy, names, network_steps, network_lr, network_batch)
    return _along_training(base, lambda key: net.init(key)['params'], train, restart_every)


def _matched(cross_entropy, names, images_per_class, kind) -> Callable[..., Objective]:
    """The loss: the distances of the gradients at `state.extra['network']`, over classes."""

    def loss(params, state, batch, key) -> Objective:
        real = jnp.swapaxes(batch['input'], 0, 1)
        classes = len(real)
        family_key, key = jax.random.split(key)
        family = jax.random.randint(family_key, (), 0, max(len(names), 1))

        def of_class(theta, examples):
            x = examples['input']
            if names:
                x = siamese(examples['key'], x, names, shared=True, family=family)
            return cross_entropy(theta, x, jnp.full(len(x), examples['label']))

        shared = {'key': jax.random.split(key, classes), 'label': jnp.arange(classes)}
        ours = params['images'].reshape(classes, images_per_class, *real.shape[2:])
        distances = losses.gradient_matching(
            of_class,
            state.extra['network'],
            {**shared, 'input': ours},
            {**shared, 'input': real},
            kind=kind,
        )
        # The paper sums over classes; `Mean` would divide by their number.
        return Objective(mean(distances.sum()[None]))

    return loss


def _descent(cross_entropy, names, steps, lr, batch_size) -> Callable[..., PyTree]:
    """`train(params, images, labels, key)`: the network after descent on the set."""

    def train(params, images, labels, key):
        def body(params, step):
            key, rows, where = step
            x, y = (images, labels) if rows is None else (images[rows], labels[rows])
            x = siamese(key, x, names) if names else x
            grads = jax.grad(cross_entropy)(params, x, y, where)
            return jax.tree.map(lambda p, g: p - lr * g, params, grads), None

        rows, where = None, None
        if 0 < batch_size < len(labels):
            rows, where = inner_batches(jax.random.fold_in(key, 0), len(labels), batch_size, steps)
        return jax.lax.scan(body, params, (jax.random.split(key, steps), rows, where))[0]

    return train


def _along_training(base: Method, fresh, train, restart_every) -> Method:
    """`base` with a network in its state, trained after every step and now and then begun anew."""

    def init(key, frozen=None):
        state = base.init(key, frozen)
        return state.replace(extra={'network': fresh(jax.random.fold_in(key, 0))})

    def step(state: State, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(state.step_key(), 1)
        due = (state.step % restart_every == 0) & (state.step > 0)
        network = jax.lax.cond(due, lambda: fresh(key), lambda: state.extra['network'])
        state, metrics = base.step(state.replace(extra={**state.extra, 'network': network}), batch)
        # A network that is used once need not be trained.
        if restart_every > 1:
            made = state.variables()
            network = train(
                network, made['params']['images'], made['label'], jax.random.fold_in(key, 1)
            )
        return state.replace(extra={**state.extra, 'network': network}), metrics

    return Method(init, step)
