"""EDM's networks: counts, an independent network in PyTorch or numbers of it, files, bad input."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from kd import config
from kd.errors import UserError
from kd.io import pretrained
from kd.models import edm, edm_parts
from kd.network import parameter_count

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SIZES = dict(multipliers=(1, 2), blocks=1, attention=(4,), num_classes=5)
SONG = dict(channels=16, augment=2, **SIZES)
VE = dict(noise='fourier', noise_multiplier=2, taps=(1, 3, 3, 1))
CASES = {
    'ddpmpp': (edm.SongUNet, SONG),
    'ncsnpp': (edm.SongUNet, dict(channels=16, encoder='residual', **SIZES, **VE)),
    'skip': (edm.SongUNet, dict(channels=16, encoder='skip', decoder='skip', **SIZES, **VE)),
    'adm': (edm.DhariwalUNet, dict(channels=64, augment=2, **SIZES)),
}


def abstract(module, side=8):
    x = jnp.zeros((1, side, side, 3))
    return jax.eval_shape(module.init, jax.random.key(0), jnp.zeros(1), x)


def numbers(shape, start):
    return np.random.default_rng(start).normal(size=shape).astype(np.float32)


def variables_of(module):
    """No leaf is a neutral element, and none of them is that of another."""
    leaves, structure = jax.tree.flatten(abstract(module))
    made, start = [], 0
    for x in leaves:
        made.append(numbers(x.shape, start) * 0.15 + (len(x.shape) == 1) * 0.5)
        start += x.size
    return jax.tree.unflatten(structure, made)


@functools.cache
def applied(module):
    return jax.jit(module.apply)


def inputs(module):
    times, x = np.array([0.3, -1.2], np.float32), numbers((2, 8, 8, 3), 7)
    told = dict(label=np.array([3, 5]))
    return times, x, told | (dict(augment=numbers((2, 2), 3)) if module.augment else {})


@pytest.mark.parametrize(
    ('name', 'millions'),
    [('cifar10', 55.7), ('ffhq64', 61.8), ('imagenet64', 295.9)],
)
def test_presets_have_the_published_numbers_of_parameters(name, millions):
    module = edm.preset(name, remat=True)
    found = parameter_count(abstract(module, 32 if name == 'cifar10' else 64))
    assert round(found / 1e6, 1) == millions


def test_presets_name_what_they_lack():
    with pytest.raises(ValueError, match=r"no network 'cifar' of EDM; known are: cifar10, "):
        edm.preset('cifar')
    with pytest.raises(ValueError, match=r"DhariwalUNet has no 'taps'; it has: channels, "):
        edm.preset('imagenet64', taps=(1, 1))


# sum, sum of squares and one entry of what the same networks in PyTorch, written from the released
# code (convolutions with groups, transposed for 'up'), say of the same weights.
KNOWN = {
    'ddpmpp': (293.35734, 446.54305, 2.618432),
    'ncsnpp': (270.12882, 543.00684, 1.150758),
    'skip': (48.12269, 1483.86689, -1.085415),
    'adm': (398.51612, 761.08462, 0.198308),
}


@pytest.mark.parametrize('name', list(CASES))
def test_networks_say_what_those_in_pytorch_do(name):
    kind, arguments = CASES[name]
    module = kind(**arguments)
    times, x, told = inputs(module)
    said = np.asarray(applied(module)(variables_of(module), times, x, **told), np.float64)
    found = said.sum(), (said**2).sum(), said[1, 2, 5, 1]
    np.testing.assert_allclose(found, KNOWN[name], rtol=2e-4, atol=2e-4)


def test_resampling_keeps_what_is_constant_and_is_adjoint():
    x, y = numbers((1, 8, 8, 2), 0), numbers((1, 4, 4, 2), 9)
    for taps in ((1, 1), (1, 3, 3, 1)):
        down, up = edm_parts.resample(x, 'down', taps), edm.resample(y, 'up', taps)
        assert (down.shape, up.shape) == ((1, 4, 4, 2), (1, 8, 8, 2))
        # <down x, y> = <x, up y> / 4
        np.testing.assert_allclose((down * y).sum(), (x * up).sum() / 4, rtol=1e-4)
        inner = edm_parts.resample(np.ones_like(x), 'down', taps)[:, 1:-1, 1:-1]
        np.testing.assert_allclose(inner, 1, rtol=1e-6)


def test_without_a_label_it_is_the_null_class_and_without_an_augmentation_none():
    module = edm.SongUNet(**SONG)
    variables, (times, x, _) = variables_of(module), inputs(module)
    apply = applied(module)
    told = apply(variables, times, x, label=np.array([5, 5]), augment=np.zeros((2, 2)))
    np.testing.assert_array_equal(apply(variables, times, x), told)
    assert np.isnan(
        apply(variables, times, x, label=np.array([6, 5]), augment=np.zeros((2, 2)))[0]
    ).all()
    wide = jnp.zeros((2, 8, 12, 3))
    with pytest.raises(ValueError, match='4 levels needs image sides divisible by 8, got 8x12'):
        jax.eval_shape(edm.SongUNet().init, jax.random.key(0), times, wide)


def write(folder, changed=None, described=None):
    """A directory of the network 'ddpmpp', by the names of the released code."""
    flat = jax.tree_util.tree_flatten_with_path(variables_of(edm.SongUNet(**SONG)))[0]
    tensors = {}
    for path, x in flat:
        *modules, last = (key.key for key in path[1:])
        name = '.'.join([*modules, 'bias' if last == 'bias' else 'weight'])
        for level in ('enc', 'dec'):
            name = name.replace(f'{level}_', f'{level}.') if name.startswith(level) else name
        axes = {4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[x.ndim]
        tensors[name] = np.ascontiguousarray(np.transpose(x, axes))
    tensors['enc.4x4_down.conv0.resample_filter'] = np.ones((1, 1, 2, 2), np.float32) / 4
    said = dict(
        _class_name='SongUNet', img_resolution=8, in_channels=3, out_channels=3, label_dim=5,
        augment_dim=2, model_channels=16, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[4],
    )  # fmt: skip
    folder.mkdir()
    (folder / 'config.json').write_text(json.dumps(said | (described or {})))
    safetensors.numpy.save_file(tensors | (changed or {}), folder / 'model.safetensors')
    return f'hf:{folder}'


def test_a_directory_is_read_and_held_to_the_network_of_a_denoiser(tmp_path):
    module = edm.SongUNet(**SONG)
    reference = write(tmp_path / 'good')
    assert pretrained.network(reference) == module
    found = pretrained.load(reference, abstract(module))
    jax.tree.map(np.testing.assert_array_equal, found, variables_of(module))

    def denoiser(**changes):
        inner = dict(name='kd.models.edm.SongUNet', **SONG, **changes)
        block = dict(
            name='kd.models.denoiser.denoiser', network=inner, precondition='edm',
            schedule=dict(name='kd.losses.schedule.edm'),
        )  # fmt: skip
        return config.build(block, where='network'), block

    described = pretrained.describe(reference)
    assert described.architecture == 'SongUNet'
    pretrained.check_agreement(described, *denoiser())
    made, _ = denoiser(encoder='skip')
    with pytest.raises(UserError, match=r"says encoder='standard', and the network has 'skip'"):
        pretrained.check_agreement(described, made, denoiser()[1])


def test_files_that_do_not_fit_are_told_by_name(tmp_path):
    shapes = abstract(edm.SongUNet(**SONG))
    more = write(tmp_path / 'more', {'enc.8x8_block7.conv0.weight': np.ones(3, np.float32)})
    with pytest.raises(UserError, match=r"no use for: 'enc\.8x8_block7\.conv0\.weight'\. Is it"):
        pretrained.check(more, shapes)
    wrong = write(tmp_path / 'wrong', {'map_layer0.weight': np.ones((3, 16), np.float32)})
    with pytest.raises(
        UserError, match=r"'map_layer0\.weight' has shape \[3, 16\], which does not"
    ):
        pretrained.check(wrong, shapes)
    odd = write(tmp_path / 'odd', described=dict(num_block=1))
    with pytest.raises(UserError, match=r"'num_block' is no argument of EDM's networks\. Did you"):
        pretrained.describe(odd)
