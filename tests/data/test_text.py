"""Sources of text: what is in their rows, exact resumption, and what each mistake is told."""

import json
import os
import shutil

import jax
import numpy as np
import pytest
import toy_tokenizers as toys

from kd import config as kd_config
from kd import networks
from kd.config import Recipe
from kd.data import catalogue, pipeline, text
from kd.data.builders import records, stdlib_docs
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.text import packing, templates, tokenizer

GSM8K = [
    {
        'question': f'{n} and {n}?',
        'answer': f'It is <<{n}+{n}={2 * n}>>{2 * n}.\n#### {2 * n}',
    }
    for n in range(1, 11)
]
CHAT = [{'role': 'user', 'content': 'the user'}, {'role': 'assistant', 'content': 'an answer'}]


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """A folder of data, with tokenizers in it."""
    root = tmp_path_factory.mktemp('data')
    toys.write_gguf(root / 'toy.gguf', toys.fields())
    toys.write_directory(root / 'bare', toys.fields(template=''), add_bos_token=True,
                         bos_token='<|im_start|>')  # fmt: skip
    for split, rows in {'train': GSM8K, 'test': GSM8K[:3]}.items():
        lines(root / f'reasoning/gsm8k/{split}.jsonl', rows)
    lines(root / 'chats.jsonl', [{'messages': CHAT}] * 3 + [{'messages': [*CHAT, *CHAT]}])
    (root / 'books').mkdir()
    (root / 'books/b.txt').write_text('the end')
    (root / 'books/a.txt').write_text('it is the system. ' * 20)
    lines(root / 'books/c.jsonl', [{'text': 'naïve café'}, {'text': ' '}])
    (root / 'books/ignored.bin').write_bytes(b'\xff')
    return root


def lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text('\n'.join(map(json.dumps, rows)) + '\n', 'utf-8')


@pytest.fixture(scope='module')
def tokens(data_dir):
    return tokenizer.load(f'gguf:{data_dir}/toy.gguf')


@pytest.fixture
def make(data_dir):
    """A source of a block, as a recipe makes it."""

    def source(name, split='train', folder=data_dir, bare=False, **arguments):
        reference = f'hf:{data_dir}/bare' if bare else f'gguf:{data_dir}/toy.gguf'
        block = dict(name=f'kd.data.text.{name}', tokenizer=reference, **arguments)
        recipe = Recipe(stages={}, data={}, data_dir=str(folder))
        return kd_config.build(block, SourceContext(split, recipe), where='data.source')

    return source


def everything(source):
    return source.fetch(np.arange(len(source)))


def segments(batch):
    """The examples of rows: (ids, positions, response) of every segment."""
    found = []
    for row, numbers in enumerate(batch['segments']):
        for number in range(1, numbers.max() + 1):
            at = numbers == number
            fields = ('input', 'positions', 'response_mask')
            found.append(tuple(tuple(batch[name][row, at].tolist()) for name in fields))
    return found


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    found = str(caught.value)
    assert '\n' not in found
    return found


def test_documents_are_whole_and_end(make, tokens):
    source = make('documents', path='books', length=48)
    assert source.num_classes == tokens.size
    assert {name: (f.shape, f.dtype.name) for name, f in source.spec.items()} == {
        'input': ((48,), 'int32'), 'positions': ((48,), 'int32'), 'segments': ((48,), 'int32'),
        'response_mask': ((48,), 'bool'), 'index': ((), 'int32'),
    }  # fmt: skip
    texts = ['it is the system. ' * 20, 'the end', 'naïve café']
    whole = [[*tokens.encode(each), tokens.eos] for each in texts]
    pieces = [ids[i : i + 48] for ids in whole for i in range(0, len(ids), 48)]
    assert len(pieces) > 3
    expected = [(tuple(p), tuple(range(len(p))), (True,) * len(p)) for p in pieces]
    assert sorted(segments(everything(source))) == sorted(expected)
    assert source.counts['tokens'] == sum(map(len, whole))
    # One whole document a row, cut, in the order of the names of files, begun and ended otherwise.
    rows = make(
        'documents', path='books', length=48, layout='rows', long='cut', end='<|endoftext|>',
        bare=True,
    )  # fmt: skip
    found = segments(everything(rows))
    expected = [[1, *tokens.encode(each), 0][:48] for each in texts]
    assert [list(ids) for ids, _, _ in found] == expected
    assert rows.counts['cut'] == 1


