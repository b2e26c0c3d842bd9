"""Examples of any length in rows of one: packed, alone, in pairs, or as prompts.

An example is token ids and which of them count as an answer. In a row every token has a position,
counted from 0 in its example, and a segment, the number of its example in the row counted from 1;
padding is segment 0. Attention stays within segments, so a packed row computes what its examples
compute alone. Nothing here is shifted: `response_mask[t]` is about token t, and `shifted` alone
knows that position i predicts token i + 1.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from kd.errors import UserError

Long = Literal['cut', 'drop', 'split']


class Example(NamedTuple):
    """`ids` int32 [n], and `response` bool [n]: the tokens that are learnt."""

    ids: np.ndarray
    response: np.ndarray


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows of tokens, and what became of the examples.

    Attributes:
      arrays: fields with a leading axis of rows.
      counts: 'examples' given, 'cut', 'dropped' or 'split' for their length, 'rows', 'tokens' that
        are no padding, and 'responses' among them.
    """

    arrays: dict[str, np.ndarray]
    counts: dict[str, int]


def fit(
    examples: Sequence[Example], length: int, long: Long = 'cut', *, where: str = 'example'
) -> tuple[list[Example], Counter]:
    """Examples of at most `length` tokens, and how many were too long.

    Args:
      examples: of any length, at least one token each.
      length: T.
      long: 'cut' keeps the first T tokens, 'drop' leaves the example out, 'split' makes several
        examples of it, none longer than T.
      where: what an example is called in messages, such as a file's name.

    Raises:
      UserError: an example without a response, or one that 'cut' would leave without (its prompt
        fills the length); nothing left.
    """
    if long not in ('cut', 'drop', 'split'):
        raise UserError(f"What is too long is 'cut', 'drop'ped or 'split', got long={long!r}.")
    fitting: list[Example] = []
    counts = Counter(examples=len(examples), cut=0, dropped=0, split=0)
    for number, example in enumerate(examples, 1):
        if not example.response.any():
            raise UserError(f'{where} {number} has an empty response; leave it out.')
        if len(example.ids) <= length:
            fitting.append(example)
        elif long == 'drop':
            counts['dropped'] += 1
        elif long == 'split':
            counts['split'] += 1
            for start in range(0, len(example.ids), length):
                part = slice(start, start + length)
                fitting.append(Example(example.ids[part], example.response[part]))
        elif not example.response[1:length].any():
            raise UserError(
                f'{where} {number} has a prompt of {int(example.response.argmax()):,} tokens, '
                f'which leaves none for the response in a length of {length:,}; raise length, or '
                "drop what is too long (long='drop')."
            )
        else:
            counts['cut'] += 1
            fitting.append(Example(example.ids[:length], example.response[:length]))
    if not fitting:
        raise UserError(f'{where}: none of {len(examples)} fits into a length of {length:,}.')
    return fitting, counts


def pack(
    examples: Sequence[Example],
    length: int,
    *,
    pad: int,
    seed: int = 0,
    epoch: int = 0,
    window: int = 64,
    shuffle: bool = True,
    long: Long = 'cut',
    where: str = 'example',
) -> Rows:
    """Several examples a row: each goes into the first open row with room for it.

    Args:
      examples: at least one token and one response token each.
      length: T.
      pad: the token of padding.
      seed: with the epoch's number decides the order of the examples: rows are a pure function of
        (examples, seed, epoch).
      epoch: number of the epoch.
      window: rows that are open at a time; when one more is needed, the first is closed. More of
        them leave less padding and reach further from the order.
      shuffle: False keeps the order of the examples.
      long: see `fit`.
      where: see `fit`.

    Returns:
      input, positions, segments int32 [N, T] and response_mask bool [N, T].

    Raises:
      UserError: see `fit`.
    """
    fitting, counts = fit(examples, length, long, where=where)
    order = np.arange(len(fitting))
    if shuffle:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
        order = rng.permutation(len(fitting))
    rows = first_fit([len(fitting[i].ids) for i in order], length, window)
    return _filled([[fitting[order[i]] for i in row] for row in rows], length, pad, counts)


