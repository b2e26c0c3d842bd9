"""Answers in words, judged by a function of Python that reads them as text."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kd.context import Context
from kd.errors import UserError
from kd.method import Batch
from kd.ranges import Count, Positive
from kd.rewards.host import Question, host
from kd.rewards.reward import Reward
from kd.text import tokenizer as tokenizers
from kd.text.tokenizer import Tokenizer


def words(
    context: Context,
    *,
    function: str,
    tokenizer: str = '',
    mark: str = '',
    after: str = '',
    limit: Positive = 5.0,
    workers: Count = 4,
) -> Reward:
    """What `function(answer, solution)` says of an answer and the solution of its problem, texts.

    The batch brings the solution, as the layout 'prompts' of `kd.data.text` has it: `response` int
    [B, R'] and `response_mask` bool [B, R']. An answer that has come to no end (`truncated`) is
    wrong, whatever it says: it is judged as if it were empty.

    Args:
      context: the stage.
      function: import path, see `kd.rewards.host.host`, in whose processes it runs.
      tokenizer: 'hf:DIR' or 'gguf:FILE'; '' for that of the stage's data.
      mark: what stands before the result in a solution; all of it is the result where it is absent.
      after: what ends the thoughts of an answer, such as '</think>'; only what follows is judged,
        and an answer without it is empty. '' for all of it.
      limit, workers: see `kd.rewards.host.host`.

    Raises:
      UserError: data without solutions, no tokenizer, no such function.
    """
    for field in ('response', 'response_mask'):
        if field not in context.spec:
            raise UserError(
                f"{context.stage}: the reward needs solutions; give data.source layout='prompts' "
                'and a response_length.'
            )
    taken = tokenizers.load(tokenizer) if tokenizer else of_data(context)

    def encode(tokens: np.ndarray, row: Mapping[str, np.ndarray]) -> Question:
        assert taken is not None
        solution = taken.decode(row['response'][row['response_mask']])
        answer = taken.decode(tokens)
        if after:
            answer = answer.partition(after)[2]
        return (answer, (solution.rpartition(mark)[2] if mark else solution).strip()), {}

    judge = host(
        function, fields=('response', 'response_mask'), encode=encode, mesh=context.mesh,
        limit=limit, workers=workers,
    )  # fmt: skip

    def reward(tokens: jax.Array, mask: jax.Array, batch: Batch) -> jax.Array:
        cut = batch.get('truncated', jnp.zeros(tokens.shape[0], bool))
        # Nothing is an answer that is judged fast, and wrong.
        return judge(tokens, mask & ~cut[:, None], batch)

    return reward


def of_data(context: Context) -> Tokenizer | None:
    """The tokenizer of the stage's data; None where they are only described."""
    source = context.source('train')
    if not hasattr(source, 'tokenizer'):
        raise UserError(f"{context.stage}: the data have no tokenizer; give the reward's.")
    return source.tokenizer
