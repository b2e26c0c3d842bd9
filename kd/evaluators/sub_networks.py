"""How good are the parts of an elastic network, with their own running statistics?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators.classification import negative_log_likelihood, top_k_correct
from kd.losses import robust
from kd.models import elastic
from kd.models.elastic_space import Architecture
from kd.network import Network
from kd.ranges import Count, Finite, NonNegative, Positive, Size
from kd.state import PyTree

# (variables, architectures by name [n, ...]) -> accuracies, clean and attacked, float [n, 2].
Measure = Callable[[PyTree, Architecture], np.ndarray]
_SEED = 17


def sub_networks(
    context: Context,
    *,
    random: Size = 20,
    epsilon: NonNegative,
    step: Positive,
    steps: Count = 10,
    low: Finite = -1.0,
    high: Finite = 1.0,
    jitter: NonNegative = 0.002,
    examples: Size = 0,
    calibration: Size = 2_000,
    batch: Count = 500,
    together: Count = 8,
    unroll: bool = False,
) -> Probe:
    """Accuracy, clean and under projected gradients, of the smallest, the largest and others.

    `smallest_clean`, `smallest_robust`, `largest_...`, and `random_...`, the mean over `random`
    architectures, always the same ones. Running statistics are those of clean training images.

    Args:
      context: the stage, of an elastic network.
      random: architectures drawn.
      epsilon, step, steps, low, high, jitter, unroll: of the attack; see `kd.losses.robust.pgd`.
      examples: of the split that are looked at; 0 for all.
      calibration: training images for running statistics.
      batch: images at a time.
      together: architectures at a time.
    """
    network = context.classifier
    space = elastic.elastic(network, f'{context.stage}.network').space()
    attack = dict(
        epsilon=epsilon, step=step, steps=steps, low=low, high=high, jitter=jitter, unroll=unroll
    )

    def run(state, batches):
        measure = measurer(
            network, *taken(network, batches, examples), images(context, calibration, batch),
            attack, together=together, batch=batch,
        )  # fmt: skip
        ends = {'smallest': space.smallest(), 'largest': space.largest()}
        drawn = draw(network, np.arange(random))
        stacked = _joined([*({k: v[None] for k, v in a.items()} for a in ends.values()), drawn])
        found = measure(state.variables(), stacked)
        rows = dict(zip(ends, found, strict=False))
        if random:
            rows['random'] = found[2:].mean(0)
        return {
            f'{name}_{kind}': float(value)
            for name, values in rows.items()
            for kind, value in zip(('clean', 'robust'), values, strict=True)
        }

    return Probe(run)


def draw(network: Network, numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Architectures [n, ...] by their numbers, the same for every run."""
    space = elastic.elastic(network, 'the network').space()
    sample = jax.jit(jax.vmap(lambda i: space.sample(jax.random.fold_in(jax.random.key(_SEED), i))))
    return jax.device_get(sample(jnp.asarray(numbers)))


def measurer(
    network: Network,
    inputs: np.ndarray,
    labels: np.ndarray,
    calibration: np.ndarray | None,
    attack: Mapping[str, Any],
    *,
    together: int = 8,
    batch: int = 500,
) -> Measure:
    """What measures architectures.

    Args:
      network: elastic.
      inputs, labels: [N, ...] and int [N].
      calibration: inputs [n, B, ...] for running statistics; None for those of the variables.
      attack: keywords of `kd.losses.robust.pgd`, on the cross-entropy.
      together, batch: architectures and inputs at a time.
    """

    def right(variables, arch, x, y):
        def logits(x):
            return network.apply(variables, x, arch=arch).logits

        attacked = robust.pgd(
            jax.random.key(_SEED), lambda x: negative_log_likelihood(logits(x), y), x, **attack
        )
        return jnp.stack([top_k_correct(logits(z), y).sum() for z in (x, attacked)])

    @jax.jit
    @jax.vmap
    def calibrated(variables, arch):
        if calibration is None:
            return variables
        return elastic.recalibrate(network, variables, calibration, arch)

    counted = jax.jit(jax.vmap(right, (0, 0, None, None)))

    def measure(variables: PyTree, architectures: Architecture) -> np.ndarray:
        found = []
        for begin in range(0, len(next(iter(architectures.values()))), together):
            arch = {name: x[begin : begin + together] for name, x in architectures.items()}
            size = len(next(iter(arch.values())))
            # The last ones are as many as the others, so that there is one program.
            arch = {name: np.resize(x, (together, *x.shape[1:])) for name, x in arch.items()}
            many = jax.tree.map(lambda x: jnp.broadcast_to(x, (together, *x.shape)), variables)
            own, sums = calibrated(many, arch), np.zeros((together, 2))
            for first in range(0, len(labels), batch):
                rows = slice(first, first + batch)
                sums += np.asarray(counted(own, arch, inputs[rows], labels[rows]))
            found.append(sums[:size] / len(labels))
        return np.concatenate(found)

    return measure


def taken(
    network: Network, batches: Iterable[Mapping[str, jax.Array]], examples: int
) -> tuple[np.ndarray, np.ndarray]:
    """The first examples that an evaluation brings, all for 0: inputs and labels."""
    (field,), inputs, labels, count = network.fields, [], [], 0
    for each in batches:
        mask = np.asarray(each['mask'])
        inputs.append(np.asarray(each[field])[mask])
        labels.append(np.asarray(each['label'])[mask])
        count += int(mask.sum())
        if 0 < examples <= count:
            break
    end = examples or count
    return np.concatenate(inputs)[:end], np.concatenate(labels)[:end]


def images(context: Context, count: int, batch: int) -> np.ndarray | None:
    """Training inputs [n, B, ...] for running statistics; None where the network has no norm."""
    network = context.classifier
    abstract = jax.eval_shape(network.init, jax.random.key(0))
    if elastic.STATISTICS not in abstract or not count:
        return None
    source = context.source('train')
    if len(source) < min(count, batch):
        raise UserError(
            f'{context.stage}: calibration={count} images are wanted, and there are {len(source)} '
            'for training.'
        )
    size = min(batch, count)
    rows = np.arange(count // size * size) % len(source)
    (field,) = network.fields
    found = source.fetch(rows)[field]
    return found.reshape(-1, size, *found.shape[1:])


def _joined(parts: Sequence[Architecture]) -> dict[str, np.ndarray]:
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
