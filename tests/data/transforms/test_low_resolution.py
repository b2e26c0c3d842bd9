"""What is left of images at a lower resolution, at their own size."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.data.context import SourceContext
from kd.data.transforms.low_resolution import low_resolution
from kd.errors import UserError

CROPS = dict(name='kd.data.patches.crops', of='china_flower', size=8, channels='grey', count=600)


def source(**options):
    return low_resolution(SourceContext('train'), **dict(of=CROPS) | options)


def test_means_of_squares_are_a_projection_and_what_they_leave_has_none():
    batch = source(down='box', up='repeat').fetch(np.arange(600))
    images, low = batch['input'], batch['low']
    assert low.shape == images.shape == (600, 8, 8, 1)
    means = images.reshape(600, 2, 4, 2, 4).mean((2, 4))
    np.testing.assert_allclose(low[:, ::4, ::4, 0], means, atol=1e-6)
    np.testing.assert_array_equal(low[:, 1:4, :4], low[:, :3, :4])
    again = source(down='box', up='repeat').lowered(low)
    np.testing.assert_allclose(again, low, atol=1e-6)
    # So that the error of the low image is the variance within the squares.
    within = images.reshape(600, 2, 4, 2, 4).var((2, 4)).mean()
    np.testing.assert_allclose(np.square(images - low).mean(), within, rtol=1e-4)


def test_scales_are_nested_and_the_last_is_told_apart_from_the_one_before():
    options = dict(down='box', up='repeat')
    one, two = (source(scales=s, **options).fetch(np.arange(20)) for s in ((2,), (2, 4)))
    np.testing.assert_array_equal(two['easier'], one['low'])
    np.testing.assert_allclose(
        two['low'], source(scales=(4,), **options).fetch(np.arange(20))['low'], atol=1e-6
    )
    # Where the order matters: 4 is made of 2.
    bicubic = source(scales=(2, 4)).fetch(np.arange(20))
    small = jax.image.resize(bicubic['input'], (20, 4, 4, 1), 'cubic')
    smaller = jax.image.resize(small, (20, 2, 2, 1), 'cubic')
    for name, x in (('easier', small), ('low', smaller)):
        expected = jax.image.resize(x, (20, 8, 8, 1), 'cubic')
        np.testing.assert_allclose(bicubic[name], expected, atol=2e-5)
    direct = jax.image.resize(bicubic['input'], (20, 2, 2, 1), 'cubic')
    assert float(jnp.abs(direct - smaller).max()) > 0.004


def test_noise_is_of_the_small_image_and_of_each_example():
    clean = source(down='box', up='repeat').fetch(np.arange(600))['low']
    noisy = source(down='box', up='repeat', noise=0.1).fetch(np.arange(600))['low']
    away = (noisy - clean)[..., 0]
    np.testing.assert_allclose(away[:, 1:4, 1:4], np.repeat(away[:, :1, :1], 3, 1).repeat(3, 2),
                               atol=1e-6)  # fmt: skip
    assert away[:, ::4, ::4].std() == pytest.approx(0.1, rel=0.05)
    again = source(down='box', up='repeat', noise=0.1).fetch([9, 4])['low']
    np.testing.assert_array_equal(again, noisy[[9, 4]])


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match=r'scales=\(3,\): images of 8 x 8 pixels need'):
        source(scales=(3,))
    with pytest.raises(UserError, match=r'scales=\(\): images'):
        source(scales=())
    # What is left of a noisy small image is another thing than a smaller noisy one.
    with pytest.raises(UserError, match=r'noise=0\.1 is of one scale: of \(2, 4\) the smaller'):
        source(scales=(2, 4), noise=0.1)
    pairs = dict(name='kd.data.patches.patches', of='china_flower', scale=2, size=8, count=2)
    with pytest.raises(UserError, match=r"must have images, an 'input' .*\{'low': \(8, 8, 3\)"):
        source(of=pairs)
    for scales in ((2, 2), (4, 2), (1, 2)):
        with pytest.raises(UserError, match='must each be so many times the one before, above 1'):
            source(scales=scales)
