"""Networks of others as teachers, references and starts of a stage."""

import json
import sys

import jax
import numpy as np
import pytest

from kd import config as kd_config
from kd import files
from kd.aot.compile import compile_stage
from kd.errors import UserError
from kd.io import cache, manifest, pretrained, safetensors
from kd.overrides import override
from kd.parallel.mesh import make_mesh
from kd.training import loop, reuse
from kd.training import step as step_lib
from kd.training.stage import prepare

SHARED = dict(num_classes=40, width=32, depth=2, heads=4, kv_heads=2, mlp_hidden=64)
LLAMA = dict(
    **SHARED,
    rope_theta=500000.0,
    rope_scaling=dict(
        rope_type='llama3',
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    ),
)


@pytest.fixture(scope='module', autouse=True)
def helpers():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend('tests/recipes')
        patch.syspath_prepend('tests/io')
        yield
    for name in ('tokens', 'hf_models'):
        sys.modules.pop(name, None)


@pytest.fixture(scope='module')
def models(helpers, tmp_path_factory):
    """A directory of a Llama and a GGUF file of it."""
    import hf_models

    folder = tmp_path_factory.mktemp('models')
    hf_models.write(folder / 'llama', 'llama')
    hf_models.write_gguf(folder / 'llama.gguf', 'llama')
    return folder


def recipe(**stage):
    import tokens

    return tokens.get_config(**stage)


def decoder(**arguments):
    return dict(name='kd.models.decoder.Decoder', **arguments)


def prepared(config, workdir=None):
    return prepare(kd_config.parse(config), 'student', make_mesh({'data': 1}), workdir)


def params_of(reference):
    module = pretrained.network(reference)
    abstract = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 1), np.int32))
    return pretrained.load(reference, abstract)


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


def test_every_way_to_name_one_gives_its_variables(models, tmp_path):
    gguf, hf = f'gguf:{models}/llama.gguf', f'hf:{models}/llama'
    entries = dict(
        named=dict(weights=hf),
        preset=dict(weights=hf, network=decoder(**LLAMA, param_dtype='bfloat16')),
        changed=dict(weights=gguf, network=dict(stacked=True)),
    )
    config = recipe(
        pretrained=entries,
        teacher=gguf,
        references=dict(a=hf, b='named', c='preset', d='changed', e=gguf),
    )
    frozen = prepared(config, tmp_path).frozen
    wanted = params_of(hf)
    for name in ('teacher', 'a', 'b'):
        same(frozen[name], wanted)
    same(frozen['c'], jax.tree.map(lambda x: x.astype('bfloat16'), wanted))
    # One network of two labels lies in memory once.
    assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x is y, frozen['e'], frozen['teacher'])))
    assert frozen['d']['params']['blocks']['mlp']['up']['kernel'].shape == (2, 32, 64)


def test_a_student_starts_from_a_file_and_learns_from_another(models, tmp_path):
    shape = dict(name='kd.io.pretrained.network', of=f'hf:{models}/llama')
    config = recipe(
        network=shape,
        teacher='big',
        references=dict(start=f'gguf:{models}/llama.gguf'),
        pretrained=dict(big=dict(weights=f'hf:{models}/llama')),
    )
    config.student.optimizer.lr = 0.0
    loop.run(config, tmp_path / 'run')
    same(safetensors.stage_variables(tmp_path / 'run' / 'student'), params_of(shape['of']))
    lines = (tmp_path / 'run' / 'student' / 'metrics.jsonl').read_text().splitlines()
    assert np.isfinite(json.loads(lines[-1])['train/loss'])


