"""Facts and connectors: contexts with one right answer, and contexts with several.

Over the structured table of `kd.data.builders.table`. A context (a, b) with a < 24 is a fact, whose
valid answer is the table's most probable one; one with a >= 24 is a connector, as words between the
steps of a proof are, with four valid answers that are equally good. A model that has learnt all of
them is fine-tuned on demonstrations by an expert with habits: of each connector it always uses its
favourite, the most probable of the four. What does the model keep of the other three?
"""

from __future__ import annotations

from typing import Literal

import jax
import numpy as np

from kd.data import sources
from kd.data.builders import table
from kd.data.context import SourceContext

FACTS, CHOICES = 24, 4
SIZES = {'train': 100_000, 'validation': table.TOKENS**2, 'test': table.TOKENS**2}
Answers = Literal['any', 'favourite']


def valid(law: np.ndarray, *, facts: int = FACTS, choices: int = CHOICES) -> np.ndarray:
    """Which answers are valid, bool like the table's logits [V, V, V]: one to facts, else several.

    Args:
      law: the logits, over contexts (a, b) and answers.
      facts: contexts with a below this are facts.
      choices: valid answers of the others.
    """
    several = table.valid(law, choices)
    several[:facts] = table.valid(law[:facts], 1)
    return several


def make(split: str, answers: Answers, *, seed: int) -> dict[str, np.ndarray]:
    """Contexts `input` int32 [N, 2], an answer `label` int32 [N], and `valid` bool [N, V].

    Args:
      split: 'train' draws contexts uniformly; 'validation' and 'test' are all of them once.
      answers: 'any' draws one of the valid answers uniformly; 'favourite' takes the most probable.
      seed: of the table and of the draws.

    Raises:
      DataError: a split that is not there.
    """
    if split not in SIZES:
        raise sources.DataError(
            f'facts and connectors have the splits {list(SIZES)}, not {split!r}'
        )
    law = table.logits(seed)
    rng = np.random.default_rng([seed, 51, list(SIZES).index(split)])
    pairs = table.contexts()
    if split == 'train':
        pairs = pairs[rng.integers(len(pairs), size=SIZES[split])]
    first, second = pairs.T
    allowed = valid(law)[first, second]
    if answers == 'any':
        label = table.answers(np.where(allowed, 0.0, -np.inf), rng)
    else:
        label = law[first, second].argmax(-1).astype(np.int32)
    return {'input': pairs, 'label': label, 'valid': allowed}


def facts(context: SourceContext, *, answers: Answers = 'any') -> sources.Source:
    """`make` as a source, for the key `source` of a recipe's or a stage's data."""
    split = context.split
    arrays = make(split, answers, seed=context.recipe.seed)
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in arrays.items()
    }
    data = sources.DataSet(
        'facts', {split: SIZES[split]}, lambda _: sources.in_memory(arrays), spec, table.TOKENS
    )
    return sources.Source(data, split)
