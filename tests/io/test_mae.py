"""Encoders of masked autoencoders from directories, by both namings, against NumPy."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy
import scipy.special

from kd.errors import UserError
from kd.io import pretrained

pytestmark = pytest.mark.usefixtures('compiled_quickly')

D, F, DEPTH, HEADS, IMAGE, PATCH = 8, 12, 2, 2, 8, 4
CONFIG = dict(
    model_type='vit_mae', hidden_size=D, intermediate_size=F, num_hidden_layers=DEPTH,
    num_attention_heads=HEADS, image_size=IMAGE, patch_size=PATCH, hidden_act='gelu',
)  # fmt: skip
IMAGES = np.random.default_rng(1).uniform(-1, 1, (2, IMAGE, IMAGE, 3)).astype(np.float32)
# The places of four patches: columns, then rows, each by sin 1, sin .01, cos 1, cos .01.
ZERO, ONE = [0.0, 0.0, 1.0, 1.0], [0.8414710, 0.0099998, 0.5403023, 0.99995]
GRID = np.array([ZERO + ZERO, ONE + ZERO, ZERO + ONE, ONE + ONE])


def released():
    """Random, by the names of the released code."""
    rng = np.random.default_rng(0)

    def draw(*shape):
        return (rng.normal(size=shape) * 0.3).astype(np.float32)

    found = {
        'cls_token': draw(1, 1, D),
        'pos_embed': np.concatenate([np.zeros((1, D)), GRID])[None].astype(np.float32),
        'patch_embed.proj.weight': draw(D, 3, PATCH, PATCH),
        'patch_embed.proj.bias': draw(D),
    }
    norms = ['norm']
    for layer in range(DEPTH):
        at = f'blocks.{layer}.'
        norms += [f'{at}norm1', f'{at}norm2']
        for name, shape in {
            'attn.qkv': (3 * D, D), 'attn.proj': (D, D), 'mlp.fc1': (F, D), 'mlp.fc2': (D, F)
        }.items():  # fmt: skip
            found |= {f'{at}{name}.weight': draw(*shape), f'{at}{name}.bias': draw(shape[0])}
    for name in norms:
        found |= {f'{name}.weight': 1 + draw(D), f'{name}.bias': draw(D)}
    return found


RENAMED = {
    'cls_token': 'embeddings.cls_token',
    'pos_embed': 'embeddings.position_embeddings',
    'patch_embed.proj': 'embeddings.patch_embeddings.projection',
    'blocks.': 'encoder.layer.',
    'norm1': 'layernorm_before',
    'norm2': 'layernorm_after',
    'attn.proj': 'attention.output.dense',
    'mlp.fc1': 'intermediate.dense',
    'mlp.fc2': 'output.dense',
}


def of_transformers():
    """The same, as `ViTMAEForPreTraining.save_pretrained` names them, with some of its decoder."""
    found = {'decoder.mask_token': np.zeros((1, 1, 4), np.float32)}
    for name, x in released().items():
        if name.startswith('norm.'):
            found[f'vit.layer{name}'] = x
            continue
        for old, new in RENAMED.items():
            name = name.replace(old, new)
        if 'attn.qkv' in name:
            for role, part in zip(('query', 'key', 'value'), np.split(x, 3), strict=True):
                found['vit.' + name.replace('attn.qkv', f'attention.attention.{role}')] = part
        else:
            found[f'vit.{name}'] = x
    return found


def write(folder, tensors, **config):
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps({**CONFIG, **config}))
    safetensors.numpy.save_file(tensors, folder / 'model.safetensors')
    return f'hf:{folder}'


def tokens(images):
    """float64 [B, 1 + N, D], by the formulas of the released code."""
    t = {name: x.astype(np.float64) for name, x in released().items()}

    def linear(x, name):
        return x @ t[f'{name}.weight'].T + t[f'{name}.bias']

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        return x * t[f'{name}.weight'] + t[f'{name}.bias']

    out = []
    for image in images:
        pixels = (image.astype(np.float64) + 1) / 2 - [0.485, 0.456, 0.406]
        pixels = (pixels / [0.229, 0.224, 0.225]).transpose(2, 0, 1)
        squares = [
            pixels[:, i : i + PATCH, j : j + PATCH]
            for i in range(0, IMAGE, PATCH)
            for j in range(0, IMAGE, PATCH)
        ]
        kernel = t['patch_embed.proj.weight']
        patches = np.stack([np.einsum('ocij,cij->o', kernel, square) for square in squares])
        x = np.concatenate([t['cls_token'][0], patches + t['patch_embed.proj.bias'] + GRID])
        for number in range(DEPTH):
            at = f'blocks.{number}.'
            q, k, v = np.split(linear(norm(x, at + 'norm1'), at + 'attn.qkv'), 3, axis=1)
            heads = []
            for head in np.split(np.arange(D), HEADS):
                scores = scipy.special.softmax(q[:, head] @ k[:, head].T / np.sqrt(D // HEADS), 1)
                heads.append(scores @ v[:, head])
            x = x + linear(np.concatenate(heads, 1), at + 'attn.proj')
            y = linear(norm(x, at + 'norm2'), at + 'mlp.fc1')
            y = y * scipy.special.ndtr(y)
            x = x + linear(y, at + 'mlp.fc2')
        out.append(norm(x, 'norm'))
    return np.stack(out)


def loaded(reference):
    module = pretrained.network(reference)
    abstract = jax.eval_shape(module.init, jax.random.key(0), IMAGES)
    return module, pretrained.load(reference, abstract)


def test_an_encoder_computes_what_its_tensors_say_by_either_naming(tmp_path):
    module, variables = loaded(write(tmp_path / 'released', released()))
    found = jax.jit(module.apply)(variables, IMAGES)
    np.testing.assert_allclose(found, tokens(IMAGES), atol=3e-5)
    same = loaded(write(tmp_path / 'hf', of_transformers()))[1]
    jax.tree.map(np.testing.assert_array_equal, same, variables)


def test_what_is_not_an_encoder_of_this_kind_is_refused(tmp_path):
    other = write(tmp_path / 'other', released(), hidden_act='relu')
    with pytest.raises(UserError, match="hidden_act='relu'"):
        pretrained.describe(other)
    more = {**released(), 'surplus': np.zeros(1, np.float32)}
    with pytest.raises(UserError, match="no use for: 'surplus'"):
        loaded(write(tmp_path / 'more', more))
    missing = released()
    del missing['blocks.1.attn.qkv.bias']
    with pytest.raises(UserError, match=r"has no tensor 'blocks\.1\.attn\.qkv\.bias'"):
        loaded(write(tmp_path / 'less', missing))
