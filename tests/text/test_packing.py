"""Rows of examples: nothing is lost, nothing sees anything else, nothing is shifted but once."""

import itertools

import jax
import numpy as np
import pytest

from kd.errors import UserError
from kd.text import packing
from kd.text.packing import Example

LENGTH = 16


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert '\n' not in text
    return text


def examples(count=60, longest=LENGTH, seed=0):
    """Tokens that occur once each, so that a token says where it is from."""
    rng = np.random.default_rng(seed)
    made, first = [], 1
    for size in rng.integers(1, longest + 1, count):
        response = np.arange(size) >= rng.integers(0, size)
        made.append(Example(np.arange(first, first + size, dtype=np.int32), response))
        first += size
    return made


def predictions(arrays):
    """{(context, target)} of everything that counts, with attention within segments, causal."""
    targets, where = jax.device_get(packing.shifted(arrays))
    found = []
    for row, at in zip(*np.nonzero(where), strict=True):
        seen = (arrays['segments'][row] == arrays['segments'][row, at]) & (
            np.arange(arrays['input'].shape[1]) <= at
        )
        context = zip(arrays['input'][row][seen], arrays['positions'][row][seen], strict=True)
        found.append((tuple(context), targets[row, at]))
    return sorted(found)


def test_packed_rows_predict_what_examples_predict_alone():
    given = examples()
    packed = packing.pack(given, LENGTH, pad=0, seed=3)
    alone = packing.unpacked(given, LENGTH, pad=0)
    by_hand = sorted(
        (tuple((example.ids[j], j) for j in range(i + 1)), example.ids[i + 1])
        for example in given
        for i in range(len(example.ids) - 1)
        if example.response[i + 1]
    )
    assert predictions(packed.arrays) == predictions(alone.arrays) == by_hand
    assert len(packed.arrays['input']) < 0.65 * len(given)
    total = sum(len(example.ids) for example in given)
    for rows in (packed, alone):
        counts = rows.counts
        assert counts['tokens'] == total
        assert counts['responses'] == sum(example.response.sum() for example in given)
        assert (counts['examples'], counts['cut'], counts['dropped']) == (60, 0, 0)
        assert counts['rows'] == len(rows.arrays['input'])


def test_rows_hold_examples_one_after_the_other():
    given = [Example(np.arange(n) + 10 * n, np.ones(n, bool)) for n in (3, 4, 2)]
    arrays = packing.pack(given, 6, pad=99, shuffle=False).arrays
    assert arrays['input'].tolist() == [
        [30, 31, 32, 20, 21, 99],
        [40, 41, 42, 43, 99, 99],
    ]
    assert arrays['positions'].tolist() == [[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 0, 0]]
    assert arrays['segments'].tolist() == [[1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 0, 0]]
    assert arrays['response_mask'].tolist() == [[True] * 5 + [False], [True] * 4 + [False] * 2]
    assert {name: x.dtype.name for name, x in arrays.items()} == {
        'input': 'int32', 'positions': 'int32', 'segments': 'int32', 'response_mask': 'bool'
    }  # fmt: skip


@pytest.mark.parametrize('window', [1, 2, 5, 1000])
def test_first_fit_within_a_window(window):
    sizes = np.random.default_rng(window).integers(1, 11, 200).tolist()
    # By hand: rows are open until they are full, or the first of `window` when one more is needed.
    closed, rows = [], []
    for item, size in enumerate(sizes):
        for row in rows:
            if sum(sizes[i] for i in row) + size <= 10:
                break
        else:
            if len(rows) == window:
                closed.append(rows.pop(0))
            row = []
            rows.append(row)
        row.append(item)
        if sum(sizes[i] for i in row) == 10:
            closed.append(rows.pop(rows.index(row)))
    assert packing.first_fit(sizes, 10, window) == closed + rows


def test_rows_are_a_function_of_seed_and_epoch():
    given = examples()
    keys = list(itertools.product((0, 1), (0, 1)))
    made = {key: packing.pack(given, LENGTH, pad=0, seed=key[0], epoch=key[1]) for key in keys}
    for seed, epoch in keys:
        again = packing.pack(given, LENGTH, pad=0, seed=seed, epoch=epoch)
        for name, value in made[seed, epoch].arrays.items():
            np.testing.assert_array_equal(value, again.arrays[name])
    orders = {tuple(rows.arrays['input'].ravel().tolist()) for rows in made.values()}
    assert len(orders) == 4


def test_what_is_too_long_is_cut_dropped_or_split_and_counted():
    given = [Example(np.arange(n), np.arange(n) >= 2) for n in (3, 9, 4, 5)]

    def made(long):
        rows = packing.unpacked(given, 4, pad=-1, long=long)
        counts = {name: rows.counts[name] for name in ('cut', 'dropped', 'split', 'rows')}
        return rows.arrays['input'].tolist(), list(counts.values())

    assert made('cut') == ([[0, 1, 2, -1], [0, 1, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]], [2, 0, 0, 4])
    assert made('drop') == ([[0, 1, 2, -1], [0, 1, 2, 3]], [0, 2, 0, 2])
    assert made('split') == (
        [
            [0, 1, 2, -1],
            [0, 1, 2, 3], [4, 5, 6, 7], [8, -1, -1, -1],
            [0, 1, 2, 3],
            [0, 1, 2, 3], [4, -1, -1, -1],
        ],
        [0, 0, 2, 7],
    )  # fmt: skip
    assert message(packing.unpacked, given, 4, pad=0, long='fold') == (
        "What is too long is 'cut', 'drop'ped or 'split', got long='fold'."
    )
    assert message(packing.pack, given, 2, pad=0, long='drop', where='a.jsonl, example') == (
        'a.jsonl, example: none of 4 fits into a length of 2.'
    )


