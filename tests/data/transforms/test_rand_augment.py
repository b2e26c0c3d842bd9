"""What vision transformers are fine-tuned with: RandAugment, erasing, CutMix, bicubic crops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, ImageEnhance, ImageOps

from kd.data.transforms import augment, mixing, rand_augment, warp

pytestmark = pytest.mark.usefixtures('compiled_quickly')

COUNT, H, W = 4, 16, 12


@pytest.fixture(scope='module')
def levels():
    """uint8 images of different contrast, smooth as pictures are; the last of one level."""
    rng = np.random.default_rng(0)
    waves = np.cumsum(rng.normal(size=(COUNT, H, W, 3)), 1) + np.cumsum(
        rng.normal(size=(COUNT, H, W, 3)), 2
    )
    scale = np.array([20, 8, 30, 0]).reshape(-1, 1, 1, 1)
    return np.clip(110 + scale * waves, 0, 255).astype(np.uint8)


def enhance(kind):
    return lambda image, m: kind(image).enhance(1 + 0.09 * m)


def solarize_add(image, m):
    add = int(11 * m)
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


PILLOW = {
    'autocontrast': lambda image, m: ImageOps.autocontrast(image),
    'equalize': lambda image, m: ImageOps.equalize(image),
    'invert': lambda image, m: ImageOps.invert(image),
    'posterize': lambda image, m: ImageOps.posterize(image, 4 - int(0.4 * m)),
    'solarize': lambda image, m: ImageOps.solarize(image, 256 - int(25.6 * m)),
    'solarize_add': solarize_add,
    'colour': enhance(ImageEnhance.Color),
    'contrast': enhance(ImageEnhance.Contrast),
    'brightness': enhance(ImageEnhance.Brightness),
    'sharpness': enhance(ImageEnhance.Sharpness),
}


@pytest.fixture(scope='module')
def apply():
    return jax.jit(rand_augment.apply)


@pytest.mark.parametrize('name', PILLOW)
def test_operations_on_colours_are_those_of_pillow(levels, apply, name):
    images = levels.astype(np.float32) / 127.5 - 1
    which = jnp.full(COUNT, rand_augment.OPERATIONS.index(name))
    strength = jnp.array([9.1, 4.3, 0.7, 6.2])
    found = (np.asarray(apply(images, which, strength, jnp.ones(COUNT))) + 1) * 127.5
    for image, m, made in zip(levels, strength, found, strict=True):
        wanted = np.asarray(PILLOW[name](Image.fromarray(image), float(m)), float)
        # Pillow's blends cut off what is behind the point, and its grey is of integers.
        np.testing.assert_allclose(
            made, wanted, atol=2.1 if name in ('colour', 'contrast') else 1.01
        )
        assert np.abs(made - wanted).mean() < 0.8


def test_the_other_sign_takes_away(levels, apply):
    images = levels.astype(np.float32) / 127.5 - 1
    which = jnp.full(COUNT, rand_augment.OPERATIONS.index('brightness'))
    found = apply(images, which, jnp.array([5.0, 9.0, 10.0, 10.0]), -jnp.ones(COUNT))
    factor = np.array([0.55, 0.19, 0.1, 0.1]).reshape(-1, 1, 1, 1)
    np.testing.assert_allclose((found + 1) * 127.5, factor * levels, atol=1e-3)


def test_geometric_operations_move_a_point_where_they_should(apply):
    """A bump at (row, column) = (2, 3) from the centre."""
    size = 33
    row, column = np.meshgrid(np.arange(size) - 16, np.arange(size) - 16, indexing='ij')
    bump = np.exp(-((row - 4) ** 2 + (column - 6) ** 2) / 4).astype(np.float32)[None, :, :, None]
    images = jnp.tile(bump, (len(rand_augment.GEOMETRIC), 1, 1, 1))
    which = jnp.arange(len(images))
    found = np.asarray(apply(images, which, jnp.full(len(images), 5.0), jnp.ones(len(images))))
    weights = found[..., 0] / found[..., 0].sum((1, 2), keepdims=True)
    places = np.stack([(weights * row).sum((1, 2)), (weights * column).sum((1, 2))], 1)
    angle = np.pi / 12
    # The result at p is the image at M p + shift: a point moves by the inverse.
    wanted = [
        np.linalg.solve([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]], [4, 6]),
        [4, 6 - 0.15 * 4],
        [4 - 0.15 * 6, 6],
        [4, 6 - 0.225 * size],
        [4 - 0.225 * size, 6],
    ]
    np.testing.assert_allclose(places, wanted, atol=0.02)


def test_half_of_the_operations_are_left_out(levels):
    images = np.repeat(levels[:1], 400, 0).astype(np.float32) / 127.5 - 1
    made = jax.jit(lambda key, x: rand_augment.rand_augment(key, x, 1, 9.0))
    found = np.asarray(made(jax.random.key(0), images))
    same = (np.abs(found - images).max((1, 2, 3)) < 1e-6).mean()
    assert 0.4 < same < 0.65
    assert found.min() >= -1 - 1e-6
    assert found.max() <= 1 + 1e-6
    with pytest.raises(ValueError, match=r'magnitude in \[0, 10\].*got \(1, 11.0, 0.5\)'):
        rand_augment.rand_augment(jax.random.key(0), images, 1, 11.0)


def test_erased_rectangles_hold_noise_and_others_nothing_new():
    images = jnp.full((400, 20, 30, 2), 3.0)
    erase = jax.jit(lambda key: augment.random_erasing(key, images, 0.25, (0.1, 0.3)))
    found = np.asarray(erase(jax.random.key(0)))
    changed = (found != 3.0).all(-1)
    erased = changed.any((1, 2))
    assert 0.18 < erased.mean() < 0.32
    for covered in changed[erased]:
        rows, columns = covered.any(1), covered.any(0)
        np.testing.assert_array_equal(covered, rows[:, None] & columns[None])
        assert 0.08 < covered.mean() < 0.32
    noise = found[found != 3.0]
    assert abs(noise.mean()) < 0.02
    assert noise.std() == pytest.approx(0.5, abs=0.02)


def test_pasted_rectangles_mix_labels_by_their_area():
    count, side = 64, 10
    batch = {
        'input': jnp.arange(count, dtype=jnp.float32)[:, None, None, None]
        + jnp.zeros((1, side, side, 1)),
        'label': jnp.arange(count),
        'index': jnp.arange(count),
    }
    mixed = jax.jit(lambda key, b: mixing.cutmix(key, b, num_classes=count))(
        jax.random.key(1), batch
    )
    shares = []
    for i, (image, label) in enumerate(
        zip(*(np.asarray(mixed[k]) for k in ('input', 'label')), strict=True)
    ):
        other = image[..., 0] != i
        np.testing.assert_array_equal(other, other.any(1)[:, None] & other.any(0)[None])
        share = 1 - other.mean()
        np.testing.assert_allclose(label[i], share, atol=1e-6)
        np.testing.assert_allclose(label.sum(), 1.0, rtol=1e-6)
        if other.any():
            (partner,) = np.unique(image[other])
            np.testing.assert_allclose(label[int(partner)], 1 - share, atol=1e-6)
            shares.append(share)
    np.testing.assert_array_equal(mixed['index'], batch['index'])
    # Uniform, but for what sticks out.
    assert 0.4 < np.mean(shares) < 0.75


def test_one_of_the_two_mixtures_by_a_coin(key):
    images = jnp.stack([jnp.zeros((6, 6, 1)), jnp.ones((6, 6, 1))] * 100)
    batch = {'input': images, 'label': jnp.tile(jnp.arange(2), 100)}
    transform = augment.compose((('mixup_or_cutmix', 0.8, 1.0),), num_classes=2)
    mixed = jax.jit(transform)(key, batch)
    found, labels = np.asarray(mixed['input']), np.asarray(mixed['label'])
    blended = ((found > 1e-6) & (found < 1 - 1e-6)).any((1, 2, 3))
    # Half of the pairs are of one class, and look alike.
    assert 0.15 < blended.mean() < 0.35
    np.testing.assert_allclose(labels[:, 1], found.mean((1, 2, 3)), atol=1e-5)


def test_bicubic_crops_are_those_of_pillow():
    image = np.random.default_rng(3).uniform(-1, 1, (12, 9)).astype(np.float32)
    resize = jax.jit(lambda corner, size: warp.resize(
        image[None, :, :, None], corner[None], size[None], method='bicubic'))  # fmt: skip
    for corner, size in (((0, 0), (12, 9)), ((2, 1), (5, 8)), ((3, 4), (9, 2))):
        top, left = corner
        part = Image.fromarray(image[top : top + size[0], left : left + size[1]])
        wanted = np.asarray(part.resize((9, 12), Image.Resampling.BICUBIC))
        found = resize(jnp.array(corner), jnp.array(size))[0, :, :, 0]
        np.testing.assert_allclose(found, wanted, atol=3e-6)
    with pytest.raises(ValueError, match="method='nearest' must be one of bilinear, bicubic"):
        warp.resize(image[None, :, :, None], jnp.zeros((1, 2), int), jnp.ones((1, 2), int),
                    method='nearest')  # fmt: skip
