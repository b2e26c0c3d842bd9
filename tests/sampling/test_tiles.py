"""Pictures by parts: what is put together is what the whole would be."""

import numpy as np
import pytest
from scipy import ndimage

from kd.sampling.tiles import adaptive_crop, count, tiled


def random(height, width, channels=2):
    rng = np.random.default_rng(height * width)
    return rng.standard_normal((1, height, width, channels)).astype(np.float32)


def blurred(x):
    """Looks 3 pixels far, zeros beyond."""
    x = np.asarray(x)
    for axis in (1, 2):
        x = ndimage.uniform_filter1d(x, 7, axis=axis, mode='constant')
    return x


def test_nothing_is_lost_or_doubled_for_sides_of_all_kinds():
    for height, width in zip(range(65, 81), range(80, 64, -1), strict=True):
        x = random(height, width, 1)
        # Not traced: a program for each size would take its time.
        np.testing.assert_array_equal(adaptive_crop(lambda part: part, x), x)


def test_parts_have_sides_of_the_multiple_and_are_one_batch():
    seen = []

    def fn(parts):
        seen.append(parts.shape)
        return parts

    adaptive_crop(fn, random(203, 157))
    # 203 // 2 + 32 = 133, 157 // 2 + 32 = 110.
    assert seen == [(4, 132, 108, 2)]


def test_a_local_function_sees_no_seam():
    x = random(90, 77)
    found = adaptive_crop(blurred, x, shave=8)
    np.testing.assert_allclose(found, blurred(x), atol=1e-6)


def test_what_adaptive_crop_cannot_cut_is_refused():
    with pytest.raises(ValueError, match='50 x 80 pixels have no parts of 56 x 72'):
        adaptive_crop(lambda x: x, random(50, 80))
    with pytest.raises(ValueError, match='adaptive_crop takes one picture, got 2'):
        adaptive_crop(lambda x: x, np.zeros((2, 80, 80, 3)))


@pytest.mark.parametrize('size', [(20, 20), (40, 40), (41, 93), (17, 150), (40, 41)])
def test_tiles_are_of_one_size_and_a_local_function_sees_none_of_them(size):
    x, shapes, told = random(*size), set(), []

    def fn(part):
        shapes.add(part.shape)
        return blurred(part).repeat(2, 1).repeat(2, 2)

    found = tiled(fn, x, scale=2, tile=40, overlap=8, said=told.append)
    np.testing.assert_allclose(found, blurred(x).repeat(2, 1).repeat(2, 2), atol=1e-6)
    assert shapes == {(1, min(size[0], 40), min(size[1], 40), 2)}
    assert told == list(range(1, count(size, 40, 8) + 1))


def test_neighbours_share_what_was_asked_for():
    with pytest.raises(ValueError, match='tile=32 must be larger than overlap=32'):
        tiled(lambda x: x, random(50, 50), scale=1, tile=32)
    seen, line = [], np.arange(100.0, dtype=np.float32)[None, :, None, None]
    tiled(lambda x: seen.append(x[0, 0, 0, 0]) or x, line, scale=1, tile=20, overlap=6)
    steps = np.diff(seen)
    assert max(steps) <= 14
    assert [seen[0], seen[-1]] == [0, 80]
