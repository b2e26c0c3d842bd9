"""Models of others, written by hand in every family's names, against what they compute."""

import json
import re

import hf_models as hf
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.errors import UserError
from kd.io import gguf, pretrained, safetensors
from kd.models import decoders

pytestmark = pytest.mark.usefixtures('compiled_quickly')

P = jax.sharding.PartitionSpec
TOKENS = np.random.default_rng(1).integers(0, hf.V, 13)


def abstract_of(module):
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))


def loaded(reference, **changes):
    module = pretrained.network(reference, **changes)
    return module, pretrained.load(reference, abstract_of(module))


def same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize('kind', hf.CONFIGS)
def test_a_directory_computes_what_its_tensors_say(tmp_path, kind):
    tensors = hf.tensors_of(kind)
    module, variables = loaded(f'hf:{hf.write(tmp_path / kind, kind)}')
    wanted = hf.logits(kind, tensors, TOKENS)
    found = jax.jit(module.apply)(variables, TOKENS[None])[0]
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    # And so do several files with an index, read by the numbers of one tree.
    same(loaded(f'hf:{hf.write(tmp_path / "parts", kind, files=3)}')[1], variables)


@pytest.mark.parametrize('kind', hf.CONFIGS)
def test_a_gguf_file_is_the_directory_of_its_values(tmp_path, kind):
    values = hf.write_gguf(tmp_path / 'm.gguf', kind, types=gguf.TYPES)
    module, variables = loaded(f'gguf:{tmp_path}/m.gguf')
    theirs, wanted = loaded(f'hf:{hf.write(tmp_path / "m", kind, values)}')
    same(variables, wanted)
    names = ('heads', 'groups', 'size_of_head', 'epsilon', 'rope_theta', 'rope_scaling', 'window')
    for name in (*names, 'mlp', 'norm', 'tied', 'max_length'):
        assert getattr(module, name) == getattr(theirs, name), name


@pytest.mark.parametrize(('kind', 'form'), [('phi3', 'hf'), ('llama', 'gguf')])
def test_stacked_blocks_are_read_into_their_slices(tmp_path, kind, form, monkeypatch):
    if form == 'hf':
        reference = f'hf:{hf.write(tmp_path / kind, kind)}'
    else:
        hf.write_gguf(tmp_path / 'm.gguf', kind)
        reference = f'gguf:{tmp_path}/m.gguf'
    apart = loaded(reference)[1]['params']
    sizes, read = [], safetensors.Tensor.read

    def counted(self, index=None):
        sizes.append(read(self, index).size)
        return read(self, index)

    monkeypatch.setattr(safetensors.Tensor, 'read', counted)
    stacked = loaded(reference, stacked=True)[1]['params']
    blocks = [apart.pop(f'block{i}') for i in range(hf.DEPTH)]
    same(stacked.pop('blocks'), jax.tree.map(lambda *x: np.stack(x), *blocks))
    same(stacked, apart)
    # A layer's, or the vocabulary's; never both layers at once.
    assert not sizes or max(sizes) == hf.F * hf.D


@pytest.mark.parametrize('stacked', [False, True])
def test_each_device_gets_its_part_alone(tmp_path, stacked, monkeypatch):
    hf.write_gguf(tmp_path / 'm.gguf', 'llama')
    sources = {'gguf': f'gguf:{tmp_path}/m.gguf', 'hf': f'hf:{hf.write(tmp_path / "m", "phi3")}'}
    mesh = jax.make_mesh((2, 2), ('x', 'y'), devices=jax.devices()[:4])
    # Pairs of features that rotate together, and fused kernels, lie on several devices.
    spec = {'query': P('x', 'y'), 'gate': P(None, ('x', 'y')), 'down': P('y'), 'embed': P('x')}
    largest = []
    for kind in (safetensors.Tensor, gguf.Tensor):
        read = kind.read

        def counted(self, index=None, read=read):
            largest.append(read(self, index).size)
            return read(self, index)

        monkeypatch.setattr(kind, 'read', counted)
    for reference in sources.values():
        module, wanted = loaded(reference, stacked=stacked)

        def shard(path, x):
            part = next((p for key, p in spec.items() if key in str(path)), P())
            if stacked and 'blocks' in str(path):
                part = P(None, *part)
            sharding = jax.sharding.NamedSharding(mesh, part)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        abstract = jax.tree_util.tree_map_with_path(shard, abstract_of(module))
        largest.clear()
        found = pretrained.load(reference, abstract)
        same(found, wanted)
        jax.tree.map(lambda x, y: assert_placed(x, y), found, abstract)
        # Nothing whole but what is replicated: an MLP's `up`; of gguf's permuted rows their span.
        assert max(largest) == hf.F * hf.D


def assert_placed(x, y):
    assert x.sharding == y.sharding


