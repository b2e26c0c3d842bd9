"""Degradations of second order: each part against another program, all of it by its laws."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from PIL import Image
from sklearn.datasets import load_sample_image

from kd import resample
from kd.data import degradation
from kd.data.degradation import FIRST, MODES, SIDE, kernel, low_pass, second_order, sinc
from kd.data.transforms.mapped import area_weights

pytestmark = pytest.mark.usefixtures('compiled_quickly')

PLACE = np.arange(SIDE) - SIDE // 2


@pytest.fixture(scope='module')
def picture():
    return load_sample_image('flower.jpg')[100:196, 200:296]


def test_sizes_of_a_canvas_are_those_of_other_programs(picture):
    """64 x 48 pixels in a corner of 96 x 96."""
    x = np.where((np.arange(96) < 64)[:, None, None] & (np.arange(96) < 48)[:, None], picture, 0)
    x = x.astype(np.float32) / 255
    call = jax.jit(degradation.resized)

    def found(new, mode):
        return call(x, jnp.array([64, 48]), jnp.array(new), MODES.index(mode))

    small = x[:64, :48].astype(np.float64)
    for new in ((40, 70), (90, 13)):
        out = found(new, 'bicubic')
        assert not np.asarray(out[new[0] :]).any()
        assert not np.asarray(out[:, new[1] :]).any()
        expected = resample.resize(small, new, 'torch')
        np.testing.assert_allclose(out[: new[0], : new[1]], expected, atol=2e-6)
    by = [area_weights(64, 32), area_weights(48, 16)]
    expected = np.einsum('yh,hwc,xw->yxc', by[0], small, by[1])
    np.testing.assert_allclose(found((32, 16), 'area')[:32, :16], expected, atol=1e-6)
    # Twice as many by a tent: three quarters of one and a quarter of the next.
    twice = np.asarray(found((64, 96), 'bilinear'))[:64]
    np.testing.assert_allclose(
        twice[:, 1:94:2], 0.75 * small[:, :-1] + 0.25 * small[:, 1:], atol=1e-6
    )


def test_kernels_have_sum_one_and_the_shapes_of_their_kinds():
    keys = jax.random.split(jax.random.key(0), 400)
    found = np.asarray(jax.jit(jax.vmap(lambda key: kernel(key, FIRST)))(keys), np.float64)
    np.testing.assert_allclose(found.sum((1, 2)), 1, atol=1e-5)
    np.testing.assert_allclose(found, found[:, ::-1, ::-1], atol=1e-6)
    sides = [int((k.any(1)).sum()) for k in found]
    assert set(sides) <= set(range(1, 22, 2))
    assert max(sides) == 21
    sinc_like = (found < -1e-4).any((1, 2)).mean()
    assert 0.05 < sinc_like < 0.16
    # Those of all directions alike, .69 of the rest, are their own transposes.
    round_ones = np.abs(found - found.swapaxes(1, 2)).max((1, 2)) < 1e-6
    assert round_ones.mean() == pytest.approx(0.1 + 0.9 * 0.69, abs=0.07)
    spread = np.sqrt((found * PLACE[:, None] ** 2).sum((1, 2)).clip(0))
    assert 2.0 < np.percentile(spread[~(found < 0).any((1, 2))], 90) < 4.5


def test_the_sinc_filter_passes_what_is_below_its_cut(picture):
    cut = 1.2
    r = np.hypot(*np.meshgrid(PLACE, PLACE))
    away = np.where(r > 0, r, 1)
    expected = np.where(
        r > 0, cut * scipy.special.j1(cut * r) / (2 * np.pi * away), cut**2 / 4 / np.pi
    )
    np.testing.assert_allclose(low_pass(jnp.float32(cut)), expected, atol=2e-6)
    drawn = np.asarray(sinc(jax.random.key(3)))
    assert drawn.sum() == pytest.approx(1, abs=1e-5)
    # A constant stays what it is to its edges, and a pulse becomes the kernel.
    flat, size = jnp.full((48, 48, 3), 0.3), jnp.array([40, 30])
    out = degradation.blurred(flat, size, drawn)
    np.testing.assert_allclose(out[:40, :30], 0.3, atol=1e-5)
    pulse = jnp.zeros((48, 48, 3)).at[20, 15].set(1.0)
    out = degradation.blurred(pulse, size, drawn)
    np.testing.assert_allclose(out[10:31, 5:26, 0], drawn, atol=1e-5)


def test_filters_of_the_last_compression_begin_at_a_third_of_a_turn(monkeypatch):
    """Where others of large sides begin at pi / 5: what they leave of .85 radians a pixel."""
    keys, wave = jax.random.split(jax.random.key(0), 600), np.cos(0.85 * PLACE)[:, None]
    call = jax.jit(jax.vmap(sinc, (0, None)))
    for least, bounds in ((np.pi / 5, (-0.2, 0.3)), (np.pi / 3, (0.45, 0.85))):
        found = np.asarray(call(keys, least))
        assert bounds[0] < (found * wave).sum((1, 2)).min() < bounds[1]
    asked = []

    def recorded(key, least=np.pi / 5):
        asked.append(least)
        return sinc(key, least)

    monkeypatch.setattr(degradation, 'sinc', recorded)
    picture = jax.ShapeDtypeStruct((32, 32, 3), jnp.float32)
    jax.eval_shape(second_order, jax.random.key(0), picture)
    assert asked == [np.pi / 5, np.pi / 5, np.pi / 3]


def test_jpeg_is_that_of_pillow(picture):
    x = picture.astype(np.float32) / 255
    for quality in (30, 75, 95):
        stream = io.BytesIO()
        Image.fromarray(picture).save(stream, 'JPEG', quality=quality, subsampling=2)
        theirs = np.asarray(Image.open(stream), np.float64)
        ours = np.asarray(jax.jit(degradation.jpeg)(x, jnp.array([96, 96]), float(quality))) * 255
        # Decoders round, and smooth colours between pixels.
        assert np.square((ours - theirs) @ [0.299, 0.587, 0.114]).mean() < 1.3
        lost, own = (np.square(x - picture).mean() for x in (theirs, ours))
        assert lost < own < 1.3 * lost


def test_noise_has_its_deviation_and_may_be_grey():
    x, keys = jnp.full((16, 16, 3), 0.5), jax.random.split(jax.random.key(1), 300)
    order = FIRST._replace(noise=(20.0, 20.0), poisson=(1.0, 1.0))
    out = np.asarray(jax.jit(jax.vmap(lambda key: degradation.noisy(key, x, order)))(keys)) - 0.5
    deviation = out.std((1, 2, 3))
    gaussian = np.abs(deviation - 20 / 255) < np.abs(deviation - (0.5 / 256) ** 0.5)
    assert gaussian.mean() == pytest.approx(0.5, abs=0.1)
    assert deviation[gaussian].mean() == pytest.approx(20 / 255, rel=0.03)
    assert deviation[~gaussian].mean() == pytest.approx((0.5 / 256) ** 0.5, rel=0.03)
    grey = np.abs(out - out[..., :1]).max((1, 2, 3)) < 1e-6
    assert grey.mean() == pytest.approx(0.4, abs=0.1)


def test_a_picture_is_degraded_by_its_own_key_whatever_is_beside_it(picture):
    x = np.stack([picture[:64, :64], picture[32:, 32:]] * 2) / np.float32(127.5) - 1
    keys = jax.random.split(jax.random.key(0), 4)
    call = jax.jit(jax.vmap(second_order))
    out = np.asarray(call(keys, x))
    assert out.shape == (4, 16, 16, 3)
    levels = (out + 1) * 127.5
    np.testing.assert_allclose(levels, np.rint(levels), atol=1e-3)
    assert np.abs(out).max() <= 1
    order = np.array([2, 0, 3, 1])
    np.testing.assert_allclose(call(keys[order], x[order]), out[order], atol=1e-5)
    # Twice the same picture, by two keys, is not the same, but the same picture.
    assert np.abs(out[0] - out[2]).mean() > 0.01
    small = resample.resize(x.astype(np.float64), (16, 16), 'torch_antialias')
    away = np.abs(out - small).mean((1, 2, 3))
    others = np.abs(out - small[[1, 0, 3, 2]]).mean((1, 2, 3))
    assert (away < others).all()
