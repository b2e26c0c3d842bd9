"""CLIP's vision tower from directories in transformers' names, against NumPy."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

from kd.errors import UserError
from kd.io import pretrained
from kd.models import clip

pytestmark = pytest.mark.usefixtures('compiled_quickly')

D, F, DEPTH, HEADS, IMAGE, PATCH = 16, 24, 3, 2, 8, 4
SIZES = dict(
    hidden_size=D,
    intermediate_size=F,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    image_size=IMAGE,
    patch_size=PATCH,
    hidden_act='quick_gelu',
    layer_norm_eps=1e-5,
)
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, IMAGE, IMAGE, 3)).astype(np.float32)


def tensors(prefix=''):
    """Random, by the names that `save_pretrained` writes."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    found = {
        'embeddings.class_embedding': draw(D),
        'embeddings.patch_embedding.weight': draw(D, 3, PATCH, PATCH),
        'embeddings.position_embedding.weight': draw(1 + (IMAGE // PATCH) ** 2, D),
    }
    norms = ['pre_layrnorm', 'post_layernorm']
    for layer in range(DEPTH):
        at = f'encoder.layers.{layer}.'
        norms += [f'{at}layer_norm1', f'{at}layer_norm2']
        for name, shape in {
            **{f'self_attn.{x}_proj': (D, D) for x in ('q', 'k', 'v', 'out')},
            'mlp.fc1': (F, D),
            'mlp.fc2': (D, F),
        }.items():
            found |= {f'{at}{name}.weight': draw(*shape), f'{at}{name}.bias': draw(shape[0])}
    for name in norms:
        found |= {f'{name}.weight': 1 + draw(D), f'{name}.bias': draw(D)}
    return {prefix + name: x for name, x in found.items()}


def write(folder, prefix='', config=None, more=None):
    folder.mkdir()
    made = dict(model_type='clip_vision_model', **SIZES) if config is None else config
    (folder / 'config.json').write_text(json.dumps(made))
    safetensors.numpy.save_file(tensors(prefix) | (more or {}), folder / 'model.safetensors')
    return f'hf:{folder}'


def hidden_states(images, layer):
    """float64 [B, N, D] of the patches, by transformers' formulas."""
    t = {name: x.astype(np.float64) for name, x in tensors().items()}
    mean, std = (np.array(clip.PRESETS['vit_l_14'][f'pixel_{x}']) for x in ('mean', 'std'))

    def linear(x, name):
        return x @ t[f'{name}.weight'].T + t[f'{name}.bias']

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
        return x * t[f'{name}.weight'] + t[f'{name}.bias']

    out = []
    for image in images:
        pixels = (((image.astype(np.float64) + 1) / 2 - mean) / std).transpose(2, 0, 1)
        squares = [
            pixels[:, i : i + PATCH, j : j + PATCH]
            for i in range(0, IMAGE, PATCH)
            for j in range(0, IMAGE, PATCH)
        ]
        kernel = t['embeddings.patch_embedding.weight']
        tokens = [np.einsum('ocij,cij->o', kernel, square) for square in squares]
        x = np.stack([t['embeddings.class_embedding'], *tokens])
        states = [norm(x + t['embeddings.position_embedding.weight'], 'pre_layrnorm')]
        for number in range(DEPTH):
            at, x = f'encoder.layers.{number}.', states[-1]
            y = norm(x, at + 'layer_norm1')
            q, k, v = (linear(y, f'{at}self_attn.{name}_proj') for name in 'qkv')
            heads = []
            for head in np.split(np.arange(D), HEADS):
                scores = np.exp(q[:, head] @ k[:, head].T / np.sqrt(D // HEADS))
                heads.append(scores / scores.sum(1, keepdims=True) @ v[:, head])
            x = x + linear(np.concatenate(heads, 1), at + 'self_attn.out_proj')
            y = linear(norm(x, at + 'layer_norm2'), at + 'mlp.fc1')
            states.append(x + linear(y / (1 + np.exp(-1.702 * y)), at + 'mlp.fc2'))
        out.append(states[layer][1:])
    return np.stack(out)


def loaded(reference, **changes):
    module = pretrained.network(reference, **changes)
    abstract = jax.eval_shape(module.init, jax.random.key(0), IMAGES)
    return module, pretrained.load(reference, abstract)


@pytest.mark.parametrize('layer', [-2, -1, 0])
def test_a_tower_computes_the_hidden_states_of_its_tensors(tmp_path, layer):
    module, variables = loaded(write(tmp_path / 'tower'), layer=layer)
    found = jax.jit(module.apply)(variables, IMAGES)
    np.testing.assert_allclose(found, hidden_states(IMAGES, layer), atol=2e-5)


@pytest.mark.parametrize('layer', [-1, 0])
def test_stacked_blocks_are_those_of_the_tower(tmp_path, layer):
    """All three, one more than a described tower computes; and none."""
    module, variables = loaded(write(tmp_path / 'tower'), layer=layer, stacked=True)
    found = jax.jit(module.apply)(variables, IMAGES)
    np.testing.assert_allclose(found, hidden_states(IMAGES, layer), atol=2e-5)
    stacks = jax.tree.leaves(variables['params'].get('blocks', {}))
    assert {x.shape[0] for x in stacks} == ({DEPTH} if layer else set())


def test_a_whole_clip_brings_the_same_tower(tmp_path):
    rest = {
        'logit_scale': np.zeros(1, np.float32),
        'text_projection.weight': np.zeros((4, 4), np.float32),
        'visual_projection.weight': np.zeros((4, D), np.float32),
        'text_model.embeddings.position_ids': np.zeros((1, 4), np.int64),
        'vision_model.embeddings.position_ids': np.zeros((1, 5), np.int64),
    }
    config = dict(model_type='clip', vision_config=SIZES, text_config={})
    whole = write(tmp_path / 'whole', 'vision_model.', config, rest)
    wanted = loaded(write(tmp_path / 'tower'))[1]
    jax.tree.map(np.testing.assert_array_equal, loaded(whole)[1], wanted)
    # A block less than the file has, as the last is not needed.
    assert set(wanted['params']) == {
        'block0', 'block1', 'class_embed', 'patch_embed', 'positions', 'pre_norm'
    }  # fmt: skip
    with pytest.raises(UserError, match=r"no use for: 'surplus'"):
        loaded(write(tmp_path / 'more', more={'surplus': np.zeros(1, np.float32)}))


def test_the_large_tower_has_the_parameters_of_the_released_one():
    """Of openai/clip-vit-large-patch14-336, with its last block and the norm behind it."""
    module = clip.preset('vit_l_14_336')
    assert (module.blocks, module.patches) == (23, 576)
    abstract = jax.eval_shape(module.init, jax.random.key(0), np.zeros((1, 336, 336, 3)))
    count = sum(x.size for x in jax.tree.leaves(abstract))
    block = 4 * (1024**2 + 1024) + 2 * 1024 * 4096 + 4096 + 1024 + 4 * 1024
    assert count + block + 2 * 1024 == 303_507_456
    out = jax.eval_shape(module.apply, abstract, np.zeros((1, 336, 336, 3)))
    assert out.shape == (1, 576, 1024)


def test_what_cannot_be_is_told(tmp_path):
    with pytest.raises(UserError, match=r"hidden_act='relu'"):
        pretrained.network(
            write(tmp_path / 'relu', config=dict(SIZES, model_type='clip', hidden_act='relu'))
        )
    with pytest.raises(ValueError, match=r'takes images of 8 x 8 pixels, got shape \(1, 9, 8, 3\)'):
        clip.preset('toy').init(jax.random.key(0), np.zeros((1, 9, 8, 3)))
    with pytest.raises(ValueError, match=r"there is no tower 'vit'; known are: vit_b_32"):
        clip.preset('vit')
