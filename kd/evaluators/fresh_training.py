"""A synthetic set judged by networks trained on it from scratch, as an evaluator of its stage."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from kd import figures, metrics
from kd.context import Context, Probe
from kd.data import sources
from kd.data.distilled import synthetic
from kd.data.transforms import augment, standardised
from kd.evaluators import synthetic_set
from kd.network import Network
from kd.networks import build_network
from kd.ranges import Count, Decay, NonNegative, Positive, held

log = logging.getLogger('kd')


def fresh_training(
    context: Context,
    *,
    network: Mapping[str, Any] | None = None,
    data: str = 'validation',
    repeats: Count = 5,
    average: str = '',
    step_sizes: Sequence[Positive] = (),
    images: bool = True,
    **protocol: Any,
) -> Probe:
    """Trains `repeats` networks on the stage's synthetic set and tests them on a split.

    Reports `accuracy` and its population deviation `std` over the networks, the `step_size` used,
    and a figure of the set. In the stage, give it `split='train'`: it reads its own split.

    Args:
      context: the stage, whose state is that of a method in `kd.methods.dataset`.
      network: block of the architecture; that of the stage or of its trajectories by default.
      data: a split of the recipe's data, not the one of the report.
      repeats: networks, each initialised and trained with its own key.
      average: an average of the images to judge instead of them.
      step_sizes: learning rates of which the best on the split is taken; the learned one if empty.
      images: draw the set.
      **protocol: see `Protocol`.
    """
    block = network
    if block is None and context.optional_network is None:
        block = context.config.data['source']['network']
    chosen = (
        context.network
        if block is None
        else build_network(block, context.recipe_source('train'), where='network')
    )
    assert chosen is not None
    judge = Protocol(chosen, **protocol)

    judged = context.recipe_source(data)

    @functools.cache
    def test() -> dict[str, np.ndarray]:
        return standardised.everything(judged)

    def run(state, batches):
        del batches
        made = jax.device_get(synthetic.of_state(state, average))
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), 1), repeats)
        accuracies, step_size = judge.best(keys, made, test(), step_sizes)
        result: dict[str, Any] = {
            'accuracy': accuracies.mean(),
            'std': accuracies.std(),
            'step_size': step_size,
        }
        if images:
            result['images'] = page(made, context.recipe_source('train'))
        return result

    return Probe(run)


class Protocol:
    """How a network is trained on a synthetic set: batches, schedule, augmentation."""

    @held
    def __init__(
        self,
        network: Network,
        *,
        epochs: Count = 1000,
        batch_size: Count = 256,
        augmentation: str = '',
        momentum: Decay = 0.9,
        weight_decay: NonNegative = 5e-4,
        drop: NonNegative = 0.1,
        late_momentum: Decay | None = None,
    ) -> None:
        """See `synthetic_set.sgd_phases`; `augmentation` are families joined by '_', '' none."""
        transform = augment.compose((('siamese', augmentation),)) if augmentation else None
        phases = synthetic_set.sgd_phases(
            epochs,
            momentum=momentum,
            weight_decay=weight_decay,
            drop=drop,
            late_momentum=late_momentum,
        )
        self.evaluate = synthetic_set.fresh_networks(
            network, phases, batch_size=batch_size, transform=transform
        )

    def best(
        self,
        keys: jax.Array,
        made: synthetic.SyntheticSet,
        test: Mapping[str, np.ndarray],
        step_sizes: Sequence[float] = (),
    ) -> tuple[np.ndarray, float]:
        """Accuracies [K] at the best of the step sizes, or at the learned one, and that step size.

        Raises:
          ValueError: no step sizes for a set that has none of its own.
        """
        rates = [float(rate) for rate in step_sizes] or [float(made.step_size)]
        if not np.isfinite(rates).all():
            raise ValueError('The set has no learning rate of its own; give step_sizes.')
        tried = [(self(keys, made.examples, test, rate), rate) for rate in rates]
        return tried[metrics.best(accuracies.mean() for accuracies, _ in tried) or 0]

    def __call__(self, keys, examples, test, rate) -> np.ndarray:
        """Accuracies [K] of networks trained on `examples`."""
        if rate < 0:
            log.warning(
                'The learned step size is %.3g: networks trained with it climb their loss. Lower '
                'the lr of step_size_optimizer, or set log_step_size=True.',
                rate,
            )
        tested = {name: jnp.asarray(test[name]) for name in ('input', 'label')}
        examples = {name: jnp.asarray(x) for name, x in examples.items()}
        return np.asarray(self.evaluate(keys, examples, tested, rate))


def pixels(made: synthetic.SyntheticSet, source: sources.Source) -> np.ndarray:
    """The images of a set before standardisation, float32 [n, H, W, C] around [-1, 1]."""
    return source.to_pixels(np.asarray(made.input))


def page(
    made: synthetic.SyntheticSet, source: sources.Source, *, most: int = 10, classes: int = 20
) -> Figure:
    """A page of images, a row for each of the first `classes` classes, at most `most` of each."""
    label = np.asarray(made.label)
    label = label.argmax(-1) if label.ndim > 1 else label
    rows = [np.flatnonzero(label == k)[:most] for k in np.unique(label)[:classes]]
    # A single image per class would make a tower.
    columns = max(len(row) for row in rows)
    names = source.class_names or [str(k) for k in range(label.max() + 1)]
    chosen = np.concatenate(rows)
    return figures.image_page(
        pixels(made, source)[chosen],
        [names[label[i]] for i in chosen],
        columns=columns if columns > 1 else 10,
    )