def test_a_stage_that_is_done_is_of_the_networks_that_it_names():
    def plain(**changes):
        entries = dict(big=dict(weights='hf:a'), spare=dict(weights='hf:a'))
        made = recipe(pretrained={**entries, **changes}, teacher='big')
        return json.loads(files.json_text(kd_config.parse(made).plain()))

    def check(old, new):
        reuse.check(old, new, ['student'], reuse.EVERYTHING)

    check(plain(), plain(spare=dict(weights='hf:b')))
    older = {key: value for key, value in plain().items() if key != 'pretrained'}
    for old, message in (
        (plain(big=dict(weights='hf:b')), r"pretrained\.big\.weights was 'hf:b' and is 'hf:a'"),
        (plain(big=dict(weights='hf:a', network=dict(depth=1))), r'pretrained\.big\.network'),
        (older, r'pretrained\.big is only in the new config'),
    ):
        with pytest.raises(UserError, match=message):
            check(old, plain())
    # A recipe of before there were such networks.
    new = json.loads(files.json_text(kd_config.parse(recipe()).plain()))
    check({key: value for key, value in new.items() if key != 'pretrained'}, new)


def test_weights_of_others_are_in_the_manifest(models):
    parsed = kd_config.parse(
        recipe(
            pretrained=dict(big=dict(weights=f'hf:{models}/llama')),
            teacher='big',
            references=dict(start=f'gguf:{models}/llama.gguf'),
        )
    )
    plain = parsed.plain()
    before = manifest.teachers(plain)
    assert set(before) == {'big', f'gguf:{models}/llama.gguf'}
    file = models / 'llama' / 'model.safetensors'
    content = file.read_bytes()
    try:
        file.write_bytes(content[:-5] + bytes(5))
        after = manifest.teachers(plain)
    finally:
        file.write_bytes(content)
    assert [name for name in before if before[name] != after[name]] == ['big']
    assert manifest.teachers(plain) == before
    # What a cache remembers of its teacher.
    for reference, digest in before.items():
        assert cache.training_fingerprint(parsed.locate(reference, models)) == digest


def test_without_a_file_a_preset_is_checked_and_compiled(quick_compilation):
    entry = dict(weights='hf:/nowhere', network=decoder(**LLAMA, dtype='bfloat16'))
    config = recipe(pretrained=dict(big=entry), teacher='big')
    config.frozen_sharding = (('kernel', 'fsdp'),)
    stage = prepared(config)
    assert stage.frozen['teacher']['params']['block1']['mlp']['up']['kernel'].shape == (32, 64)
    with quick_compilation():
        report = compile_stage(config, 'student', 'cpu:2')
    assert report.refused == ''
    with pytest.raises(UserError, match=r'^student\.teacher: /nowhere is not there, or is no dir'):
        step_lib.check(kd_config.parse(config), 'student', make_mesh({'data': 1}))
    with pytest.raises(UserError, match=r'^student\.teacher: /nowhere is not there'):
        prepared(recipe(teacher='hf:/nowhere'))


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (dict(network=decoder(**LLAMA | dict(rope_theta=1e4))), None),
        (dict(network=dict(rope_theta=1e4)), None),
        (
            dict(network=dict(name='mine.preset', theta=1e4)),
            r'says rope_theta=500000\.0, and the n',
        ),
        (dict(network=dict(name='mine.preset', theta=5e5)), None),
        (dict(network=decoder(**LLAMA | dict(depth=3))), r"has no tensor 'model\.layers\.2\."),
        (
            dict(network=dict(name='kd.models.mlp.MLP', widths=(4,))),
            'is a Decoder, and the network a MLP',
        ),
        (dict(network=dict(depht=3)), "Decoder has no 'depht'. Did you mean 'depth'"),
        (dict(weights='gguf:/nowhere.gguf'), r'There is no GGUF file /nowhere\.gguf'),
    ],
)
def test_a_network_and_its_file_agree(models, monkeypatch, entry, message):
    import types

    from kd.models.decoder import Decoder

    module = types.ModuleType('mine')
    module.preset = lambda theta: Decoder(**LLAMA | dict(rope_theta=theta))
    monkeypatch.setitem(sys.modules, 'mine', module)
    entry = {'weights': f'hf:{models}/llama', **entry}

    def check():
        stage = prepared(recipe(pretrained=dict(big=entry), references=dict(big='big')))
        stage.trained['big'].verify()

    if message is None:
        check()
        return
    with pytest.raises(UserError, match=message) as raised:
        check()
    assert str(raised.value).startswith('student.references.big')
    assert '\n' not in str(raised.value)


