"""Diffusion networks in directories: what `config.json` says, and where leaves lie.

Networks here have the names of the modules in the files, with `_` where these have `.` before an
index: `down_blocks_0/resnets_1/conv1/kernel` is `down_blocks.0.resnets.1.conv1.weight`. A module of
`STACKED` without an index holds all of its list, [layers, ...].

`config.json` of `diffusers` names its class in `_class_name`. EDM's files are pickles of its own
code; with that at hand, a directory is made of one by

    net = pickle.load(open('edm-imagenet-64x64-cond-adm.pkl', 'rb'))['ema'].model
    described = {'_class_name': type(net).__name__, **net.init_kwargs}
    json.dump(described, open('DIR/config.json', 'w'))
    tensors = {name: x.contiguous() for name, x in net.state_dict().items()}
    safetensors.torch.save_file(tensors, 'DIR/model.safetensors')
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from kd.errors import UserError, did_you_mean
from kd.io.torch_weights import LEAVES, Find, Part, kernel_axes
from kd.models.unet_conditional import SIZES

# Lists of modules that a network holds as one with a leading axis, all or those from an index.
STACKED = re.compile(
    r'((?:single_)?transformer_blocks|blocks|layers|(?:noise|context)_refiner)(?:_from_(\d+))?'
)
# `linear_1` and its like have their index in their name.
_INDEX = re.compile(r'(?<!linear)(?<!proj_out)_(\d+)$')
_LEVEL = re.compile(r'^(enc|dec)_')
# Filters of EDM, which are no weights, and copies: DiT's blocks repeat what embeds their condition.
_LEFT = r'resample_filter$|transformer_blocks\.[1-9]\d*\.norm1\.emb\.'
# Where one module serves all.
_SHARED = {'emb': 'transformer_blocks.0.norm1.emb'}
# What Qwen-Image calls the modules of `kd.models.mmdit`.
QWEN = (
    (r'norm1_context\.linear', 'txt_mod.1'),
    (r'norm1\.linear', 'img_mod.1'),
    (r'\.ff_context\.', '.txt_mlp.'),
    (r'\.ff\.', '.img_mlp.'),
    (r'^context_embedder', 'txt_in'),
    (r'^x_embedder', 'img_in'),
)
# What Z-Image calls the modules of `kd.models.next_dit`.
Z_IMAGE = (
    (r'^time_caption_embed\.timestep_embedder\.linear_1', 't_embedder.mlp.0'),
    (r'^time_caption_embed\.timestep_embedder\.linear_2', 't_embedder.mlp.2'),
    (r'^time_caption_embed\.caption', 'cap'),
    (r'^x_embedder', 'all_x_embedder.2-1'),
    (r'^norm_out\.linear_1', 'all_final_layer.2-1.adaLN_modulation.1'),
    (r'^norm_out\.linear_2', 'all_final_layer.2-1.linear'),
    (r'\.attn\.', '.attention.'),
    (r'\.norm1\.linear', '.adaLN_modulation.0'),
    (r'\.norm1(\.norm)?\.', '.attention_norm1.'),
    (r'\.norm2\.', '.attention_norm2.'),
    (r'feed_forward\.linear_', 'feed_forward.w'),
)
# What autoencoders of old files call their layers of attention.
_OLD = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}

_EDM = {
    'model_channels': 'channels',
    'channel_mult': 'multipliers',
    'channel_mult_emb': 'embedding_multiplier',
    'num_blocks': 'blocks',
    'attn_resolutions': 'attention',
    'dropout': 'dropout',
    'label_dim': 'num_classes',
    'augment_dim': 'augment',
    'embedding_type': 'noise',
    'channel_mult_noise': 'noise_multiplier',
    'encoder_type': 'encoder',
    'decoder_type': 'decoder',
    'resample_filter': 'taps',
}
_EDM_UNUSED = ('img_resolution', 'in_channels', 'out_channels', 'label_dropout')


def edm(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What a network of `kd.models.edm` takes, of the arguments of EDM's class of the same name.

    Raises:
      UserError: an argument that is not known.
    """
    del tensors
    given = {k: v for k, v in config.items() if not k.startswith('_') and k not in _EDM_UNUSED}
    if unknown := [name for name in given if name not in _EDM]:
        near = did_you_mean(unknown[0], [*_EDM, *_EDM_UNUSED])
        raise UserError(f"{where}: '{unknown[0]}' is no argument of EDM's networks.{near}")
    found = {_EDM[name]: _frozen(value) for name, value in given.items()}
    if 'num_classes' in found:
        found['num_classes'] = found['num_classes'] or None
    return found


def find(
    of: Any, tensors: Iterable[str], where: Any, *, renames: tuple[tuple[str, str], ...] = ()
) -> tuple[Find, str]:
    """Where the leaves of a network lie, and an expression for tensors that may be left over.

    Args:
      of: the network.
      tensors: of the file, where old names are looked for.
      where: the file.
      renames: (expression, name) pairs of what the file calls otherwise.
    """
    del of, where
    there = frozenset(tensors)

    def named(modules: tuple[str, ...], leaf: str) -> str:
        names = [_LEVEL.sub(r'\1.', _INDEX.sub(r'.\1', module)) for module in modules]
        names[:1] = [_SHARED.get(name, name) for name in names[:1]]
        name = '.'.join([*names, leaf])
        for expression, other in renames:
            name = re.sub(expression, other, name)
        old = '.'.join([*names[:-1], *(_OLD.get(last, last) for last in names[-1:]), leaf])
        return old if old in there and name not in there else name

    def place(keys: tuple[str, ...], shape: tuple[int, ...]) -> Part | tuple[Part, ...]:
        *modules, last = keys
        leaf = LEAVES.get(last, last)
        lists = [STACKED.fullmatch(module) for module in modules]
        stack = next((i for i, match in enumerate(lists) if match), -1)
        axes = kernel_axes(len(shape) - (stack >= 0)) if last == 'kernel' else None
        match = lists[stack] if stack >= 0 else None
        if match is None:
            return Part(named(tuple(modules), leaf), axes)
        first, before, after = int(match[2] or 0), modules[:stack], modules[stack + 1 :]
        layers = (f'{match[1]}_{first + layer}' for layer in range(shape[0]))
        return tuple(Part(named((*before, layer, *after), leaf), axes) for layer in layers)

    return place, _LEFT


