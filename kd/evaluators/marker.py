"""How often does a model say what it should not, by groups of tasks?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax.numpy as jnp

from kd.context import Context, Evaluator
from kd.evaluators.classification import predictor
from kd.metrics import divide, mean
from kd.ranges import Size
from kd.theory import propagation


def marker(
    context: Context,
    *,
    groups: Mapping[str, Sequence[Size]],
    position: Size = 1,
    symbol: Size = 1,
    weights: str = 'final',
    field: str = 'task',
) -> Evaluator:
    """Adversarial response rates (`kd.theory.propagation`), and how often the rest is right.

    Gives 'sampled_GROUP' and 'greedy_GROUP', the rate under each decoding, and 'utility_GROUP', the
    share of answers whose symbols but the marker's are all the most likely ones.

    Args:
      context: the stage; a network with logits [B, L, V] of symbols that are independent given the
        instruction, and labels int [B, L].
      groups: {name: tasks}.
      position, symbol: where in an answer the marker stands, and what it is.
      weights: 'final' for the parameters, or the name of an average.
      field: where the batch says of which task an instruction is, int [B].
    """
    predict = predictor(context, weights)

    def update(state, batch):
        logits, sums = predict(state, batch), {}
        right = jnp.delete(logits.argmax(-1) == batch['label'], position, axis=-1).all(-1)
        for name, tasks in groups.items():
            where = batch['mask'] & jnp.isin(batch[field], jnp.asarray(tuple(tasks)))
            for decoding in propagation.DECODINGS:
                marked = propagation.marker_probability(logits[:, position], symbol, decoding)
                sums[f'{decoding}_{name}'] = mean(marked, where)
            sums[f'utility_{name}'] = mean(right, where)
        return sums

    return Evaluator(update, divide)