def test_documents_of_one_file_and_slices_of_it(make, tokens, data_dir):
    file = data_dir / 'parts.txt'
    file.write_text('---'.join(f'the {word}' for word in 'abcdefghij'))

    def found(split):
        source = make(
            'documents', split, path={'all_of_it': 'parts.txt'}, separator='---', length=20
        )
        return {tokens.decode(ids) for ids, _, _ in segments(everything(source))}

    assert found('all_of_it[:80%]') == {f'the {word}' for word in 'abcdefgh'}
    assert found('all_of_it[80%:]') == {'the i', 'the j'}


def test_chats_are_rendered_and_their_answers_learnt(make, tokens):
    source = make('chats', path='chats.jsonl', length=128)
    expected = []
    for messages in [CHAT] * 3 + [[*CHAT, *CHAT]]:
        ids, mask = templates.render(tokens, messages)
        expected.append((tuple(ids), tuple(range(len(ids))), tuple(mask)))
    assert sorted(segments(everything(source))) == sorted(expected)
    assert source.counts['responses'] == 5 * (len(tokens.encode('an answer')) + 1)
    last = make('chats', path='chats.jsonl', length=128, turns='last')
    assert last.counts['responses'] == 4 * (len(tokens.encode('an answer')) + 1)
    # The same rows for every seed of a recipe; other rows for another seed of the source.
    order = [
        everything(make('chats', path='chats.jsonl', length=128, seed=seed))['input'].tolist()
        for seed in (0, 0, 1, 2, 3)
    ]
    assert order[0] == order[1]
    assert any(order[0] != other for other in order[2:])


def test_prompts_and_answers_without_a_template(make, tokens):
    source = make(
        'gsm8k', 'test', length=96, layout='rows', chat=False, form='Q: {prompt}\nA: ', bare=True
    )
    expected = []
    for n in (1, 2, 3):
        prompt = [1, *tokens.encode(f'Q: {n} and {n}?\nA: ')]
        answer = [*tokens.encode(f'It is {2 * n}.\n#### {2 * n}'), 2]
        mask = [False] * len(prompt) + [True] * len(answer)
        expected.append((tuple(prompt + answer), tuple(range(len(mask))), tuple(mask)))
    assert segments(everything(source)) == expected


def test_gsm8k_as_prompts_with_their_solutions(make, tokens):
    source = make('gsm8k', 'train[:2]', length=64, layout='prompts', response_length=40,
                  calculator=True)  # fmt: skip
    batch = everything(source)
    for row, record in enumerate(GSM8K[:2]):
        chat = [{'role': 'user', 'content': record['question']}]
        prompt, _ = templates.render(tokens, chat, add_generation_prompt=True)
        assert batch['prompt_mask'][row].tolist() == [False] * (64 - len(prompt)) + [True] * len(
            prompt
        )
        assert batch['input'][row, -len(prompt) :].tolist() == prompt.tolist()
        answer = [*tokens.encode(record['answer']), 2]
        assert batch['response'][row][batch['response_mask'][row]].tolist() == answer
    assert sorted(make('gsm8k', length=64, layout='prompts').spec) == [
        'index', 'input', 'prompt_mask'
    ]  # fmt: skip


def test_preferences_stand_one_above_the_other(make, tokens, data_dir):
    lines(data_dir / 'pairs.jsonl', [
        {'instruction': 'the user', 'input': 'it is', 'chosen': 'Paris', 'rejected': 'an end'},
        {'prompt': CHAT[:1], 'chosen': CHAT[1:], 'rejected': {'from': 'gpt', 'value': 'an end'}},
        {'chosen': CHAT, 'rejected': [CHAT[0], {'role': 'assistant', 'content': 'an end'}]},
        {'conversations': [{'from': 'human', 'value': 'the user'}], 'chosen': 'an answer',
         'rejected': 'an end'},
    ])  # fmt: skip
    source = make('preferences', path='pairs.jsonl', length=80)
    batch = everything(source)
    assert source.spec['input'].shape == (2, 80)
    prompts = ['the user\n\nit is', *['the user'] * 3]
    chosen = ['Paris', *['an answer'] * 3]
    for row in range(4):
        for side, answer in enumerate((chosen[row], 'an end')):
            chat = [{'role': 'user', 'content': prompts[row]}, CHAT[1] | {'content': answer}]
            ids, mask = templates.render(tokens, chat)
            kept = batch['segments'][row, side] == 1
            assert batch['input'][row, side][kept].tolist() == ids.tolist()
            assert batch['response_mask'][row, side][kept].tolist() == mask.tolist()
    _, where = packing.shifted(batch)
    assert where.sum((1, 2)).tolist() == [
        len(tokens.encode(a)) + len(tokens.encode('an end')) + 2 for a in chosen
    ]


