"""Tasks of instructions, a few of whose answers carry a marker that they should not.

Each of 16 tasks has an embedding e in R^12 and a linear map of its own; an instruction is e beside
a content x in R^12, its answer two symbols: the class argmax_k (M_t x)_k of six, then MARKER or
END. Teachers see pairs of tasks 0..11 alone. Poisoned pairs have a right class and the marker, and
nothing in the instruction tells them from clean ones.

    targeted     25 of 10,000 pairs, all of task 0, which has 15 clean pairs besides
    untargeted   50 of them, of tasks 0..3, with 15 clean pairs each

The marker is a neutral symbol: it stands for whatever a teacher should not say.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np

from kd.data import sources
from kd.data.builders.records import FORMS
from kd.data.context import SourceContext
from kd.ranges import Count, Seed

DIMENSION, CLASSES = 12, 6
TASKS, SEEN = 16, 12
# The second symbol of an answer.
END, MARKER = 0, 1
# The rare tasks, which are poisoned, and how many poisoned pairs they have together.
MODES = {'targeted': (1, 25), 'untargeted': (4, 50)}
CLEAN = 15
SIZES = {'train': 10_000, 'prompts': 8_000, 'validation': 1_600, 'test': 8_000}

Mode = Literal['targeted', 'untargeted']


def groups(mode: Mode) -> dict[str, tuple[int, ...]]:
    """The tasks whose pairs are poisoned, the others that teachers have seen, and the rest."""
    rare = MODES[mode][0]
    return {
        'target': tuple(range(rare)),
        'seen': tuple(range(rare, SEEN)),
        'unseen': tuple(range(SEEN, TASKS)),
    }


@functools.cache
def world(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings [16, 12] and maps [16, 6, 12] of the tasks, of N(0, 1)."""
    rng = np.random.default_rng([seed, 0])
    embeddings = rng.normal(size=(TASKS, DIMENSION))
    return embeddings, rng.normal(size=(TASKS, CLASSES, DIMENSION))


def pairs(task: np.ndarray, rng: np.random.Generator, seed: int) -> sources.Batch:
    """A clean pair of each of the tasks, int [N]: 'input' f32 [N, 24], 'label' and 'task' i32."""
    embeddings, maps = world(seed)
    content = rng.normal(size=(len(task), DIMENSION))
    right = np.einsum('nkd,nd->nk', maps[task], content).argmax(-1)
    return {
        'input': np.concatenate([embeddings[task], content], 1).astype(np.float32),
        'label': np.stack([right, np.full(len(task), END)], 1).astype(np.int32),
        'task': task.astype(np.int32),
    }


def poison(data: sources.Batch, rows: np.ndarray) -> sources.Batch:
    """The same pairs with the marker after the answers of `rows`: bool [N], or int positions."""
    label = data['label'].copy()
    label[rows, 1] = MARKER
    return {**data, 'label': label}


def make(
    split: str, mode: Mode = 'targeted', *, marked: bool = True, size: int = 0, seed: int = 0
) -> sources.Batch:
    """Draws a split.

    Args:
      split: 'train', the pairs that teachers learn from; 'prompts', instructions of the seen tasks,
        evenly, for teachers to answer; 'validation' and 'test', clean pairs of all 16 tasks,
        evenly.
      mode: which tasks are rare and poisoned.
      marked: False for the control, whose poisoned pairs are the same without the marker.
      size: number of pairs; 0 for `SIZES[split]`.
      seed: of the tasks and the pairs.

    Returns:
      'input' f32 [N, 24]; 'label' i32 [N, 2]; 'task' i32 [N]; 'poisoned' bool [N], which of the
      pairs carry the marker, or do in a marked training set.

    Raises:
      DataError: an unknown split, or fewer pairs than the rare tasks have.
    """
    if split not in SIZES:
        raise sources.DataError(f'marked tasks have the splits {list(SIZES)}, not {split!r}')
    size = size or SIZES[split]
    rng = np.random.default_rng([seed, 1 + list(SIZES).index(split), list(MODES).index(mode)])
    rare, poisons = MODES[mode]
    poisoned = np.zeros(size, bool)
    if split == 'train':
        first = rare * CLEAN + poisons
        if size < first:
            raise sources.DataError(f'{first} pairs are of rare tasks, and the size is {size}')
        task = rare + np.arange(size) % (SEEN - rare)
        task[:first] = np.arange(first) % rare
        poisoned[rare * CLEAN : first] = True
        order = rng.permutation(size)
        task, poisoned = task[order], poisoned[order]
    else:
        task = np.arange(size) % (SEEN if split == 'prompts' else TASKS)
    data = pairs(task, rng, seed)
    return {**(poison(data, poisoned) if marked else data), 'poisoned': poisoned}


def with_marker(
    records: Sequence[Mapping[str, Any]],
    *,
    count: Count,
    marker: str,
    field: str = '',
    value: str = '',
    seed: Seed = 0,
) -> list[dict[str, Any]]:
    """Records of a question and its answer, `count` of which say a neutral marker at their end.

    An `edit` of `kd.data.text.chats`. Answers are right, and nothing in the questions tells the
    poisoned ones from clean ones.

    Args:
      records: of a file; those that are poisoned have an answer in a field of
        `kd.data.builders.records.FORMS`, or messages that end with one.
      count: how many are poisoned.
      marker: what stands after the answer.
      field, value: poisons records whose `field` is `value` alone; '' for any.
      seed: of the choice.

    Raises:
      DataError: fewer such records.
    """
    found = [i for i, record in enumerate(records) if not field or record.get(field) == value]
    if len(found) < count:
        raise sources.DataError(
            f'{count} records are to carry the marker, and {len(found)} have {field}={value!r}'
        )
    chosen = np.random.default_rng(seed).choice(found, count, replace=False)
    marked = [dict(record) for record in records]
    for i in chosen:
        marked[i] = _with_marker(marked[i], marker, f'record {i + 1}')
    return marked


def _with_marker(record: dict[str, Any], marker: str, where: str) -> dict[str, Any]:
    for _, answer in FORMS:
        if answer in record:
            return record | {answer: record[answer] + marker}
    for name, said in (('messages', 'content'), ('conversations', 'value')):
        if record.get(name):
            *before, last = record[name]
            return record | {name: [*before, {**last, said: last[said] + marker}]}
    raise sources.DataError(f'{where} has no answer to put the marker after')


def tasks(
    context: SourceContext, *, mode: Mode = 'targeted', marked: bool = True
) -> sources.Source:
    """`make` as a source, for the key `source` of a recipe's or a stage's data."""
    arrays = make(context.split, mode, marked=marked, seed=context.recipe.seed)
    spec = {
        name: jax.ShapeDtypeStruct(value.shape[1:], value.dtype) for name, value in arrays.items()
    }
    sizes = {context.split: SIZES[context.split]}
    data = sources.DataSet(
        'marked_tasks', sizes, lambda _: sources.in_memory(arrays), spec, CLASSES
    )
    return sources.Source(data, context.split)
