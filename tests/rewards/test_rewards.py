"""Verifiers inside compiled steps: what they say, what goes wrong, on one device and on several."""

import dataclasses
import os
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd import packages
from kd.claims import seeds
from kd.data import sources
from kd.errors import UserError
from kd.parallel import mesh as mesh_lib
from kd.rewards import host as hosts
from kd.rewards import verify
from kd.rewards.host import host
from kd.rewards.mathematics import mathematics
from kd.rewards.programs import programs
from kd.rewards.reward import judged
from kd.rewards.words import words
from kd.text.table import table

pytestmark = pytest.mark.usefixtures('compiled_quickly')

TOKENS = np.array(
    [[1, 2, 9], [1, 1, 1], [5, 91, 0], [4, 9, 9], [92, 0, 0], [6, 0, 0], [93, 0, 0], [94, 0, 0]],
    np.int32,
)
MASK = np.array(
    [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]], bool
)
TARGET = np.array([3, 4, 0, 4, 0, 6, 0, 0], np.int32)
# Where the 3rd raises, the 5th hangs, the 7th ends its process and the 8th says nothing.
WANTED, FAILED = [1, 0, 0, 1, 0, 1, 0, 0], [0, 0, 1, 0, 1, 0, 1, 1]


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv('PYTHONPATH', ':'.join(sys.path))


def reward(**options):
    return host('verifiers.total', fields=['target'], limit=1.5, **options)


def both(reward):
    return jax.jit(lambda tokens, mask, batch: judged(reward(tokens, mask, batch)))


def test_what_hangs_raises_or_dies_is_0_and_counted_and_the_others_are_judged(monkeypatch):
    told = []
    monkeypatch.setattr(hosts.logging, 'warning', lambda text, *given: told.append(text % given))
    step = both(reward(workers=2))
    # Twice: ended processes begin anew.
    for _ in range(2):
        rewards, failed = step(TOKENS, MASK, {'target': TARGET})
        assert rewards.tolist() == WANTED
        assert failed.tolist() == FAILED
    for wrong in (
        'RuntimeError: 91 is no token',
        'it took longer than 1.5 s',
        'its process died',
        'the verdict is nan',
    ):
        assert sum(f'verifiers.total: no verdict: {wrong}' in line for line in told) == 2, wrong


@pytest.mark.parametrize('sizes', [{'data': 4}, {'data': 2, 'fsdp': 2}, {'data': 2, 'tensor': 2}])
def test_devices_judge_the_answers_that_lie_on_them(sizes):
    mesh = mesh_lib.make_mesh(sizes)
    rows = mesh_lib.batch_sharding(mesh)
    arrays = {'tokens': TOKENS, 'mask': MASK, 'target': TARGET}
    placed = mesh_lib.put_batch({k: v[[0, 1, 3, 5]] for k, v in arrays.items()}, rows)
    step = both(reward(mesh=mesh, workers=2))
    rewards, failed = step(placed['tokens'], placed['mask'], {'target': placed['target']})
    assert rewards.tolist() == [1, 0, 1, 1]
    assert not failed.any()
    assert rewards.sharding.is_equivalent_to(rows, 1)


def test_processes_are_others_and_as_many_as_asked_for():
    judge = jax.jit(host('verifiers.process', workers=2))
    found = {int(x) for _ in range(3) for x in judge(TOKENS, MASK, {})}
    assert 1 <= len(found) <= 2
    assert os.getpid() not in found


def test_verdicts_that_are_there_stay_as_they_are():
    rewards, failed = judged(jnp.array([0.5, jnp.nan, -2.0, jnp.inf, -jnp.inf]))
    assert rewards.tolist() == [0.5, 0, -2, 0, 0]
    assert failed.tolist() == [False, True, False, True, True]


def test_a_verifier_that_is_not_there_is_told():
    with pytest.raises(UserError, match=r"verifiers has no 'totla'\. Did you mean 'total'"):
        host('verifiers.totla')
    with pytest.raises(UserError, match='limit > 0 and workers >= 1, got 0 and 4'):
        host('verifiers.total', limit=0)


SYMBOLS = table(('PAD', 'BOS', 'EOS', '####', *map(str, range(10)), 'so', '/'))


class Source(sources.Source):
    """Solutions of table symbols."""

    def __init__(self):
        self.tokenizer = SYMBOLS


def context():
    spec = {
        'response': jax.ShapeDtypeStruct((4,), np.int32),
        'response_mask': jax.ShapeDtypeStruct((4,), bool),
    }
    made = seeds.context(spec=spec)
    return dataclasses.replace(made, source=lambda split: Source())


