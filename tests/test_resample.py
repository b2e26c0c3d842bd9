"""Four conventions of resampling, each against its own definition or its own program."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kd.resample import box, cubic, matrix, repeat, resize

SIZES = [(18, 26), (37, 26), (12, 17), (9, 53), (74, 106), (41, 150), (37, 53), (1, 1)]


def random_picture(height=37, width=53, seed=0):
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 256, (height, width, 3), np.uint8)
    # Edges of full contrast, where kernels overshoot.
    picture[5:15, 7:30] = rng.choice([0, 255], (10, 23, 3))
    return picture


def keys(x, a):
    x = abs(x)
    if x < 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0.0


def imresize_axis(line, new):
    """MATLAB's imresize of a line of numbers, as its documentation and `contributions` have it."""
    old, scale = len(line), new / len(line)
    shrink = min(scale, 1.0)
    taps = math.ceil(4 / shrink) + 2
    mirrored = [*range(1, old + 1), *range(old, 0, -1)]
    found = []
    for x in range(1, new + 1):
        u = x / scale + 0.5 * (1 - 1 / scale)
        left = math.floor(u - 2 / shrink)
        places = [left + k for k in range(taps)]
        weights = [shrink * keys(shrink * (u - p), -0.5) for p in places]
        pairs = zip(weights, places, strict=True)
        value = sum(w * line[mirrored[(p - 1) % (2 * old)] - 1] for w, p in pairs)
        found.append(value / sum(weights))
    return found


def imresize(picture, size, axes):
    """Of uint8, axis after axis, each rounded as MATLAB rounds."""
    x = picture.astype(float)
    for axis in axes:
        new = np.apply_along_axis(imresize_axis, axis, x, size[axis])
        x = np.clip(np.floor(new + 0.5), 0, 255)
    return x.astype(np.uint8)


def test_the_kernel_is_that_of_keys():
    x = np.linspace(-2.5, 2.5, 101)
    for a in (-0.5, -0.75):
        np.testing.assert_allclose(cubic(x, a), [keys(p, a) for p in x], atol=1e-14)


