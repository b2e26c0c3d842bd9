"""Does the network's confidence say how often it is right?"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from kd.context import Context, Evaluator
from kd.evaluators.classification import negative_log_likelihood, predictor, top_k_correct
from kd.losses import numerics
from kd.metrics import divide, mean
from kd.ranges import Count


class Bins(NamedTuple):
    """Sums over confidence bins, each float32 [bins]; they merge by adding."""

    examples: jax.Array
    confidence: jax.Array
    correct: jax.Array


def confidence_bins(
    logits: ArrayLike, labels: ArrayLike, bins: int = 15, where: ArrayLike | None = None
) -> Bins:
    """Sorts predictions into equal-width bins of their confidence max_k softmax(z)_k.

    Args:
      logits: [B, ..., V].
      labels: int [B, ...].
      bins: bin i holds confidences in (i / bins, (i + 1) / bins].
      where: bool [B].
    """
    p = jax.nn.softmax(jnp.asarray(logits, jnp.float32)).reshape(-1, jnp.shape(logits)[-1])
    confidence = p.max(-1)
    index = jnp.clip(jnp.ceil(confidence * bins).astype(jnp.int32) - 1, 0, bins - 1)
    member = jax.nn.one_hot(index, bins, dtype=bool)
    if where is not None:
        mask = jnp.asarray(where).reshape(-1, *(1,) * (jnp.ndim(labels) - 1))
        member &= jnp.broadcast_to(mask, jnp.shape(labels)).reshape(-1, 1)

    def per_bin(values: jax.Array) -> jax.Array:
        # A matrix product would be rounded to bfloat16 or TF32 on accelerators.
        return jnp.where(member, values[:, None], 0.0).sum(0)

    correct = (p.argmax(-1) == jnp.ravel(labels)).astype(jnp.float32)
    return Bins(per_bin(jnp.ones_like(confidence)), per_bin(confidence), per_bin(correct))


def expected_calibration_error(bins: Bins) -> float:
    """ECE = sum_b n_b / N |accuracy_b - confidence_b| (Guo et al. 2017, arXiv:1706.04599)."""
    gap = np.abs(np.asarray(bins.correct, np.float64) - np.asarray(bins.confidence, np.float64))
    return float(gap.sum() / max(float(np.sum(bins.examples)), 1.0))


def brier_score(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """`sum_k (softmax(z)_k - onehot_k)^2`, in [0, 2]; logits [..., V], labels int [...].

    A label that is none of 0 .. V - 1 is one more outcome, of probability 0.
    """
    p = jax.nn.softmax(jnp.asarray(logits, jnp.float32))
    score = jnp.sum((p - jax.nn.one_hot(labels, p.shape[-1])) ** 2, axis=-1)
    return jnp.where(numerics.is_outcome(labels, p.shape[-1]), score, score + 1.0)


def calibration(context: Context, *, weights: str = 'final', bins: Count = 15) -> Evaluator:
    """ECE, NLL, Brier score and accuracy of the stage's network."""
    predict = predictor(context, weights)

    def update(state, batch):
        logits, labels, mask = predict(state, batch), batch['label'], batch['mask']
        means = {
            'nll': mean(negative_log_likelihood(logits, labels), mask),
            'brier': mean(brier_score(logits, labels), mask),
            'accuracy': mean(top_k_correct(logits, labels), mask),
        }
        return means, confidence_bins(logits, labels, bins, mask)

    def finish(sums) -> dict[str, float]:
        means, binned = sums
        return {'ece': expected_calibration_error(binned), **divide(means)}

    return Evaluator(update, finish)
