"""Synthetic data sets: training sets whose images, and perhaps labels and learning rate, are
trained. How they are held in a state, read out, and started from real images.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd.data import sources
from kd.data.distilled import coreset
from kd.losses import numerics
from kd.state import State

STARTS = ('random', 'noise', 'kmeans', 'herding')


class SyntheticSet(NamedTuple):
    """A training set.

    Attributes:
      input: float32 [n, ...], as networks see them.
      label: int32 [n] or float32 [n, classes], probabilities.
      step_size: float32 scalar, the learning rate that goes with it; NaN where it has none.
    """

    input: Any
    label: Any
    step_size: Any

    @property
    def examples(self) -> dict[str, Any]:
        """What a network is trained on."""
        return {'input': self.input, 'label': self.label}


def parameters(
    images: ArrayLike,
    labels: ArrayLike,
    *,
    step_size: float | None = None,
    log: bool = False,
    num_classes: int | None = None,
) -> dict[str, jax.Array]:
    """What is trained: `images`; `step_size` or its logarithm; `label_logits` if `num_classes`.

    Learned labels are softmax(label_logits), which start at probability 0.9 for the true class.

    Args:
      images: [n, ...].
      labels: int [n], of 0 .. num_classes - 1; NumPy's, which the logits start from.
      step_size: positive; None for a set without one.
      log: whether its logarithm is trained.
      num_classes: at least 2; None for labels that are not trained.

    Raises:
      ValueError: a step size that is not positive, fewer than two classes, or labels that are none
        of them.
    """
    if step_size is not None:
        numerics.check_positive('step_size', step_size)
    params = {'images': jnp.asarray(images, jnp.float32)}
    if step_size is not None:
        name = 'log_step_size' if log else 'step_size'
        params[name] = jnp.float32(np.log(step_size) if log else step_size)
    if num_classes is not None:
        if num_classes < 2:
            raise ValueError(f'Learned labels need at least 2 classes, got {num_classes}.')
        coreset.check_labels(np.asarray(labels), num_classes)
        true = jax.nn.one_hot(labels, num_classes)
        params['label_logits'] = true * np.log(9.0 * (num_classes - 1))
    return params


def decode(params: Mapping[str, Any], label: jax.Array) -> SyntheticSet:
    """The set that parameters stand for; `label` counts where labels are not trained."""
    if 'log_step_size' in params:
        step_size = jnp.exp(params['log_step_size'])
    else:
        step_size = params.get('step_size', jnp.float32(jnp.nan))
    if 'label_logits' in params:
        label = jax.nn.softmax(params['label_logits'])
    return SyntheticSet(params['images'], label, step_size)


def of_state(state: State, average: str = '') -> SyntheticSet:
    """The set of a state; `average` names an averaged copy to take the images from.

    The step size is never averaged.
    """
    variables = state.variables()
    params = variables['params']
    if average:
        params = {**params, 'images': state.variables(average)['params']['images']}
    return decode(params, variables['label'])


def class_ordered(num_classes: int, images_per_class: int) -> np.ndarray:
    """Labels 0, .., 0, 1, .., 1, ...: int32 [classes * images_per_class]."""
    return np.repeat(np.arange(num_classes, dtype=np.int32), images_per_class)


def start_indices(
    kind: str,
    source_labels: np.ndarray,
    images_per_class: int,
    *,
    features: np.ndarray | None = None,
    seed: int = 0,
    num_classes: int | None = None,
) -> np.ndarray:
    """Positions of the real images to start from, by class; `features` [n, D] unless 'random'."""
    if kind == 'random':
        rng = np.random.default_rng(seed)
        return coreset.random_subset(rng, source_labels, images_per_class, num_classes=num_classes)
    if kind in ('kmeans', 'herding'):
        assert features is not None
        function = coreset.kmeans if kind == 'kmeans' else coreset.herding
        extra: dict[str, Any] = {'seed': seed} if kind == 'kmeans' else {}
        extra['num_classes'] = num_classes
        return function(features, source_labels, images_per_class, **extra)
    raise ValueError(f'A synthetic set starts from {", ".join(STARTS)}; got {kind!r}.')


def labels_of(source: sources.Source, chunk: int = 4096) -> np.ndarray:
    """All labels of a split, int32 [N]."""
    size = len(source)
    parts = [np.arange(i, min(i + chunk, size)) for i in range(0, size, chunk)]
    return np.concatenate([source.fetch(part)['label'] for part in parts])
