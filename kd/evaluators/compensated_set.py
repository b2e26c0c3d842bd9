"""The training set that compensators unfold to, and how good it is.

Source: Zhang et al. 2024, arXiv 2408.06927 (static soft labels, mixed as logits).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from kd.context import Context, Probe
from kd.data import augment, compensator, standardised
from kd.evaluators import synthetic_set
from kd.losses import divergence
from kd.network import Network
from kd.stage import build_network
from kd.state import State


def soft_examples(
    networks: Mapping[str, Network],
    variables: Mapping[str, Any],
    images: np.ndarray,
    batch_size: int = 500,
) -> dict[str, np.ndarray]:
    """Images with the mean logits of several networks for labels, neither augmented.

    z(x) = 1 / M sum_m f_m(x)
    """

    @jax.jit
    def mean_logits(variables, x):
        return sum(net.apply(variables[name], x).logits for name, net in networks.items()) / len(
            networks
        )

    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    logits = np.concatenate([np.asarray(mean_logits(dict(variables), part)) for part in parts])
    return {'input': np.asarray(images), 'label': logits}


class SoftTraining:
    """Training on logits by AdamW, its rate falling to 0 by a cosine.

    KL( softmax(z' / T) || softmax(g(x') / T) ),   x' and z' mixed alike, logits as logits
    """

    def __init__(
        self,
        network: Network,
        *,
        lr: float = 1e-3,
        epochs: int = 400,
        batch_size: int = 64,
        temperature: float = 30.0,
        gradient_scale: float = 1.0,
        mixup: float = 0.8,
        weight_decay: float = 0.01,
        augmentation: Sequence[Any] = (),
    ) -> None:
        """Args:
        network: the architecture g.
        lr: largest rate.
        epochs: passes through the set.
        batch_size: of training.
        temperature: T; there is no factor T^2.
        gradient_scale: factor on the loss.
        mixup: parameter of MixUp; 0 for none.
        weight_decay: of AdamW.
        augmentation: of `kd.data.augment`, before MixUp.
        """
        self.network, self.lr, self.epochs, self.batch_size = network, lr, epochs, batch_size
        self.weight_decay, self.mixup, self.augmentation = weight_decay, mixup, tuple(augmentation)
        self.loss = lambda logits, labels: (
            gradient_scale * divergence.forward_kl(logits, labels, temperature=temperature)
        )
        # One compiled step per kind of set.
        self._evaluate = functools.cache(self._build)

    def __call__(
        self,
        keys: jax.Array,
        examples: Mapping[str, Any],
        test: Mapping[str, Any],
        *,
        of: int = 0,
    ) -> np.ndarray:
        """Accuracies [K] of networks trained on `examples`.

        Args:
          keys: one per network.
          examples: `input`, and `label` logits [n, C] or int [n]; the latter take cross-entropy
            and no MixUp.
          test: `input` and `label`.
          of: examples that `epochs` counts, to compare sets at equal numbers of steps; 0 for those
            of the set.
        """
        size, soft = len(examples['input']), np.ndim(examples['label']) > 1
        passes = max(self.epochs * (of or size) // size, 1)
        given, tested = (
            {k: jnp.asarray(x[k]) for k in ('input', 'label')} for x in (examples, test)
        )
        evaluate = self._evaluate(passes, passes * -(-size // self.batch_size), soft)
        return np.asarray(evaluate(keys, given, tested, self.lr))

    def _build(self, passes: int, steps: int, soft: bool):
        schedule = optax.cosine_decay_schedule(1.0, steps)
        mixup = (('mixup', self.mixup),) if self.mixup and soft else ()
        entries = (*self.augmentation, *mixup)

        def tx(rate):
            decay = self.weight_decay
            return optax.adamw(lambda step: rate * schedule(step), weight_decay=decay)

        return synthetic_set.fresh_networks(
            self.network,
            (synthetic_set.Phase(passes, tx),),
            batch_size=self.batch_size,
            transform=augment.compose(entries) if entries else None,
            loss=self.loss if soft else synthetic_set.cross_entropy,
        )


def compensated_training(
    context: Context,
    *,
    network: Mapping[str, Any],
    data: str = 'validation',
    repeats: int = 3,
    controls: bool = True,
    low: float = -np.inf,
    high: float = np.inf,
    **training: Any,
) -> Probe:
    """Trains networks on the stage's images, compensated and not, under static soft labels.

    Reports `accuracy` and `std` over the networks; with `controls` also `real_accuracy`, that on
    the groups of real images alone for as many steps. In the stage, give it `split='train'`.

    Args:
      context: a stage of `kd.methods.dataset.infer_ufc`.
      network: block of the architecture that is trained.
      data: a split of the recipe's data, not the one of the report.
      repeats: networks.
      controls: see above.
      low, high: range of valid inputs.
      **training: see `SoftTraining`.
    """
    student = build_network(network, context.recipe_source('train'), where='network')
    assert student is not None
    train = SoftTraining(student, **training)

    @functools.cache
    def test() -> dict[str, np.ndarray]:
        return standardised.everything(context.recipe_source(data))

    def accuracies(examples, of):
        keys = jax.random.split(jax.random.key(1), repeats)
        return train(keys, examples, test(), of=of)

    def run(state: State, batches):
        del batches
        images = unfolded(state, low, high)
        labelled = soft_examples(context.references, state.frozen, images)
        found = accuracies(labelled, len(images))
        result = {'accuracy': found.mean(), 'std': found.std(), 'examples': len(images)}
        if controls:
            real = int(np.prod(state.mutables['groups'].shape[:2]))
            alone = {name: value[:real] for name, value in labelled.items()}
            result['real_accuracy'] = accuracies(alone, len(images)).mean()
        return result

    return Probe(run)


def unfolded(state: State, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    """All images of a state of `infer_ufc`: first the real ones, then those with compensators."""
    made = jnp.stack([*state.params.values()])
    return np.asarray(compensator.unfold(state.mutables['groups'], made, low, high))