def unpacked(
    examples: Sequence[Example],
    length: int,
    *,
    pad: int,
    long: Long = 'cut',
    where: str = 'example',
) -> Rows:
    """One example a row, in order; arguments and fields as of `pack`."""
    fitting, counts = fit(examples, length, long, where=where)
    return _filled([[example] for example in fitting], length, pad, counts)


def pairs(
    chosen: Sequence[Example],
    rejected: Sequence[Example],
    length: int,
    *,
    pad: int,
    long: Literal['cut', 'drop'] = 'cut',
    where: str = 'pair',
) -> Rows:
    """Two answers a row, one above the other: fields [N, 2, T] with the chosen one first.

    A pair is dropped if either is too long (long='drop'); 'cut' cuts each by itself, so that what
    they share at the start stays shared.

    Raises:
      UserError: see `fit`.
    """
    if long == 'split':
        raise UserError("Pairs that are too long are 'cut' or 'drop'ped, not split.")
    sizes = [max(len(a.ids), len(b.ids)) for a, b in zip(chosen, rejected, strict=True)]
    kept = [i for i, size in enumerate(sizes) if long == 'cut' or size <= length]
    if not kept:
        raise UserError(f'{where}: none of {len(sizes)} fits into a length of {length:,}.')
    counts = Counter(examples=len(sizes), cut=0, dropped=len(sizes) - len(kept), split=0)
    counts['cut'] = sum(sizes[i] > length for i in kept)
    sides = []
    for side in (chosen, rejected):
        fitting, _ = fit([side[i] for i in kept], length, where=where)
        sides.append(_filled([[example] for example in fitting], length, pad, Counter()))
    arrays = {
        name: np.stack([side.arrays[name] for side in sides], axis=1) for name in sides[0].arrays
    }
    for name in ('tokens', 'responses'):
        counts[name] = sum(side.counts[name] for side in sides)
    return Rows(arrays, {**counts, 'rows': len(kept)})


def prompts(
    prompts: Sequence[np.ndarray],
    length: int,
    *,
    pad: int,
    responses: Sequence[np.ndarray] = (),
    response_length: int = 0,
    long: Literal['cut', 'drop'] = 'cut',
    where: str = 'prompt',
) -> Rows:
    """Prompts that end where the answers begin: padded on the left to P.

    Args:
      prompts: int [n_i].
      length: P.
      pad: the token of padding.
      responses: an answer to each prompt, int [r_i]; none if `response_length` is 0.
      response_length: R, to which answers are padded on the right; longer ones are cut, or dropped
        with their prompt.
      long: 'drop' leaves out prompts longer than P; 'cut' cuts responses alone.
      where: see `fit`.

    Returns:
      input int32 [N, P] and prompt_mask bool [N, P]; with responses also response int32 [N, R] and
      response_mask bool [N, R].

    Raises:
      UserError: a prompt that is longer than P, unless dropped; an empty response; nothing left.
    """
    count = len(prompts)
    answers = list(responses) if response_length else [np.zeros(0, np.int32)] * count
    kept = []
    for number, (prompt, answer) in enumerate(zip(prompts, answers, strict=True), 1):
        if response_length and not len(answer):
            raise UserError(f'{where} {number} has an empty response; leave it out.')
        if len(prompt) > length and long != 'drop':
            raise UserError(
                f'{where} {number} has a prompt of {len(prompt):,} tokens, longer than {length:,}; '
                "raise length, or drop what is too long (long='drop')."
            )
        if len(prompt) <= length and (len(answer) <= response_length or long != 'drop'):
            kept.append(number - 1)
    if not kept:
        raise UserError(f'{where}: none of {count} fits into a length of {length:,}.')
    arrays = {
        'input': np.full((len(kept), length), pad, np.int32),
        'prompt_mask': np.zeros((len(kept), length), bool),
    }
    if response_length:
        arrays['response'] = np.full((len(kept), response_length), pad, np.int32)
        arrays['response_mask'] = np.zeros((len(kept), response_length), bool)
    for row, i in enumerate(kept):
        start = length - len(prompts[i])
        arrays['input'][row, start:] = prompts[i]
        arrays['prompt_mask'][row, start:] = True
        if response_length:
            answer = answers[i][:response_length]
            arrays['response'][row, : len(answer)] = answer
            arrays['response_mask'][row, : len(answer)] = True
    responses_kept = int(arrays['response_mask'].sum()) if response_length else 0
    counts = {
        'examples': count,
        'cut': sum(len(answers[i]) > response_length for i in kept) if response_length else 0,
        'dropped': count - len(kept),
        'split': 0,
        'rows': len(kept),
        'tokens': int(arrays['prompt_mask'].sum()) + responses_kept,
        'responses': responses_kept,
    }
    return Rows(arrays, counts)