def test_prompts_that_leave_no_room_and_empty_responses():
    full = Example(np.arange(9), np.arange(9) >= 6)
    assert message(packing.pack, [full], 6, pad=0, where='a.jsonl, example') == (
        'a.jsonl, example 1 has a prompt of 6 tokens, which leaves none for the response in a '
        "length of 6; raise length, or drop what is too long (long='drop')."
    )
    assert packing.pack([full], 7, pad=0).arrays['response_mask'].sum() == 1
    empty = Example(np.arange(3), np.zeros(3, bool))
    assert message(packing.pack, [full, empty], 9, pad=0) == (
        'example 2 has an empty response; leave it out.'
    )


def test_pairs_stand_one_above_the_other():
    prompt = [7, 8]

    def answers(*tails):
        return [
            Example(np.array(prompt + tail), np.array([False, False] + [True] * len(tail)))
            for tail in tails
        ]

    chosen, rejected = answers([1], [1, 2, 3], [5]), answers([4, 4], [6], [5, 5, 5, 5])
    rows = packing.pairs(chosen, rejected, 5, pad=0)
    assert rows.arrays['input'].tolist() == [
        [[7, 8, 1, 0, 0], [7, 8, 4, 4, 0]],
        [[7, 8, 1, 2, 3], [7, 8, 6, 0, 0]],
        [[7, 8, 5, 0, 0], [7, 8, 5, 5, 5]],
    ]
    assert rows.arrays['segments'].tolist()[0] == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert rows.counts == {
        'examples': 3, 'cut': 1, 'dropped': 0, 'split': 0, 'rows': 3, 'tokens': 23, 'responses': 11
    }  # fmt: skip
    targets, where = packing.shifted(rows.arrays)
    assert targets[1].tolist() == [[8, 1, 2, 3, 0], [8, 6, 0, 0, 0]]
    assert where[1].tolist() == [
        [False, True, True, True, False], [False, True, False, False, False]
    ]  # fmt: skip
    dropped = packing.pairs(chosen, rejected, 5, pad=0, long='drop')
    assert dropped.arrays['input'].tolist() == rows.arrays['input'].tolist()[:2]
    assert (dropped.counts['cut'], dropped.counts['dropped']) == (0, 1)


def test_prompts_end_where_answers_begin():
    given = [np.array([1, 2, 3]), np.array([4]), np.array([5, 6, 7, 8])]
    rows = packing.prompts(given, 4, pad=9)
    assert rows.arrays['input'].tolist() == [[9, 1, 2, 3], [9, 9, 9, 4], [5, 6, 7, 8]]
    assert rows.arrays['prompt_mask'].sum(1).tolist() == [3, 1, 4]
    assert not rows.arrays['prompt_mask'][0, 0]
    assert sorted(rows.arrays) == ['input', 'prompt_mask']
    answers = [np.array([1]), np.array([2, 3, 4]), np.array([5, 6])]
    both = packing.prompts(given, 4, pad=9, responses=answers, response_length=2)
    assert both.arrays['response'].tolist() == [[1, 9], [2, 3], [5, 6]]
    assert both.arrays['response_mask'].tolist() == [[True, False], [True, True], [True, True]]
    assert (both.counts['cut'], both.counts['dropped'], both.counts['tokens']) == (1, 0, 13)
    kept = packing.prompts(
        given, 3, pad=9, responses=answers, response_length=2, long='drop'
    )  # fmt: skip
    assert kept.arrays['input'].tolist() == [[1, 2, 3]]
    assert kept.counts['dropped'] == 2
    assert message(packing.prompts, given, 3, pad=9) == (
        'prompt 3 has a prompt of 4 tokens, longer than 3; raise length, or drop what is too long '
        "(long='drop')."
    )
    empty = [*answers[:2], np.zeros(0, int)]
    assert message(
        packing.prompts, given, 4, pad=9, responses=empty, response_length=2
    ) == 'prompt 3 has an empty response; leave it out.'  # fmt: skip


def test_the_one_shift_against_a_loop():
    rng = np.random.default_rng(0)
    batch = {
        'input': rng.integers(0, 50, (5, 12)),
        'segments': np.sort(rng.integers(0, 4, (5, 12)), axis=1)[:, ::-1].copy(),
        'response_mask': rng.random((5, 12)) < 0.5,
    }
    targets, where = jax.jit(packing.shifted)(batch)
    for b, i in np.ndindex(5, 12):
        last = i == 11
        assert targets[b, i] == (0 if last else batch['input'][b, i + 1])
        assert where[b, i] == (
            not last
            and batch['response_mask'][b, i + 1]
            and batch['segments'][b, i + 1] > 0
            and batch['segments'][b, i] == batch['segments'][b, i + 1]
        )
    _, everything = packing.shifted({'input': batch['input']})
    assert everything.tolist() == [[True] * 11 + [False]] * 5
