"""The UNet of ResShift and the heads that are told the time, against independent forward passes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from kd.models.discriminator import TimeAwareHead, TimeAwareHeads
from kd.models.latent_parts import timestep_features
from kd.models.swin_unet import SwinUNet, WindowBlock, relative_places
from kd.network import from_linen, parameter_count

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, width=8, head_size=4, window=4, extracted=4)


def numbers(shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def filled(module, *inputs, **options):
    """Variables none of which is a neutral element."""
    abstract = jax.eval_shape(lambda k: module.init(k, *inputs, **options), jax.random.key(0))
    leaves, structure = jax.tree.flatten(abstract)
    made = [0.3 * numbers(x.shape, i) + (x.ndim == 1) * 0.5 for i, x in enumerate(leaves)]
    return jax.tree.unflatten(structure, made)


def shapes(side, channels, low):
    f32 = jnp.float32
    return (
        jax.ShapeDtypeStruct((1,), f32),
        jax.ShapeDtypeStruct((1, side, side, channels), f32),
        jax.ShapeDtypeStruct((1, low, low, 3), f32),
    )


def count(module, *sizes):
    net = from_linen(module, *shapes(*sizes))
    return parameter_count(jax.eval_shape(net.init, jax.random.key(0)))


def test_it_has_the_published_number_of_parameters():
    assert count(SwinUNet(), 64, 3, 64) == 118_593_583


def test_low_pictures_of_four_times_the_side_pass_convolutions_first():
    module = SwinUNet(**SMALL | dict(multipliers=(1,)))
    convs = ((3, 4), (4, 8), (8, 8), (8, 16))
    # The last has 16 channels beside those of x, where a low picture of its side has 3.
    more = sum(9 * a * b + b for a, b in convs) + 9 * (16 - 3) * 8
    assert count(module, 4, 3, 16) - count(module, 4, 3, 4) == more


def group_norm(x, scale, bias, groups):
    rows = x.reshape(len(x), -1, groups, x.shape[-1] // groups)
    mean, var = rows.mean((1, 3), keepdims=True), rows.var((1, 3), keepdims=True)
    return ((rows - mean) / np.sqrt(var + 1e-5)).reshape(x.shape) * scale + bias


def gelu(x):
    return 0.5 * x * (1 + scipy.special.erf(x / np.sqrt(2)))


def attended(y, params, heads, side, shift):
    """Pixel by pixel: it sees those of its own window of the moved map that were near it before."""
    _, height, width, size = y.shape
    q, k, v = np.split(y @ params['qkv']['kernel'] + params['qkv']['bias'], 3, -1)
    each, places, out = size // heads, relative_places(side), np.zeros_like(y)
    pixels = [(i, j) for i in range(height) for j in range(width)]
    for i, j in pixels:
        a, b = (i - shift) % height, (j - shift) % width
        seen, bias = [], []
        for m, n in pixels:
            c, d = (m - shift) % height, (n - shift) % width
            same = (a // side, b // side) == (c // side, d // side)
            # Neighbours in the moved map that came from opposite edges are none.
            if same and (abs(i - m), abs(j - n)) == (abs(a - c), abs(b - d)):
                seen.append((m, n))
                offset = places[a % side * side + b % side, c % side * side + d % side]
                bias.append(params['places'][offset])
        at = tuple(np.array(seen).T)
        for h in range(heads):
            own = slice(h * each, (h + 1) * each)
            logits = np.einsum('bd,bmd->bm', q[:, i, j, own], k[:, *at, own]) / np.sqrt(each)
            maps = scipy.special.softmax(logits + np.array(bias)[:, h], axis=-1)
            out[:, i, j, own] = np.einsum('bm,bmd->bd', maps, v[:, *at, own])
    return out @ params['proj']['kernel'] + params['proj']['bias']


@pytest.mark.parametrize(('side', 'shift'), [(8, 2), (4, 2)])
def test_windows_attend_as_pixels_that_are_near_do(side, shift):
    """A map of one window is not moved."""
    module, x = WindowBlock(2, 4, shift, 2.0, jnp.float32), numbers((2, side, side, 8), 1)
    params = filled(module, x)['params']
    found = jax.jit(module.apply)({'params': params}, x)
    y = x.astype(np.float64)
    normed = group_norm(y, params['norm1']['scale'], params['norm1']['bias'], 2)
    y = y + attended(normed, params, 2, 4, shift if side > 4 else 0)
    hidden = group_norm(y, params['norm2']['scale'], params['norm2']['bias'], 2)
    hidden = gelu(hidden @ params['mlp_0']['kernel'] + params['mlp_0']['bias'])
    y = y + hidden @ params['mlp_2']['kernel'] + params['mlp_2']['bias']
    np.testing.assert_allclose(found, y, atol=2e-4)


def test_offsets_have_one_number_each():
    places = relative_places(3)
    assert places.shape == (9, 9)
    assert (np.sort(np.unique(places)) == np.arange(25)).all()
    assert (np.diagonal(places) == 12).all()
    # From one pixel to its right neighbour, wherever.
    assert len({places[0, 1], places[1, 2], places[3, 4], places[7, 8]}) == 1


def test_its_features_are_the_ends_of_levels_and_sides_that_do_not_fit_are_refused():
    module = SwinUNet(**SMALL)
    net = from_linen(module, *shapes(8, 3, 16))
    t, x, low = jnp.array([3.0, 14.0]), numbers((2, 8, 8, 3)), numbers((2, 16, 16, 3), 1)
    variables = net.init(jax.random.key(0))
    names = ('level0', 'level1', 'middle')
    out = jax.jit(lambda v: net.apply(v, t, x, low, capture=names))(variables)
    sizes = [out.features[name].shape for name in names]
    assert sizes == [(2, 8, 8, 8), (2, 4, 4, 16), (2, 4, 4, 16)]
    assert out.logits.shape == x.shape
    for sides, words in (((6, 6), 'windows of 4 pixels'), ((8, 12), 'a low picture of 1, 2, 4')):
        with pytest.raises(ValueError, match=words):
            jax.eval_shape(
                module.init, jax.random.key(0), t, x[:, : sides[0], : sides[0]],
                jnp.zeros((2, sides[1], sides[1], 3)),
            )  # fmt: skip


def test_heads_are_what_their_equations_say_with_spectral_norms_of_one():
    f, t = numbers((2, 3, 3, 16), 3), jnp.array([2.0, 9.0])
    waves = np.asarray(jax.nn.silu(timestep_features(t, 8)))
    module = TimeAwareHead(5, jnp.float32)
    variables = filled(module, f, waves, False)
    call = jax.jit(lambda v: module.apply(v, f, waves, True, mutable=['batch_stats']))
    for _ in range(60):
        found, moved = call(variables)
        variables = {**variables, **moved}
    p = {k: jax.tree.map(np.float64, v) for k, v in variables['params'].items()}
    told = waves @ p['time']['kernel'] + p['time']['bias']
    scale, shift = (part[:, None, None] for part in np.split(told, 2, -1))
    h = group_norm(f.astype(np.float64), p['norm']['scale'], p['norm']['bias'], 4)
    h = h * (1 + scale) + shift
    h = h * scipy.special.expit(h)
    padded = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
    mixed = p['mix']['bias'] + sum(
        padded[:, i : i + 3, j : j + 3] @ p['mix']['kernel'][i, j]
        for i in range(3)
        for j in range(3)
    )
    h = mixed.reshape(2, 9, 16)

    def block(x, name):
        own = p[name]
        kernel = own['kernel'] / np.linalg.norm(own['kernel'].reshape(-1, 16), 2)
        taps = kernel if kernel.ndim == 3 else kernel[None]
        middle = len(taps) // 2
        y = sum(np.roll(x, middle - i, 1) @ tap for i, tap in enumerate(taps)) + own['bias']
        y = group_norm(y, p[f'{name}_norm']['scale'], p[f'{name}_norm']['bias'], 4)
        return np.where(y > 0, y, 0.2 * y)

    h = block(h, 'first')
    h = (h + block(h, 'second')) / np.sqrt(2)
    last = p['logits']['kernel'] / np.linalg.norm(p['logits']['kernel'], 2)
    expected = (h @ last + p['logits']['bias']).reshape(2, -1)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_heads_of_all_features_stand_side_by_side_and_are_told_the_time():
    features = [numbers((2, 2, 2, 8), 1), numbers((2, 12), 2)]
    module = TimeAwareHeads(logits=3, waves=8)
    variables = filled(module, features, jnp.zeros(2))

    def call(time, update):
        t = jnp.full(2, time)
        return module.apply(variables, features, t, update=update, mutable=['batch_stats'])

    (early, still), (late, moved) = jax.jit(lambda: (call(0.0, False), call(9.0, True)))()
    assert early.shape == (2, 4 * 3 + 3)
    assert np.abs(early - late).max() > 1e-2
    jax.tree.map(np.testing.assert_array_equal, still['batch_stats'], variables['batch_stats'])
    assert any((a != b).any() for a, b in zip(*map(jax.tree.leaves, (still, moved)), strict=True))
