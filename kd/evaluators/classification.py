"""How often is the network right, and how sure is it of the right class?"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from kd.context import Context, Evaluator
from kd.errors import UserError
from kd.losses import numerics
from kd.metrics import Mean, divide, mean
from kd.ranges import Size


def top_k_correct(logits: ArrayLike, labels: ArrayLike, k: int = 1) -> jax.Array:
    """Whether the label is among the k largest logits; ties and NaN count against the label.

    A label that is none of 0 .. V - 1 is never among them.

    Args:
      logits: [..., V].
      labels: int [...].
      k: 1 for accuracy.

    Returns:
      float32 [...] of 0 and 1.
    """
    logits, labels = jnp.asarray(logits), jnp.asarray(labels)
    size = logits.shape[-1]
    of_label = numerics.take_outcomes(logits, labels[..., None], missing=jnp.nan)
    others = jnp.arange(size) != labels[..., None]
    # Not `logits >= of_label`, which is false for NaN and would call a broken network right.
    ahead = ~(logits < of_label) & others
    return ((ahead.sum(-1) < k) & numerics.is_outcome(labels, size)).astype(jnp.float32)


def negative_log_likelihood(logits: ArrayLike, labels: ArrayLike) -> jax.Array:
    """`-log softmax(logits)[label]` in nats; logits [..., V], labels int [...], float32 [...].

    +inf where a label is none of 0 .. V - 1.
    """
    log_p = numerics.log_softmax(logits)
    labels = jnp.asarray(labels)[..., None]
    return -numerics.take_outcomes(log_p, labels, missing=-jnp.inf)[..., 0]


def classification(context: Context, *, weights: str = 'final', top_k: Size = 0) -> Evaluator:
    """Accuracy and NLL of the stage's network.

    Args:
      context: the stage.
      weights: 'final' for the parameters, or the name of an average.
      top_k: also report whether the label is among the k best; 0 for not.
    """
    predict = predictor(context, weights)

    def update(state, batch) -> dict[str, Mean]:
        logits, mask = predict(state, batch), batch['mask']
        sums = {
            'accuracy': mean(top_k_correct(logits, batch['label']), mask),
            'nll': mean(negative_log_likelihood(logits, batch['label']), mask),
        }
        if top_k:
            sums[f'top_{top_k}'] = mean(top_k_correct(logits, batch['label'], top_k), mask)
        return sums

    return Evaluator(update, divide)


def predictor(context: Context, weights: str = 'final'):
    """`predict(state, batch) -> logits` of the trained network, in evaluation mode."""
    if context.num_classes is None:
        raise UserError('this needs data with class labels.')
    network = context.classifier
    averages = context.config.ema
    if weights != 'final' and weights not in averages:
        raise UserError(f"{context.stage}.ema has no '{weights}', only {list(averages)}.")

    def predict(state, batch):
        variables = state.variables(None if weights == 'final' else weights)
        return network.apply(variables, *network.of(batch)).logits

    return predict