@pytest.mark.parametrize('size', SIZES)
def test_pillow_is_met_in_every_pixel(size):
    picture = random_picture()
    expected = Image.fromarray(picture).resize(size[::-1], Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(resize(picture, size, 'pillow'), np.asarray(expected))


@pytest.mark.parametrize('size', [(18, 26), (12, 17), (37, 26), (9, 53), (20, 60)])
def test_matlab_is_met_in_every_pixel(size):
    picture = random_picture()
    ratios = [new / old for new, old in zip(size, picture.shape, strict=False)]
    axes = (0, 1) if ratios[0] <= ratios[1] else (1, 0)
    np.testing.assert_array_equal(resize(picture, size, 'matlab'), imresize(picture, size, axes))


def test_the_order_of_the_axes_and_the_rounding_between_them_matter():
    picture = random_picture(40, 56)
    rows_first = resize(picture, (20, 28), 'matlab')
    other = resize(picture.swapaxes(0, 1), (28, 20), 'matlab').swapaxes(0, 1)
    assert 0.05 < (rows_first != other).mean() < 0.4
    at_once = resize(picture.astype(float), (20, 28), 'matlab')
    at_once = np.clip(np.floor(at_once + 0.5), 0, 255)
    assert 0.05 < (rows_first != at_once).mean() < 0.4


def test_matlab_of_floats_is_its_definition_to_rounding():
    picture = np.random.default_rng(1).standard_normal((23, 31, 2))
    expected = picture
    for axis, new in enumerate((46, 20)):
        expected = np.apply_along_axis(imresize_axis, axis, expected, new)
    np.testing.assert_allclose(resize(picture, (46, 20), 'matlab'), expected, atol=1e-12)


def test_torch_without_antialiasing_is_its_definition_to_rounding():
    picture = np.random.default_rng(2).standard_normal((11, 14, 1))

    def axis_of(line, new):
        ratio, found = len(line) / new, []
        for i in range(new):
            u = (i + 0.5) * ratio - 0.5
            near = math.floor(u)
            places = [min(max(near + k, 0), len(line) - 1) for k in (-1, 0, 1, 2)]
            weights = [keys(u - near - k, -0.75) for k in (-1, 0, 1, 2)]
            found.append(sum(w * line[p] for w, p in zip(weights, places, strict=True)))
        return found

    for size in ((22, 28), (5, 9), (11, 30)):
        expected = picture
        for axis, new in enumerate(size):
            expected = np.apply_along_axis(axis_of, axis, expected, new)
        np.testing.assert_allclose(resize(picture, size, 'torch'), expected, atol=1e-12)


def test_torch_with_antialiasing_is_its_definition_and_that_of_jax():
    picture = np.random.default_rng(3).standard_normal((2, 37, 53, 3))

    def axis_of(line, new):
        """aten's _compute_indices_weights_aa."""
        old, ratio = len(line), len(line) / new
        support, inverse = (2 * ratio, 1 / ratio) if ratio >= 1 else (2.0, 1.0)
        found = []
        for i in range(new):
            centre = ratio * (i + 0.5)
            first = max(int(centre - support + 0.5), 0)
            places = range(first, min(int(centre + support + 0.5), old))
            weights = [keys((p - centre + 0.5) * inverse, -0.5) for p in places]
            value = sum(w * line[p] for w, p in zip(weights, places, strict=True))
            found.append(value / sum(weights))
        return found

    for size in ((18, 26), (60, 53)):
        expected = picture
        for axis, new in zip((1, 2), size, strict=True):
            expected = np.apply_along_axis(axis_of, axis, expected, new)
        found = resize(picture, size, 'torch_antialias')
        np.testing.assert_allclose(found, expected, atol=1e-12)
        jaxs = jax.image.resize(jnp.asarray(picture, jnp.float32), found.shape, 'cubic')
        np.testing.assert_allclose(found, jaxs, atol=1e-4)


def test_on_the_device_it_is_the_same_map():
    picture = np.random.default_rng(4).standard_normal((2, 20, 14, 3)).astype(np.float32)
    for convention in ('matlab', 'torch', 'torch_antialias'):
        found = jax.jit(lambda x, c=convention: resize(x, (10, 28), c))(jnp.asarray(picture))
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, resize(picture, (10, 28), convention), atol=2e-6)


def test_constants_stay_and_boxes_are_undone():
    for options in (dict(border='mirror'), dict(border='drop'), dict(a=-0.75, border='clamp')):
        for new in (3, 7, 12, 25):
            np.testing.assert_allclose(matrix(12, new, **options).sum(1), 1.0, atol=1e-14)
    x = np.random.default_rng(5).standard_normal((2, 4, 6, 3))
    np.testing.assert_allclose(box(repeat(x, 3), 3), x, atol=1e-14)
    np.testing.assert_allclose(box(x, 2)[0, 0, 1], x[0, :2, 2:4].mean((0, 1)), atol=1e-14)


def test_what_a_convention_does_not_have_is_refused():
    picture = random_picture()
    with pytest.raises(ValueError, match="convention='bicubic' must be one of 'matlab', 'pillow'"):
        resize(picture, (4, 4), 'bicubic')
    with pytest.raises(ValueError, match="'torch' takes floats, got uint8"):
        resize(picture, (4, 4), 'torch')
    with pytest.raises(ValueError, match="'pillow' takes uint8, got float64"):
        resize(picture / 255, (4, 4), 'pillow')
    with pytest.raises(ValueError, match='side of at least 1 pixel, got 37 and 0'):
        resize(picture, (0, 4), 'matlab')
    with pytest.raises(ValueError, match='9 x 4 pixels are no multiple of 2'):
        box(np.zeros((9, 4, 1)), 2)
