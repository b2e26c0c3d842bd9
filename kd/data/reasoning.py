"""Problems that are made as they are asked for, and have a verifier: `reasoning-gym`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import numpy as np

from kd.data import catalogue, sources
from kd.data.builders import examples as builder
from kd.data.builders import gym
from kd.data.context import SourceContext
from kd.data.text_rows import Form, Layout, TextSource
from kd.ranges import Count, Seed, Size
from kd.text import tokenizer as tokenizers
from kd.text.packing import Example
from kd.text.tokenizer import Tokenizer

# What a task of logic or arithmetic is told beside its question.
INSTRUCTION = 'Think first, and then give the final answer between <answer> and </answer>.'


def reasoning_gym(
    context: SourceContext,
    *,
    task: str,
    tokenizer: str,
    length: Count,
    levels: Sequence[Mapping[str, Any]] = (),
    sizes: Mapping[str, Count] | None = None,
    problems: Seed = 0,
    instruction: str = INSTRUCTION,
    chat: bool = True,
    form: str = '{prompt}',
    template: str = '',
    template_arguments: Mapping[str, Any] | None = None,
    layout: Layout = 'prompts',
    response_length: Size = 0,
    vocabulary: Size = 0,
) -> TextSource:
    """Problems of a task, which `kd.rewards.reasoning.reasoning_gym` judges.

    Beside the fields of the layout, which is 'prompts' or 'rows', `number` int32: which problem it
    is. Numbers go on from split to split.

    Args:
      context: a split.
      task: of reasoning-gym, 'knights_knaves' for one.
      levels: options of the task for each level, which take turns; () for its own ones.
      sizes: problems of each split, {'train': 20_000, 'validation': 500, 'test': 1_000} by default.
      problems: seed of the problems.
      instruction: after the question; '' for none.
      tokenizer, length, chat, form, template, template_arguments, layout, response_length,
        vocabulary: as of `kd.data.text.chats`. Answers are the task's own, without thoughts.

    Raises:
      UserError: what `kd.data.builders.gym.problem` raises.
      DataError: the layout 'packed', whose rows are of several problems.
    """
    if layout == 'packed':
        raise sources.DataError("problems of reasoning-gym have the layout 'prompts' or 'rows'.")
    form_of_rows = Form(
        task, context, tokenizer, length, layout, response_length, vocabulary=vocabulary,
        template=template,
    )  # fmt: skip
    if context.recipe.data_dir == catalogue.DESCRIBED:
        return form_of_rows.described(vocabulary or None, {'number': np.zeros(1, np.int32)})
    counts = dict(sizes or {'train': 20_000, 'validation': 500, 'test': 1_000})
    ends = dict(zip(counts, accumulate(counts.values()), strict=True))
    style = builder.Style(
        chat, form, 'last', tuple((template_arguments or {}).items()),
        answers=layout != 'prompts' or response_length > 0,
    )  # fmt: skip
    kind = gym.levels_of(levels)

    def examples(split: str, taken: Tokenizer) -> Sequence[tuple[Example, int]]:
        found = []
        for number in range(ends[split] - counts[split], ends[split]):
            made = gym.problem(task, kind, problems, number)
            asked = '\n\n'.join(filter(None, (made['question'], instruction)))
            messages = [{'role': 'user', 'content': asked}]
            if style.answers:
                messages.append({'role': 'assistant', 'content': str(made['answer'])})
            where = f'{task}, problem {number}'
            found.append((builder.of_chat(taken, messages, style, where), number))
        return found

    taken = tokenizers.load(tokenizer, template=template)
    classes = tokenizers.shared_size(taken, vocabulary or taken.size)
    chosen = form_of_rows.chosen({split: partial(examples, split) for split in counts}, taken)
    rows, numbers = zip(*chosen, strict=True)
    return form_of_rows.filled(rows, taken, classes, {'number': np.asarray(numbers, np.int32)})
