"""Answers that are programs. kd runs none of them: whoever trains on programs brings the judge."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kd.context import Context
from kd.errors import UserError
from kd.method import Batch
from kd.ranges import Count, Positive
from kd.rewards.reward import Reward
from kd.rewards.words import of_data, words


def programs(
    context: Context,
    *,
    function: str = '',
    tokenizer: str = '',
    after: str = '',
    limit: Positive = 60.0,
    workers: Count = 64,
) -> Reward:
    """What a verifier of yours says of an answer with a program, and the outputs that are expected.

        def verdict(answer: str, expected: str) -> float:          # mine.verdict
            '''1 if all tests pass, else 0; runs the program in a sandbox of its own.'''

    A program that a model has written is never run by this package, which has no sandbox: `answer`
    is text, and what is done with it happens behind `function`, a client of a service that you
    trust with it. `expected` is the solution of the data, as they have it: printed outputs, or a
    name by which the verifier finds its tests.

    Args:
      context: the stage.
      function: import path of the verifier; there is none to fall back on.
      tokenizer, after: see `kd.rewards.words.words`.
      limit: seconds for an answer, all tests together.
      workers: processes, as many as are judged at a time.

    Raises:
      UserError: no function. (Where data are only described, to trace or to compile ahead, no
        answer is judged and none is needed.)
    """
    if function:
        return words(
            context, function=function, tokenizer=tokenizer, after=after, limit=limit,
            workers=workers,
        )  # fmt: skip
    if tokenizer or of_data(context) is not None:
        raise UserError(
            f'{context.stage}: programs of a model are not run here; name a verifier of yours, '
            "reward.function='MODULE.FUNCTION', that says of (answer, expected) 0 or 1."
        )

    def unjudged(tokens: jax.Array, mask: jax.Array, batch: Batch) -> jax.Array:
        return jnp.full(tokens.shape[:1], jnp.nan)

    return unjudged
