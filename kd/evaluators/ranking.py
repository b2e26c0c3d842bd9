"""Do scores put the right things first? Exact, over all scores at once; NumPy and SciPy."""

from __future__ import annotations

import jax
import numpy as np
from jax.typing import ArrayLike
from scipy.stats import rankdata

from kd.context import Context, Probe
from kd.errors import UserError
from kd.evaluators.classification import predictor


def roc_auc(scores: ArrayLike, positive: ArrayLike) -> float:
    """The chance that a positive example has a larger score than a negative one; ties count half.

        (sum of the ranks of the positives - P (P + 1) / 2) / (P N)

    Args:
      scores: [n], finite or infinite.
      positive: bool [n], P true and N false.

    Returns:
      In [0, 1], the area under the ROC curve; NaN where all are positive or none is, or a score is
      NaN.
    """
    scores, positive = _given(scores, positive)
    count = int(positive.sum())
    if count in (0, len(positive)) or np.isnan(scores).any():
        return float('nan')
    above = rankdata(scores)[positive].sum() - count * (count + 1) / 2
    return float(above / (count * (len(positive) - count)))


def average_precision(scores: ArrayLike, positive: ArrayLike) -> float:
    """Precision at each score, weighted by the share of positives that it adds: the area under PR.

        sum_k precision_k (recall_k - recall_{k-1})

    over the distinct scores from above. Arguments as of `roc_auc`; NaN without a positive.
    """
    scores, positive = _given(scores, positive)
    if not positive.any() or np.isnan(scores).any():
        return float('nan')
    order = np.argsort(-scores, kind='stable')
    hits = np.cumsum(positive[order])
    last = np.append(np.flatnonzero(scores[order][1:] != scores[order][:-1]), len(order) - 1)
    precision, recall = hits[last] / (last + 1), hits[last] / hits[-1]
    return float(np.sum(precision * np.diff(recall, prepend=0.0)))


def one_against_rest(scores: ArrayLike, labels: ArrayLike) -> dict[str, float]:
    """`roc_auc` and `average_precision` of each class against the others, their mean over classes.

    Args:
      scores: [n, C].
      labels: int [n]; classes that do not occur, or occur alone, have no part in the mean.
    """
    scores, labels = np.asarray(scores), np.asarray(labels)
    found = [c for c in range(scores.shape[1]) if 0 < np.sum(labels == c) < len(labels)]
    if scores.shape[1] == 2:
        # The difference is the one score that a threshold is laid on.
        scores, found = np.diff(scores, axis=1).repeat(2, 1), [c for c in found if c]
    each = {
        name: [measure(scores[:, c], labels == c) for c in found]
        for name, measure in (('roc_auc', roc_auc), ('average_precision', average_precision))
    }
    return {name: float(np.mean(values)) if values else np.nan for name, values in each.items()}


def kendall_tau(first: ArrayLike, second: ArrayLike) -> float:
    """Kendall's tau-b of two scores of the same things.

        (concordant pairs - discordant) / sqrt(pairs not tied in first * pairs not tied in second)

    Args:
      first, second: [n].

    Returns:
      In [-1, 1]; NaN where all values of a side are equal, or one is NaN.
    """
    order = [_signs(x) for x in _columns(first, second)]
    return _tau(*order)


def kendall_interval(
    first: ArrayLike, second: ArrayLike, *, draws: int = 2_000, level: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of `kendall_tau` over the things that are scored.

    Args:
      first, second: [n].
      draws: samples of n things with replacement; those in which a side is constant do not count.
      level: of the interval.
      seed: of the draws.

    Source: Efron 1979, Bootstrap methods: another look at the jackknife.
    """
    order = [_signs(x) for x in _columns(first, second)]
    count, rng = len(order[0]), np.random.default_rng(seed)
    taus = []
    for _ in range(draws):
        rows = rng.integers(0, count, count)
        taus.append(_tau(*(signs[np.ix_(rows, rows)] for signs in order)))
    low, high = np.nanquantile(taus, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _columns(first: ArrayLike, second: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if a.ndim != 1 or a.shape != b.shape or len(a) < 2:
        raise ValueError(f'two rows of one length are to be compared, got {a.shape} and {b.shape}.')
    return a, b


def _signs(x: np.ndarray) -> np.ndarray:
    """[n, n], 1 where the first of a pair is above the second, -1 below, 0 tied."""
    return np.sign(x[:, None] - x[None])


def _tau(first: np.ndarray, second: np.ndarray) -> float:
    untied = np.sqrt(np.sum(first**2) * np.sum(second**2))
    return float(np.sum(first * second) / untied) if untied > 0 else float('nan')


def classes(context: Context, *, weights: str = 'final') -> Probe:
    """`one_against_rest` of the stage's network, by its log-probabilities; of two classes the AUC.

    Args:
      context: the stage.
      weights: 'final' for the parameters, or the name of an average.
    """
    predict = predictor(context, weights)
    compiled = jax.jit(lambda state, batch: jax.nn.log_softmax(predict(state, batch)))

    def run(state, batches):
        scores, labels = [], []
        for batch in batches:
            found, mask = compiled(state, batch), np.asarray(batch['mask'])
            scores.append(np.asarray(found)[mask])
            labels.append(np.asarray(batch['label'])[mask])
        return one_against_rest(np.concatenate(scores), np.concatenate(labels))

    return Probe(run)


def fields(context: Context, *, score: str, positive: str, lower: bool = False) -> Probe:
    """How well one field of the data tells where another is true; the network is not asked.

    Args:
      context: the stage, whose data have both.
      score: a field of numbers [B].
      positive: a field of truth values [B].
      lower: positives are to have the lower scores.

    Raises:
      UserError: the data lack a field.
    """
    missing = [name for name in (score, positive) if name not in context.spec]
    if missing:
        raise UserError(
            f"{context.stage}: its data have no field '{missing[0]}', only {sorted(context.spec)}."
        )

    def run(state, batches):
        del state
        rows = [
            (np.asarray(batch[score])[mask], np.asarray(batch[positive])[mask])
            for batch in batches
            for mask in (np.asarray(batch['mask']),)
        ]
        scores, truth = (np.concatenate(column) for column in zip(*rows, strict=True))
        scores = -scores if lower else scores
        return {
            'roc_auc': roc_auc(scores, truth),
            'average_precision': average_precision(scores, truth),
        }

    return Probe(run)


def _given(scores: ArrayLike, positive: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    scores, positive = np.asarray(scores, np.float64), np.asarray(positive).astype(bool)
    if scores.ndim != 1 or scores.shape != positive.shape:
        raise ValueError(
            f'scores {scores.shape} and positive {positive.shape} must be one row each, as long as '
            'each other.'
        )
    return scores, positive
