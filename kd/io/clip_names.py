"""Vision towers of CLIP in directories of Hugging Face: `config.json`, and where leaves lie.

A directory is of the tower alone ('clip_vision_model') or of the whole model ('clip'), of whose
other parts nothing is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kd.errors import UserError
from kd.io.torch_weights import LEAVES, Find, Part, kernel_axes
from kd.models.clip import PRESETS, ClipVision

_MODULES = {
    'patch_embed': 'embeddings.patch_embedding',
    # The name in the files.
    'pre_norm': 'pre_layrnorm',
    'norm1': 'layer_norm1',
    'norm2': 'layer_norm2',
    'query': 'self_attn.q_proj',
    'key': 'self_attn.k_proj',
    'value': 'self_attn.v_proj',
    'output': 'self_attn.out_proj',
    'up': 'mlp.fc1',
    'down': 'mlp.fc2',
}
# The leaves that belong to no module.
_ALONE = {
    'class_embed': 'embeddings.class_embedding',
    'positions': 'embeddings.position_embedding.weight',
}
_PREFIX = 'vision_model.'
_OTHERS = r'^text_|^visual_projection|^logit_scale|position_ids$|post_layernorm\.'


def arguments(config: Mapping[str, Any], where: Any) -> dict[str, Any]:
    """What `ClipVision` takes; pixels are standardised as CLIP's are.

    Raises:
      UserError: a size that is missing, or a setting that `ClipVision` does not have.
    """
    config = config.get('vision_config', config)

    def need(name: str) -> int:
        value = config.get(name)
        if not isinstance(value, int):
            raise UserError(f"{where} must give '{name}' as an integer, and gives {value!r}.")
        return value

    mlp = config.get('hidden_act', 'quick_gelu')
    if mlp not in ('quick_gelu', 'gelu') or config.get('num_channels', 3) != 3:
        raise UserError(f'{where}: hidden_act={mlp!r}, or its channels, are more than kd knows.')
    pixels = {name: PRESETS['vit_l_14'][name] for name in ('pixel_mean', 'pixel_std')}
    return dict(
        image=need('image_size'),
        patch=need('patch_size'),
        width=need('hidden_size'),
        depth=need('num_hidden_layers'),
        heads=need('num_attention_heads'),
        mlp_hidden=need('intermediate_size'),
        mlp=mlp,
        epsilon=config.get('layer_norm_eps', 1e-5),
        **pixels,
    )


def find(of: ClipVision, tensors: Iterable[str], where: Any) -> tuple[Find, str]:
    """Where each leaf of a tower lies, and an expression for what is left over.

    Of leaves that stack blocks there is a part for each block.

    Args:
      of: what the file holds.
      tensors: names in the file.
      where: the file, for messages.
    """
    del where
    prefix = _PREFIX if any(name.startswith(_PREFIX) for name in tensors) else ''

    def found(keys: tuple[str, ...], shape: tuple[int, ...]) -> Part | tuple[Part, ...]:
        if keys[-1] in _ALONE:
            return Part(prefix + _ALONE[keys[-1]])
        if keys[0] == 'blocks':
            inside = (f'encoder.layers.{layer}.' for layer in range(shape[0]))
            return tuple(part(each, keys, len(shape) - 1) for each in inside)
        block = re.fullmatch(r'block(\d+)', keys[0])
        return part(f'encoder.layers.{block[1]}.' if block else '', keys, len(shape))

    def part(inside: str, keys: tuple[str, ...], rank: int) -> Part:
        name = f'{prefix}{inside}{_MODULES[keys[-2]]}.{LEAVES[keys[-1]]}'
        return Part(name, kernel_axes(rank) if keys[-1] == 'kernel' else None)

    later = '|'.join(str(layer) for layer in range(of.depth))
    return found, f'{_OTHERS}|encoder\\.layers\\.({later})\\.'
