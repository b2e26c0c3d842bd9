"""Siamese augmentation: adjoints, invariants and an independent resampler."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from kd.data import augment, siamese, warp

SHAPE = (6, 8, 8, 2)
GEOMETRIC = ('crop', 'cutout', 'flip', 'scale', 'rotate')


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)


@pytest.mark.parametrize('family', GEOMETRIC)
def test_geometric_families_are_linear_with_the_vjp_as_adjoint(key, images, family):
    other = np.random.default_rng(1).normal(size=SHAPE).astype(np.float32)

    def apply(x):
        return siamese.siamese(key, x, (family,))

    moved, transpose = jax.vjp(apply, jnp.asarray(images))
    (adjoint,) = transpose(jnp.asarray(other))
    np.testing.assert_allclose(jnp.vdot(moved, other), jnp.vdot(images, adjoint), rtol=1e-5)
    combined = apply(2.0 * images - 3.0 * other)
    np.testing.assert_allclose(combined, 2.0 * moved - 3.0 * apply(other), atol=2e-5)


def test_flip_twice_is_the_identity(key, images):
    once = siamese.siamese(key, images, 'flip')
    assert not np.array_equal(once, images)
    np.testing.assert_array_equal(siamese.siamese(key, once, 'flip'), images)


def test_pixels_removed_by_cutout_have_no_gradient(key, images):
    cut = np.asarray(siamese.siamese(key, images, 'cutout'))
    gradient = jax.grad(lambda x: (siamese.siamese(key, x, 'cutout') ** 2).sum())(images)
    assert (np.asarray(gradient)[cut == 0.0] == 0.0).all()
    areas = (cut == 0.0).all(-1).sum((1, 2))
    assert areas.max() <= 16  # a square of round(0.5 * 8) pixels a side, clipped
    assert areas.min() >= 4


def test_crop_translates_by_at_most_an_eighth_and_fills_with_zero(key, images):
    moved = np.asarray(siamese.siamese(key, images, 'crop'))
    padded = np.pad(images, [(0, 0), (1, 1), (1, 1), (0, 0)])
    for image, source in zip(moved, padded, strict=True):
        windows = [source[r : r + 8, c : c + 8] for r in range(3) for c in range(3)]
        assert sum(np.array_equal(image, window) for window in windows) == 1


def test_resampling_agrees_with_scipy_away_from_the_border(images):
    matrix = np.asarray([[1.1, 0.2], [-0.15, 0.9]], np.float32)
    resampled = warp.affine(jnp.asarray(images), jnp.asarray(matrix)[None])
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
        moved = np.asarray(siamese.siamese(key, jnp.asarray(ramps), family))
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
    np.testing.assert_allclose(siamese.siamese(key, images, 'color'), expected, atol=2e-6)


def test_each_call_uses_one_family_and_all_are_drawn_equally(images):
    families = siamese.FAMILIES
    call = jax.jit(lambda key: siamese.siamese(key, jnp.asarray(images)))
    given = jax.jit(lambda key, f: siamese.siamese(key, jnp.asarray(images), family=f))
    counts = np.zeros(len(families), int)
    for seed in range(60):
        key = jax.random.key(seed)
        drawn = call(key)
        same = [bool(jnp.array_equal(drawn, given(key, f))) for f in range(len(families))]
        assert sum(same) == 1
        counts[same.index(True)] += 1
    assert counts.min() >= 3  # 10 +- 2.9


def test_shared_parameters_treat_two_sets_alike(key, images):
    for family in siamese.FAMILIES:
        one = siamese.siamese(key, images[:1], family, shared=True)
        many = siamese.siamese(key, images, family, shared=True)
        np.testing.assert_allclose(many[0], one[0], atol=1e-6)
        apart = siamese.siamese(key, np.repeat(images[:1], 6, 0), family)
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