def test_leaves_are_of_the_type_of_the_network_or_of_the_one_asked_for(tmp_path):
    reference = f'hf:{hf.write(tmp_path / "m", "qwen2")}'
    module, half = loaded(reference, param_dtype='bfloat16', dtype='bfloat16')
    assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype('bfloat16')}
    full = pretrained.load(reference, abstract_of(module), dtype='float32')
    same(jax.tree.map(lambda x: x.astype('bfloat16'), full), half)
    assert full['params']['head'].dtype == jnp.float32


def test_what_older_files_have_besides_and_lack_is_known(tmp_path):
    """GPT-2 as it was released: no prefix, and the causal masks among the tensors."""
    tensors = hf.tensors_of('gpt2')
    wanted = loaded(f'hf:{hf.write(tmp_path / "new", "gpt2")}')[1]
    older = {name.removeprefix('transformer.'): x for name, x in tensors.items()}
    older |= {f'h.{i}.attn.bias': np.ones((1, 1, 32, 32), np.float32) for i in range(2)}
    same(loaded(f'hf:{hf.write(tmp_path / "old", "gpt2", older)}')[1], wanted)
    # A head that repeats the embedding, which is the head.
    tied = hf.tensors_of('llama')
    wanted = loaded(f'hf:{hf.write(tmp_path / "tied", "llama")}')[1]
    tied['lm_head.weight'] = tied['model.embed_tokens.weight'].copy()
    tied['model.layers.0.self_attn.rotary_emb.inv_freq'] = np.ones(4, np.float32)
    same(loaded(f'hf:{hf.write(tmp_path / "both", "llama", tied)}')[1], wanted)


@pytest.mark.parametrize(
    ('kind', 'changes', 'arguments'),
    [
        ('llama', {}, dict(rope_theta=5e5, rope_scaling=hf.LLAMA3, tied=True)),
        (
            'llama',
            dict(rope_scaling=None, rope_parameters={**hf.LLAMA3, 'rope_theta': 7.0}),
            dict(rope_theta=7.0, rope_scaling=hf.LLAMA3),
        ),
        (
            'llama',
            dict(rope_scaling=dict(type='linear', factor=4.0)),
            dict(rope_scaling=dict(rope_type='linear', factor=4.0)),
        ),
        (
            'qwen2',
            dict(
                rope_parameters=None,
                rope_theta=1e6,
                rope_scaling=dict(type='yarn', factor=4.0, attention_factor=1.2),
            ),
            dict(
                rope_theta=1e6,
                rope_scaling=dict(
                    rope_type='yarn',
                    factor=4.0,
                    original_max_position_embeddings=32,
                    attention_factor=1.2,
                ),
            ),
        ),
        ('qwen2', {}, dict(window=None, qkv_bias=True, bias=False, rope_theta=1000.0)),
        ('qwen2', dict(use_sliding_window=True, max_window_layers=0), dict(window=9)),
        ('qwen2', dict(use_sliding_window=True, max_window_layers=2), dict(window=None)),
        ('qwen3', dict(head_dim=None), dict(head_dim=128, qk_norm=True, qkv_bias=False)),
        ('phi3', {}, dict(window=5, rope_theta=10000.0)),
        ('llama', dict(attention_bias=True, mlp_bias=True), dict(bias=True, qkv_bias=True)),
        ('llama', dict(num_key_value_heads=None, head_dim=None), dict(kv_heads=4, head_dim=None)),
        ('gpt2', dict(n_inner=17), dict(mlp_hidden=17, norm='layer', rope_theta=None, tied=True)),
    ],
)
def test_a_config_says_what_the_decoder_takes(tmp_path, kind, changes, arguments):
    hf.write(tmp_path, kind, {'x': np.zeros(1, np.float32)}, **changes)
    found = pretrained.describe(f'hf:{tmp_path}')
    assert {name: found.arguments[name] for name in arguments} == arguments
    assert (found.architecture, found.vocabulary, found.tokenizer) == (kind, hf.V, '')
    assert found.tokens == (dict(bos_token_id=1, eos_token_id=2) if kind == 'llama' else {})
    (tmp_path / 'tokenizer.json').write_text('{}')
    assert pretrained.describe(f'hf:{tmp_path}').tokenizer == f'hf:{tmp_path}'


