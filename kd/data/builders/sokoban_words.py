"""Sokoban (`kd.data.builders.sokoban`) in words: the rules, and what an expert says of a level."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kd.data.builders import sokoban
from kd.data.sources import Batch
from kd.text.tokenizer import Tokenizer

RULES = (
    '<|im_start|>system\n'
    'You play Sokoban on a grid of 6 x 6 cells. Signs: # wall, _ floor, . goal, $ box, * box on a '
    'goal, @ you, + you on a goal. Every turn you see the grid and answer with one letter: U, R, '
    'D or L, to move up, right, down or left. You push a box by moving into it, if the cell '
    'behind it is free; you cannot pull. You win when all boxes are on goals, in at most 40 turns.'
)
SAYS = '\nAn expert would begin with: '


def fields(
    split: str, which: Sequence[int], told: int, tokenizer: Tokenizer | None
) -> dict[str, np.ndarray]:
    """Fields of chosen levels [N, ...], see `kd.data.text.sokoban`; without a tokenizer the shapes
    count alone."""
    levels = sokoban.levels(split)
    chosen = np.asarray(which, int)
    made: Batch = {
        name: getattr(levels, name)[chosen] for name in ('walls', 'goals', 'boxes', 'agent')
    }
    made['level'] = chosen.astype(np.int32)
    if told:
        if tokenizer is None:
            ahead, letters = np.zeros(8, np.int32), np.zeros(4, np.int32)
        else:
            ahead = np.asarray(tokenizer.encode(SAYS, begin=False), np.int32)
            letters = np.asarray([tokenizer.encode(a, begin=False)[0] for a in 'URDL'], np.int32)
        plan = levels.plan[chosen, :told]
        ahead = np.broadcast_to(ahead, (len(plan), len(ahead)))
        made['told'] = np.concatenate([ahead, letters[np.maximum(plan, 0)]], 1)
        made['told_mask'] = np.concatenate([np.ones(ahead.shape, bool), plan >= 0], 1)
    return made