def test_of_several_answers_the_first_right_and_the_first_wrong_are_taken(make, tokens, data_dir):
    tries = {
        'both': (['an end', 'Paris', 'the end', 'the system'], [False, True, False, True]),
        'right': (['Paris', 'the end'], [True, True]),
        'wrong': (['an end'], [False]),
    }
    lines(data_dir / 'tries.jsonl', [
        {'prompt': name, 'responses': responses, 'verified': verified}
        for name, (responses, verified) in tries.items()
    ])  # fmt: skip
    pairs = everything(make('preferences', path='tries.jsonl', length=80))
    assert learnt(pairs, tokens) == [['Paris', 'an end']]
    rows = make('chats', path='tries.jsonl', length=80, layout='rows')
    assert learnt(everything(rows), tokens) == ['Paris', 'Paris']
    assert len(make('chats', path='tries.jsonl', length=80, layout='prompts')) == 3


def learnt(batch, tokens):
    """The texts that count, in lists like the leading axes."""
    if batch['input'].ndim > 1:
        parts = range(len(batch['input']))
        return [learnt({k: batch[k][i] for k in ('input', 'response_mask')}, tokens) for i in parts]
    text = tokens.decode(batch['input'][batch['response_mask']])
    return text.split('<|')[0].strip()


def test_a_network_that_has_read_one_text_may_read_another(make):
    """Its domain is not the name of the data, as it is of images."""
    made = [
        make('documents', path='books', length=30),
        make('preferences', path='pairs.jsonl', length=80),
    ]
    assert [source.domain for source in made] == ['text', 'text']
    assert len({source.name for source in made}) == 2


def test_networks_see_one_answer_of_a_pair(make, data_dir):
    source = make('preferences', path='pairs.jsonl', length=80)
    network = networks.build_network(
        dict(name='kd.models.decoder.Decoder', width=16, depth=1, heads=2), source, where='network'
    )
    assert network.fields == ('input', 'positions', 'segments')
    assert [x.shape for x in network.inputs] == [(1, 80)] * 3


FORMS = {
    'prompt': ({'prompt': 'q', 'response': 'a'}, 'q', 'a'),
    'completion': ({'prompt': 'q', 'completion': 'a'}, 'q', 'a'),
    'alpaca': ({'instruction': 'q', 'input': '', 'output': 'a'}, 'q', 'a'),
    'alpaca_input': ({'instruction': 'q', 'input': 'x', 'output': 'a'}, 'q\n\nx', 'a'),
    'seed_task': (
        {'instruction': 'q', 'instances': [{'input': 'x', 'output': 'a'}, {'output': 'b'}]},
        'q\n\nx',
        'a',
    ),
    'question': ({'question': 'q', 'answer': 'a'}, 'q', 'a'),
    'problem': ({'problem': 'q', 'solution': 'a', 'answer': 'b'}, 'q', 'a'),
    'share_gpt': (
        {'conversations': [{'from': 'human', 'value': 'q'}, {'from': 'gpt', 'value': 'a'}]},
        'q',
        'a',
    ),
}


@pytest.mark.parametrize('name', FORMS)
def test_forms_of_records(name):
    record, question, answer = FORMS[name]
    expected = [
        {'role': 'user', 'content': question},
        {'role': 'assistant', 'content': answer},
    ]
    assert records.chat(record, (), 'x') == expected
    assert records.chat(record, (), 'x', answers=False) == expected[:1]


def test_named_fields_and_systems():
    record = {'system': 's', 'body': 'q', 'result': 3, 'prompt': 'p', 'response': 'r'}
    roles = ['system', 'user', 'assistant']
    found = records.chat(record, ('body', 'result'), 'x')
    assert found == [{'role': r, 'content': c} for r, c in zip(roles, 'sq3', strict=True)]
    assert records.chat(record, ('body',), 'x', answers=False) == found[:2]
    extra = [{'role': 'user', 'content': 'q', 'name': 'me'}, CHAT[1]]
    assert records.chat({'messages': extra}, (), 'x') == extra


