"""DiT, PixArt, autoencoders and all networks of latents: counts, outputs, shardings, bad input."""

import diffusion_files
import jax
import latent_cases
import numpy as np
import pytest
from diffusion_files import numbers
from jax.sharding import PartitionSpec
from latent_cases import (
    CONFIGS,
    FRAMES,
    IMAGES,
    INPUTS,
    MASK,
    TEXT,
    TIMES,
    VIDEO,
    X,
    module_of,
    said,
    shapes_of,
    variables_of,
)

from kd.errors import UserError
from kd.io import pretrained
from kd.models import (
    autoencoder_kl,
    autoencoder_wan,
    latent_dit,
    latent_parts,
    mmdit,
    next_dit,
    wan,
)
from kd.network import parameter_count
from kd.parallel.mesh import make_mesh
from kd.parallel.sharding import tree_shardings

pytestmark = pytest.mark.usefixtures('compiled_quickly')
NAMES = ('dit', 'pixart', 'autoencoder', 'wan_autoencoder', 'vq')


@pytest.mark.parametrize(
    ('made', 'of', 'shape', 'millions'),
    [
        (latent_dit.preset, 'dit_xl2_256', (32, 32, 4), 675),
        (latent_dit.preset, 'pixart_alpha_512', (64, 64, 4), 611),
        (mmdit.preset, 'sd3_medium', (64, 64, 16), 2_028),
        (mmdit.preset, 'sd35_large', (64, 64, 16), 8_057),
        (mmdit.preset, 'flux_dev', (64, 64, 16), 11_901),
        (mmdit.preset, 'qwen_image', (64, 64, 16), 20_430),
        (next_dit.preset, 'lumina2', (64, 64, 16), 2_610),
        (next_dit.preset, 'z_image', (64, 64, 16), 6_155),
        (wan.preset, 'wan21_1_3b', (5, 32, 32, 16), 1_419),
        (wan.preset, 'wan21_14b', (5, 32, 32, 16), 14_288),
    ],
)
def test_presets_have_the_published_numbers_of_parameters(made, of, shape, millions):
    count = parameter_count(diffusion_files.abstract(made(of), (1,), (1, *shape)))
    assert round(count / 1e6) == millions


@pytest.mark.parametrize(
    ('made', 'of', 'shape', 'thousands'),
    [
        (autoencoder_kl.preset, 'sdxl', (64, 64, 3), 83_654),
        (autoencoder_kl.preset, 'flux', (64, 64, 3), 83_820),
        (autoencoder_kl.preset, 'vq_f4', (64, 64, 3), 55_323),
        (autoencoder_wan.preset, 'wan21', (5, 64, 64, 3), 126_893),
        # Of a picture there are the same.
        (autoencoder_wan.preset, 'qwen_image', (1, 64, 64, 3), 126_893),
    ],
)
def test_autoencoders_have_the_published_numbers_of_parameters(made, of, shape, thousands):
    shapes = diffusion_files.abstract(made(of), (1, *shape))
    assert round(parameter_count(shapes) / 1e3) == thousands


@pytest.mark.parametrize('name', NAMES)
def test_a_directory_is_read_and_says_what_diffusers_does(name, tmp_path):
    latent_cases.check_directory(name, tmp_path)


@diffusion_files.asked_anew
@pytest.mark.parametrize('name', NAMES)
def test_diffusers_says_so(name, tmp_path):
    latent_cases.check_anew(name, tmp_path)


@pytest.mark.parametrize(
    ('made', 'of', 'shape'),
    [
        (latent_dit.preset, 'pixart_alpha_512', (64, 64, 4)),
        (mmdit.preset, 'sd35_medium', (64, 64, 16)),
        (mmdit.preset, 'flux_dev', (64, 64, 16)),
        (next_dit.preset, 'z_image', (64, 64, 16)),
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
    inner = next(path for path in lying['params'] if 'blocks' in path or path == 'layers')
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


def test_a_text_may_be_followed_by_anything():
    for name in ('lumina2', 'z_image'):
        other = said(name, text=TEXT + 3 * ~MASK[..., None])
        np.testing.assert_allclose(other, said(name), rtol=1e-5, atol=1e-5)


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


# As PixArt-alpha/PixArt-XL-2-512x512 and facebook/DiT-XL-2-256 were published.
PUBLISHED = dict(
    _class_name='Transformer2DModel', _diffusers_version='0.22.0.dev0', attention_bias=True,
    activation_fn='gelu-approximate', attention_head_dim=72, double_self_attention=False,
    dropout=0.0, in_channels=4, norm_elementwise_affine=False, norm_num_groups=32,
    num_attention_heads=16, num_embeds_ada_norm=1000, num_layers=28, num_vector_embeds=None,
    only_cross_attention=False, out_channels=8, patch_size=2, upcast_attention=False,
    use_linear_projection=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ('of', 'described'),
    [
        (
            'pixart_alpha_512',
            dict(
                norm_type='ada_norm_single', attention_type='default', caption_channels=4096,
                cross_attention_dim=1152, norm_eps=1e-6, sample_size=64,
            ),
        ),
        (
            'pixart_alpha_1024',
            dict(
                norm_type='ada_norm_single', attention_type='default', caption_channels=4096,
                cross_attention_dim=1152, norm_eps=1e-6, sample_size=128,
            ),
        ),
        (
            'dit_xl2_256',
            dict(
                norm_type='ada_norm_zero', cross_attention_dim=None, norm_eps=1e-5, sample_size=32
            ),
        ),
    ],
)  # fmt: skip
def test_published_descriptions_are_those_of_presets(of, described, tmp_path):
    reference = diffusion_files.write(tmp_path, PUBLISHED | described, {})
    assert pretrained.network(reference) == latent_dit.preset(of)


@pytest.mark.parametrize(
    ('name', 'described', 'words'),
    [
        ('dit', dict(norm_type='ada_norm'), "norm_type='ada_norm' is more than LatentDiT knows"),
        ('dit', dict(_class_name='Transformer2DModel'), 'whose norm_type is one of ada_norm_zero'),
        ('dit', dict(out_channels=5), 'as many channels or twice, not 5'),
        ('pixart', dict(caption_channels=None), 'projects texts of caption_channels'),
        ('sd35', dict(dual_attention_layers=[1]), 'attends twice in its first blocks'),
        ('flux', dict(patch_size=2), 'MMDiT has patch_size=1'),
        ('qwen', dict(out_channels=16), 'a quarter of its in_channels out'),
        ('lumina2', dict(out_channels=8), 'NextDiT has patch_size=2 and as many channels'),
        ('z_image', dict(all_patch_size=[2, 4]), 'patches of 2x2 pixels of one image alone'),
        ('wan_autoencoder', dict(is_residual=True), 'is_residual=True is more than WanAuto'),
        ('wan', dict(image_dim=1_280), 'image_dim=1280 is more than Wan knows'),
        ('autoencoder', dict(use_quant_conv=False), 'both of quant_conv and post_quant_conv'),
        ('vq', dict(vq_embed_dim=4), 'codes of as many numbers as latents have'),
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
        ('z_image', (), dict(text=np.zeros((2, 5, 7))), "'text' has 7 features, expected 6"),
        ('wan_autoencoder', (FRAMES[:, :4],), {}, 'one frame and a multiple of 4, with sides'),
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
