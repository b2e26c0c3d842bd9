"""Scores of restored pictures, against computations of their own."""

import math

import numpy as np
import pytest
from scipy import ndimage

from kd import resample
from kd.errors import UserError
from kd.evaluators import restoration
from kd.evaluators.restoration import Score, luma, psnr, score, ssim


def pair(height=40, width=52, noise=0.05, seed=0):
    rng = np.random.default_rng(seed)
    picture = ndimage.gaussian_filter(rng.uniform(-1, 1, (height, width, 3)), (2, 2, 0))
    picture = np.clip(4 * picture, -1, 1)
    return np.clip(picture + noise * rng.standard_normal(picture.shape), -1, 1), picture


def y_of(picture):
    r, g, b = np.moveaxis((picture + 1) / 2, -1, 0)
    return 16 + 65.481 * r + 128.553 * g + 24.966 * b


def test_psnr_is_a_ratio_of_powers_and_one_level_everywhere_is_48_dB():
    a = np.zeros((2, 5, 4, 1))
    b = a + [[[[1.0]]], [[[5.0]]]]
    np.testing.assert_allclose(psnr(a, b), [48.13080361, 48.13080361 - 20 * math.log10(5)])
    np.testing.assert_allclose(psnr(a, b, peak=1.0)[0], 0.0)
    assert psnr(a, a)[0] == math.inf


def test_luma_of_black_white_grey_and_of_each_colour():
    colours = np.array([[0, 0, 0], [255, 255, 255], [128, 128, 128], [255, 0, 0], [0, 255, 0]])
    expected = [16, 235, 16 + 219 * 128 / 255, 81.481, 144.553]
    np.testing.assert_allclose(luma(colours)[:, 0], expected, atol=1e-12)
    np.testing.assert_array_equal(luma(colours, rounded=True)[:, 0], [16, 235, 126, 81, 145])


def test_ssim_is_that_of_filtered_moments_where_the_window_lies_inside():
    a, b = (127.5 * (x + 1) for x in pair())

    def blurred(x):
        # Of deviation 1.5, cut off after 5 pixels.
        return ndimage.gaussian_filter(x, 1.5, axes=(0, 1), truncate=10 / 3)[5:-5, 5:-5]

    m, n = blurred(a), blurred(b)
    aa, bb, ab = blurred(a * a) - m * m, blurred(b * b) - n * n, blurred(a * b) - m * n
    above = (2 * m * n + 2.55**2) * (2 * ab + 7.65**2)
    expected = (above / ((m * m + n * n + 2.55**2) * (aa + bb + 7.65**2))).mean()
    assert ssim(a, b) == pytest.approx(expected, abs=1e-9)
    assert 0.5 < expected < 0.97
    assert ssim(a, a) == pytest.approx(1.0, abs=1e-12)
    with pytest.raises(ValueError, match='SSIM needs 11 pixels at least'):
        ssim(a[:10], b[:10])


def test_protocols_differ_in_what_they_round():
    a, b = pair(noise=0.02)
    inside = (slice(2, -2), slice(2, -2))

    def of(x, y):
        return 10 * math.log10(255**2 / np.square((x - y)[inside]).mean())

    quantised = [y_of(np.rint((x + 1) * 127.5) / 127.5 - 1) for x in (a, b)]
    found = {name: score(a, b, scale=2, protocol=name).psnr for name in restoration.PROTOCOLS}
    assert found['float'] == pytest.approx(of(y_of(a), y_of(b)), abs=1e-9)
    assert found['matlab'] == pytest.approx(of(*quantised), abs=1e-9)
    assert found['imdn_script'] == pytest.approx(of(*map(np.rint, quantised)), abs=1e-9)
    assert found['imdn_script'] < found['matlab'] < found['float']


def test_the_border_is_not_seen():
    _, b = pair()
    a = b.copy()
    a[:3], a[-3:], a[:, :3], a[:, -3:] = 1.0, -1.0, 0.5, -0.5
    assert score(a, b, scale=3, protocol='matlab') == Score(math.inf, pytest.approx(1.0))
    assert score(a, b, scale=2, protocol='matlab').psnr < 40


def test_a_folder_has_the_mean_of_its_pictures_decibels():
    pictures = {
        name: restoration.to_bytes(pair(39, 53, noise, seed)[0])
        for name, noise, seed in (('smooth', 0.0, 1), ('rough', 0.2, 2))
    }
    options = dict(scale=2, protocol='matlab')
    found = restoration.pictures_scored(restoration.bicubic(2), pictures, **options)
    for name, picture in pictures.items():
        cut = picture[:38, :52]
        low = resample.resize(cut, (19, 26), 'matlab')
        high = resample.resize(low, (38, 52), 'matlab')
        y = [y_of(x / 127.5 - 1)[2:-2, 2:-2] for x in (high, cut)]
        expected = 10 * math.log10(255**2 / np.square(y[0] - y[1]).mean())
        assert found[name].psnr == pytest.approx(expected, abs=1e-4)
    mean = restoration.mean_score(found.values())
    assert mean.psnr == pytest.approx((found['smooth'].psnr + found['rough'].psnr) / 2)
    assert found['smooth'].psnr > found['rough'].psnr + 3


def test_what_cannot_be_scored_is_refused():
    a, b = pair()
    with pytest.raises(UserError, match=r"There is no protocol 'matlap', only .* mean 'matlab'"):
        score(a, b, scale=2, protocol='matlap')
    with pytest.raises(UserError, match=r'has \(39, 52\) pixels, its original \(40, 52\)'):
        score(a[:-1], b, scale=2, protocol='matlab')
    with pytest.raises(UserError, match='12 x 52 pixels is too small to be scored at scale 2'):
        score(a[:12], b[:12], scale=2, protocol='matlab')
