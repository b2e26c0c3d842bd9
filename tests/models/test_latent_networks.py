"""Released transformers and autoencoders of latents: counts, what diffusers says, files, inputs."""

import functools

import diffusion_files
import jax
import numpy as np
import pytest
from diffusion_files import numbers
from jax.sharding import PartitionSpec

from kd.errors import UserError
from kd.io import pretrained
from kd.models import autoencoder_kl, latent_dit, latent_parts, mmdit, wan
from kd.network import parameter_count
from kd.parallel.mesh import make_mesh
from kd.parallel.sharding import tree_shardings

pytestmark = pytest.mark.usefixtures('compiled_quickly')

TEXT, TIMES = numbers((2, 5, 6), 1), np.array([7.0, 901.0], np.float32)
POOLED, SCALE = numbers((2, 10), 2), np.array([1.0, 3.5], np.float32)
MASK = np.array([[True, True, False, False, False], [True] * 5])
SIZE = np.array([[512, 300, 512 / 300], [1024, 1024, 1]], np.float32)
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
    'wan': dict(
        _class_name='WanTransformer3DModel', in_channels=4, out_channels=4, text_dim=6, ffn_dim=20,
        num_layers=2, **_HEADS,
    ),
    'autoencoder': dict(
        _class_name='AutoencoderKL', block_out_channels=[8, 16], norm_num_groups=4,
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
    'wan': ((TIMES, VIDEO), dict(text=TEXT)),
    'autoencoder': ((IMAGES,), {}),
}
ENCODED = tuple(
    ('encode', f'latent_dist.{moment}', {'x': np.moveaxis(IMAGES, -1, 1)})
    for moment in ('mean', 'logvar')
)
# Sum, sum of squares and one entry of what diffusers 0.42.1 says of the same weights.
KNOWN = {
    'dit': (698.931827, 5732.588739, 0.55619),
    'pixart': (-982.860527, 23004.707024, 4.315297),
    'sd3': (47.985768, 3980.549841, 2.33616),
    'sd35': (96.68792, 5113.535867, 3.001695),
    'flux': (2036.338011, 16200.797459, 6.612652),
    'qwen': (450.651378, 2946.574852, 0.485858),
    'wan': (-61.22234, 4574.302149, -3.368743),
    'autoencoder': (319.647979, 469.963357, 0.033934),
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


@pytest.mark.parametrize(
    ('made', 'of', 'shape', 'millions'),
    [
        (latent_dit.preset, 'dit_xl2_256', (32, 32, 4), 675),
        (latent_dit.preset, 'pixart_alpha_512', (64, 64, 4), 611),
        (mmdit.preset, 'sd3_medium', (64, 64, 16), 2_028),
        (mmdit.preset, 'sd35_large', (64, 64, 16), 8_057),
        (mmdit.preset, 'flux_dev', (64, 64, 16), 11_901),
        (mmdit.preset, 'qwen_image', (64, 64, 16), 20_430),
        (wan.preset, 'wan21_1_3b', (5, 32, 32, 16), 1_419),
        (wan.preset, 'wan21_14b', (5, 32, 32, 16), 14_288),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(made, of, shape, millions):
    count = parameter_count(diffusion_files.abstract(made(of), (1,), (1, *shape)))
    assert round(count / 1e6) == millions


@pytest.mark.parametrize(('of', 'thousands'), [('sdxl', 83_654), ('flux', 83_820)])
def test_autoencoders_have_the_published_numbers_of_parameters(of, thousands):
    shapes = diffusion_files.abstract(autoencoder_kl.preset(of), (1, 64, 64, 3))
    assert round(parameter_count(shapes) / 1e3) == thousands


@pytest.mark.parametrize('name', list(CONFIGS))
def test_a_directory_is_read_and_says_what_diffusers_does(name, tmp_path):
    reference, module = write(name, tmp_path), module_of(name)
    assert pretrained.network(reference) == module
    found = pretrained.load(reference, diffusion_files.abstract(module, *shapes_of(name)))
    jax.tree.map(np.testing.assert_array_equal, found, variables_of(name))
    np.testing.assert_allclose(diffusion_files.summary(said(name)), KNOWN[name], rtol=2e-4)


@diffusion_files.asked_anew
@pytest.mark.parametrize('name', list(CONFIGS))
def test_diffusers_says_so(name, tmp_path):
    write(name, tmp_path)
    channels_first = {
        key: np.moveaxis(x, -1, 1) for key, x in dict(x=X, video=VIDEO, image=IMAGES).items()
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
        'wan': {'hidden_states': channels_first['video'], 'timestep': TIMES, **text},
        'autoencoder': {'sample': channels_first['image']},
    }  # fmt: skip
    wanted, *more = diffusion_files.said(
        tmp_path,
        ('forward', 'sample', calls[name]),
        *ENCODED * (name == 'autoencoder'),
    )
    for part, moment in zip(more, (0, 1), strict=bool(more)):
        found = module_of(name).apply(variables_of(name), IMAGES, method='encode')[moment]
        np.testing.assert_allclose(found, np.moveaxis(part, 1, -1), rtol=1e-4, atol=1e-4)
    if name in ('flux', 'qwen'):
        wanted = wanted.reshape(2, 4, 6, 4, 2, 2).transpose(0, 1, 4, 2, 5, 3).reshape(X.shape)
    else:
        wanted = np.moveaxis(wanted, 1, -1)
    found = said(name)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ('made', 'of', 'shape'),
    [
        (latent_dit.preset, 'pixart_alpha_512', (64, 64, 4)),
        (mmdit.preset, 'sd35_medium', (64, 64, 16)),
        (mmdit.preset, 'flux_dev', (64, 64, 16)),
        (wan.preset, 'wan21_14b', (5, 32, 32, 16)),
    ],
)
def test_parameters_lie_on_all_devices(made, of, shape):
    mesh = make_mesh({'fsdp': 4, 'tensor': 2})
    shapes = diffusion_files.abstract(made(of), (1,), (1, *shape))
    lying = tree_shardings(shapes, latent_parts.SHARDING, mesh)
    held = jax.tree.map(lambda x, y: np.prod(y.shard_shape(x.shape)), shapes, lying)
    share = sum(jax.tree.leaves(held)) / sum(x.size for x in jax.tree.leaves(shapes))
    # Of eight; norms and biases lie whole, and what is outside of blocks over four alone.
    assert 1 / 8 < share < 1 / 7
    inner = next(path for path in lying['params'] if 'blocks' in path)
    specs = {x.spec for x in jax.tree.leaves(lying['params'][inner])}
    assert {PartitionSpec(None, 'fsdp', 'tensor'), PartitionSpec(None, 'tensor', 'fsdp')} < specs


def test_variances_are_further_channels():
    both = said('dit')
    assert both.shape == (2, 8, 8, 8)
    np.testing.assert_allclose(said('dit', variances=False), both[..., :4], rtol=1e-5, atol=1e-5)
    # The class that is none, and what is no class.
    null = said('dit', label=np.array([5, 6]))
    np.testing.assert_array_equal(null[0], said('dit', label=np.array([5, 5]))[0])
    assert np.isnan(null[1]).all()


def test_what_a_mask_hides_is_not_seen():
    other = said('pixart', text=TEXT + 3 * ~MASK[..., None])
    np.testing.assert_array_equal(other, said('pixart'))


def test_a_causal_video_does_not_see_what_comes():
    whole = module_of('wan')
    causal = wan.Wan(**{**{k: getattr(whole, k) for k in (
        'width', 'depth', 'heads', 'hidden', 'context', 'epsilon')}, 'causal': 2})  # fmt: skip
    apply, variables = applied(causal), variables_of('wan')
    later = VIDEO.copy()
    later[:, 2:] += 1
    first = apply(variables, TIMES, VIDEO, text=TEXT)
    other = apply(variables, TIMES, later, text=TEXT)
    # Blocks of two frames: the first two see each other alone.
    np.testing.assert_array_equal(first[:, :2], other[:, :2])
    assert np.abs(first[:, 2:] - other[:, 2:]).min() > 0
    assert np.abs(said('wan')[:, :2] - first[:, :2]).max() > 0.01
    # Times of frames, all equal, are those of videos.
    each = apply(variables, np.repeat(TIMES[:, None], 3, 1), VIDEO, text=TEXT)
    np.testing.assert_allclose(each, first, rtol=1e-5, atol=1e-5)


def test_latents_are_scaled_and_old_names_are_read(tmp_path):
    module = autoencoder_kl.preset('sd3')
    latents = numbers((2, 3), 0)
    np.testing.assert_allclose(module.scaled(latents), (latents - 0.0609) * 1.5305, rtol=1e-5)
    np.testing.assert_allclose(module.unscaled(module.scaled(latents)), latents, rtol=1e-4)
    tensors = diffusion_files.tensors_of(CONFIGS['autoencoder'], variables_of('autoencoder'))
    for new, old in (('to_q', 'query'), ('to_k', 'key'), ('to_v', 'value'),
                     ('to_out.0', 'proj_attn')):  # fmt: skip
        tensors = {key.replace(f'.{new}.', f'.{old}.'): x for key, x in tensors.items()}
    reference = diffusion_files.write(tmp_path, CONFIGS['autoencoder'], tensors)
    shapes = diffusion_files.abstract(module_of('autoencoder'), *shapes_of('autoencoder'))
    jax.tree.map(
        np.testing.assert_array_equal,
        pretrained.load(reference, shapes),
        variables_of('autoencoder'),
    )


@pytest.mark.parametrize(
    ('name', 'described', 'words'),
    [
        ('dit', dict(norm_type='ada_norm'), "norm_type='ada_norm' is more than LatentDiT knows"),
        ('dit', dict(out_channels=5), 'as many channels or twice, not 5'),
        ('pixart', dict(caption_channels=None), 'projects texts of caption_channels'),
        ('sd35', dict(dual_attention_layers=[1]), 'attends twice in its first blocks'),
        ('flux', dict(patch_size=2), 'MMDiT has patch_size=1'),
        ('qwen', dict(out_channels=16), 'a quarter of its in_channels out'),
        ('wan', dict(image_dim=1_280), 'image_dim=1280 is more than Wan knows'),
        ('autoencoder', dict(use_quant_conv=False), 'both of quant_conv and post_quant_conv'),
    ],
)
def test_settings_that_networks_do_not_have_are_told(name, described, words, tmp_path):
    with pytest.raises(UserError, match=words):
        pretrained.describe(diffusion_files.write(tmp_path, CONFIGS[name] | described, {}))


@pytest.mark.parametrize(
    ('name', 'inputs', 'told', 'words'),
    [
        ('pixart', (), dict(size=None), "'size' was missing"),
        ('sd3', (), dict(text=np.zeros((2, 5, 9))), "'text' has 9 features, expected 6; is it of"),
        ('sd3', (TIMES, X[:, :7]), {}, 'patches of 2x2 got 7x12; the sides must be divisible'),
        ('sd3', (TIMES, np.zeros((2, 8, 16, 4))), {}, 'knows 7 places along a side, got 8'),
        ('flux', (), dict(guidance=None), "'guidance' was missing"),
        ('wan', (np.zeros((2, 4)), VIDEO), {}, 'times of 4 frames of latents, there are 3'),
        ('autoencoder', (IMAGES[:, :7],), {}, 'image sides divisible by 2, got 7x12'),
    ],
)
def test_inputs_that_do_not_fit_are_told(name, inputs, told, words):
    inputs, given = inputs or INPUTS[name][0], INPUTS[name][1] | told
    given.pop('variances', None)
    with pytest.raises(ValueError, match=words):
        jax.eval_shape(
            lambda v: module_of(name).apply(v, *inputs, **given),
            diffusion_files.abstract(module_of(name), *shapes_of(name)),
        )


def test_other_networks_are_told_by_name():
    with pytest.raises(ValueError, match="no MMDiT 'sd4'; known are: sd3_medium, sd35_medium, "):
        mmdit.preset('sd4')
    with pytest.raises(ValueError, match=r"Wan has no 'frames'; it has: width, depth, "):
        wan.preset('wan21_14b', frames=1)
