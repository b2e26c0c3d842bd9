"""Masked autoencoders in directories of Hugging Face: `config.json`, and where leaves lie.

Tensors have the names of `transformers` ('vit_mae'), or those of the released code, where queries,
keys and values are one tensor. Of a file with a decoder the encoder alone is read; positions are
those of a fixed grid, which the network makes itself.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kd.errors import UserError
from kd.io.torch_weights import LEAVES, Find, Part, kernel_axes
from kd.models.masked_autoencoder import PRESETS, Encoder

# Of transformers, and of the release: the class token, a block, and modules by their names.
_HF = {
    'cls': 'embeddings.cls_token',
    'patch_embed': 'embeddings.patch_embeddings.projection',
    'encoder_norm': 'layernorm',
    'block': 'encoder.layer.{}.',
    'norm1': 'layernorm_before',
    'norm2': 'layernorm_after',
    'query': 'attention.attention.query',
    'key': 'attention.attention.key',
    'value': 'attention.attention.value',
    'out': 'attention.output.dense',
    'up': 'intermediate.dense',
    'down': 'output.dense',
}
_RELEASED = {
    'cls': 'cls_token',
    'patch_embed': 'patch_embed.proj',
    'encoder_norm': 'norm',
    'block': 'blocks.{}.',
    'norm1': 'norm1',
    'norm2': 'norm2',
    'out': 'attn.proj',
    'up': 'mlp.fc1',
    'down': 'mlp.fc2',
}
_FUSED = ('query', 'key', 'value')
_PREFIX = 'vit.'
_OTHERS = r'^decoder|^mask_token$|position_embeddings$|^pos_embed$'


def arguments(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `Encoder` takes; pixels are standardised as ImageNet's are.

    Raises:
      UserError: a size that is missing, or a setting that `Encoder` does not have.
    """
    del tensors

    def need(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int):
            raise UserError(f"{where} must give '{name}' as an integer, and gives {value!r}.")
        return value

    mlp, bias = config.get('hidden_act', 'gelu'), config.get('qkv_bias', True)
    if mlp != 'gelu' or not bias or config.get('num_channels', 3) != 3:
        raise UserError(
            f'{where}: hidden_act={mlp!r}, qkv_bias={bias}, or its channels, are more than kd '
            'knows.'
        )
    width = need('hidden_size')
    return dict(
        patch=need('patch_size'),
        width=width,
        depth=need('num_hidden_layers'),
        heads=need('num_attention_heads'),
        mlp_ratio=need('intermediate_size') / width,
        **{name: PRESETS['vit_b'][name] for name in ('pixel_mean', 'pixel_std')},
    )


def find(of: Encoder, tensors: Iterable[str], where: Any) -> tuple[Find, str]:
    """Where each leaf of an encoder lies, and an expression for what is left over.

    Args:
      of: what the file holds.
      tensors: names in the file.
      where: the file, for messages.
    """
    del where
    known = set(tensors)
    released = _RELEASED['cls'] in known
    names = _RELEASED if released else _HF
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in known) else ''

    def found(keys: tuple[str, ...], shape: tuple[int, ...]) -> Part:
        if keys == ('cls',):
            return Part(prefix + names['cls'])
        module, leaf = keys[-2:]
        block = re.fullmatch(r'block(\d+)', keys[0])
        inside = prefix + (names['block'].format(block[1]) if block else '')
        axes = kernel_axes(len(shape)) if leaf == 'kernel' else None
        if released and module in _FUSED:
            first = _FUSED.index(module) * of.width
            rows = range(first, first + of.width)
            return Part(f'{inside}attn.qkv.{LEAVES[leaf]}', axes, rows, 3 * of.width)
        return Part(f'{inside}{names[module]}.{LEAVES[leaf]}', axes)

    return found, _OTHERS
