"""What a linear map reads in the features of a network that has seen no labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
import scipy.special
from jax.typing import ArrayLike

from kd.context import Context, Probe
from kd.data import sources
from kd.errors import UserError
from kd.ranges import Count, NonNegative, Size, SplitName


def logistic_regression(
    features: ArrayLike, labels: ArrayLike, classes: int, *, penalty: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The minimum of sum_i CE(y_i, W^T x_i + b) + (penalty / 2) ||W||^2, in float64 by L-BFGS.

    Args:
      features: [N, D].
      labels: int [N], each one of 0 .. classes - 1.
      classes: K.
      penalty: the inverse of scikit-learn's C; b is not penalised.

    Returns:
      W [D, K] and b [K].
    """
    x = np.asarray(features, np.float64)
    target = np.eye(classes)[np.asarray(labels)]

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = _parts(flat, classes)
        log_p = scipy.special.log_softmax(x @ weight + bias, axis=1)
        slope = np.exp(log_p) - target
        value = -np.sum(target * log_p) + 0.5 * penalty * np.sum(weight**2)
        inner = np.concatenate([x.T @ slope + penalty * weight, slope.sum(0)[None]])
        return float(value), inner.ravel()

    start = np.zeros((x.shape[1] + 1) * classes)
    options = {'maxiter': 2_000, 'maxfun': 4_000, 'ftol': 1e-12, 'gtol': 1e-6}
    found = scipy.optimize.minimize(objective, start, jac=True, method='L-BFGS-B', options=options)
    return _parts(found.x, classes)


def accuracy(
    train: tuple[ArrayLike, ArrayLike],
    test: tuple[ArrayLike, ArrayLike],
    classes: int,
    *,
    penalty: float = 1.0,
) -> float:
    """Of `logistic_regression` on features that the training ones standardise.

    Args:
      train, test: (features [N, D], labels [N]) of each; a feature that is constant stays 0.
      classes, penalty: as above.
    """
    x = np.asarray(train[0], np.float64)
    mean, deviation = x.mean(0), x.std(0)
    scale = np.where(deviation > 0, deviation, 1.0)
    weight, bias = logistic_regression((x - mean) / scale, train[1], classes, penalty=penalty)
    said = ((np.asarray(test[0], np.float64) - mean) / scale) @ weight + bias
    return float(np.mean(said.argmax(1) == np.asarray(test[1])))


def few_shot(
    train: tuple[ArrayLike, ArrayLike],
    test: tuple[ArrayLike, ArrayLike],
    classes: int,
    shots: int,
    *,
    draws: int = 10,
    penalty: float = 1.0,
) -> float:
    """Mean `accuracy` from `shots` examples of each class, over draws 0, 1, ... of them.

    The draws are the same whatever the features.

    Raises:
      UserError: a class with fewer examples.
    """
    x, y = (np.asarray(of) for of in train)
    return float(
        np.mean(
            [
                accuracy((x[rows], y[rows]), test, classes, penalty=penalty)
                for rows in (chosen(y, classes, shots, draw) for draw in range(draws))
            ]
        )
    )


def chosen(labels: ArrayLike, classes: int, shots: int, draw: int) -> np.ndarray:
    """Rows of `shots` examples of each class; raises UserError where a class has fewer."""
    rng, y = np.random.default_rng([draw, shots]), np.asarray(labels)
    found = []
    for label in range(classes):
        rows = np.flatnonzero(y == label)
        if len(rows) < shots:
            raise UserError(
                f'class {label} has {len(rows)} examples, and {shots} are wanted; give the probe '
                'fewer shots, or a larger limit.'
            )
        found.append(rng.permutation(rows)[:shots])
    return np.concatenate(found)


def linear_probe(
    context: Context,
    *,
    train: SplitName = 'train',
    shots: Sequence[Count] = (),
    draws: Count = 10,
    penalty: NonNegative = 1.0,
    feature: str = '',
    skip: Size = 1,
    limit: Size = 0,
    batch_size: Count = 256,
    weights: str = 'final',
) -> Probe:
    """Accuracy of a logistic regression on the stage's features, fitted on another split.

    Reports `accuracy` from all labels, and `shots_5`, the mean over draws of 5 labels a class, for
    each of `shots`. Features [B, tokens, D] are averaged over the tokens, maps over positions.

    Args:
      context: the stage; its data has labels.
      train: the split to fit on.
      shots: labels of a class.
      draws: of such labels.
      penalty: see `logistic_regression`.
      feature: name of a captured feature; '' for what the network returns.
      skip: tokens in front that are left out, the class token.
      limit: examples of `train` at most; 0 for all.
      batch_size: of them.
      weights: 'final' for the parameters, or the name of an average.
    """
    classes, network = context.num_classes, context.network
    if classes is None:
        raise UserError('linear_probe needs data with class labels.')
    source = context.recipe_source(train)

    @jax.jit
    def pooled(variables, *inputs):
        output = network.apply(variables, *inputs, capture=(feature,) if feature else ())
        return pool(output.features[feature] if feature else output.logits, skip)

    def read(variables, batches: Iterable) -> tuple[np.ndarray, np.ndarray]:
        found = []
        for batch in batches:
            x = np.asarray(pooled(variables, *network.of(batch)))
            real = np.asarray(batch.get('mask', np.ones(len(x), bool)))
            found.append((x[real], np.asarray(batch['label'])[real]))
        features, labels = zip(*found, strict=True)
        return np.concatenate(features), np.concatenate(labels)

    def run(state, batches):
        variables = state.variables(None if weights == 'final' else weights)
        fitted = read(variables, _batches(source, limit, batch_size))
        test = read(variables, batches)
        found = {'accuracy': accuracy(fitted, test, classes, penalty=penalty)}
        for count in shots:
            found[f'shots_{count}'] = few_shot(
                fitted, test, classes, count, draws=draws, penalty=penalty
            )
        return found

    return Probe(run)


def pool(features: jax.Array, skip: int = 1) -> jax.Array:
    """[B, D] float32: [B, D] as they are, tokens averaged from `skip` on, maps over positions."""
    x = features.astype(jnp.float32)
    if x.ndim == 3:
        x = x[:, skip:]
    return x.mean(tuple(range(1, x.ndim - 1))) if x.ndim > 2 else x


def _batches(source: sources.Source, limit: int, size: int) -> Iterable[sources.Batch]:
    """All or the first `limit` examples; the last batch is filled up, and says so."""
    count = min(limit or len(source), len(source))
    for first in range(0, count, size):
        rows = np.arange(first, first + size)
        yield {**source.fetch(np.minimum(rows, count - 1)), 'mask': rows < count}


def _parts(flat: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    table = flat.reshape(-1, classes)
    return table[:-1], table[-1]
