"""Tokenizers against computations of their own, in both kinds of files."""

import itertools
import json
import os
import random
import re
import sys
import unicodedata

import numpy as np
import pytest
import toy_tokenizers as toys
from tokenizers import Tokenizer

from kd import packages
from kd.errors import UserError
from kd.io import gguf as gguf_files
from kd.text import gguf, table, tokenizer

SMOLLM2 = os.environ.get('KD_SMOLLM2', '')
TEXTS = (
    'The capital of France is Paris.',
    "  It's   what\n\nthe system\tsays… 12 345, naïve café\u0301 x²½Ⅷ٣",
    '中文 русский हिन्दी 👩‍👩‍👧 \u00a0\u3000 ﬁ \x00\x7f',
    '<|im_start|>assistant <think> </think><|endoftext|>',
    ' \n',
    '',
)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp('models')


@pytest.fixture(scope='module')
def smollm(folder):
    """References of one byte-level tokenizer: GGUF, directory."""
    found = toys.fields()
    return (
        toys.write_gguf(folder / 'smollm.gguf', found),
        toys.write_directory(folder / 'smollm', found),
    )


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert '\n' not in text
    return text


def byte_characters():
    """GPT-2's printable character for every byte."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(others)}


def gpt2_words(text):
    """GPT-2's pieces of a text, with classes of characters by unicodedata and `re`."""

    def of(first):
        found = {c for c in text if unicodedata.category(c)[0] == first} or {'\ue000'}
        return ''.join(map(re.escape, sorted(found)))

    space = r' \t\n\r\x0b\x0c\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000'
    letters, numbers = of('L'), of('N')
    pattern = (
        f"'s|'t|'re|'ve|'m|'ll|'d| ?[{letters}]+| ?[{numbers}]+"
        f'| ?[^{space}{letters}{numbers}]+|[{space}]+(?![^{space}])|[{space}]+'
    )
    return re.findall(pattern, text)


def smollm_words(text):
    """Every number character alone, and GPT-2's pieces of what is between."""
    pieces = []
    for part in re.split(r'(?s)(.)', text)[1::2]:
        if unicodedata.category(part)[0] == 'N':
            pieces.append([part])
        elif pieces and isinstance(pieces[-1], str):
            pieces[-1] += part
        else:
            pieces.append(part)
    return [w for p in pieces for w in (p if isinstance(p, list) else gpt2_words(p))]


def merged(word, ranks):
    """Byte-pair merging: the pair of lowest rank first, the leftmost of equals."""
    parts = list(word)
    while len(parts) > 1:
        pairs = list(itertools.pairwise(parts))
        best = min(pairs, key=lambda pair: ranks.get(pair, float('inf')))
        if best not in ranks:
            break
        at = pairs.index(best)
        parts[at : at + 2] = [''.join(best)]
    return parts


def byte_pair_ids(text, fields):
    ids = {token: i for i, token in enumerate(fields['tokenizer.ggml.tokens'])}
    ranks = {tuple(m.split(' ')): i for i, m in enumerate(fields['tokenizer.ggml.merges'])}
    characters = byte_characters()
    words = [''.join(characters[b] for b in word.encode()) for word in smollm_words(text)]
    return [ids[part] for word in words for part in merged(word, ranks)]


def random_texts(count, seed=0):
    """Strings of letters, digits, marks, spaces and emoji of many scripts."""
    rng = random.Random(seed)
    alphabet = [
        *"   \n\tabcdeTHE012789.,!'-_/(){}",
        *'éßñжщΩ中文日ñ٣½Ⅷ²👩🇫\u200d\u0301\u00a0\u3000',
    ]
    return [''.join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(count)]


def test_byte_level_ids_are_those_of_merging_by_hand(smollm):
    tokens, fields = tokenizer.load(smollm[0]), toys.fields()
    for text in (*random_texts(200), *TEXTS[:3], toys.CORPUS):
        assert tokens.encode(text) == byte_pair_ids(text, fields)


@pytest.mark.skipif(not SMOLLM2, reason='KD_SMOLLM2 names no GGUF file of SmolLM2')
def test_smollm2s_ids_are_those_of_merging_by_hand_and_of_llama_cpp():
    tokens = tokenizer.load(f'gguf:{SMOLLM2}')
    assert (tokens.size, tokens.eos, tokens.pad, tokens.bos) == (49152, 2, 2, 1)
    assert tokens.stop == (2, 0)
    assert not tokens.begins
    fields = gguf_files.metadata(SMOLLM2)
    vocabulary = fields['tokenizer.ggml.tokens']
    # Digits first, as llama.cpp does: two spaces before a number are one token.
    assert [vocabulary[i] for i in tokens.encode('a  12')] == ['a', 'ĠĠ', '1', '2']
    for text in (*random_texts(300, seed=1), *TEXTS[:3]):
        ids = tokens.encode(text)
        assert ids == byte_pair_ids(text, fields)
        assert tokens.decode(ids) == text


