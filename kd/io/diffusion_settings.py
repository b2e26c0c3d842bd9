"""What `config.json` says of transformers of latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kd.errors import UserError
from kd.io.diffusion_names import settings

_TRANSFORMER = {'num_attention_heads': 16, 'attention_head_dim': 72, 'in_channels': 4}
_DIT = {
    **_TRANSFORMER,
    'out_channels': None,
    'num_layers': 28,
    'sample_size': 32,
    'patch_size': 2,
    'num_embeds_ada_norm': 1_000,
    'norm_eps': 1e-5,
}
_DIT_FIXED = {
    'attention_bias': True,
    'activation_fn': 'gelu-approximate',
    'norm_type': 'ada_norm_zero',
    'norm_num_groups': 32,
    'attention_type': 'default',
    'dropout': 0.0,
}
_PIXART = {
    **_DIT,
    'sample_size': 128,
    'out_channels': 8,
    'norm_eps': 1e-6,
    'caption_channels': None,
    'cross_attention_dim': 1_152,
    'interpolation_scale': None,
    'use_additional_conditions': None,
}
_PIXART_FIXED = {**_DIT_FIXED, 'norm_type': 'ada_norm_single'}
UNUSED = ('upcast_attention', 'force_upcast')


def dit(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `LatentDiT` takes, of the settings of `DiTTransformer2DModel`, here and below.

    Raises:
      UserError: a setting that the network does not have.
    """
    del tensors
    read = settings(config, where, 'LatentDiT', _DIT, _DIT_FIXED, UNUSED)
    return dict(
        num_classes=read['num_embeds_ada_norm'],
        grid=read['sample_size'] // read['patch_size'],
        **_of_latents(read, where),
    )