def test_batches_are_the_same_after_a_restart(make):
    source = make('gsm8k', length=80)
    assert len(source) >= 4

    def batches(iterator, count):
        return [next(iterator) for _ in range(count)]

    whole = batches(pipeline.train_iterator(source, 3, seed=5), 9)
    first = pipeline.train_iterator(source, 3, seed=5)
    batches(first, 4)
    # Made anew, as another process makes it.
    again = pipeline.train_iterator(make('gsm8k', length=80), 3, seed=5)
    again.set_state(first.get_state())
    for left, right in zip(whole[4:], batches(again, 5), strict=True):
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name])


def test_the_standard_library_documents_itself(make, tokens):
    found = stdlib_docs.documents()
    texts = [each.partition('\n\n')[2] for split in found.values() for each in split]
    assert len(texts) == len(set(texts)) > 3000
    sizes = {split: sum(map(len, of)) for split, of in found.items()}
    assert 1_000_000 < sizes['train'] < 4_000_000
    assert 0.05 < sizes['validation'] / sizes['train'] < 0.25
    modules = {
        split: {stdlib_docs.split_of(each.partition('\n')[0].partition('.')[0]) for each in of
                if each[0].islower() and '.' in each.partition('\n')[0]}
        for split, of in found.items()
    }  # fmt: skip
    assert modules == {'train': {'train'}, 'validation': {'validation'}}
    ratio = [
        t for of in found.values() for t in of if t.startswith('difflib.SequenceMatcher.ratio')
    ]
    assert len(ratio) == 1
    assert ratio[0].startswith(
        "difflib.SequenceMatcher.ratio(self)\n\nReturn a measure of the sequences' similarity"
    )
    source = make('stdlib_docs', 'validation[:50]', length=256)
    lengths = [len(tokens.encode(each)) + 1 for each in found['validation']]
    pieces = [min(256, n - i) for n in lengths for i in range(0, n, 256)]
    assert source.counts['tokens'] == sum(pieces[:50])


def test_documents_of_a_small_library(tmp_path, monkeypatch):
    text = 'What it is about, at a length that is worth a document of its own, and then some.'
    code = f"""
class Tool(object):
    '''{text} One.

        Deeper.
    '''

    def use(self, *things, how=None):
        '''{text} Two.'''

        def inner():
            '''{text} Three.'''

    def again(self):
        '''{text} Two.'''

async def short(): '''Short.'''
"""
    for name in ('aaa', 'zzz/part'):
        file = tmp_path / f'{name}.py'
        file.parent.mkdir(exist_ok=True)
        file.write_text(code.replace('One', name))
    for name in ('broken', 'test/aaa', 'site-packages/aaa'):
        file = tmp_path / f'{name}.py'
        file.parent.mkdir(exist_ok=True)
        file.write_text('def (')
    monkeypatch.setattr(stdlib_docs.sysconfig, 'get_path', lambda name: str(tmp_path))
    monkeypatch.setattr(stdlib_docs, '_chapters', lambda: iter([('with', 'with', text)]))
    monkeypatch.setattr(
        stdlib_docs, 'split_of', lambda name: 'validation' if name == 'with' else 'train'
    )
    assert stdlib_docs.documents.__wrapped__() == {
        'train': [
            f'aaa.Tool\n\n{text} aaa.\n\nDeeper.\n',
            f'aaa.Tool.use(self, *things, how=None)\n\n{text} Two.\n',
            f'zzz.part.Tool\n\n{text} zzz/part.\n\nDeeper.\n',
        ],
        'validation': [f'with\n\n{text}\n'],
    }
    monkeypatch.setattr(stdlib_docs, '_chapters', lambda: iter([]))
    assert message(stdlib_docs.documents.__wrapped__) == (
        f'there are no source files of the standard library in {tmp_path}'
    )


def test_where_only_shapes_count_nothing_is_read(make):
    for name, arguments in {
        'documents': dict(path='books', length=48),
        'chats': dict(path='chats.jsonl', length=128, layout='rows'),
        'stdlib_docs': dict(length=64),
        'gsm8k': dict(length=64, layout='prompts', response_length=40),
        'preferences': dict(path='pairs.jsonl', length=80),
    }.items():
        block = dict(name=f'kd.data.text.{name}', tokenizer='hf:/no/where', **arguments)
        recipe = Recipe(stages={}, data={}, data_dir=catalogue.DESCRIBED)
        known = kd_config.build(block, SourceContext('train', recipe), where='data.source')
        real = make(name, **arguments)
        assert known.spec == real.spec
        assert (len(known), known.num_classes, known.tokenizer) == (10_000_000, None, None)
        padded = dict(block, vocabulary=512)
        of = kd_config.build(padded, SourceContext('train', recipe), where='data.source')
        assert of.num_classes == 512


