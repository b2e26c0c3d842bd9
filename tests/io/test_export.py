"""Exported directories: what is in them, that they come back, and that transformers agrees."""

import json
import sys

import hf_models as hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import toy_tokenizers as toys

from kd import export, files, process
from kd.errors import UserError
from kd.io import pretrained
from kd.io import safetensors as kd_safetensors
from kd.models.decoder import Decoder

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SIZES = dict(
    num_classes=hf.V, width=hf.D, depth=2, heads=4, kv_heads=2, mlp_hidden=48, max_length=32
)
YARN = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=8)
# Every family, and what it can do beside.
DECODERS = {
    'llama': dict(rope_scaling=dict(hf.LLAMA3, original_max_position_embeddings=16)),
    'llama with biases': dict(bias=True, qkv_bias=True, tied=False, head_dim=10),
    'qwen2': dict(qkv_bias=True, tied=False, rope_scaling=YARN),
    'qwen2 with a window': dict(qkv_bias=True, window=4),
    'qwen3': dict(qk_norm=True, head_dim=16, rope_theta=100.0),
    'phi3': dict(window=4, tied=False),
    'gpt2': dict(
        kv_heads=None, mlp='gelu', norm='layer', bias=True, qkv_bias=True, rope_theta=None
    ),
}


def random_model(name, **changes):
    """Every leaf random, norms and biases too."""
    module = Decoder(**{**SIZES, **DECODERS[name], **changes})
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    rng = np.random.default_rng(0)

    def draw(path, x):
        offset = float('scale' in str(path[-1]))
        return jnp.asarray(rng.normal(size=x.shape) * 0.2 + offset, x.dtype)

    return module, jax.tree_util.tree_map_with_path(draw, abstract)


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize('kind', hf.CONFIGS)
def test_what_was_read_is_written_again(tmp_path, kind):
    reference = f'hf:{hf.write(tmp_path / "in", kind)}'
    module = pretrained.network(reference, stacked=kind == 'gpt2')
    abstract = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    export.export(module, pretrained.load(reference, abstract), tmp_path / 'out')
    found = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
    wanted = hf.tensors_of(kind)
    assert set(found) == set(wanted)
    same(found, wanted)
    again = json.loads((tmp_path / 'out' / 'config.json').read_text())
    assert again['model_type'] == kind
    for name, value in hf.CONFIGS[kind].items():
        if not name.endswith('token_id') and value is not None and 'rope_p' not in name:
            ours = {'sliding_window': None} if kind == 'qwen2' else {}
            assert again[name] == ours.get(name, value), name


@pytest.mark.parametrize('name', DECODERS)
def test_a_directory_describes_the_decoder_that_was_exported(tmp_path, name):
    module, variables = random_model(name, param_dtype='bfloat16')
    sizes = export.export(module, variables, tmp_path, largest=20_000)
    assert len(sizes) > 1
    assert max(sizes.values()) <= 20_000
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    assert set(index['weight_map'].values()) == set(sizes)
    total = 2 * sum(x.size for x in jax.tree.leaves(variables))
    assert index['metadata']['total_size'] == sum(sizes.values()) == total
    config = json.loads((tmp_path / 'config.json').read_text())
    assert config['dtype'] == config['torch_dtype'] == 'bfloat16'
    found = pretrained.network(f'hf:{tmp_path}')
    for field in ('heads', 'groups', 'size_of_head', 'hidden_units', 'bias', 'qkv_bias', 'qk_norm',
                  'rope_theta', 'rope_scaling', 'window', 'tied', 'max_length', 'mlp', 'norm',
                  'epsilon', 'num_classes', 'depth'):  # fmt: skip
        assert getattr(found, field) == getattr(module, field), field
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), variables)
    same(pretrained.load(f'hf:{tmp_path}', abstract), variables)
    # One file in the place of several leaves no index behind.
    export.export(module, variables, tmp_path)
    same(pretrained.load(f'hf:{tmp_path}', abstract), variables)