def pixart(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """The same of `PixArtTransformer2DModel`."""
    del tensors
    read = settings(config, where, 'LatentDiT', _PIXART, _PIXART_FIXED, UNUSED)
    width = read['num_attention_heads'] * read['attention_head_dim']
    if not read['caption_channels'] or read['cross_attention_dim'] != width:
        raise UserError(
            f'{where}: LatentDiT projects texts of caption_channels to tokens of its own size, '
            f'cross_attention_dim={width}.'
        )
    sized, side = read['use_additional_conditions'], read['sample_size']
    return dict(
        num_classes=None,
        context=read['caption_channels'],
        sized=side == 128 if sized is None else sized,
        grid=side // read['patch_size'],
        stretch=float(read['interpolation_scale'] or max(side // 64, 1)),
        **_of_latents(read, where),
    )


def transformer(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """The same of `Transformer2DModel`, as which DiT's and PixArt-alpha's files were published."""
    kinds = {'ada_norm_zero': dit, 'ada_norm_single': pixart}
    if config.get('norm_type') not in kinds:
        raise UserError(
            f'{where}: of Transformer2DModel those are known whose norm_type is one of '
            f'{", ".join(kinds)}.'
        )
    return kinds[config['norm_type']](config, tensors, where)


def _of_latents(read: Mapping[str, Any], where: Any) -> dict[str, Any]:
    out, channels = read['out_channels'] or read['in_channels'], read['in_channels']
    if out not in (channels, 2 * channels):
        raise UserError(f'{where}: LatentDiT says as many channels or twice, not {out}.')
    return dict(
        width=read['num_attention_heads'] * read['attention_head_dim'],
        depth=read['num_layers'],
        heads=read['num_attention_heads'],
        patch=read['patch_size'],
        variance=out > channels,
        epsilon=read['norm_eps'],
    )


_JOINT = {
    'num_layers': 18,
    'attention_head_dim': 64,
    'num_attention_heads': 18,
    'joint_attention_dim': 4_096,
    'pooled_projection_dim': 2_048,
    'in_channels': 16,
    'out_channels': None,
    'patch_size': 2,
}
_SD3 = {
    **_JOINT,
    'sample_size': 128,
    'caption_projection_dim': 1_152,
    'pos_embed_max_size': 96,
    'dual_attention_layers': (),
    'qk_norm': None,
}
_FLUX = {
    **_JOINT,
    'num_layers': 19,
    'attention_head_dim': 128,
    'num_attention_heads': 24,
    'pooled_projection_dim': 768,
    'in_channels': 64,
    'patch_size': 1,
    'num_single_layers': 38,
    'guidance_embeds': False,
    'axes_dims_rope': (16, 56, 56),
}


_QWEN = {
    'patch_size': 2,
    'in_channels': 64,
    'out_channels': 16,
    'num_layers': 60,
    'attention_head_dim': 128,
    'num_attention_heads': 24,
    'joint_attention_dim': 3_584,
    'axes_dims_rope': (16, 56, 56),
}


def sd3(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `MMDiT` takes, of the settings of `SD3Transformer2DModel`."""
    del tensors
    read = settings(config, where, 'MMDiT', _SD3, {})
    made = _joint(read, where, patch=2)
    dual = read['dual_attention_layers']
    if (
        read['qk_norm'] not in (None, 'rms_norm')
        or dual != tuple(range(len(dual)))
        or read['caption_projection_dim'] != made['width']
    ):
        raise UserError(
            f'{where}: MMDiT normalises queries and keys by rms_norm or not at all, attends twice '
            'in its first blocks, and projects texts to tokens of its own size.'
        )
    return dict(
        dual=len(dual),
        norm=read['qk_norm'] is not None,
        table=read['pos_embed_max_size'],
        grid=read['sample_size'] // 2,
        **made,
    )


def flux(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `MMDiT` takes, of the settings of `FluxTransformer2DModel`."""
    del tensors
    read = settings(config, where, 'MMDiT', _FLUX, {})
    return dict(
        single=read['num_single_layers'],
        norm=True,
        guided=read['guidance_embeds'],
        table=0,
        axes=read['axes_dims_rope'],
        **_joint(read, where, patch=1),
    )


def qwen(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `MMDiT` takes, of the settings of `QwenImageTransformer2DModel`."""
    del tensors
    read = settings(config, where, 'MMDiT', _QWEN, {}, ('pooled_projection_dim',))
    if 4 * (read['out_channels'] or 0) != read['in_channels']:
        raise UserError(f'{where}: MMDiT has a quarter of its in_channels out, of patches of 2x2.')
    return dict(
        norm=True,
        text_norm=True,
        masked=True,
        table=0,
        axes=read['axes_dims_rope'],
        centred=True,
        **_joint(read | dict(out_channels=None, pooled_projection_dim=0), where, patch=2),
    )


def _joint(read: Mapping[str, Any], where: Any, patch: int) -> dict[str, Any]:
    if read['patch_size'] != patch or read['out_channels'] not in (None, read['in_channels']):
        raise UserError(f'{where}: MMDiT has patch_size={patch} and as many channels out as in.')
    return dict(
        width=read['num_attention_heads'] * read['attention_head_dim'],
        depth=read['num_layers'],
        heads=read['num_attention_heads'],
        context=read['joint_attention_dim'],
        pooled=read['pooled_projection_dim'],
    )


_LUMINA = {
    'patch_size': 2,
    'in_channels': 16,
    'out_channels': None,
    'hidden_size': 2_304,
    'num_layers': 26,
    'num_refiner_layers': 2,
    'num_attention_heads': 24,
    'num_kv_heads': 8,
    'multiple_of': 256,
    'ffn_dim_multiplier': None,
    'norm_eps': 1e-5,
    'axes_dim_rope': (32, 32, 32),
    'cap_feat_dim': 1_024,
}
_Z_IMAGE = {
    'all_patch_size': (2,),
    'all_f_patch_size': (1,),
    'dim': 3_840,
    'n_layers': 30,
    'n_refiner_layers': 2,
    'n_heads': 30,
    'norm_eps': 1e-5,
    'cap_feat_dim': 2_560,
    'rope_theta': 256.0,
    't_scale': 1_000.0,
    'axes_dims': (32, 48, 48),
}
# Places for which released code makes tables, and what it does not read.
_PLACES = ('axes_lens', 'sample_size', 'n_kv_heads', 'in_channels')


def lumina2(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `NextDiT` takes, of the settings of `Lumina2Transformer2DModel`."""
    del tensors
    read = settings(config, where, 'NextDiT', _LUMINA, {'scaling_factor': 1.0}, _PLACES)
    if read['patch_size'] != 2 or read['out_channels'] not in (None, read['in_channels']):
        raise UserError(f'{where}: NextDiT has patch_size=2 and as many channels out as in.')
    width, step = read['hidden_size'], read['multiple_of']
    units = int((read['ffn_dim_multiplier'] or 1) * 4 * width)
    return dict(
        width=width,
        depth=read['num_layers'],
        heads=read['num_attention_heads'],
        refiners=read['num_refiner_layers'],
        groups=read['num_kv_heads'] or read['num_attention_heads'],
        hidden=step * -(-units // step),
        context=read['cap_feat_dim'],
        time=(min(width, 1_024),) * 2,
        axes=read['axes_dim_rope'],
        epsilon=read['norm_eps'],
    )


def z_image(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `NextDiT` takes, of the settings of `ZImageTransformer2DModel`."""
    del tensors
    read = settings(config, where, 'NextDiT', _Z_IMAGE, {'qk_norm': True}, _PLACES)
    if read['all_patch_size'] != (2,) or read['all_f_patch_size'] != (1,):
        raise UserError(f'{where}: NextDiT has patches of 2x2 pixels of one image alone.')
    width = read['dim']
    return dict(
        width=width,
        depth=read['n_layers'],
        heads=read['n_heads'],
        refiners=read['n_refiner_layers'],
        groups=read['n_heads'],
        hidden=int(width / 3 * 8),
        context=read['cap_feat_dim'],
        time=(1_024, min(width, 256)),
        clock=read['t_scale'],
        activated=False,
        filled=32,
        axes=read['axes_dims'],
        theta=read['rope_theta'],
        epsilon=read['norm_eps'],
    )


_WAN = {
    'patch_size': (1, 2, 2),
    'num_attention_heads': 40,
    'attention_head_dim': 128,
    'in_channels': 16,
    'out_channels': 16,
    'text_dim': 4_096,
    'ffn_dim': 13_824,
    'num_layers': 40,
    'eps': 1e-6,
}
_WAN_FIXED = {
    'freq_dim': 256,
    'cross_attn_norm': True,
    'qk_norm': 'rms_norm_across_heads',
    'window_size': (-1, -1),
}


def wan(config: Mapping[str, Any], tensors: Any, where: Any) -> dict[str, Any]:
    """What `Wan` takes, of the settings of `WanTransformer3DModel`."""
    del tensors
    read = settings(config, where, 'Wan', _WAN, _WAN_FIXED, ('rope_max_seq_len',))
    if read['out_channels'] not in (None, read['in_channels']):
        raise UserError(f'{where}: Wan has as many channels out as in.')
    return dict(
        width=read['num_attention_heads'] * read['attention_head_dim'],
        depth=read['num_layers'],
        heads=read['num_attention_heads'],
        hidden=read['ffn_dim'],
        patch=read['patch_size'],
        context=read['text_dim'],
        epsilon=read['eps'],
    )