def test_decoding_gives_back_every_text(smollm):
    tokens = tokenizer.load(smollm[0])
    for text in (*random_texts(100, seed=2), *TEXTS[:3], *TEXTS[4:]):
        assert tokens.decode(tokens.encode(text)) == text
    assert tokens.decode(tokens.encode(TEXTS[3]), special=True) == TEXTS[3]


def test_a_batch_is_encoded_as_each_text_alone(smollm):
    tokens = tokenizer.load(smollm[0])
    found = tokens.encode_all(TEXTS)
    assert [list(ids) for ids in found] == [tokens.encode(text) for text in TEXTS]
    assert {ids.dtype for ids in found} == {np.dtype(np.int32)}


def test_half_of_a_surrogate_pair_is_a_question_mark(smollm):
    tokens = tokenizer.load(smollm[0])
    assert tokens.decode(tokens.encode(json.loads('"a\\ud83d!"'))) == 'a?!'


def test_control_tokens_are_text_unless_they_are_asked_for(smollm):
    tokens = tokenizer.load(smollm[0])
    text = 'hi<|im_end|>\n<think>'
    think = tokens.encode('<think>')
    assert len(think) == 1
    ids = tokens.encode(text, special=True)
    assert ids == [*tokens.encode('hi'), 2, *tokens.encode('\n'), *think]
    assert 2 not in tokens.encode(text)
    assert tokens.decode(ids) == 'hi\n<think>'
    assert tokens.decode(ids, special=True) == text


@pytest.mark.parametrize('kind', ['smollm', 'scored'])
def test_parsing_control_tokens_is_what_the_package_does(kind, folder):
    fields = toys.fields() if kind == 'smollm' else toys.scored_fields()
    reference = toys.write_directory(folder / f'parsing-{kind}', fields)
    package = Tokenizer.from_file(reference.removeprefix('hf:') + '/tokenizer.json')
    tokens = tokenizer.load(reference)
    end = fields['tokenizer.ggml.tokens'][2]
    for text in (f'the{end} the {end}{end}\n', f'{end}it is', 'Paris <s> <|im_start|>user'):
        expected = package.encode(text, add_special_tokens=False).ids
        assert tokens.encode(text, special=True) == expected


def test_pieces_of_the_families():
    pieces = {
        'gpt-2': ['a', ' ', ' 1234', "'ll", ' ', '\n', 'B', '!'],
        'smollm': ['a', '  ', '1', '2', '3', '4', "'ll", ' ', '\n', 'B', '!'],
        'llama-bpe': ['a', ' ', ' ', '123', '4', "'ll", ' \n', 'B', '!'],
        'qwen2': ['a', ' ', ' ', '1', '2', '3', '4', "'ll", ' \n', 'B', '!'],
    }
    characters = byte_characters()
    for name, expected in pieces.items():
        fields = toys.fields(name)
        made = Tokenizer.from_str(json.dumps(gguf.tokenizer_json(fields, where='x')))
        found = made.pre_tokenizer.pre_tokenize_str("a  1234'll \nB!")
        assert [piece for piece, _ in found] == [
            ''.join(characters[b] for b in word.encode()) for word in expected
        ], name
    aliases = {'llama3': 'llama-bpe', 'llama-v3': 'llama-bpe', 'deepseek-r1-qwen': 'qwen2'}
    assert {name: name for name in pieces} | aliases == gguf.PRE_TOKENIZERS


def test_a_whole_word_of_llama_3_needs_no_merges():
    fields = toys.fields('llama-bpe')
    fields['tokenizer.ggml.merges'] = fields['tokenizer.ggml.merges'][:1]
    roles = gguf.roles(fields)
    made = tokenizer.build(gguf.tokenizer_json(fields, where='x'), roles, name='x')
    assert len(made.encode(' capital')) == 1
    fields['tokenizer.ggml.pre'] = 'gpt-2'
    plain = tokenizer.build(gguf.tokenizer_json(fields, where='x'), roles, name='x')
    assert len(plain.encode(' capital')) > 1


