"""The conditional UNet against that of diffusers or numbers of it; files; bad input."""

import functools

import diffusion_files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.errors import UserError
from kd.io import diffusion_names, pretrained
from kd.models import unet_conditional
from kd.network import parameter_count

pytestmark = pytest.mark.usefixtures('compiled_quickly')

# As SDXL: no attention at the first level, two blocks in that of the second, texts and sizes.
TINY = dict(
    _class_name='UNet2DConditionModel', sample_size=8, in_channels=4, out_channels=4,
    layers_per_block=1, norm_num_groups=4, block_out_channels=[8, 16],
    down_block_types=['DownBlock2D', 'CrossAttnDownBlock2D'],
    up_block_types=['CrossAttnUpBlock2D', 'UpBlock2D'], cross_attention_dim=6,
    attention_head_dim=[2, 4], use_linear_projection=True, transformer_layers_per_block=[1, 2],
    addition_embed_type='text_time', addition_time_embed_dim=4,
    projection_class_embeddings_input_dim=10 + 24, norm_eps=1e-5,
)  # fmt: skip
# sum, sum of squares and one entry of what diffusers 0.42.1 says of the same weights, with the text
# seen whole and where its mask is True.
KNOWN = {
    'whole': (171.75311, 958.25705, -1.729966),
    'masked': (169.40477, 947.31038, -1.720876),
}


@functools.cache
def module_of(**changes):
    arguments = diffusion_names.unet(TINY, {}, 'config.json')
    return unet_conditional.UNetConditional(**arguments | changes)


def abstract(module, side=8):
    return diffusion_files.abstract(module, (1,), (1, side, side, 4))


def variables_of(module):
    return diffusion_files.variables_of(module, (1,), (1, 8, 8, 4))


def inputs():
    """(t, x, what it is told), with a mask."""
    told = dict(
        text=diffusion_files.numbers((2, 5, 6), 1),
        mask=np.array([[True, True, False, False, False], [True] * 5]),
        pooled=diffusion_files.numbers((2, 10), 2),
        size=np.array([[512, 300, 0, 10, 512, 512], [1024, 1024, 3, 4, 768, 999]], np.float32),
    )
    return np.array([7.0, 901.0], np.float32), diffusion_files.numbers((2, 8, 8, 4), 7), told


@pytest.mark.parametrize(('name', 'billions'), [('sd15', 0.8595), ('sdxl', 2.5675)])
def test_presets_have_the_published_numbers_of_parameters(name, billions):
    module = unet_conditional.preset(name, remat=True)
    assert round(parameter_count(abstract(module, 64)) / 1e9, 4) == billions


def test_it_says_what_diffusers_does():
    module = module_of()
    variables, (t, x, told) = variables_of(module), inputs()
    apply = jax.jit(module.apply)
    masked = apply(variables, t, x, **told)
    np.testing.assert_allclose(
        diffusion_files.summary(masked), KNOWN['masked'], rtol=1e-4, atol=1e-4
    )
    whole = apply(variables, t, x, **told | dict(mask=np.ones((2, 5), bool)))
    np.testing.assert_allclose(diffusion_files.summary(whole), KNOWN['whole'], rtol=1e-4, atol=1e-4)
    # What is masked is not seen.
    other = told['text'] + 3 * ~told['mask'][..., None]
    np.testing.assert_array_equal(apply(variables, t, x, **told | dict(text=other)), masked)


def test_what_is_computed_again_changes_nothing():
    module, again = module_of(), module_of(remat=True, masked=True)
    assert jax.tree.structure(abstract(module)) == jax.tree.structure(abstract(again))
    assert again.conditions == ('text', 'mask', 'pooled', 'size')
    assert unet_conditional.preset('sd15').conditions == ('text',)
    variables, (t, x, told) = variables_of(module), inputs()
    traced = jax.eval_shape(
        jax.grad(lambda v: (again.apply(v, t, x, train=True, **told) ** 2).sum()), variables
    )
    assert jax.tree.map(jnp.shape, traced) == jax.tree.map(jnp.shape, variables)


