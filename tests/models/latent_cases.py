"""Tiny transformers and autoencoders of latents, what diffusers says of them, and inputs."""

import functools

import diffusion_files
import jax
import numpy as np
from diffusion_files import numbers

from kd.io import pretrained

TEXT, TIMES = numbers((2, 5, 6), 1), np.array([7.0, 901.0], np.float32)
POOLED, SCALE = numbers((2, 10), 2), np.array([1.0, 3.5], np.float32)
MASK = np.array([[True, True, False, False, False], [True] * 5])
SIZE = np.array([[512, 300, 512 / 300], [1024, 1024, 1]], np.float32)
FRAMES = numbers((2, 9, 4, 8, 3), 7)
X, VIDEO = numbers((2, 8, 12, 4), 7), numbers((2, 3, 4, 6, 4), 7)
SQUARE, IMAGES = X[:, :, :8], numbers((2, 8, 12, 3), 7)

_HEADS = dict(num_attention_heads=2, attention_head_dim=12)
_JOINT = dict(in_channels=4, joint_attention_dim=6, pooled_projection_dim=10)
_SD3 = dict(
    _class_name='SD3Transformer2DModel', sample_size=8, out_channels=4, pos_embed_max_size=7,
    caption_projection_dim=24, **_HEADS, **_JOINT,
)  # fmt: skip
CONFIGS = {
    'dit': dict(
        _class_name='DiTTransformer2DModel', sample_size=12, out_channels=8, num_layers=2,
        num_embeds_ada_norm=5, **_HEADS,
    ),
    'pixart': dict(
        _class_name='PixArtTransformer2DModel', sample_size=8, num_layers=2, caption_channels=6,
        cross_attention_dim=24, use_additional_conditions=True, interpolation_scale=2, **_HEADS,
    ),
    'sd3': dict(num_layers=3, **_SD3),
    'sd35': dict(num_layers=3, dual_attention_layers=[0], qk_norm='rms_norm', **_SD3),
    'flux': dict(
        _class_name='FluxTransformer2DModel', num_layers=1, num_single_layers=2, **_HEADS,
        axes_dims_rope=[2, 4, 6], guidance_embeds=True, **_JOINT | dict(in_channels=16),
    ),
    'qwen': dict(
        _class_name='QwenImageTransformer2DModel', num_layers=2, in_channels=16, out_channels=4,
        joint_attention_dim=6, axes_dims_rope=[2, 4, 6], **_HEADS,
    ),
    'lumina2': dict(
        _class_name='Lumina2Transformer2DModel', in_channels=4, hidden_size=24, num_layers=2,
        num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1, multiple_of=8,
        ffn_dim_multiplier=0.4, axes_dim_rope=[2, 4, 6], cap_feat_dim=6,
    ),
    'z_image': dict(
        _class_name='ZImageTransformer2DModel', in_channels=4, dim=24, n_layers=2,
        n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=6, axes_dims=[2, 4, 6],
    ),
    'wan': dict(
        _class_name='WanTransformer3DModel', in_channels=4, out_channels=4, text_dim=6, ffn_dim=20,
        num_layers=2, **_HEADS,
    ),
    'autoencoder': dict(
        _class_name='AutoencoderKL', block_out_channels=[8, 16], norm_num_groups=4,
        down_block_types=['DownEncoderBlock2D'] * 2, up_block_types=['UpDecoderBlock2D'] * 2,
    ),
    'wan_autoencoder': dict(
        _class_name='AutoencoderKLWan', base_dim=8, z_dim=4, dim_mult=[1, 2, 2],
        num_res_blocks=1, temperal_downsample=[True, True], latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 3.0, 4.0],
    ),
    'vq': dict(
        _class_name='VQModel', block_out_channels=[8, 16], norm_num_groups=4, num_vq_embeddings=20,
        down_block_types=['DownEncoderBlock2D'] * 2, up_block_types=['UpDecoderBlock2D'] * 2,
    ),
}  # fmt: skip
JOINT = dict(text=TEXT, pooled=POOLED)
INPUTS = {
    'dit': ((TIMES, SQUARE), dict(label=np.array([3, 5]), variances=True)),
    'pixart': ((TIMES, X), dict(text=TEXT, mask=MASK, size=SIZE, variances=True)),
    'sd3': ((TIMES, X), JOINT),
    'sd35': ((TIMES, X), JOINT),
    'flux': ((TIMES, X), JOINT | dict(guidance=SCALE)),
    'qwen': ((TIMES, X), dict(text=TEXT, mask=MASK)),
    'lumina2': ((TIMES, X), dict(text=TEXT, mask=MASK)),
    'z_image': ((TIMES, X), dict(text=TEXT, mask=MASK)),
    'wan': ((TIMES, VIDEO), dict(text=TEXT)),
    'autoencoder': ((IMAGES,), {}),
    'wan_autoencoder': ((FRAMES,), {}),
    'vq': ((IMAGES,), {}),
}
ENCODED = {
    'autoencoder': ('latent_dist.mean', 'latent_dist.logvar'),
    'wan_autoencoder': ('latent_dist.mean', 'latent_dist.logvar'),
    'vq': ('latents',),
}
# Sum, sum of squares and one entry of what diffusers 0.42.1 says of the same weights.
KNOWN = {
    'dit': (698.931827, 5732.588739, 0.55619),
    'pixart': (-982.860527, 23004.707024, 4.315297),
    'sd3': (47.985768, 3980.549841, 2.33616),
    'sd35': (96.68792, 5113.535867, 3.001695),
    'flux': (2036.338011, 16200.797459, 6.612652),
    'qwen': (450.651378, 2946.574852, 0.485858),
    'lumina2': (-498.536454, 2909.57254, -1.275592),
    'z_image': (-366.914464, 76461.926511, 2.060912),
    'wan_autoencoder': (640.517781, 306.314532, 0.477578),
    'wan': (-61.22234, 4574.302149, -3.368743),
    'autoencoder': (319.647979, 469.963357, 0.033934),
    'vq': (492.550294, 705.909957, 0.575023),
}


