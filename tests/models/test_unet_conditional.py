"""The conditional UNet against that of diffusers or numbers of it; files; bad input."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

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
    'whole': (171.75310, 958.25711, 1.404904),
    'masked': (169.40478, 947.31050, 1.417874),
}


def numbers(shape, start):
    return np.random.default_rng(start).normal(size=shape).astype(np.float32)


def module_of(described=TINY):
    return unet_conditional.UNetConditional(**diffusion_names.unet(described, {}, 'config.json'))


def abstract(module, side=8):
    x = jnp.zeros((1, side, side, 4))
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(1), x)


def variables_of(module):
    """No leaf is a neutral element, and none of them is that of another."""
    leaves, structure = jax.tree.flatten(abstract(module))
    made, start = [], 0
    for x in leaves:
        made.append(numbers(x.shape, start) * 0.2 + (len(x.shape) == 1) * 0.5)
        start += x.size
    return jax.tree.unflatten(structure, made)


def inputs():
    """(t, x, what it is told), with a mask."""
    told = dict(
        text=numbers((2, 5, 6), 1),
        mask=np.array([[True, True, False, False, False], [True] * 5]),
        pooled=numbers((2, 10), 2),
        size=np.array([[512, 300, 0, 10, 512, 512], [1024, 1024, 3, 4, 768, 999]], np.float32),
    )
    return np.array([7.0, 901.0], np.float32), numbers((2, 8, 8, 4), 7), told


def tensors_of(variables):
    """The weights under the names and in the layouts of a file."""
    find, _ = diffusion_names.find(None, (), '')
    tensors = {}
    for path, x in jax.tree_util.tree_flatten_with_path(variables)[0]:
        found = find(tuple(key.key for key in path[1:]), x.shape)
        for part, leaf in zip(*(((found,), (x,)) if not isinstance(found, tuple) else (found, x)),
                              strict=True):  # fmt: skip
            axes = np.argsort(part.axes) if part.axes else range(leaf.ndim)
            tensors[part.name] = np.ascontiguousarray(np.transpose(leaf, axes))
    return tensors


def summary(x):
    x = np.asarray(x, np.float64)
    return x.sum(), (x**2).sum(), x[0, 2, 5, 1]


@pytest.mark.parametrize(('name', 'billions'), [('sd15', 0.8595), ('sdxl', 2.5675)])
def test_presets_have_the_published_numbers_of_parameters(name, billions):
    module = unet_conditional.preset(name, remat=True)
    assert round(parameter_count(abstract(module, 64)) / 1e9, 4) == billions


def test_it_says_what_diffusers_does():
    module = module_of()
    variables, (t, x, told) = variables_of(module), inputs()
    apply = jax.jit(module.apply)
    masked = apply(variables, t, x, **told)
    np.testing.assert_allclose(summary(masked), KNOWN['masked'], rtol=1e-4, atol=1e-4)
    whole = apply(variables, t, x, **told | dict(mask=np.ones((2, 5), bool)))
    np.testing.assert_allclose(summary(whole), KNOWN['whole'], rtol=1e-4, atol=1e-4)
    # What is masked is not seen.
    other = told['text'] + 3 * ~told['mask'][..., None]
    np.testing.assert_array_equal(apply(variables, t, x, **told | dict(text=other)), masked)


def test_what_is_computed_again_changes_nothing():
    changes = dict(remat=True, masked=True)
    module, again = module_of(), unet_conditional.UNetConditional(
        **diffusion_names.unet(TINY, {}, ''), **changes
    )  # fmt: skip
    assert jax.tree.structure(abstract(module)) == jax.tree.structure(abstract(again))
    assert again.conditions == ('text', 'mask', 'pooled', 'size')
    assert unet_conditional.preset('sd15').conditions == ('text',)
    variables, (t, x, told) = variables_of(module), inputs()
    traced = jax.eval_shape(
        jax.grad(lambda v: (again.apply(v, t, x, train=True, **told) ** 2).sum()), variables
    )
    assert jax.tree.map(jnp.shape, traced) == jax.tree.map(jnp.shape, variables)


def write(folder, changed=None, described=None):
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(TINY | (described or {})))
    tensors = tensors_of(variables_of(module_of())) | (changed or {})
    safetensors.numpy.save_file(tensors, folder / 'diffusion_pytorch_model.safetensors')
    return f'hf:{folder}'


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
    with pytest.raises(ValueError, match="no conditional UNet 'sd3'; known are: sd15, sd21, sdxl"):
        unet_conditional.preset('sd3')


@pytest.mark.parametrize('linear', [True, False])
def test_a_directory_of_diffusers_gives_its_outputs(tmp_path, linear):
    torch = pytest.importorskip('torch')
    diffusers = pytest.importorskip('diffusers')
    described = TINY | dict(use_linear_projection=linear)
    theirs = diffusers.UNet2DConditionModel(
        **{name: value for name, value in described.items() if name != '_class_name'}
    ).eval()
    with torch.no_grad():
        for p in theirs.parameters():
            p.copy_(torch.randn_like(p) * 0.2 + (0.5 if p.ndim == 1 else 0.0))
    theirs.save_pretrained(tmp_path)
    t, x, told = inputs()
    with torch.no_grad():
        wanted = theirs(
            torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(t), torch.tensor(told['text']),
            encoder_attention_mask=torch.tensor(told['mask']),
            added_cond_kwargs=dict(
                text_embeds=torch.tensor(told['pooled']), time_ids=torch.tensor(told['size'])
            ),
        ).sample.numpy()  # fmt: skip
    module = pretrained.network(f'hf:{tmp_path}')
    variables = pretrained.load(f'hf:{tmp_path}', abstract(module))
    found = jax.jit(module.apply)(variables, t, x, **told)
    np.testing.assert_allclose(found, wanted.transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-4)