def targets(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """The token that each position is asked for, int [B] or [B, T], and which positions count.

    Text is shifted; a batch with a `label` says itself what each position is asked for. NumPy
    arrays from NumPy arrays, as of `shifted`.
    """
    if 'response_mask' in batch and 'label' not in batch:
        return shifted(batch)
    where = _namespace(batch).broadcast_to(batch.get('response_mask', True), batch['label'].shape)
    return batch['label'], where


def shifted(batch: Mapping[str, Any]) -> tuple[Any, Any]:
    """What each position predicts, and which of these predictions count.

        targets[b, i] = input[b, i + 1]
        where[b, i] = response_mask[b, i + 1] and segments[b, i] = segments[b, i + 1] > 0

    The last position predicts nothing (target 0, where False), nor does the last token of a segment
    the first of the next.

    Args:
      batch: input int [..., T], and where it has them response_mask bool [..., T] (all if absent)
        and segments int [..., T] (one if absent).

    Returns:
      targets int32 [..., T] and where bool [..., T], both by the predicting position; on the host
      where all fields are NumPy arrays.
    """
    xp = _namespace(batch)
    tokens = xp.asarray(batch['input'], xp.int32)
    where = xp.asarray(batch.get('response_mask', xp.ones(tokens.shape, bool)))[..., 1:]
    if 'segments' in batch:
        segments = xp.asarray(batch['segments'])
        where = where & (segments[..., 1:] == segments[..., :-1]) & (segments[..., 1:] > 0)
    last = [(0, 0)] * (tokens.ndim - 1) + [(0, 1)]
    return xp.pad(tokens[..., 1:], last), xp.pad(where, last)


def _namespace(batch: Mapping[str, Any]) -> Any:
    """`numpy` for arrays on the host alone, else `jax.numpy`."""
    return np if all(isinstance(x, np.ndarray) for x in batch.values()) else jnp


def first_fit(sizes: Sequence[int], length: int, window: int) -> list[list[int]]:
    """Rows of positions in `sizes`, none of more than `length` in sum; see `pack`."""
    closed: list[list[int]] = []
    rows: list[list[int]] = []
    room = np.zeros(0, np.int64)
    for item, size in enumerate(sizes):
        fits = np.flatnonzero(room >= size)
        if fits.size:
            at = int(fits[0])
        else:
            if len(rows) == window:
                closed.append(rows.pop(0))
                room = room[1:]
            at = len(rows)
            rows.append([])
            room = np.append(room, length)
        rows[at].append(item)
        room[at] -= size
        if not room[at]:
            closed.append(rows.pop(at))
            room = np.delete(room, at)
    return closed + rows


def _filled(rows: list[list[Example]], length: int, pad: int, counts: Counter) -> Rows:
    """The arrays of rows of examples."""
    shape = (len(rows), length)
    arrays = {name: np.zeros(shape, np.int32) for name in ('input', 'positions', 'segments')}
    arrays['input'][:] = pad
    arrays['response_mask'] = np.zeros(shape, bool)
    for row, examples in enumerate(rows):
        start = 0
        for number, example in enumerate(examples, 1):
            at = slice(start, start + len(example.ids))
            arrays['input'][row, at] = example.ids
            arrays['positions'][row, at] = np.arange(len(example.ids))
            arrays['segments'][row, at] = number
            arrays['response_mask'][row, at] = example.response
            start = at.stop
    totals = {
        'rows': len(rows),
        'tokens': int((arrays['segments'] > 0).sum()),
        'responses': int(arrays['response_mask'].sum()),
    }
    return Rows(arrays, {**counts, **totals})
