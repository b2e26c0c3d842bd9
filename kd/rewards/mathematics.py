"""Answers to mathematical problems in words, judged by `math-verify`."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from kd import packages
from kd.context import Context
from kd.errors import UserError
from kd.method import Batch
from kd.ranges import Count, Positive
from kd.rewards.host import Question, host
from kd.rewards.reward import Reward
from kd.text import tokenizer as tokenizers
from kd.text.tokenizer import Tokenizer


def mathematics(
    context: Context,
    *,
    tokenizer: str = '',
    mark: str = '####',
    limit: Positive = 5.0,
    workers: Count = 4,
) -> Reward:
    """1 for an answer whose result is that of the solution, else 0; by `kd.rewards.verify`.

    The batch brings the solution, as the layout 'prompts' of `kd.data.text` has it: `response` int
    [B, R'] and `response_mask` bool [B, R'], such as worked solutions of GSM8K, which end in
    '#### 72'. The result in an answer is what it has in a box, after 'answer', or last. An answer
    that has come to no end (`truncated`) is wrong, whatever it says.

    Args:
      context: the stage.
      tokenizer: 'hf:DIR' or 'gguf:FILE'; '' for that of the stage's data.
      mark: what stands before the result in a solution; all of it is the result where it is absent.
      limit, workers: see `kd.rewards.host.host`.

    Raises:
      UserError: no tokenizer, or `math-verify` is not installed.
    """
    for field in ('response', 'response_mask'):
        if field not in context.spec:
            raise UserError(
                f"{context.stage}: the reward needs solutions; give data.source layout='prompts' "
                'and a response_length.'
            )
    taken = tokenizers.load(tokenizer) if tokenizer else _of_data(context)
    if taken is not None:
        packages.need('math_verify', extra='math')

    def encode(tokens: np.ndarray, row: Mapping[str, np.ndarray]) -> Question:
        assert taken is not None
        solution = taken.decode(row['response'][row['response_mask']])
        return (taken.decode(tokens), solution.rpartition(mark)[2].strip()), {}

    judge = host(
        'kd.rewards.verify.same_result', fields=('response', 'response_mask'), encode=encode,
        mesh=context.mesh, limit=limit, workers=workers,
    )  # fmt: skip

    def reward(tokens: jax.Array, mask: jax.Array, batch: Batch) -> jax.Array:
        cut = batch.get('truncated', jnp.zeros(tokens.shape[0], bool))
        # Nothing is an answer that is judged fast, and wrong.
        return judge(tokens, mask & ~cut[:, None], batch)

    return reward


def _of_data(context: Context) -> Tokenizer | None:
    """The tokenizer of the stage's data; None where they are only described."""
    source = context.source('train')
    if not hasattr(source, 'tokenizer'):
        raise UserError(f"{context.stage}: the data have no tokenizer; give the reward's.")
    return source.tokenizer
