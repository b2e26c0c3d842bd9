"""TRADES: accuracy, and answers that an attack does not change (2019, arXiv:1901.08573)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from kd.context import Context
from kd.data.transforms import augment
from kd.losses import divergence, robust
from kd.method import Method, Objective, minimize
from kd.metrics import mean
from kd.network import Network, Output
from kd.ranges import Count, Finite, NonNegative, Positive, Size
from kd.state import PyTree

# (key, loss of inputs [B], inputs) -> attacked inputs.
Attack = Callable[[jax.Array, Callable[[jax.Array], jax.Array], jax.Array], jax.Array]


class Taught(NamedTuple):
    """What `trades_values` returns: values [B], and outputs of both inputs, the clean one first."""

    values: jax.Array
    clean: Output
    adversarial: Output


def trades(
    context: Context,
    *,
    epsilon: NonNegative,
    step: Positive,
    attack_steps: Size = 10,
    beta: NonNegative = 6.0,
    low: Finite = -1.0,
    high: Finite = 1.0,
    jitter: NonNegative = 0.002,
    unroll: bool = False,
    augmentation: tuple = (),
    micro_batches: Count = 1,
) -> Method:
    """Labels, and the divergence between the laws of an input and of the worst one near it.

        loss = CE(y, p(x)) + beta KL(p(x) || p(x')),   x' = argmax KL(p(x) || p(.)) near x

    The attack sees the network in evaluation mode, both terms in training mode; running statistics
    take in the clean inputs, then the attacked ones. Of an elastic network it trains the largest.

    Args:
      context: the stage; needs a network, an optimiser and labelled data.
      epsilon, step, attack_steps, low, high, jitter, unroll: of the attack, in the units of the
        inputs; see `kd.losses.robust.pgd`. Published ones are for [0, 1]: twice as large for
        images in [-1, 1].
      beta: weight of the divergence.
      augmentation: for `kd.data.transforms.augment.augment`.
      micro_batches: parts over which gradients are accumulated.

    Source: Zhang et al. 2019, arXiv:1901.08573.
    """
    network = context.classifier
    attack = attack_of(epsilon, step, attack_steps, low, high, jitter, unroll)

    def loss(params, state, batch, key) -> Objective:
        augment_key, key = jax.random.split(key)
        labels = batch['label']
        batch = augment.augment(augment_key, batch, augmentation, context.num_classes)
        variables, (x,) = state.variables(params=params), network.of(batch)
        found = trades_values(network, variables, x, batch['label'], key, attack, beta)
        metrics = {
            'accuracy': mean(found.clean.logits.argmax(-1) == labels),
            'robust_accuracy': mean(found.adversarial.logits.argmax(-1) == labels),
        }
        return Objective(mean(found.values), metrics, found.adversarial.mutables)

    return minimize(loss, context.tx, network.init, micro_batches=micro_batches)


def attack_of(
    epsilon: float, step: float, steps: int, low: float, high: float, jitter: float, unroll: bool
) -> Attack:
    """`kd.losses.robust.pgd` with its numbers."""

    def attack(key, loss, x):
        return robust.pgd(
            key, loss, x, epsilon=epsilon, step=step, steps=steps, low=low, high=high,
            jitter=jitter, unroll=unroll,
        )  # fmt: skip

    return attack


def trades_values(
    network: Network,
    variables: PyTree,
    x: jax.Array,
    labels: jax.Array,
    key: jax.Array,
    attack: Attack,
    beta: float,
) -> Taught:
    """The loss of each example, with its attack."""
    attack_key, clean_key, adversarial_key = jax.random.split(key, 3)
    still = jax.lax.stop_gradient(variables)
    law = network.apply(still, x).logits
    attacked = attack(
        attack_key, lambda x: divergence.forward_kl(network.apply(still, x).logits, law), x
    )
    clean, adversarial = both(network, variables, x, attacked, clean_key, adversarial_key)
    values = robust.trades(clean.logits, adversarial.logits, labels, beta=beta)
    return Taught(values, clean, adversarial)


def both(
    network: Network,
    variables: PyTree,
    x: jax.Array,
    attacked: jax.Array,
    clean_key: jax.Array,
    adversarial_key: jax.Array,
    **options: Any,
) -> tuple[Output, Output]:
    """Outputs in training mode; what the first has changed, the second sees."""
    clean = network.apply(variables, x, train=True, key=clean_key, **options)
    after = {**variables, **clean.mutables}
    return clean, network.apply(after, attacked, train=True, key=adversarial_key, **options)