def scored_ids(text, fields):
    """SentencePiece by hand: join the neighbours whose union scores best, the leftmost of equals;
    what is no piece in the end is spelled in bytes."""
    ids = {token: i for i, token in enumerate(fields['tokenizer.ggml.tokens'])}
    scores = fields['tokenizer.ggml.scores']
    parts = list('▁' + text.replace(' ', '▁')) if text else []
    while len(parts) > 1:
        joined = [a + b for a, b in itertools.pairwise(parts)]
        at = max(
            range(len(joined)), key=lambda i: scores[ids[joined[i]]] if joined[i] in ids else -1e9
        )
        if joined[at] not in ids:
            break
        parts[at : at + 2] = [joined[at]]
    raw = [[ids[p]] if p in ids else [ids[f'<0x{b:02X}>'] for b in p.encode()] for p in parts]
    return [index for group in raw for index in group]


def test_scored_pieces_are_joined_as_by_hand(folder):
    fields = toys.scored_fields()
    tokens = tokenizer.load(toys.write_gguf(folder / 'scored.gguf', fields))
    rng = random.Random(3)
    words = ['the', 'answer', 'is', 'Paris', 'it', 'wing', 'é', '中', 'in', 'user', '', '12', '\n']
    for _ in range(200):
        text = ' '.join(rng.choices(words, k=rng.randint(1, 8)))
        ids = tokens.encode(text)
        assert ids == scored_ids(text, fields)
        assert tokens.decode(ids) == text
    # A text that goes on from other text begins with no space.
    names = fields['tokenizer.ggml.tokens']
    assert [names[i] for i in tokens.encode('is')] == ['▁is']
    assert [names[i] for i in tokens.encode('is', begin=False)] == ['is']
    assert tokens.begins


def test_a_space_before_the_first_piece_alone(folder):
    fields = toys.scored_fields()
    description = gguf.tokenizer_json(fields, where='x')
    description['normalizer'] = None
    description['pre_tokenizer'] = {
        'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': 'first', 'split': False
    }  # fmt: skip
    made = tokenizer.build(description, gguf.roles(fields), name='x')
    names = fields['tokenizer.ggml.tokens']
    found = made.encode('is</s>is', special=True)
    assert [names[i] for i in found] == ['▁is', '</s>', 'is']
    package = Tokenizer.from_str(json.dumps(description))
    assert found == package.encode('is</s>is', add_special_tokens=False).ids


def variants():
    """Changes of a description, and whether they change what is computed."""

    def merges_as_strings(d):
        d['model']['merges'] = [' '.join(pair) for pair in d['model']['merges']]

    def fewer_merges(d):
        d['model']['merges'].pop()

    def two_exchanged(d):
        ids = d['model']['vocab']
        ids['Ġthe'], ids['Ġis'] = ids['Ġis'], ids['Ġthe']

    def cut_at_512(d):
        d['truncation'] = {
            'max_length': 512, 'stride': 0, 'strategy': 'LongestFirst', 'direction': 'Right'
        }  # fmt: skip
        d['model']['dropout'] = 0.5

    def a_first_token(d):
        d['post_processor'] = {
            'type': 'TemplateProcessing',
            'single': [
                {'SpecialToken': {'id': '<|im_start|>', 'type_id': 0}},
                {'Sequence': {'id': 'A', 'type_id': 0}},
            ],
            'pair': [],
            'special_tokens': {
                '<|im_start|>': {'id': '<|im_start|>', 'ids': [1], 'tokens': ['<|im_start|>']}
            },
        }

    def no_digits(d):
        d['pre_tokenizer'] = d['pre_tokenizer']['pretokenizers'][1]

    def composed(d):
        d['normalizer'] = {'type': 'NFC'}

    def another_added(d):
        d['added_tokens'].pop()

    def not_special(d):
        for token in d['added_tokens']:
            token['special'] = False

    same = (merges_as_strings, cut_at_512, a_first_token, not_special)
    other = (fewer_merges, two_exchanged, no_digits, composed, another_added)
    return [(f, True) for f in same] + [(f, False) for f in other]


@pytest.mark.parametrize(('change', 'same'), variants(), ids=lambda x: getattr(x, '__name__', ''))
def test_a_fingerprint_tells_what_is_computed(change, same, smollm):
    fields = toys.fields()
    description = gguf.tokenizer_json(fields, where='x')
    change(description)
    changed = tokenizer.build(description, gguf.roles(fields), name='changed')
    original = tokenizer.load(smollm[0])
    assert (changed.fingerprint == original.fingerprint) is same
    if same:
        assert changed.encode(TEXTS[1]) == original.encode(TEXTS[1])
        tokenizer.check_same(changed, original)
    else:
        assert message(tokenizer.check_same, changed, original, where='student.teacher') == (
            f'student.teacher: the tokenizers of changed ({changed.size:,} tokens, '
            f'{changed.fingerprint}) and {original.name} ({original.size:,} tokens, '
            f'{original.fingerprint}) are not the same, and distillation compares token by token; '
            'take models of one family.'
        )