@pytest.mark.parametrize(
    ('kind', 'changes', 'message'),
    [
        (
            'llama',
            dict(model_type='gemma3'),
            "'gemma3' is none of those known: llama, qwen2, qwen3",
        ),
        ('llama', dict(hidden_size=None), "must give 'hidden_size' as an integer, and gives None"),
        ('llama', dict(hidden_act='gelu'), "hidden_act='gelu' is more than kd knows"),
        ('llama', dict(attention_bias=True), 'attention_bias=True without mlp_bias=True'),
        ('llama', dict(num_key_value_heads=3), 'heads=4 must be divisible by kv_heads=3'),
        ('llama', dict(quantization_config={'bits': 4}), 'its weights are quantised'),
        (
            'llama',
            dict(rope_scaling=dict(rope_type='dynamic', factor=2.0)),
            "the type 'dynamic' are",
        ),
        ('llama', dict(rope_scaling=dict(rope_type='llama3', factor=2.0)), "'llama3' lacks"),
        (
            'llama',
            dict(rope_scaling=dict(rope_type='yarn', factor=2.0, mscale=0.7)),
            r"mscale=0\.7 of rotations 'yarn' is not known",
        ),
        ('llama', dict(partial_rotary_factor=0.5), r'partial_rotary_factor=0\.5 is more than'),
        ('qwen2', dict(rope_parameters=dict(full=dict(rope_theta=1))), 'rotations that differ by'),
        (
            'qwen2',
            dict(use_sliding_window=True, max_window_layers=1),
            'windows in some layers alone',
        ),
        ('gpt2', dict(activation_function='relu'), "activation_function='relu' is more"),
        (
            'gpt2',
            dict(scale_attn_by_inverse_layer_idx=True),
            'scale_attn_by_inverse_layer_idx=True',
        ),
    ],
)
def test_a_config_that_is_more_than_is_known_is_one_line(tmp_path, kind, changes, message):
    hf.write(tmp_path, kind, {'x': np.zeros(1, np.float32)}, **changes)
    with pytest.raises(UserError, match=rf'config\.json.*{message}') as raised:
        pretrained.describe(f'hf:{tmp_path}')
    assert '\n' not in str(raised.value)


def test_directories_and_references_that_are_none_are_told(tmp_path):
    with pytest.raises(UserError, match='gone is not there, or is no directory of a model'):
        pretrained.describe(f'hf:{tmp_path}/gone')
    with pytest.raises(UserError, match=r'has no config\.json: it is no directory of a model'):
        pretrained.describe(f'hf:{tmp_path}')
    (tmp_path / 'config.json').write_text('{')
    with pytest.raises(UserError, match=r'config\.json is damaged: .*; fetch it again'):
        pretrained.describe(f'hf:{tmp_path}')
    for reference in ('hf:', 'torch:x', 'x'):
        with pytest.raises(UserError, match=f"is 'hf:DIRECTORY' or 'gguf:FILE', not '{reference}'"):
            pretrained.describe(reference)
    (tmp_path / 'config.json').write_text(json.dumps(hf.CONFIGS['llama']))
    module = pretrained.network(f'hf:{tmp_path}')  # Its shape alone needs no weights.
    with pytest.raises(UserError, match=r'has no model\.safetensors or .*index\.json; fetch it\.'):
        pretrained.check(f'hf:{tmp_path}', abstract_of(module))
    (tmp_path / 'pytorch_model.bin').write_bytes(b'')
    with pytest.raises(UserError, match='save it anew with save_pretrained'):
        pretrained.check(f'hf:{tmp_path}', abstract_of(module))
    with pytest.raises(ValueError, match=r"Decoder has no 'dept'\. Did you mean 'depth'"):
        pretrained.network(f'hf:{tmp_path}', dept=3)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda t: t.pop('model.norm.weight'), "has no tensor 'model.norm.weight'"),
        (lambda t: t.update(extra=t['lm_head.weight'] + 1), "has no use for: 'extra'"),
        (
            lambda t: t.update(
                {'model.layers.1.self_attn.qkv_proj.weight': np.ones((60, 32), 'f4')}
            ),
            r"'model.layers.1.self_attn.qkv_proj.weight' has shape \[60, 32\], which does not fit",
        ),
        (
            lambda t: t.update({'model.layers.0.mlp.down_proj.weight': np.ones((64, 32), 'f4')}),
            r"'model.layers.0.mlp.down_proj.weight' has shape \[64, 32\], which does not fit",
        ),
    ],
)
@pytest.mark.parametrize('stacked', [False, True])
def test_tensors_that_are_missing_unused_or_misshapen_are_named(tmp_path, change, message, stacked):
    tensors = hf.tensors_of('phi3')
    change(tensors)
    reference = f'hf:{hf.write(tmp_path, "phi3", tensors)}'
    abstract = abstract_of(pretrained.network(reference, stacked=stacked))
    for function in (pretrained.check, pretrained.load):
        with pytest.raises(UserError, match=rf'model\.safetensors.*{message}') as raised:
            function(reference, abstract)
        assert '\n' not in str(raised.value)