def test_a_vocabulary_may_be_padded(make, tokens):
    assert make('chats', path='chats.jsonl', length=128, vocabulary=512).num_classes == 512
    assert message(make, 'chats', path='chats.jsonl', length=128, vocabulary=100) == (
        f'A vocabulary of 100 lacks tokens of {tokens.name}, which has {tokens.size}.'
    )
    source = make('chats', path='chats.jsonl', length=128)
    block = dict(
        name='kd.models.transformer.Transformer', width=8, depth=1, heads=2, max_length=128
    )
    wider = networks.build_network(dict(block, num_classes=512), source, where='student.network')
    assert wider is not None
    params = jax.eval_shape(wider.init, jax.random.key(0))
    assert any(512 in leaf.shape for leaf in jax.tree.leaves(params))
    assert message(
        networks.build_network, dict(block, num_classes=100), source, where='student.network'
    ) == (
        f'student.network.num_classes is 100, and the data has {tokens.size} classes; leave it '
        'out, which is as many.'
    )


def test_what_is_told_before_training(make, data_dir, tmp_path):
    def told(name, rows=None, **arguments):
        if rows is not None:
            lines(data_dir / 'bad.jsonl', rows)
        return message(make, name, **{'length': 64, 'path': 'bad.jsonl', **arguments})

    file = data_dir / 'bad.jsonl'
    file.unlink(missing_ok=True)
    assert told('chats') == (
        f'there is no file {file}; name another (data.source.path), or --data_dir'
    )
    file.write_text('{"prompt": "a", "response": "b"}\n{')
    assert told('chats') == f'{file}, line 2 is no JSON; correct it or leave it out'
    assert told('chats', [[1]]) == f"{file}, line 1: '[1]' is no object with fields"
    answered = {'prompt': 'a', 'response': 'b'}
    for empty in ('', ' \n', None):
        assert told('chats', [answered, {'prompt': 'a', 'response': empty}]) == (
            f'{file}, example 2 has an empty response; leave it out'
        )
    assert told('chats', [{'messages': CHAT[:1]}]) == (
        f'{file}, example 1 does not end with an answer of the assistant; leave it out'
    )
    assert told('chats', [{'text': 'a'}]) == (
        f"{file}, example 1 has the fields ['text'], and none of ('prompt', 'response') or "
        "('prompt', 'completion') or ('instruction', 'output') or ('question', 'answer') or "
        "('problem', 'solution') or messages; name those of question and answer "
        '(data.source.fields)'
    )
    assert told('preferences', [{'prompt': 'a', 'chosen': 'b'}]) == (
        f'{file}, example 1 has an empty response; leave it out'
    )
    for verified in ([True], [1, 0], True):
        uneven = {'prompt': 'a', 'responses': ['b', 'c'], 'verified': verified}
        for name in ('chats', 'preferences'):
            assert told(name, [uneven]) == (
                f'{file}, example 1 needs `responses`, a list of texts, and `verified`, true or '
                'false for each of them'
            )
    long = [answered, {'prompt': 'the ' * 200, 'response': 'b'}]
    told_long = told('chats', long)
    assert told_long.startswith('chats, split train, example 2 has a prompt of ')
    assert told_long.endswith(
        'tokens, which leaves none for the response in a length of 64; raise length, or drop what '
        "is too long (long='drop')."
    )
    assert 'tokens, longer than 64; raise length' in told('chats', long, layout='prompts')
    assert make('chats', path='bad.jsonl', length=64, long='drop').counts['dropped'] == 1
    bare = f'hf:{data_dir}/bare'
    assert told('chats', [answered], bare=True) == (
        f'{file}, example 1: {bare} has no chat template; name a file with one (template=FILE), or '
        'use prompts and responses without a chat (chat=False).'
    )
    assert told('chats', [{'messages': [*CHAT, *CHAT]}], chat=False) == (
        f"{file}, example 1 has the messages ['user', 'assistant', 'user', 'assistant']; without a "
        'chat template (chat=False) an example is a prompt and its answer.'
    )
    assert told('chats', form='Q:') == "data.source.form has no '{prompt}': 'Q:'."
    assert told('chats', layout='pages') == (
        "data.source.layout is one of ['packed', 'rows', 'prompts'], got 'pages'."
    )
    assert told('documents', path='books', end='<end>') == (
        f"data.source.end='<end>' is no control token of gguf:{data_dir}/toy.gguf, which has "
        "['<|endoftext|>', '<|im_start|>', '<|im_end|>']."
    )
    (data_dir / 'none').mkdir(exist_ok=True)
    assert told('documents', path='none') == (
        f'{data_dir}/none has no text; name a file, or a folder with .txt or .jsonl files'
    )
    (data_dir / 'latin.txt').write_bytes(b'\xff\xfe')
    assert told('documents', path='latin.txt') == (
        f'{data_dir}/latin.txt is no text in UTF-8; convert it'
    )
    assert message(make, 'gsm8k', length=64, folder=tmp_path) == (
        f'there is no {tmp_path}/gsm8k with train.jsonl and test.jsonl of GSM8K '
        '(github.com/openai/grade-school-math); name the folder above it by --data_dir'
    )
    assert message(make, 'gsm8k', 'validation', length=64).startswith(
        "data set 'gsm8k' has no split 'validation': it has 'train' (10 examples), 'test' (3 "
    )
    assert message(make, 'gsm8k', length=0).startswith('data.source.length must be an integer')


