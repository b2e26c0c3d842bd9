"""Networks of TRELLIS in directories: what `config.json` says, and where leaves lie.

A directory is made of a release's `NAME.json` and `NAME.safetensors`:

    told = json.load(open('ss_flow_img_dit_L_16l8_fp16.json'))
    json.dump({'_class_name': told['name'], **told['args']}, open('DIR/config.json', 'w'))
    shutil.copy('ss_flow_img_dit_L_16l8_fp16.safetensors', 'DIR/model.safetensors')
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from kd.errors import UserError
from kd.io import diffusion_names
from kd.io.torch_weights import Find, Part

_COMMON = {
    'resolution': 16,
    'in_channels': 8,
    'out_channels': 8,
    'model_channels': 1_024,
    'cond_channels': 1_024,
    'num_blocks': 24,
    'num_heads': 16,
    'patch_size': 1,
}
_FIXED = {'mlp_ratio': 4, 'pe_mode': 'ape', 'qk_rms_norm': True, 'num_io_res_blocks': 2}
_UNUSED = ('use_fp16', 'use_checkpoint', 'num_head_channels')


def structure(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `ShapeDiT` takes, of the arguments of `SparseStructureFlowModel`.

    Raises:
      UserError: an argument that the network does not have, here and below.
    """
    del tensors
    read = _read(config, where, 'ShapeDiT', _COMMON)
    return dict(patch=read['patch_size'], **_trunk(read))


def latents(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `VoxelDiT` takes, of the arguments of `SLatFlowModel`."""
    del tensors
    known = {**_COMMON, 'resolution': 64, 'patch_size': 2, 'io_block_channels': (128,)}
    read = _read(config, where, 'VoxelDiT', known)
    if read['patch_size'] != 2 or len(read['io_block_channels']) != 1:
        raise UserError(f'{where}: VoxelDiT has cells of 2^3 voxels, and one level of these.')
    (features,) = read['io_block_channels']
    return dict(features=features, side=read['resolution'], **_trunk(read))


def _read(
    config: Mapping[str, Any], where: Any, network: str, known: Mapping[str, Any]
) -> dict[str, Any]:
    read = diffusion_names.settings(config, where, network, known, _FIXED, _UNUSED)
    if read['in_channels'] != read['out_channels']:
        raise UserError(f'{where}: {network} has as many channels out as in.')
    return read


def _trunk(read: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        width=read['model_channels'],
        depth=read['num_blocks'],
        heads=read['num_heads'],
        context=read['cond_channels'],
    )


def find(of: Any, tensors: Iterable[str], where: Any) -> tuple[Find, str]:
    """Where the leaves of a network lie, and an expression for tensors that may be left over.

    Kernels of convolutions over voxels are [O, 3, 3, 3, I] there, as spconv has them.
    """
    usual, left = diffusion_names.find(of, tensors, where)

    def place(keys: tuple[str, ...], shape: tuple[int, ...]) -> Part | tuple[Part, ...]:
        *modules, last = keys
        if modules and modules[-1] in ('conv1', 'conv2'):
            found = usual((*modules, 'conv', 'bias'), (0,))
            assert isinstance(found, Part)
            if last == 'bias':
                return found
            return Part(f'{found.name.removesuffix("bias")}weight', (1, 2, 3, 4, 0))
        return usual(keys, shape)

    return place, f'{left}|^pos_emb$'
