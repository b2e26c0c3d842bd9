"""Matching of mean embeddings under random networks (Zhao and Bilen 2021, arXiv 2110.04181)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.data.transforms.siamese import siamese
from kd.losses.mean_embedding import mean_embedding_distance
from kd.method import Method, Objective, minimize
from kd.methods.dataset import common
from kd.metrics import mean
from kd.ranges import Count


def distribution_matching(
    context: Context,
    *,
    images_per_class: Count,
    network: Mapping[str, Any] | None = None,
    embedding: str = 'features',
    start: str = 'random',
    augmentation: str = '',
) -> Method:
    """Trains images whose mean embeddings are those of real images, class by class.

        loss = sum_c || mean psi(A(synthetic of c)) - mean psi(A(real of c)) ||^2

    with psi a new random network at every step and both sides of a class augmented alike.

    Args:
      context: the stage, whose data are `kd.data.distilled.groups.one_of_each_class`; a batch of m
        groups has m real images of every class.
      images_per_class: of the synthetic set.
      network: block of the architecture of psi; the stage's by default.
      embedding: name of the feature that is the embedding.
      start: see `common.real_start`.
      augmentation: families of siamese augmentation, joined by '_'; '' for none.
    """
    net = common.build_network(context, network, where='network') if network else context.network
    images, labels = common.real_start(context, images_per_class, start)
    classes = context.num_classes
    assert classes is not None
    names = tuple(augmentation.split('_')) if augmentation else ()

    def init(key):
        del key
        return {'params': {'images': jnp.asarray(images)}, 'label': jnp.asarray(labels)}

    def loss(params, state, batch, key) -> Objective:
        net_key, family_key, key = jax.random.split(key, 3)
        variables = net.init(net_key)
        family = jax.random.randint(family_key, (), 0, max(len(names), 1))

        def embed(images):
            """[C, n, ...] -> [C, n, D]."""
            if names:
                alike = lambda k, x: siamese(k, x, names, shared=True, family=family)  # noqa: E731
                images = jax.vmap(alike)(jax.random.split(key, classes), images)
            flat = images.reshape(-1, *images.shape[2:])
            features = net.apply(variables, flat, capture=(embedding,)).features[embedding]
            return features.reshape(*images.shape[:2], -1)

        ours = embed(params['images'].reshape(classes, images_per_class, *images.shape[1:]))
        real = embed(jnp.swapaxes(batch['input'], 0, 1))
        distances = mean_embedding_distance(ours, jax.lax.stop_gradient(real))
        # The paper sums over classes; `Mean` would divide by their number.
        return Objective(mean(distances.sum()[None]))

    return minimize(loss, context.tx, init)
