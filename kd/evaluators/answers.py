"""How often is a whole answer right?"""

from __future__ import annotations

import jax.numpy as jnp

from kd.context import Context, Evaluator
from kd.evaluators.classification import predictor, top_k_correct
from kd.metrics import divide, mean
from kd.ranges import Size


def answers(
    context: Context, *, weights: str = 'final', groups: Size = 0, field: str = 'family'
) -> Evaluator:
    """Exact match: the share of answers right in every symbol, most likely symbols taken.

    Args:
      context: the stage; a network with logits [B, L, V] and labels int [B, L].
      weights: 'final' for the parameters, or the name of an average.
      groups: also report the exact match of each group 0 .. groups - 1.
      field: where the batch says which group a problem is of, int [B].
    """
    predict = predictor(context, weights)

    def update(state, batch):
        right = top_k_correct(predict(state, batch), batch['label'])
        exact = jnp.all(right == 1, axis=-1)
        sums = {'exact': mean(exact, batch['mask'])}
        for group in range(groups):
            sums[f'exact_{group}'] = mean(exact, batch['mask'] & (batch[field] == group))
        return sums

    return Evaluator(update, divide)
