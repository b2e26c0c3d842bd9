"""Does the network's confidence say how often it is right?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.context import Context, Evaluator
from kd.evaluators.classification import negative_log_likelihood, predictor, top_k_correct
from kd.losses import numerics
from kd.losses.calibration import confidence_bins, expected_calibration_error
from kd.metrics import divide, mean
from kd.ranges import Count


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
