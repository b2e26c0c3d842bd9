"""Siamese augmentation: adjoints, invariants and an independent resampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from kd.data.transforms import augment, siamese, warp

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SHAPE = (6, 8, 8, 2)
_compiled = jax.jit(siamese.siamese, static_argnames='shared')
GEOMETRIC = ('crop', 'cutout', 'flip', 'scale', 'rotate')


def transformed(key, images, family, shared=False):
    return _compiled(key, images, shared=shared, family=siamese.FAMILIES.index(family))


@jax.jit
def pulled_back(key, images, family, cotangent):
    return jax.vjp(lambda x: siamese.siamese(key, x, family=family), images)[1](cotangent)[0]


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.mark.parametrize('family', GEOMETRIC)
def test_geometric_families_are_linear_with_the_vjp_as_adjoint(key, images, family):
    other = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)

    moved = transformed(key, images, family)
    adjoint = pulled_back(key, images, siamese.FAMILIES.index(family), other)
    np.testing.assert_allclose(jnp.vdot(moved, other), jnp.vdot(images, adjoint), rtol=1e-5)
    combined = transformed(key, 2.0 * images - 3.0 * other, family)
    expected = 2.0 * moved - 3.0 * transformed(key, other, family)
    np.testing.assert_allclose(combined, expected, atol=2e-5)


def test_flip_twice_is_the_identity(key, images):
    once = transformed(key, images, 'flip')
    assert not np.array_equal(once, images)
    np.testing.assert_array_equal(transformed(key, once, 'flip'), images)


def test_pixels_removed_by_cutout_have_no_gradient(key, images):
    cut = np.asarray(transformed(key, images, 'cutout'))
    ones = np.ones(SHAPE, np.float32)
    gradient = np.asarray(pulled_back(key, images, siamese.FAMILIES.index('cutout'), ones))
    np.testing.assert_array_equal(gradient, np.where(cut == 0.0, 0.0, 1.0))
    areas = (cut == 0.0).all(-1).sum((1, 2))
    assert areas.max() <= 16  # a square of round(0.5 * 8) pixels a side, clipped
    assert areas.min() >= 4


def test_crop_translates_by_at_most_an_eighth_and_fills_with_zero(key, images):
    moved = np.asarray(transformed(key, images, 'crop'))
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for image, source in zip(moved, padded, strict=True):
        windows = [source[r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
        assert sum(np.array_equal(image, window) for window in windows) == 1


def test_resampling_agrees_with_scipy_away_from_the_border(images):
    matrix = np.asarray([[1.1, 0.2], [-0.15, 0.9]], np.float32)
    resampled = jax.jit(warp.affine)(images, matrix[None])
    centre = np.asarray([3.5, 3.5])
    offset = centre - matrix @ centre
    for index in range(2):
        for channel in range(2):
            # A ring of zeros makes scipy blend to zero across the border as well.
            padded = np.pad(images[index, :, :, channel].astype(np.float64), 4)
            place = offset + 4 - matrix @ [4, 4]
            expected = ndimage.affine_transform(padded, matrix, place, order=1, mode='constant')
            np.testing.assert_allclose(
                resampled[index, :, :, channel], expected[4:-4, 4:-4], atol=1e-5
            )


def test_scale_and_rotation_move_a_ramp_as_their_matrices_say(key):
    # On a linear image bilinear interpolation is exact, so factors can be read off the slopes.
    ramp = np.stack(np.meshgrid(np.arange(9.0), np.arange(9.0), indexing='ij'), -1) - 4.0
    ramps = np.broadcast_to(ramp, (64, 9, 9, 2)).astype(np.float32)

    def jacobian(family):
        moved = np.asarray(transformed(key, ramps, family))
        np.testing.assert_allclose(moved[:, 4, 4], 0.0, atol=1e-6)
        return np.stack([moved[:, 5, 4] - moved[:, 4, 4], moved[:, 4, 5] - moved[:, 4, 4]], -1)

    scales = jacobian('scale')
    np.testing.assert_allclose(scales[:, [0, 1], [1, 0]], 0.0, atol=1e-5)
    factors = scales[:, [0, 1], [0, 1]]
    assert factors.min() >= 1 / 1.2 - 1e-5
    assert factors.max() <= 1.2 + 1e-5
    assert np.ptp(factors) > 0.3
    assert np.abs(factors[:, 0] - factors[:, 1]).max() > 0.1
    rotations = jacobian('rotate')
    np.testing.assert_allclose(np.linalg.det(rotations), 1.0, atol=1e-5)
    angles = np.rad2deg(np.arctan2(rotations[:, 1, 0], rotations[:, 0, 0]))
    assert np.abs(angles).max() <= 15.0 + 1e-3
    assert angles.min() < -10.0
    assert angles.max() > 10.0


def test_colour_does_brightness_then_saturation_then_contrast_in_numpy(key, images):
    parameter_key = jax.random.split(key)[1]
    u = np.asarray(jax.random.uniform(parameter_key, (3, SHAPE[0], 1, 1, 1)), np.float64)
    expected = images.astype(np.float64) + (u[0] - 0.5)
    grey = expected.mean(-1, keepdims=True)
    expected = (expected - grey) * 2 * u[1] + grey
    mean = expected.mean((1, 2, 3), keepdims=True)
    expected = (expected - mean) * (u[2] + 0.5) + mean
    np.testing.assert_allclose(transformed(key, images, 'color'), expected, atol=2e-6)


def test_each_call_uses_one_family_and_all_are_drawn_equally(images):
    families = siamese.FAMILIES
    counts = np.zeros(len(families), int)
    for seed in range(60):
        key = jax.random.key(seed)
        drawn = _compiled(key, images)
        same = [np.array_equal(drawn, transformed(key, images, name)) for name in families]
        assert sum(same) == 1
        counts[same.index(True)] += 1
    assert counts.min() >= 3  # 10 +- 2.9


def test_shared_parameters_treat_two_sets_alike(key, images):
    for family in siamese.FAMILIES:
        # The first image stands at another place in another batch and is treated the same.
        many = transformed(key, images, family, shared=True)
        rolled = transformed(key, np.roll(images, 2, 0), family, shared=True)
        np.testing.assert_allclose(np.roll(many, 2, 0), rolled, atol=1e-6)
        apart = transformed(key, np.repeat(images[:1], 6, 0), family)
        assert not np.allclose(apart[0], apart[1:], atol=1e-6)


def test_config_reaches_families_and_strength(key, images):
    spec = (('siamese', 'rotate', {'strength': {'rotate': 0.0}}),)
    made = augment.augment(key, {'input': jnp.asarray(images)}, spec)['input']
    np.testing.assert_allclose(made, images, atol=1e-6)


def test_bad_families_are_named(key, images):
    with pytest.raises(ValueError, match=r"'crp' of siamese.*Did you mean 'crop'"):
        siamese.siamese(key, images, 'color_crp')
    with pytest.raises(ValueError, match='families is empty'):
        siamese.siamese(key, images, ())