def test_a_network_of_another_shape_is_told(tmp_path):
    reference = f'hf:{hf.write(tmp_path, "llama")}'
    for changes, message in (
        (dict(depth=1), "no use for: 'model.layers.1.input_layernorm.weight', "),
        (dict(depth=1, stacked=True), 'has 2 layers, and the network stacks 1'),
        (dict(depth=3), "has no tensor 'model.layers.2."),
        (dict(mlp='gelu', mlp_hidden=64), "no use for: 'model.layers.0.mlp.gate_proj.weight'"),
        (dict(num_classes=41), r"embed_tokens.weight' has shape \[40, 32\], which does not fit"),
        (dict(tied=False), "has no tensor 'lm_head.weight'"),
        (dict(rope_theta=None), "models of its architecture have no 'positions/embedding'"),
    ):
        with pytest.raises(UserError, match=message):
            pretrained.check(reference, abstract_of(pretrained.network(reference, **changes)))


def test_weights_that_are_cut_short_are_told(tmp_path):
    file = hf.write(tmp_path, 'llama') / 'model.safetensors'
    abstract = abstract_of(pretrained.network(f'hf:{tmp_path}'))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match='not a safetensors file, or is cut short'):
        pretrained.check(f'hf:{tmp_path}', abstract)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(architecture='mamba'), "'mamba' is none of those known: llama, qwen2, qwen3, phi3"),
        (dict(add={'llama.expert_count': 8}), 'llama.expert_count is more than kd knows'),
        (dict(add={'llama.rope.scaling.type': 'longrope'}), "the type 'longrope' are more"),
        (dict(add={'llama.attention.value_length': 4}), 'values of another size than keys'),
        (
            dict(drop='llama.block_count'),
            "must give 'llama.block_count' as a number, and gives None",
        ),
        (dict(drop='rope_freqs'), 'not those of Llama 3'),
    ],
)
def test_a_gguf_file_that_is_more_than_is_known_is_one_line(
    tmp_path, changes, message, monkeypatch
):
    file = tmp_path / 'm.gguf'
    hf.write_gguf(file, 'llama', architecture=changes.get('architecture'))
    read = gguf.read

    def changed(of):
        fields, tensors = read(of)
        fields |= changes.get('add', {})
        fields.pop(changes.get('drop'), None)
        if changes.get('drop') == 'rope_freqs':
            tensors['rope_freqs.weight'] = tensors['blk.0.attn_norm.weight']
        return fields, tensors

    monkeypatch.setattr(gguf, 'read', changed)
    with pytest.raises(UserError, match=rf'm\.gguf.*{message}'):
        pretrained.describe(f'gguf:{file}')


def test_presets_are_what_released_configs_say(tmp_path):
    """The config.json of Qwen3-8B and of Llama-3.2-1B as they were released."""
    qwen3 = dict(
        model_type='qwen3', attention_bias=False, head_dim=128, hidden_act='silu',
        hidden_size=4096, intermediate_size=12288, max_position_embeddings=40960,
        max_window_layers=36, num_attention_heads=32, num_hidden_layers=36,
        num_key_value_heads=8, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
        sliding_window=None, tie_word_embeddings=False, use_sliding_window=False,
        vocab_size=151936, bos_token_id=151643, eos_token_id=151645,
    )  # fmt: skip
    llama = dict(
        model_type='llama', attention_bias=False, bos_token_id=128000, eos_token_id=128001,
        head_dim=64, hidden_act='silu', hidden_size=2048, intermediate_size=8192,
        max_position_embeddings=131072, mlp_bias=False, num_attention_heads=32,
        num_hidden_layers=16, num_key_value_heads=8, rms_norm_eps=1e-05,
        rope_scaling=dict(factor=32.0, high_freq_factor=4.0, low_freq_factor=1.0,
                          original_max_position_embeddings=8192, rope_type='llama3'),
        rope_theta=500000.0, tie_word_embeddings=True, vocab_size=128256,
    )  # fmt: skip
    for config, name in ((qwen3, 'qwen3_8b'), (llama, 'llama3_2_1b')):
        (tmp_path / 'config.json').write_text(json.dumps(config))
        found, wanted = pretrained.network(f'hf:{tmp_path}'), decoders.preset(name)
        assert (found.size_of_head, found.groups) == (wanted.size_of_head, wanted.groups)
        same = found.clone(head_dim=wanted.head_dim)
        assert re.sub(r'\s', '', repr(same)) == re.sub(r'\s', '', repr(wanted))


def test_a_gguf_file_has_the_tokenizer_that_is_in_it(tmp_path):
    for tokens in ((), ('a', 'b')):
        hf.write_gguf(tmp_path / 'm.gguf', 'llama', tokens=tokens)
        found = pretrained.describe(f'gguf:{tmp_path}/m.gguf')
        assert found.tokenizer == (found.reference if tokens else '')
        assert (found.tokens, found.vocabulary) == ({'eos_token_id': 2}, hf.V)