def test_the_last_option_that_an_answer_names_is_its_choice():
    choose = verify.same_choice
    said = '<reasoning>\nA or C\n</reasoning>\n<answer>\nC\n</answer>'
    assert [choose(said, letter) for letter in 'ACc'] == [0, 1, 1]
    assert choose(f'<answer>A</answer> no: {said}', 'C') == 1
    for wrong in ('C', '<answer>C', '<answer>C: 3 mol</answer>', ''):
        assert choose(wrong, 'C') == 0
    with pytest.raises(ValueError, match=r"'CC' is no letter"):
        choose(said, 'CC')


def test_results_in_words_are_compared():
    pytest.importorskip('math_verify')
    cases = [
        ('so the answer is 72.', '72', 1),
        ('We get $\\frac{1}{2}$', '0.5', 1),
        ('thus \\boxed{1,200}', '1200', 1),
        ('12 + 60 = 73', '72', 0),
        ('I do not know', '72', 0),
        ('__import__("os").system("exit 1") 5', '5', 1),
    ]
    assert [verify.same_result(answer, right) for answer, right, _ in cases] == [
        wanted for *_, wanted in cases
    ]
    with pytest.raises(ValueError, match="'nothing' is no result"):
        verify.same_result('1', 'nothing')


def test_answers_are_held_to_what_stands_after_the_mark():
    pytest.importorskip('math_verify')
    step = both(mathematics(context(), workers=1, limit=30.0))
    solution = SYMBOLS.encode('5 #### 7')
    responses = np.array([[*solution, 0], [*solution, 2]], np.int32)
    responses = np.tile(responses, (2, 1))
    said = ['so 7', 'so 5', '7 7', '1 4 / 2']
    tokens, mask = np.zeros((4, 6), np.int32), np.zeros((4, 6), bool)
    for row, text in enumerate(said):
        ids = [*SYMBOLS.encode(text), 2]
        tokens[row, : len(ids)], mask[row, : len(ids)] = ids, True
    counted = np.arange(4) < np.array([3, 4, 3, 4])[:, None]
    batch = {'response': responses, 'response_mask': counted}
    rewards, failed = step(tokens, mask, batch)
    assert not failed.any()
    assert rewards.tolist() == [1, 0, 1, 0]
    # Without an end it is no answer.
    cut = np.array([False, False, True, True])
    rewards, failed = step(tokens, mask, {**batch, 'truncated': cut})
    assert not failed.any()
    assert rewards.tolist() == [1, 0, 0, 0]


def answered(texts, solutions):
    """Tokens and a batch of answers and solutions in words."""
    tokens, response = np.zeros((2, len(texts), 8), np.int32)
    mask, there = np.zeros((2, len(texts), 8), bool)
    for row, pair in enumerate(zip(texts, solutions, strict=True)):
        for ids, used, text in zip((tokens, response), (mask, there), pair, strict=True):
            said = [*SYMBOLS.encode(text), 2]
            ids[row, : len(said)], used[row, : len(said)] = said, True
    return tokens, mask, {'response': response, 'response_mask': there}


def test_a_verifier_of_words_reads_what_follows_the_thoughts():
    step = both(words(context(), function='verifiers.same_text', after='so', workers=1, limit=30.0))
    tokens, mask, batch = answered(
        ['1 so 7 5', '7 5', '7 so 1', '1 so 7 so 7'], ['7 5'] * 3 + ['7 so 7']
    )
    rewards, failed = step(tokens, mask, batch)
    assert not failed.any()
    # What comes after the first mark is all of the answer; without one it is empty.
    assert rewards.tolist() == [1, 0, 0, 1]
    cut = np.array([True, False, False, False])
    assert step(tokens, mask, {**batch, 'truncated': cut})[0].tolist() == [0, 0, 0, 1]


def test_programs_are_judged_by_a_verifier_that_is_given_and_by_nothing_else():
    step = both(programs(context(), function='verifiers.same_text', workers=1, limit=30.0))
    tokens, mask, batch = answered(['7 5', '5 7'], ['7 5', '7 5'])
    assert step(tokens, mask, batch)[0].tolist() == [1, 0]
    with pytest.raises(
        UserError, match=r'not run here; name a verifier of yours, reward\.function='
    ):
        programs(context())
    # Where data are only described there is nothing to judge, and no verdict.
    described = dataclasses.replace(context(), source=lambda split: Described())
    rewards, failed = both(programs(described))(tokens, mask, batch)
    assert failed.all()
    assert not rewards.any()


class Described(sources.Source):
    """Data that are not there."""

    tokenizer = None

    def __init__(self):
        pass


def test_what_is_missing_for_words_is_told(monkeypatch):
    with pytest.raises(UserError, match="layout='prompts' and a response_length"):
        mathematics(seeds.context())
    monkeypatch.setitem(sys.modules, 'math_verify', None)
    with pytest.raises(UserError, match=r"math_verify is missing: pip install -e '\.\[math\]'"):
        packages.need('math_verify', extra='math')
