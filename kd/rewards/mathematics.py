"""Answers to mathematical problems in words, judged by `math-verify`."""

from __future__ import annotations

from kd import packages
from kd.context import Context
from kd.ranges import Count, Positive
from kd.rewards.reward import Reward
from kd.rewards.words import of_data, words


def mathematics(
    context: Context,
    *,
    tokenizer: str = '',
    mark: str = '####',
    after: str = '',
    limit: Positive = 5.0,
    workers: Count = 4,
) -> Reward:
    """1 for an answer whose result is that of the solution, else 0; by `kd.rewards.verify`.

    The batch brings the solution, see `kd.rewards.words.words`, such as worked solutions of GSM8K,
    which end in '#### 72'. The result in an answer is what it has in a box, after 'answer', or
    last. An answer that has come to no end is wrong.

    Args:
      context: the stage.
      tokenizer, mark, after, limit, workers: as of `kd.rewards.words.words`.

    Raises:
      UserError: no tokenizer, or `math-verify` is not installed.
    """
    reward = words(
        context, function='kd.rewards.verify.same_result', tokenizer=tokenizer, mark=mark,
        after=after, limit=limit, workers=workers,
    )  # fmt: skip
    if tokenizer or of_data(context) is not None:
        packages.need('math_verify', extra='math')
    return reward