def test_the_same_tokenizer_in_both_files_is_the_same(smollm, folder):
    a, b = map(tokenizer.load, smollm)
    assert a.fingerprint == b.fingerprint
    for role in ('size', 'eos', 'pad', 'stop', 'control', 'template', 'begins'):
        assert getattr(a, role) == getattr(b, role), role
    # Unused tokens at the end of a file are padding of its vocabulary.
    assert a.size == len(toys.fields()['tokenizer.ggml.tokens']) - 2
    # Ways to one piece in another order, as an older converter writes them.
    fields = toys.scored_fields()
    scored = tokenizer.load(toys.write_gguf(folder / 'both.gguf', fields))
    description = gguf.tokenizer_json(fields, where='x')
    score = dict(zip(fields['tokenizer.ggml.tokens'], fields['tokenizer.ggml.scores'], strict=True))
    description['model']['merges'].sort(key=lambda m: (-score[''.join(m)], -len(m[0])))
    again = tokenizer.build(description, gguf.roles(fields), name='x')
    assert again.fingerprint == scored.fingerprint


@pytest.mark.parametrize('begins', [False, True])
@pytest.mark.parametrize('kind', ['byte_level', 'scored'])
def test_a_tokenizer_of_a_gguf_file_is_saved_as_one_that_transformers_reads(kind, begins, tmp_path):
    made = toys.fields() if kind == 'byte_level' else toys.scored_fields('{{ messages }}')
    made['tokenizer.ggml.add_bos_token'] = begins
    made['tokenizer.ggml.eot_token_id'] = 2
    reference = toys.write_gguf(tmp_path / 'x.gguf', made)
    tokenizer.save(reference, tmp_path)
    one, other = tokenizer.load(reference), tokenizer.load(f'hf:{tmp_path}')
    for role in ('fingerprint', 'size', 'eos', 'pad', 'bos', 'stop', 'control', 'template'):
        assert getattr(one, role) == getattr(other, role), role
    assert one.begins == other.begins == begins
    # What reads the file puts the first token there by the post-processor.
    package = Tokenizer.from_file(str(tmp_path / 'tokenizer.json'))
    first = [one.bos] if begins else []
    assert package.encode('the answer is').ids == [*first, *one.encode('the answer is')]
    # A directory is copied.
    (tmp_path / 'again').mkdir()
    tokenizer.save(f'hf:{tmp_path}', tmp_path / 'again')
    assert tokenizer.load(f'hf:{tmp_path}/again').fingerprint == one.fingerprint


def test_padded_vocabularies_share_the_smaller(smollm):
    tokens = tokenizer.load(smollm[0])
    assert tokenizer.shared_size(tokens, tokens.size + 64, tokens.size + 7) == tokens.size + 7
    assert message(tokenizer.shared_size, tokens, 500, 100) == (
        f'A vocabulary of 100 lacks tokens of {tokens.name}, which has {tokens.size}.'
    )


def test_roles_of_tokens_from_the_files_of_a_directory(folder):
    fields = toys.fields(template='')
    name = folder / 'roles'
    toys.write_directory(name, fields, add_bos_token=True, bos_token='<|im_start|>')
    (name / 'generation_config.json').write_text('{"eos_token_id": [2, 0, 300]}')
    (name / 'chat_template.jinja').write_text('{{ messages }}')
    found = tokenizer.load(f'hf:{name}')
    assert (found.bos, found.begins, found.stop, found.template) == (
        1, True, (2, 0, 300), '{{ messages }}'
    )  # fmt: skip
    (name / 'chat_template.jinja').unlink()
    config = {
        'eos_token': None,
        'chat_template': [
            {'name': 'tools', 'template': 'b'}, {'name': 'default', 'template': 'a'}
        ],
    }  # fmt: skip
    toys.write_directory(folder / 'roles2', fields, **config)
    (folder / 'roles2/config.json').write_text('{"eos_token_id": [7, 8]}')
    found = tokenizer.load(f'hf:{folder}/roles2')
    assert (found.eos, found.bos, found.begins, found.template) == (7, None, False, 'a')
    own = folder / 'own.jinja'
    own.write_text('c')
    assert tokenizer.load(f'hf:{folder}/roles2', template=str(own)).template == 'c'


