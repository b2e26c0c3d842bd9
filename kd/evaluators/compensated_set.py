"""The training set that compensators unfold to, and how good it is.

Source: Zhang et al. 2024, arXiv 2408.06927 (static soft labels, mixed as logits; dynamic ones).
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
from kd.data.distilled import compensator
from kd.data.transforms import augment, standardised
from kd.evaluators import synthetic_set
from kd.losses import divergence
from kd.network import Network
from kd.networks import build_network
from kd.ranges import Count, Finite, NonNegative, Positive, held
from kd.state import State

LABELS = ('static', 'dynamic')
# A set, for training or testing, up to this size lies on the device.
RESIDENT_BYTES = 4 << 30


def mean_logits(
    networks: Mapping[str, Network], variables: Mapping[str, Any], images: jax.Array
) -> jax.Array:
    """What several networks say in evaluation mode, logits [B, C].

    z(x) = 1 / M sum_m f_m(x)
    """
    total = sum(net.apply(variables[name], images).logits for name, net in networks.items())
    return jnp.asarray(total) / len(networks)


def soft_examples(
    networks: Mapping[str, Network],
    variables: Mapping[str, Any],
    images: np.ndarray,
    batch_size: int = 500,
) -> dict[str, np.ndarray]:
    """Images with `mean_logits` for labels, not augmented."""
    label = jax.jit(functools.partial(mean_logits, networks))
    parts = [images[i : i + batch_size] for i in range(0, len(images), batch_size)]
    logits = np.concatenate([np.asarray(label(dict(variables), part)) for part in parts])
    return {'input': np.asarray(images), 'label': logits}


class SoftTraining:
    """Training on logits by AdamW, its rate falling to 0 by a cosine.

    KL( softmax(z' / T) || softmax(g(x') / T) ),   x' mixed of two images

    with z' the same mixture of the logits of the two (static labels), or what the networks say of
    x', after augmentation and mixture (dynamic labels: in a (M + 1)-th of the epochs, since every
    step also runs the M networks).
    """

    @held
    def __init__(
        self,
        network: Network,
        *,
        lr: NonNegative = 1e-3,
        epochs: Count = 400,
        batch_size: Count = 64,
        temperature: Positive = 30.0,
        gradient_scale: Positive = 1.0,
        mixup: NonNegative = 0.8,
        weight_decay: NonNegative = 0.01,
        augmentation: Sequence[Any] = (),
        labels: str = 'static',
        networks: Mapping[str, Network] | None = None,
    ) -> None:
        """Args:
          network: the architecture g.
          lr: largest rate.
          epochs: passes through the set.
          batch_size: of training.
          temperature: T; there is no factor T^2.
          gradient_scale: factor on the loss.
          mixup: parameter of MixUp, with a lambda per image; 0 for none.
          weight_decay: of AdamW.
          augmentation: of `kd.data.transforms.augment`, before MixUp.
          labels: 'static' or 'dynamic'.
          networks: those that label; needed for dynamic labels.

        Raises:
          ValueError: labels of another kind, or dynamic ones without networks.
        """
        if labels not in LABELS:
            raise ValueError(f'labels={labels!r} must be one of {", ".join(map(repr, LABELS))}.')
        if labels == 'dynamic' and not networks:
            raise ValueError("labels='dynamic' needs the networks that label.")
        self.network, self.lr, self.epochs, self.batch_size = network, lr, epochs, batch_size
        self.weight_decay, self.mixup, self.augmentation = weight_decay, mixup, tuple(augmentation)
        self.networks = dict(networks or {}) if labels == 'dynamic' else {}
        self.loss = lambda logits, labels: (
            gradient_scale * divergence.forward_kl(logits, labels, temperature=temperature)
        )
        # One compiled step per kind of set.
        self._evaluate = functools.cache(self._build)

    def passes(self, size: int, of: int = 0, *, soft: bool = True) -> int:
        """Epochs of a set of `size` examples that take as many steps as those of `of` examples."""
        share = len(self.networks) + 1 if soft else 1
        return max(self.epochs * (of or size) // (size * share), 1)

    def __call__(
        self,
        keys: jax.Array,
        examples: Mapping[str, Any],
        test: Mapping[str, Any],
        *,
        variables: Mapping[str, Any] | None = None,
        of: int = 0,
    ) -> np.ndarray:
        """Accuracies [K] of networks trained on `examples`.

        Args:
          keys: one per network.
          examples: `input`, and `label` logits [n, C] or int [n]; the latter take cross-entropy
            and neither MixUp nor dynamic labels.
          test: `input` and `label`.
          variables: of the networks that label, for dynamic labels.
          of: examples that `epochs` counts, to compare sets at equal numbers of steps; 0 for those
            of the set.
        """
        size, soft = len(examples['input']), np.ndim(examples['label']) > 1
        passes = self.passes(size, of, soft=soft)
        given, tested = _placed(examples), _placed(test)
        evaluate = self._evaluate(passes, passes * -(-size // self.batch_size), soft)
        return np.asarray(evaluate(keys, given, tested, self.lr, variables))

    def _build(self, passes: int, steps: int, soft: bool):
        schedule = optax.cosine_decay_schedule(1.0, steps)
        mixup = (('mixup', self.mixup),) if self.mixup and soft else ()
        entries = (*self.augmentation, *mixup)
        dynamic = soft and self.networks

        def tx(rate):
            decay = self.weight_decay
            return optax.adamw(lambda step: rate * schedule(step), weight_decay=decay)

        return synthetic_set.fresh_networks(
            self.network,
            (synthetic_set.Phase(passes, tx),),
            batch_size=self.batch_size,
            transform=augment.compose(entries) if entries else None,
            loss=self.loss if soft else synthetic_set.cross_entropy,
            relabel=functools.partial(mean_logits, self.networks) if dynamic else None,
        )


def _placed(examples: Mapping[str, Any]) -> dict[str, Any]:
    """Inputs and labels on the device, or on the host where they are large."""
    place = jnp.asarray if examples['input'].nbytes <= RESIDENT_BYTES else np.asarray
    return {name: place(examples[name]) for name in ('input', 'label')}


def compensated_training(
    context: Context,
    *,
    network: Mapping[str, Any],
    data: str = 'validation',
    repeats: Count = 5,
    controls: bool = True,
    low: Finite = -np.inf,
    high: Finite = np.inf,
    **training: Any,
) -> Probe:
    """Trains networks on the stage's images, compensated and not, under soft labels.

    Reports `accuracy` and `std` over the networks; with `controls` also `real_accuracy`, that on
    the groups of real images alone for as many steps. In the stage, give it `split='train'`.

    Args:
      context: a stage of `kd.methods.dataset.infer_ufc`.
      network: block of the architecture that is trained.
      data: a split of the recipe's data, not the one of the report.
      repeats: networks.
      controls: see above.
      low, high: range of valid inputs.
      **training: see `SoftTraining`; the networks that label are the stage's references.
    """
    student = build_network(network, context.recipe_source('train'), where='network')
    assert student is not None
    train = SoftTraining(student, networks=context.references, **training)

    judged = context.recipe_source(data)

    @functools.cache
    def test() -> dict[str, np.ndarray]:
        return standardised.everything(judged)

    def run(state: State, batches):
        del batches

        def accuracies(examples, of):
            keys = jax.random.split(jax.random.key(1), repeats)
            return train(keys, examples, test(), variables=state.frozen, of=of)

        images = unfolded(state, low, high)
        labelled = soft_examples(context.references, state.frozen, images)
        found = accuracies(labelled, len(images))
        result = {'accuracy': found.mean(), 'std': found.std(), 'examples': len(images)}
        if controls:
            real = int(np.prod(state.variables()['groups'].shape[:2]))
            alone = {name: value[:real] for name, value in labelled.items()}
            result['real_accuracy'] = accuracies(alone, len(images)).mean()
        return result

    return Probe(run)


def unfolded(state: State, low: float = -np.inf, high: float = np.inf) -> np.ndarray:
    """All images of a state of `infer_ufc`: first the real ones, then those with compensators.

    They are put together on the host, and pass the device group by group: the set may be larger.
    """
    variables = state.variables()
    groups, made = variables['groups'], [*variables['params'].values()]
    images = np.empty((len(made) + 1, *groups.shape), groups.dtype)
    for k in range(len(groups)):
        of_group = jnp.stack([u[k : k + 1] for u in made])
        unfolded = compensator.unfold(groups[k : k + 1], of_group, low, high)
        images[:, k] = np.asarray(unfolded).reshape(images[:, k].shape)
    return images.reshape(-1, *groups.shape[2:])
