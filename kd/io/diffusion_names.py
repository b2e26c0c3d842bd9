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

# Lists of modules that a network may hold as one module with a leading axis.
STACKED = ('transformer_blocks',)
# `linear_1` and its like have their index in their name.
_INDEX = re.compile(r'(?<!linear)_(\d+)$')
_LEVEL = re.compile(r'^(enc|dec)_')
# Filters of EDM, which are no weights.
_LEFT = r'resample_filter$'

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


def find(of: Any, tensors: Iterable[str], where: Any) -> tuple[Find, str]:
    """Where the leaves of a network lie, and an expression for tensors that may be left over."""
    del of, tensors, where

    def place(keys: tuple[str, ...], shape: tuple[int, ...]) -> Part | tuple[Part, ...]:
        *modules, last = keys
        names = [_LEVEL.sub(r'\1.', _INDEX.sub(r'.\1', module)) for module in modules]
        leaf = LEAVES.get(last, last)
        stack = next((i for i, module in enumerate(modules) if module in STACKED), None)
        if stack is None:
            axes = kernel_axes(len(shape)) if last == 'kernel' else None
            return Part('.'.join([*names, leaf]), axes)
        axes = kernel_axes(len(shape) - 1) if last == 'kernel' else None
        before, after = names[: stack + 1], [*names[stack + 1 :], leaf]
        layers = range(shape[0])
        return tuple(Part('.'.join([*before, str(layer), *after]), axes) for layer in layers)

    return place, _LEFT


def _frozen(value: Any) -> Any:
    return tuple(_frozen(x) for x in value) if isinstance(value, list | tuple) else value