def test_padded_vocabularies_differ_and_classes_may_not(models):
    for classes in (40, 48):
        stage = prepared(recipe(network=decoder(**SHARED | dict(num_classes=classes)),
                                teacher=f'hf:{models}/llama'))  # fmt: skip
        assert stage.context.network.module.num_classes == classes


def test_other_tokenizers_are_refused(models, monkeypatch):
    import toy_tokenizers as toys

    from kd.data import sources
    from kd.text import tokenizer

    toys.write_directory(models / 'llama', toys.fields('gpt-2'))
    try:
        for pre, wanted in (('gpt-2', None), ('smollm', 'the tokenizers of')):
            toys.write_gguf(models / f'{pre}.gguf', toys.fields(pre))
            taken = tokenizer.load(f'gguf:{models}/{pre}.gguf')
            monkeypatch.setattr(sources.Source, 'tokenizer', taken, raising=False)
            teacher = prepared(recipe(teacher=f'hf:{models}/llama')).trained['teacher']
            if wanted is None:
                teacher.verify()
                continue
            with pytest.raises(UserError, match=rf'^student\.teacher: {wanted}'):
                teacher.verify()
    finally:
        for name in ('tokenizer.json', 'tokenizer_config.json'):
            (models / 'llama' / name).unlink()


@pytest.mark.parametrize(
    ('entries', 'message'),
    [
        (dict(student=dict(weights='hf:x')), r'pretrained\.student has the name of a stage'),
        (dict(a=dict(network={})), r'pretrained\.a must be a block with `weights`'),
        (dict(a='hf:x'), r'pretrained\.a must be a block'),
        (dict(a=dict(weights='x')), r"pretrained\.a\.weights: .* not 'x'"),
        (
            dict(a=dict(weights='hf:x', netwrk={})),
            r"'pretrained\.a\.netwrk'\. Did you mean 'network",
        ),
    ],
)
def test_entries_that_lack_something_are_told(entries, message):
    with pytest.raises(UserError, match=message):
        kd_config.parse(recipe(pretrained=entries))


def test_the_command_line_names_networks_and_changes_them(models):
    config = recipe(pretrained=dict(small=dict(weights='hf:/nowhere')), teacher='small')
    override(
        config,
        {
            'pretrained.small.weights': f'hf:{models}/llama',
            'pretrained.small.network.dtype': 'bfloat16',
            'pretrained.other.weights': f'gguf:{models}/llama.gguf',
            'student.references.start': 'other',
        },
    )
    trained = prepared(config).trained
    assert trained['teacher'].network.module.dtype == 'bfloat16'
    assert trained['start'].network.module.dtype == np.float32
    override(config, {'student.teacher': f'gguf:{models}/llama.gguf'})
    assert prepared(config).trained['teacher'].network.module.dtype == np.float32
    override(config, {'pretrained.small.netwrk.depth': '3'})
    with pytest.raises(UserError, match=r"'pretrained\.small\.netwrk'\. Did you mean 'network"):
        kd_config.parse(config)


def test_references_that_are_none_are_told(models):
    entries = dict(qwen=dict(weights=f'hf:{models}/llama'))
    with pytest.raises(UserError, match=r"is neither a stage .* Did you mean 'qwen'"):
        prepared(recipe(pretrained=entries, teacher='qwem'))
    with pytest.raises(UserError, match="there is no 'slow' of 'qwen', only 'final'"):
        prepared(recipe(pretrained=entries, teacher='qwen', teacher_weights='slow'))


def test_packed_documents_stay_apart_without_a_word(models):
    """A decoder takes positions and segments where the data have them, a teacher's too."""
    import tokens

    from kd import networks

    recipe_ = kd_config.parse(recipe(teacher=f'hf:{models}/llama'))
    packed = tokens.rows(None, packed=True)
    found = networks.trained_network(
        recipe_, f'hf:{models}/llama', None, make_mesh({'data': 1}), packed, where='here'
    )
    assert found.network.fields == ('input', 'positions', 'segments')
    block = decoder(**SHARED, fields=('input', 'segments'))
    assert networks.build_network(block, packed, where='x').fields == ('input', 'segments')
    assert prepared(recipe()).context.network.fields == ('input',)
