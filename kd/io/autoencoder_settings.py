"""What `config.json` says of autoencoders of images and videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.errors import UserError
from kd.io.diffusion_names import settings
from kd.io.diffusion_settings import UNUSED
from kd.models.autoencoder_wan import WanAutoencoder

_AUTOENCODER = {
    'block_out_channels': (64,),
    'layers_per_block': 1,
    'latent_channels': 4,
    'norm_num_groups': 32,
    'scaling_factor': 0.18215,
    'shift_factor': None,
    'use_quant_conv': True,
    'use_post_quant_conv': True,
}
_AUTOENCODER_FIXED = {
    'in_channels': 3, 'out_channels': 3, 'act_fn': 'silu', 'mid_block_add_attention': True
}  # fmt: skip


def _levels(config: Mapping[str, Any]) -> dict[str, Any]:
    """The blocks of every level of an autoencoder, which is the one kind there is."""
    levels = len(config.get('block_out_channels', (64,)))
    return dict(
        down_block_types=('DownEncoderBlock2D',) * levels,
        up_block_types=('UpDecoderBlock2D',) * levels,
    )


def autoencoder(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `AutoencoderKL` takes, of the settings of the class of the same name."""
    del tensors
    read = settings(
        config, where, 'AutoencoderKL', _AUTOENCODER, _AUTOENCODER_FIXED | _levels(config),
        ('sample_size', *UNUSED),
    )  # fmt: skip
    if read['use_quant_conv'] != read['use_post_quant_conv']:
        raise UserError(
            f'{where}: AutoencoderKL has both of quant_conv and post_quant_conv or none.'
        )
    return dict(
        channels=read['block_out_channels'],
        blocks=read['layers_per_block'],
        latent=read['latent_channels'],
        groups=read['norm_num_groups'],
        scale=read['scaling_factor'],
        shift=read['shift_factor'] or 0.0,
        moments=read['use_quant_conv'],
    )


_VQ = {
    'block_out_channels': (64,),
    'layers_per_block': 1,
    'latent_channels': 3,
    'num_vq_embeddings': 256,
    'norm_num_groups': 32,
    'scaling_factor': 0.18215,
    'vq_embed_dim': None,
}
_VQ_FIXED = {
    'in_channels': 3, 'out_channels': 3, 'act_fn': 'silu', 'norm_type': 'group',
    'mid_block_add_attention': True, 'lookup_from_codebook': False,
}  # fmt: skip


def vq(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `AutoencoderKL` with a codebook takes, of the settings of `VQModel`."""
    del tensors
    read = settings(
        config, where, 'AutoencoderKL', _VQ, _VQ_FIXED | _levels(config), ('sample_size', *UNUSED)
    )
    if read['vq_embed_dim'] not in (None, read['latent_channels']):
        raise UserError(f'{where}: AutoencoderKL has codes of as many numbers as latents have.')
    return dict(
        channels=read['block_out_channels'],
        blocks=read['layers_per_block'],
        latent=read['latent_channels'],
        groups=read['norm_num_groups'],
        scale=read['scaling_factor'],
        codes=read['num_vq_embeddings'],
    )


_WAN_AUTOENCODER = {
    'base_dim': 96,
    'z_dim': 16,
    'dim_mult': (1, 2, 4, 4),
    'num_res_blocks': 2,
    'temperal_downsample': (False, True, True),
    'latents_mean': WanAutoencoder.mean,
    'latents_std': WanAutoencoder.deviation,
}
_WAN_AUTOENCODER_FIXED = {
    'attn_scales': (), 'dropout': 0.0, 'in_channels': 3, 'out_channels': 3, 'input_channels': 3,
}  # fmt: skip


def wan_autoencoder(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `WanAutoencoder` takes, of the settings of `AutoencoderKLWan`."""
    del tensors
    read = settings(
        config, where, 'WanAutoencoder', _WAN_AUTOENCODER, _WAN_AUTOENCODER_FIXED,
        ('scale_factor_temporal', 'scale_factor_spatial'),
    )  # fmt: skip
    return dict(
        channels=tuple(read['base_dim'] * times for times in read['dim_mult']),
        blocks=read['num_res_blocks'],
        frames=read['temperal_downsample'],
        latent=read['z_dim'],
        mean=read['latents_mean'],
        deviation=read['latents_std'],
    )