def test_what_cannot_be_loaded(folder, tmp_path, monkeypatch):
    def broken(**changes):
        file = tmp_path / f'{len(list(tmp_path.iterdir()))}.gguf'
        return toys.write_gguf(file, {**toys.fields(), **changes}), file

    assert message(tokenizer.load, 'SmolLM2') == (
        "A tokenizer is 'hf:DIR' or 'gguf:FILE', got 'SmolLM2'."
    )
    assert message(tokenizer.load, 'gguf:/no/where.gguf') == 'There is no GGUF file /no/where.gguf.'
    assert message(tokenizer.load, 'hf:/no/where') == 'There is no directory /no/where of a model.'
    (tmp_path / 'empty').mkdir()
    assert 'has no tokenizer.json' in message(tokenizer.load, f'hf:{tmp_path}/empty')
    (tmp_path / 'empty/tokenizer.json').write_text('{')
    assert message(tokenizer.load, f'hf:{tmp_path}/empty') == (
        f'{tmp_path}/empty/tokenizer.json is damaged: it is no JSON object; fetch the directory '
        'again.'
    )
    (tmp_path / 'empty/tokenizer.json').write_text('{"model": {"vocab": {}, "type": "Magic"}}')
    assert f'hf:{tmp_path}/empty: no tokenizer (' in message(tokenizer.load, f'hf:{tmp_path}/empty')
    reference, file = broken(**{'tokenizer.ggml.pre': 'viking'})
    assert message(tokenizer.load, reference) == (
        f"{file} names the pre-tokenizer 'viking', and those known are ['gpt-2', 'smollm', "
        "'llama-bpe', 'llama3', 'llama-v3', 'qwen2', 'deepseek-r1-qwen']."
    )
    reference, file = broken(**{'tokenizer.ggml.model': 'bert'})
    assert message(tokenizer.load, reference) == (
        f"{file} has a tokenizer of the kind 'bert', and those known are ['gpt2', 'llama']."
    )
    reference, file = broken(**{'tokenizer.ggml.eos_token_id': 99999})
    size = tokenizer.load(toys.write_gguf(tmp_path / 'whole.gguf', toys.fields())).size
    assert message(tokenizer.load, reference) == (
        f'{reference}: the token for the end (eos), 99999, is none of its {size:,}.'
    )
    whole = (tmp_path / 'whole.gguf').read_bytes()
    (tmp_path / 'half.gguf').write_bytes(whole[: len(whole) // 2])
    assert message(tokenizer.load, f'gguf:{tmp_path}/half.gguf').startswith(
        f'{tmp_path}/half.gguf is no whole GGUF file ('
    )
    (tmp_path / 'text.gguf').write_text('hello, this is no such file')
    assert 'is no whole GGUF file' in message(tokenizer.load, f'gguf:{tmp_path}/text.gguf')
    toys.write_directory(tmp_path / 'eos', toys.fields(), eos_token='<end>')
    assert message(tokenizer.load, f'hf:{tmp_path}/eos') == (
        f"hf:{tmp_path}/eos: the token for the end (eos), '<end>', is none of its {size:,}."
    )
    toys.write_directory(tmp_path / 'eos', toys.fields(), eos_token=None)
    assert 'names no token for the end (eos)' in message(tokenizer.load, f'hf:{tmp_path}/eos')
    assert message(tokenizer.load, f'hf:{tmp_path}/eos', template='/no.jinja') == (
        'There is no chat template /no.jinja.'
    )
    monkeypatch.setitem(sys.modules, 'gguf', None)
    assert message(packages.need, 'gguf') == (
        "The package gguf is missing: pip install -e '.[lm]' brings it."
    )


def test_a_table_of_symbols():
    digits = table.table(('PAD', 'BOS', 'EOS', '=', '#', *'0123456789'))
    ids = digits.encode('BOS 1 2 = 3 # EOS')
    assert ids == [1, 6, 7, 3, 8, 4, 2]
    assert (digits.size, digits.eos, digits.pad, digits.bos, digits.stop) == (15, 2, 0, 1, (2,))
    assert digits.decode([0, *ids]) == '1 2 = 3 #'
    assert digits.decode([0, *ids], special=True) == 'PAD BOS 1 2 = 3 # EOS'
    assert message(digits.encode, '1 + 2') == "table has no symbol '+'."
    assert message(table.table, ('EOS', 'a', 'a', 'b')) == (
        "table: symbols are different words, and ['a'] are not."
    )
    assert message(table.table, ('EOS', 'a b')) == (
        "table: symbols are different words, and ['a b'] are not."
    )
    assert message(table.table, ('a',)) == "table has no symbol 'EOS' for the end (eos)."
    other = table.table(('PAD', 'BOS', 'EOS', '#', '=', *'0123456789'))
    assert digits.fingerprint != other.fingerprint
    assert 'are not the same' in message(tokenizer.check_same, digits, other)