@functools.cache
def module_of(name):
    config = CONFIGS[name]
    family = pretrained.FAMILIES['hf'][config['_class_name']]
    return family.network(**family.arguments(config, {}, 'config.json'))


def shapes_of(name):
    return tuple((1, *x.shape[1:]) for x in INPUTS[name][0])


def variables_of(name):
    return diffusion_files.variables_of(module_of(name), *shapes_of(name))


@functools.cache
def applied(module, variances=False):
    told = dict(variances=True) if variances else {}
    return jax.jit(functools.partial(module.apply, **told))


def said(name, *inputs, **told):
    inputs, given = inputs or INPUTS[name][0], dict(INPUTS[name][1] | told)
    variances = given.pop('variances', False)
    return applied(module_of(name), variances)(variables_of(name), *inputs, **given)


def write(name, folder, changed=None, described=None):
    tensors = diffusion_files.tensors_of(CONFIGS[name], variables_of(name))
    for key in list(tensors):
        if '.0.norm1.emb.' in key:
            tensors[key.replace('.0.norm1.emb.', '.1.norm1.emb.')] = tensors[key]
    described = CONFIGS[name] | (described or {})
    return diffusion_files.write(folder, described, tensors | (changed or {}))


def check_directory(name, folder):
    """A directory is read, and its network says what diffusers does."""
    reference, module = write(name, folder), module_of(name)
    assert pretrained.network(reference) == module
    found = pretrained.load(reference, diffusion_files.abstract(module, *shapes_of(name)))
    jax.tree.map(np.testing.assert_array_equal, found, variables_of(name))
    np.testing.assert_allclose(diffusion_files.summary(said(name)), KNOWN[name], rtol=2e-4)


def check_anew(name, folder):
    """Diffusers is asked, and everything compared."""
    write(name, folder)
    channels_first = {
        key: np.moveaxis(x, -1, 1)
        for key, x in dict(x=X, video=VIDEO, image=IMAGES, frames=FRAMES).items()
    }
    x, text = channels_first['x'], {'encoder_hidden_states': TEXT}
    joint = {'hidden_states': x, 'timestep': TIMES, 'pooled_projections': POOLED, **text}
    row, column = np.indices((4, 6)).reshape(2, -1)
    packed = X.reshape(2, 4, 2, 6, 2, 4).transpose(0, 1, 3, 5, 2, 4).reshape(2, 24, 16)
    calls = {
        'dit': {
            'hidden_states': x[..., :8], 'timestep': TIMES.astype(int),
            'class_labels': np.array([3, 5]),
        },
        'pixart': {
            'hidden_states': x, 'timestep': TIMES.astype(int), **text,
            'encoder_attention_mask': MASK, 'added_cond_kwargs.resolution': SIZE[:, :2],
            'added_cond_kwargs.aspect_ratio': SIZE[:, 2:],
        },
        'sd3': joint,
        'sd35': joint,
        'flux': joint | {
            'hidden_states': packed, 'timestep': TIMES / 1_000, 'guidance': SCALE,
            'img_ids': np.stack([0 * row, row, column], 1).astype('f'),
            'txt_ids': np.zeros((5, 3), 'f'),
        },
        'qwen': {
            'hidden_states': packed, 'timestep': TIMES / 1_000, **text,
            'encoder_hidden_states_mask': MASK, 'img_shapes': np.array([[[1, 4, 6]]] * 2),
        },
        'lumina2': {
            'hidden_states': x, 'timestep': 1 - TIMES / 1_000, **text,
            'encoder_attention_mask': MASK,
        },
        'z_image': {
            't': 1 - TIMES / 1_000, **{f'x.{i}': each[:, None] for i, each in enumerate(x)},
            **{f'cap_feats.{i}': TEXT[i, MASK[i]] for i in range(2)},
        },
        'wan': {'hidden_states': channels_first['video'], 'timestep': TIMES, **text},
        'autoencoder': {'sample': channels_first['image']},
        'wan_autoencoder': {'sample': channels_first['frames']},
        'vq': {'sample': channels_first['image']},
    }  # fmt: skip
    wanted, *more = diffusion_files.said(
        folder,
        ('forward', 'sample', calls[name]),
        *(('encode', part, {'x': calls[name]['sample']}) for part in ENCODED.get(name, ())),
    )
    for moment, part in enumerate(more):
        found = module_of(name).apply(variables_of(name), *INPUTS[name][0], method='encode')[moment]
        np.testing.assert_allclose(found, np.moveaxis(part, 1, -1), rtol=1e-4, atol=1e-4)
    if name in ('flux', 'qwen'):
        wanted = wanted.reshape(2, 4, 6, 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(X.shape)
    else:
        wanted = np.moveaxis(wanted, 1, -1)
    if name == 'z_image':
        wanted = wanted[:, 0]
    if name in ('lumina2', 'z_image'):
        # As released they say x0 - eps.
        wanted = -wanted
    found = said(name)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())
