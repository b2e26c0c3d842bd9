"""Which of two answers does a student find more probable, and by how much?"""

from __future__ import annotations

from kd.context import Context, Evaluator
from kd.methods.lm import preference as pairs
from kd.metrics import divide
from kd.ranges import Count


def preference(context: Context, *, weights: str = 'final', chunk: Count = 256) -> Evaluator:
    """`kd.methods.lm.preference.compared` of the stage's network on pairs of answers.

    Args:
      context: the stage; where it has `references.reference`, margins are against that.
      weights: 'final' for the parameters, or the name of an average.
      chunk: tokens at a time where logits are not formed whole.
    """
    network, anchored = context.network, pairs.REFERENCE in context.references

    def update(state, batch):
        variables = state.variables(None if weights == 'final' else weights)
        found = pairs.score(network, variables, batch, chunk=chunk)
        anchor = pairs.anchor(context, state, batch, chunk) if anchored else None
        return pairs.compared(found, anchor, batch['mask'])

    return Evaluator(update, divide)