# Settings of `UNet2DConditionModel` that are the one thing `UNetConditional` does; what is neither
# here nor read must be None or False.
_FIXED = {
    'flip_sin_to_cos': True,
    'freq_shift': 0,
    'mid_block_type': 'UNetMidBlock2DCrossAttn',
    'downsample_padding': 1,
    'mid_block_scale_factor': 1,
    'act_fn': 'silu',
    'norm_eps': 1e-5,
    'resnet_time_scale_shift': 'default',
    'resnet_out_scale_factor': 1.0,
    'time_embedding_type': 'positional',
    'conv_in_kernel': 3,
    'conv_out_kernel': 3,
    'attention_type': 'default',
}
# Sizes that the network takes from its inputs, and types of computation, which are ours.
_UNUSED = ('sample_size', 'upcast_attention', 'addition_embed_type_num_heads')
_UNET = {
    'in_channels': 4,
    'out_channels': 4,
    'down_block_types': ('CrossAttnDownBlock2D',) * 3 + ('DownBlock2D',),
    'up_block_types': ('UpBlock2D',) + ('CrossAttnUpBlock2D',) * 3,
    'block_out_channels': (320, 640, 1280, 1280),
    'layers_per_block': 2,
    'dropout': 0.0,
    'norm_num_groups': 32,
    'cross_attention_dim': 1280,
    'transformer_layers_per_block': 1,
    'attention_head_dim': 8,
    'num_attention_heads': None,
    'use_linear_projection': False,
    'addition_embed_type': None,
    'addition_time_embed_dim': None,
    'projection_class_embeddings_input_dim': None,
}


def unet(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `UNetConditional` takes, of the settings of `UNet2DConditionModel`.

    Raises:
      UserError: a setting that `UNetConditional` does not have.
    """
    del tensors
    read = settings(config, where, 'UNetConditional', _UNET, _FIXED, _UNUSED)
    levels = len(read['block_out_channels'])
    attends = [kind.startswith('CrossAttn') for kind in read['down_block_types']]
    wanted = ['CrossAttnUpBlock2D' if one else 'UpBlock2D' for one in reversed(attends)]
    added = read['addition_embed_type']
    if (
        list(read['up_block_types']) != wanted
        or set(read['down_block_types']) - {'CrossAttnDownBlock2D', 'DownBlock2D'}
        or read['in_channels'] != read['out_channels']
        or added not in (None, 'text_time')
    ):
        raise UserError(
            f'{where}: UNetConditional has the same channels in and out, levels '
            'CrossAttnDownBlock2D and DownBlock2D with those of the way up as their mirror, and is '
            "told of sizes by 'text_time' alone."
        )  # fmt: skip
    depths = _each(read['transformer_layers_per_block'], levels)
    heads = _each(read['num_attention_heads'] or read['attention_head_dim'], levels)
    features = read['addition_time_embed_dim'] or 0
    pooled = (read['projection_class_embeddings_input_dim'] or 0) - SIZES * features
    return dict(
        channels=read['block_out_channels'],
        blocks=read['layers_per_block'],
        depths=tuple(d if one else 0 for d, one in zip(depths, attends, strict=True)),
        middle=depths[-1],
        heads=heads,
        linear=read['use_linear_projection'],
        context=read['cross_attention_dim'],
        groups=read['norm_num_groups'],
        dropout=read['dropout'],
        **(dict(pooled=pooled, size_features=features) if added else {}),
    )


def settings(
    config: Mapping[str, Any],
    where: Any,
    network: str,
    known: Mapping[str, Any],
    fixed: Mapping[str, Any],
    unused: Iterable[str] = (),
) -> dict[str, Any]:
    """The settings of `known`, with its defaults, of a config.json of diffusers.

    Args:
      config: what the file says.
      where: it.
      network: our name of the network, for messages.
      known: settings that are read, and diffusers' defaults.
      fixed: settings that are the one thing the network does.
      unused: settings that say nothing of the network. All others must be None or False.

    Raises:
      UserError: a setting that the network does not have.
    """
    given = {name: _frozen(x) for name, x in config.items() if not name.startswith('_')}
    for name, value in given.items():
        read = name in known or name in unused
        if not read and value not in (None, False, _frozen(fixed.get(name))):
            raise UserError(f'{where}: {name}={value!r} is more than {network} knows.')
    return {name: given.get(name, default) for name, default in known.items()}


def _each(value: Any, levels: int) -> tuple:
    return value if isinstance(value, tuple) else (value,) * levels


def _frozen(value: Any) -> Any:
    return tuple(_frozen(x) for x in value) if isinstance(value, list | tuple) else value
