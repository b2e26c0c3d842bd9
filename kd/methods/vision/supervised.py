"""Training on labels: teachers, and students that learn alone."""

from __future__ import annotations

import jax

from kd.context import Context
from kd.data.transforms import augment
from kd.losses import classification
from kd.method import Method, Objective, minimize
from kd.methods import start
from kd.metrics import mean
from kd.ranges import Count, Fraction


def supervised(
    context: Context,
    *,
    label_smoothing: Fraction = 0.0,
    fresh: str = '',
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """Cross-entropy with the labels.

        loss(x, y) = -sum_k q_k log softmax(f(x))_k,   q = (1 - eps) onehot(y) + eps / K

    Args:
      context: the stage; needs a network, an optimiser and labelled data. The network begins as
        `references.start`, if there is one.
      label_smoothing: eps.
      fresh: regular expression of the parameters that begin anew all the same: '^head' for a head
        of other classes; '' for none.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.
    """
    network = context.classifier

    def loss(params, state, batch, key) -> Objective:
        augment_key, dropout_key = jax.random.split(key)
        labels = batch['label']
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        variables = state.variables(params=params)
        output = network.apply(variables, *network.of(batch), train=True, key=dropout_key)
        losses = classification.cross_entropy(
            output.logits, batch['label'], label_smoothing=label_smoothing
        )
        correct = output.logits.argmax(-1) == labels
        return Objective(mean(losses), {'accuracy': mean(correct)}, output.mutables)

    transform = start.all_but(fresh) if fresh else None
    init = start.from_reference(network.init, context, transform=transform)
    return minimize(loss, context.tx, init, micro_batches=micro_batches)
