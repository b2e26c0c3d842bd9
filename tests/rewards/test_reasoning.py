"""Problems of reasoning-gym, here of a stand-in with one task, and verdicts on their answers."""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_tokenizers as toys

from kd import config as kd_config
from kd.claims import seeds
from kd.config import Recipe
from kd.data import catalogue
from kd.data.builders import gym
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.rewards.reasoning import reasoning_gym

LEVELS = (dict(most=5), dict(most=50))
SIZES = {'train': 6, 'test': 3}


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent / 'stand_ins'))
    monkeypatch.setenv('PYTHONPATH', ':'.join(sys.path))
    monkeypatch.delitem(sys.modules, 'reasoning_gym', raising=False)
    gym._task.cache_clear()


@pytest.fixture(scope='module')
def tokenizer_file(tmp_path_factory):
    file = tmp_path_factory.mktemp('toy') / 'toy.gguf'
    toys.write_gguf(file, toys.fields())
    return file


@pytest.fixture
def make(tokenizer_file):
    def source(split='train', data_dir='', **changes):
        block = dict(
            name='kd.data.reasoning.reasoning_gym', task='sums', levels=LEVELS, sizes=SIZES,
            problems=2, tokenizer=f'gguf:{tokenizer_file}', length=120, instruction='Say it.',
            chat=False, **changes,
        )  # fmt: skip
        recipe = Recipe(stages={}, data={}, data_dir=data_dir)
        return kd_config.build(block, SourceContext(split, recipe), where='data.source')

    return source


def test_levels_take_turns_and_numbers_go_on_from_split_to_split(make):
    train, test = make(), make('test')
    rows = [source.fetch(np.arange(len(source))) for source in (train, test)]
    assert rows[0]['number'].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows[1]['number'].tolist() == [6, 7, 8]
    texts = [
        train.tokenizer.decode(ids[there])
        for ids, there in zip(rows[0]['input'], rows[0]['prompt_mask'], strict=True)
    ]
    # Number 3 is the second problem of the second level: 2 + 7 and 2 + 3.
    assert texts[3] == '9 and 5?\n\nSay it.'
    assert texts[2] == '4 and 0?\n\nSay it.'
    assert make('train[-2:]').fetch(np.arange(2))['number'].tolist() == [4, 5]


def test_where_only_shapes_count_the_fields_are_the_same(make):
    full, described = make(), make(data_dir=catalogue.DESCRIBED)
    assert full.spec == described.spec


def test_answers_of_problems_may_be_learnt(make):
    rows = make(layout='rows').fetch(np.arange(6))
    assert rows['number'].tolist() == [0, 1, 2, 3, 4, 5]
    assert rows['response_mask'].any(1).all()


@pytest.mark.parametrize('partial', [False, True])
def test_verdicts_are_those_of_the_task(make, partial):
    source = make()
    spec = {**source.spec, 'number': jax.ShapeDtypeStruct((), np.int32)}
    context = seeds.context(spec=spec, source=lambda split: source)
    reward = reasoning_gym(
        context, task='sums', levels=LEVELS, problems=2, partial=partial, limit=30.0, workers=1
    )
    said = ['it is <answer> 14 </answer>', '14', '13', 'hm', '<answer>14</answer>', 'hang']
    numbers = np.array([3, 3, 3, 3, 2, 3], np.int32)
    cut = np.zeros(6, bool)
    cut[1] = True
    ids = [source.tokenizer.encode(text, begin=False) for text in said]
    width = max(map(len, ids))
    tokens = np.stack([np.pad(row, (0, width - len(row))) for row in ids]).astype(np.int32)
    mask = np.arange(width) < np.array([len(row) for row in ids])[:, None]
    found = jax.jit(reward)(tokens, mask, {'number': numbers, 'truncated': cut})
    half = 0.5 if partial else 0.0
    np.testing.assert_array_equal(found, [1, 0, half, 0, half, np.nan])


def test_what_does_not_fit_is_told(make):
    with pytest.raises(UserError, match=r"reasoning-gym has no task 'sum'. Did you mean 'sums'"):
        gym.problem('sum', ((),), 0, 0)
    with pytest.raises(UserError, match=r"reasoning-gym: sums with {'most': 0}: most must be pos"):
        gym.problem('sums', gym.levels_of([dict(most=0)]), 0, 0)
    with pytest.raises(UserError, match=r"layout 'prompts' or 'rows'"):
        make(layout='packed')
    with pytest.raises(UserError, match=r"needs to know problems by 'number'"):
        reasoning_gym(seeds.context(), task='sums')