def test_the_tokenizer_goes_with_the_model(tmp_path):
    source = hf.write(tmp_path / 'source', 'llama', pad_token_id=[3, 4])
    toys.write_directory(source, toys.fields())
    (source / 'generation_config.json').write_text('{}')
    for file in ('chat_template.jinja', 'README.md'):
        (source / file).write_text(file)
    module, variables = random_model('qwen3')
    export.export(module, variables, tmp_path / 'out', tokenizer=f'hf:{source}')
    found = {path.name for path in (tmp_path / 'out').iterdir()}
    assert found == {
        'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
        'generation_config.json', 'chat_template.jinja',
    }  # fmt: skip
    config = json.loads((tmp_path / 'out' / 'config.json').read_text())
    ids = [config[f'{role}_token_id'] for role in ('bos', 'eos', 'pad')]
    assert ids == [1, 2, [3, 4]]
    hf.write(source, 'llama', eos_token_id=40)
    with pytest.raises(UserError, match='special tokens beyond the 40 of the model'):
        export.export(module, variables, tmp_path / 'out', tokenizer=f'hf:{source}')


@pytest.mark.parametrize(
    'changes',
    [
        dict(norm='layer'),
        dict(mlp='gelu'),
        dict(bias=True),
        dict(qk_norm=True, qkv_bias=True),
        dict(window=4, rope_scaling=dict(rope_type='linear', factor=2.0)),
        dict(rope_theta=None),
    ],
)
def test_a_decoder_that_transformers_does_not_have_is_told(tmp_path, changes):
    module = Decoder(**{**SIZES, **changes})
    with pytest.raises(UserError, match='transformers has no such decoder'):
        export.export(module, {'params': {}}, tmp_path)
    module, variables = random_model('llama')
    with pytest.raises(UserError, match='not of the names and shapes of the decoder'):
        export.export(module.clone(depth=3), variables, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stage(tmp_path, monkeypatch):
    """The directory of a stage whose network's vocabulary was left to the data, 40 tokens."""
    block = dict(name='kd.models.decoder.Decoder', width=16, depth=2, heads=2, stacked=True)
    (tmp_path / 'run').mkdir()
    files.write_json(tmp_path / 'run' / 'config.json', {'student': {'network': block}})
    module = Decoder(num_classes=40, width=16, depth=2, heads=2, stacked=True)
    variables = module.init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
    monkeypatch.setattr(kd_safetensors, 'stage_variables', lambda *_: variables)
    return tmp_path / 'run' / 'student'


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', ['export', *map(str, arguments)])
    return process.entry(export.main)


def test_a_finished_stage_is_exported_by_one_command(stage, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, stage, tmp_path / 'out') == 0
    count = 40 * 16 + 2 * (4 * 16 * 16 + 3 * 16 * 64 + 2 * 16) + 16
    assert capsys.readouterr().out == (
        f'{tmp_path}/out: llama, {count:,} parameters, {4 * count:,} bytes\n'
    )
    module = pretrained.network(f'hf:{tmp_path}/out')
    assert (module.num_classes, module.depth) == (40, 2)
    variables = kd_safetensors.stage_variables(stage)
    blocks = variables['params']['blocks']
    found = safetensors.numpy.load_file(tmp_path / 'out' / 'model.safetensors')
    same(found['model.layers.1.mlp.up_proj.weight'], np.asarray(blocks['mlp']['up']['kernel'][1]).T)


def test_what_cannot_be_exported_is_one_line(stage, tmp_path, monkeypatch, capsys):
    def line(*arguments):
        assert command(monkeypatch, *arguments) == 2
        told = capsys.readouterr().err
        assert told.count('\n') == 1
        return told

    assert 'is no stage of a run' in line(tmp_path / 'x' / 'student', tmp_path / 'out')
    assert 'x is not there' in line(stage, tmp_path / 'out', f'--tokenizer=hf:{tmp_path}/x')
    (tmp_path / 'file').write_text('')
    assert 'file cannot be written' in line(stage, tmp_path / 'file')
    monkeypatch.setattr(kd_safetensors, 'stage_variables', lambda *_: {'params': {}})
    assert 'student.network is no kd.models.decoder.Decoder' in line(stage, tmp_path / 'out')
    monkeypatch.undo()
    assert 'is not a finished stage' in line(tmp_path, tmp_path / 'out')


@pytest.mark.parametrize('name', DECODERS)
def test_transformers_computes_the_same(tmp_path, name):
    torch = pytest.importorskip('torch')
    transformers = pytest.importorskip('transformers')
    module, variables = random_model(name)
    export.export(module, variables, tmp_path, largest=20_000)
    tokens = np.random.default_rng(1).integers(0, hf.V, (2, 13))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation='eager'
    )
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(module.apply(variables, tokens), wanted, atol=2e-5)