def write(folder, changed=None, described=None):
    tensors = diffusion_files.tensors_of(TINY, variables_of(module_of()))
    return diffusion_files.write(folder, TINY | (described or {}), tensors | (changed or {}))


def test_a_directory_is_read_and_what_does_not_fit_is_told_by_name(tmp_path):
    module, shapes = module_of(), abstract(module_of())
    reference = write(tmp_path / 'good')
    assert pretrained.network(reference) == module
    found = pretrained.load(reference, shapes)
    jax.tree.map(np.testing.assert_array_equal, found, variables_of(module))
    block = 'down_blocks.1.attentions.0.transformer_blocks'
    more = write(tmp_path / 'more', {f'{block}.2.norm1.bias': np.ones(16, np.float32)})
    with pytest.raises(
        UserError, match=r"no use for: 'down_blocks\.1\.attentions\.0\.transformer_"
    ):
        pretrained.check(more, shapes)
    wrong = write(tmp_path / 'wrong', {f'{block}.1.attn2.to_k.weight': np.ones((16, 7), 'f')})
    with pytest.raises(UserError, match=r"1\.attn2\.to_k\.weight' has shape \[16, 7\], which does"):
        pretrained.check(wrong, shapes)
    odd = write(tmp_path / 'odd', described=dict(dual_cross_attention=True))
    with pytest.raises(UserError, match=r'dual_cross_attention=True is more than UNetCond'):
        pretrained.describe(odd)
    odd = write(tmp_path / 'levels', described=dict(up_block_types=['UpBlock2D', 'UpBlock2D']))
    with pytest.raises(UserError, match='as their mirror'):
        pretrained.describe(odd)


def test_inputs_that_do_not_fit_are_told():
    module, (t, x, told) = module_of(), inputs()

    def trace(x=x, **given):
        jax.eval_shape(lambda v: module.apply(v, t, x, **given), abstract(module))

    with pytest.raises(ValueError, match=r"told \('text', 'pooled', 'size'\), and 'text' was miss"):
        trace()
    with pytest.raises(ValueError, match="'text' has 9 features, expected 6; is it of another enc"):
        trace(**told | dict(text=np.zeros((2, 5, 9))))
    with pytest.raises(ValueError, match='2 levels needs sides divisible by 2, got 7x8'):
        trace(x[:, :7], **told)
    with pytest.raises(ValueError, match="no UNetConditional 'sd3'; known are: sd15, sd21, sdxl"):
        unet_conditional.preset('sd3')


@diffusion_files.asked_anew
@pytest.mark.parametrize('linear', [True, False])
def test_a_directory_of_diffusers_gives_its_outputs(tmp_path, linear):
    described = TINY | dict(use_linear_projection=linear)
    module = module_of(linear=linear)
    variables, (t, x, told) = variables_of(module), inputs()
    reference = diffusion_files.write(
        tmp_path, described, diffusion_files.tensors_of(described, variables)
    )
    given = {
        'sample': x.transpose(0, 3, 1, 2), 'timestep': t, 'encoder_hidden_states': told['text'],
        'added_cond_kwargs.text_embeds': told['pooled'],
        'added_cond_kwargs.time_ids': told['size'],
    }  # fmt: skip
    masked = {'encoder_attention_mask': told['mask']}
    wanted = diffusion_files.said(
        tmp_path, ('forward', 'sample', given), ('forward', 'sample', given | masked)
    )
    assert pretrained.network(reference) == module
    apply, found = jax.jit(module.apply), pretrained.load(reference, abstract(module))
    for said, mask in zip(wanted, (np.ones((2, 5), bool), told['mask']), strict=True):
        np.testing.assert_allclose(
            apply(found, t, x, **told | dict(mask=mask)), said.transpose(0, 2, 3, 1),
            rtol=1e-4, atol=1e-4,
        )  # fmt: skip
