"""Descriptions as models were published, and the presets that they are."""

import diffusion_files
import pytest

from kd.io import pretrained
from kd.models import autoencoder_kl, autoencoder_wan, mmdit, next_dit, unet_conditional, wan

_HEADS = dict(attention_head_dim=128, num_attention_heads=24)
_VAE = dict(
    _class_name='AutoencoderKL', _diffusers_version='0.20.0', act_fn='silu', in_channels=3,
    out_channels=3, block_out_channels=[128, 256, 512, 512], layers_per_block=2,
    down_block_types=['DownEncoderBlock2D'] * 4, up_block_types=['UpDecoderBlock2D'] * 4,
    norm_num_groups=32, force_upcast=True, sample_size=1024,
)  # fmt: skip
_WIDE = dict(
    latent_channels=16, use_quant_conv=False, use_post_quant_conv=False, latents_mean=None,
    latents_std=None, mid_block_add_attention=True,
)  # fmt: skip
_UNET = dict(
    _class_name='UNet2DConditionModel', act_fn='silu', center_input_sample=False,
    downsample_padding=1, flip_sin_to_cos=True, freq_shift=0, in_channels=4, out_channels=4,
    layers_per_block=2, mid_block_scale_factor=1, norm_eps=1e-5, norm_num_groups=32,
)  # fmt: skip
_SDXL = dict(
    addition_embed_type='text_time', addition_embed_type_num_heads=64,
    addition_time_embed_dim=256, attention_head_dim=[5, 10, 20],
    block_out_channels=[320, 640, 1280], class_embed_type=None, class_embeddings_concat=False,
    conv_in_kernel=3, conv_out_kernel=3, cross_attention_dim=2048, cross_attention_norm=None,
    down_block_types=['DownBlock2D', 'CrossAttnDownBlock2D', 'CrossAttnDownBlock2D'],
    dual_cross_attention=False, encoder_hid_dim=None, encoder_hid_dim_type=None,
    mid_block_only_cross_attention=None, mid_block_type='UNetMidBlock2DCrossAttn',
    num_attention_heads=None, num_class_embeds=None, only_cross_attention=False,
    projection_class_embeddings_input_dim=2816, resnet_out_scale_factor=1.0,
    resnet_skip_time_act=False, resnet_time_scale_shift='default', sample_size=128,
    time_cond_proj_dim=None, time_embedding_act_fn=None, time_embedding_dim=None,
    time_embedding_type='positional', timestep_post_act=None,
    transformer_layers_per_block=[1, 2, 10],
    up_block_types=['CrossAttnUpBlock2D', 'CrossAttnUpBlock2D', 'UpBlock2D'],
    upcast_attention=None, use_linear_projection=True,
)  # fmt: skip
CASES = {
    'sd3_medium': (
        mmdit.preset('sd3_medium'),
        dict(
            _class_name='SD3Transformer2DModel', attention_head_dim=64, num_attention_heads=24,
            caption_projection_dim=1536, in_channels=16, out_channels=16, num_layers=24,
            joint_attention_dim=4096, patch_size=2, pooled_projection_dim=2048,
            pos_embed_max_size=192, sample_size=128,
        ),
    ),
    'flux_dev': (
        mmdit.preset('flux_dev'),
        dict(
            _class_name='FluxTransformer2DModel', guidance_embeds=True, in_channels=64,
            joint_attention_dim=4096, num_layers=19, num_single_layers=38, patch_size=1,
            pooled_projection_dim=768, **_HEADS,
        ),
    ),
    'qwen_image': (
        mmdit.preset('qwen_image'),
        dict(
            _class_name='QwenImageTransformer2DModel', axes_dims_rope=[16, 56, 56],
            guidance_embeds=False, in_channels=64, out_channels=16, joint_attention_dim=3584,
            num_layers=60, patch_size=2, pooled_projection_dim=768, **_HEADS,
        ),
    ),
    'wan21_1_3b': (
        wan.preset('wan21_1_3b'),
        dict(
            _class_name='WanTransformer3DModel', added_kv_proj_dim=None, attention_head_dim=128,
            cross_attn_norm=True, eps=1e-6, ffn_dim=8960, freq_dim=256, image_dim=None,
            in_channels=16, num_attention_heads=12, num_layers=30, out_channels=16,
            patch_size=[1, 2, 2], qk_norm='rms_norm_across_heads', rope_max_seq_len=1024,
            text_dim=4096,
        ),
    ),
    'lumina2': (
        next_dit.preset('lumina2'),
        dict(
            _class_name='Lumina2Transformer2DModel', axes_dim_rope=[32, 32, 32],
            axes_lens=[300, 512, 512], cap_feat_dim=2304, ffn_dim_multiplier=None,
            hidden_size=2304, in_channels=16, multiple_of=256, norm_eps=1e-5,
            num_attention_heads=24, num_kv_heads=8, num_layers=26, num_refiner_layers=2,
            out_channels=None, patch_size=2, sample_size=128, scaling_factor=1.0,
        ),
    ),
    'z_image': (
        next_dit.preset('z_image'),
        dict(
            _class_name='ZImageTransformer2DModel', all_f_patch_size=[1], all_patch_size=[2],
            axes_dims=[32, 48, 48], axes_lens=[1536, 512, 512], cap_feat_dim=2560, dim=3840,
            in_channels=16, n_heads=30, n_kv_heads=30, n_layers=30, n_refiner_layers=2,
            norm_eps=1e-5, qk_norm=True, rope_theta=256.0, t_scale=1000.0,
        ),
    ),
    'wan autoencoder': (
        autoencoder_wan.preset('wan21'),
        dict(
            _class_name='AutoencoderKLWan', attn_scales=[], base_dim=96, dim_mult=[1, 2, 4, 4],
            dropout=0.0, num_res_blocks=2, temperal_downsample=[False, True, True], z_dim=16,
        ),
    ),
    'sdxl autoencoder': (
        autoencoder_kl.preset('sdxl'), dict(latent_channels=4, scaling_factor=0.13025, **_VAE)
    ),
    'flux autoencoder': (
        autoencoder_kl.preset('flux'),
        dict(scaling_factor=0.3611, shift_factor=0.1159, **_VAE, **_WIDE),
    ),
    'sdxl': (unet_conditional.preset('sdxl'), _UNET | _SDXL),
    'sd15': (
        unet_conditional.preset('sd15'),
        dict(
            attention_head_dim=8, block_out_channels=[320, 640, 1280, 1280],
            cross_attention_dim=768, sample_size=64,
            down_block_types=['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D'],
            up_block_types=['UpBlock2D'] + ['CrossAttnUpBlock2D'] * 3, **_UNET,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize('name', list(CASES))
def test_a_description_is_that_of_a_preset(name, tmp_path):
    preset, described = CASES[name]
    assert pretrained.network(diffusion_files.write(tmp_path, described, {})) == preset