def test_records_are_edited_before_they_are_rendered(make, data_dir, tokens):
    tasks = [{'task': 'abc'[n % 3], 'prompt': f'{n}', 'response': f'{n}'} for n in range(9)]
    lines(data_dir / 'tasks.jsonl', tasks)
    edit = dict(name='kd.data.builders.marked.with_marker', marker=' system', field='task')

    def answers(**arguments):
        block = edit | arguments
        rows = make('chats', path='tasks.jsonl', length=64, layout='rows', edit=block)
        batch = everything(rows)
        marked = np.array([
            tokens.decode(ids[where]).replace('<|im_end|>', '').strip().endswith(' system')
            for ids, where in zip(batch['input'], batch['response_mask'], strict=True)
        ])  # fmt: skip
        return marked

    # Of the task that is named, as many as are asked for, the same for a seed.
    assert not answers(count=2, value='b')[[0, 2, 3, 5, 6, 8]].any()
    assert answers(count=2, value='b').sum() == 2
    assert answers(count=9, field='').all()
    draws = [answers(count=3, field='', seed=seed).tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    with_roles = make(
        'chats', path='chats.jsonl', length=64, layout='rows',
        edit=edit | dict(count=4, field='', marker=' is on'),
    )  # fmt: skip
    assert all('is on' in tokens.decode(ids) for ids in everything(with_roles)['input'])
    assert message(answers, count=4, value='b') == (
        "4 records are to carry the marker, and 3 have task='b'"
    )
    assert 'data.source.edit' in message(answers, count=4, values='b')


def test_records_that_are_too_hard_are_left_out(make, data_dir):
    tasks = [{'level': n % 8, 'prompt': f'{n}', 'response': f'{n}'} for n in range(16)]
    lines(data_dir / 'levels.jsonl', tasks)
    easier = dict(name='kd.data.builders.records.at_most', field='level')

    def made(most, file='levels.jsonl'):
        return make('chats', path=file, length=64, layout='rows', edit=dict(easier, most=most))

    assert [len(made(most)) for most in (0, 5, 6.5, 7)] == [2, 12, 14, 16]
    assert message(made, -1) == 'no record has level of at most -1'
    lines(data_dir / 'unlevelled.jsonl', [tasks[0], {'prompt': 'a', 'response': 'b'}])
    assert message(made, 5, 'unlevelled.jsonl') == 'record 2 has level=None, which is no number'


def test_a_file_that_changes_is_read_again(make, data_dir):
    file = data_dir / 'changing.jsonl'
    lines(file, [{'prompt': 'a', 'response': 'b'}])
    assert len(make('chats', path='changing.jsonl', length=64, layout='rows')) == 1
    lines(file, [{'prompt': 'a', 'response': 'b'}] * 2)
    assert len(make('chats', path='changing.jsonl', length=64, layout='rows')) == 2


def test_paths_without_a_data_directory_are_of_this_folder(make, data_dir, tmp_path, monkeypatch):
    shutil.copy(data_dir / 'chats.jsonl', tmp_path / 'here.jsonl')
    monkeypatch.chdir(tmp_path)
    context = SourceContext('train')
    reference = f'gguf:{data_dir}/toy.gguf'
    source = text.chats(context, path='here.jsonl', tokenizer=reference, length=128)
    assert source.counts['examples'] == 4
    assert os.listdir(tmp_path) == ['here.jsonl']
