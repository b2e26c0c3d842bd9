"""Crop, flip, cutout and mixup against NumPy, image by image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from kd import errors
from kd.data.transforms import augment, mixing, warp

pytestmark = pytest.mark.usefixtures('compiled_quickly')

SHAPE = (64, 6, 5, 2)


@pytest.fixture(scope='module')
def images():
    return np.random.default_rng(0).uniform(-1, 1, SHAPE).astype(np.float32)


def test_flip_mirrors_about_half_of_the_images_and_leaves_the_rest(key, images):
    flipped = np.asarray(jax.jit(augment.random_flip)(key, images))
    mirrored = (flipped == images[:, :, ::-1]).all((1, 2, 3))
    same = (flipped == images).all((1, 2, 3))
    assert (mirrored ^ same).all()
    assert 20 <= mirrored.sum() <= 44  # 32 +- 3 standard deviations


@pytest.mark.parametrize(('probability', 'step'), [(0.0, 1), (1.0, -1)])
def test_flip_at_probability_zero_and_one(key, images, probability, step):
    flipped = augment.random_flip(key, images, probability)
    np.testing.assert_array_equal(flipped, images[:, :, ::step])


@pytest.mark.parametrize('fill', [-1.0, None])
def test_crop_is_a_window_of_the_padded_image_and_reaches_every_place(key, images, fill):
    padding = 1
    cropped = np.asarray(augment.random_crop(key, images, padding, fill=fill))
    pads = [(0, 0), (padding, padding), (padding, padding), (0, 0)]
    if fill is None:
        padded = np.pad(images, pads, mode='reflect')
    else:
        padded = np.pad(images, pads, constant_values=fill)
    places = set()
    for index in range(SHAPE[0]):
        found = [
            (row, column)
            for row in range(3)
            for column in range(3)
            if np.array_equal(
                padded[index, row : row + SHAPE[1], column : column + SHAPE[2]], cropped[index]
            )
        ]
        assert len(found) == 1
        places.update(found)
    assert len(places) == 9


def test_crop_without_padding_is_the_identity(key, images):
    np.testing.assert_array_equal(augment.random_crop(key, images, 0), images)


def pillow_resized(image, top, left, height, width):
    """A rectangle of one image [H, W, C] resized to the whole by Pillow, channel by channel."""
    size = image.shape[1::-1]
    window = image[top : top + height, left : left + width]
    return np.stack(
        [
            np.asarray(Image.fromarray(window[..., c]).resize(size, Image.Resampling.BILINEAR))
            for c in range(image.shape[-1])
        ],
        -1,
    )


def test_resizing_a_rectangle_equals_pillow(images):
    boxes = [(0, 0, 6, 5), (1, 2, 3, 2), (2, 0, 4, 5), (5, 4, 1, 1), (0, 1, 6, 3)]
    few, boxes = images[: len(boxes)], np.asarray(boxes)
    resized = jax.jit(warp.resize)(few, boxes[:, :2], boxes[:, 2:])
    for image, box, found in zip(few, boxes, np.asarray(resized), strict=True):
        np.testing.assert_allclose(found, pillow_resized(image, *box), atol=2e-6)
    np.testing.assert_allclose(resized[0], few[0], atol=1e-6)
    shared = warp.resize(few, boxes[1:2, :2], boxes[1:2, 2:])
    np.testing.assert_allclose(shared[3], pillow_resized(few[3], *boxes[1]), atol=2e-6)


def test_resized_crops_are_rectangles_within_the_bounds_of_area_and_aspect():
    # A ramp along rows and one along columns: two pixels of each tell the rectangle. Upsampling
    # keeps the middle of a ramp exact.
    size, count = 64, 400
    rows, columns = np.meshgrid(np.arange(size), np.arange(size), indexing='ij')
    ramps = np.stack([rows, columns], -1)[None].repeat(count, 0).astype(np.float32)
    cropped = np.asarray(
        jax.jit(functools.partial(augment.random_resized_crop, area=(0.1, 0.5)))(
            jax.random.key(1), ramps
        )
    )
    middle, step = size // 2, 8
    height = (cropped[:, middle + step, 0, 0] - cropped[:, middle - step, 0, 0]) * size / 2 / step
    width = (cropped[:, 0, middle + step, 1] - cropped[:, 0, middle - step, 1]) * size / 2 / step
    np.testing.assert_allclose(height, height.round(), atol=1e-3)
    area, aspect = height * width / size**2, width / height
    # Sides are rounded to pixels.
    assert 0.095 < area.min() < 0.12
    assert 0.48 < area.max() < 0.51
    assert abs(area.mean() - 0.3) < 4 * 0.4 / 12**0.5 / count**0.5
    assert 0.72 < aspect.min() < 0.78
    assert 1.29 < aspect.max() < 1.37
    assert abs(np.log(aspect).mean()) < 4 * 2 * np.log(4 / 3) / 12**0.5 / count**0.5
    top = cropped[:, middle, 0, 0] + 0.5 - (middle + 0.5) * height / size
    np.testing.assert_allclose(top, top.round(), atol=1e-3)
    where = top / (size - height)
    assert where.min() < 0.03
    assert where.max() > 0.97
    assert abs(where.mean() - 0.5) < 4 / 12**0.5 / count**0.5


def test_a_rectangle_that_never_fits_is_replaced_by_the_central_one():
    wide = np.random.default_rng(2).uniform(-1, 1, (2, 4, 32, 1)).astype(np.float32)
    # An aspect of at most 4/3 and nearly all of the area do not go together on 4 x 32 pixels.
    crop = jax.jit(functools.partial(augment.random_resized_crop, area=(0.9, 1.0)))
    cropped = crop(jax.random.key(0), wide)
    for image, found in zip(wide, np.asarray(cropped), strict=True):
        np.testing.assert_allclose(found, pillow_resized(image, 0, 13, 4, 5), atol=2e-6)


def test_shared_crops_and_flips_are_the_same_for_all_images_and_others_are_not(key, images):
    same = jnp.tile(images[:1], (16, 1, 1, 1))
    for function in (augment.random_resized_crop, augment.random_flip):
        together, apart = (
            np.asarray(jax.jit(functools.partial(function, shared=shared))(key, same))
            for shared in (True, False)
        )
        np.testing.assert_allclose(together, together[:1].repeat(16, 0), atol=1e-6)
        assert np.abs(apart - apart[:1]).max() > 0.1


def test_the_gradient_through_a_resized_crop_is_its_transpose(key, images):
    few, weights = jnp.asarray(images[:4]), jnp.asarray(images[4:8])

    crop = jax.jit(functools.partial(augment.random_resized_crop, key))

    gradient = jax.jit(jax.grad(lambda x: (crop(x) * weights).sum()))(few)
    # A linear map: <w, A v> = <A^T w, v> for every v.
    for other in (few, jnp.asarray(images[8:12])):
        np.testing.assert_allclose(
            (gradient * other).sum(), (weights * crop(other)).sum(), rtol=1e-4
        )
    assert float(jnp.abs(gradient).max()) > 0.1


def test_cutout_fills_one_square_clipped_at_the_border(key, images):
    size, fill = 3, 0.25
    cut = np.asarray(augment.cutout(key, images, size, fill=fill))
    changed = (cut != images).any(-1)
    assert (cut[changed] == fill).all()
    possible = set()
    for row in range(SHAPE[1]):
        for column in range(SHAPE[2]):
            mask = np.zeros(SHAPE[1:3], bool)
            top, left = row - size // 2, column - size // 2
            mask[max(top, 0) : top + size, max(left, 0) : left + size] = True
            possible.add(mask.tobytes())
    seen = {mask.tobytes() for mask in changed}
    assert seen <= possible
    assert len(seen) > len(possible) // 2


def test_cutout_stops_the_gradient_of_the_pixels_it_removes(key, images):
    few = images[:4]
    gradient = np.asarray(jax.grad(lambda x: augment.cutout(key, x, 3, fill=9.0).sum())(few))
    removed = np.asarray(augment.cutout(key, few, 3, fill=9.0)) == 9.0
    np.testing.assert_array_equal(gradient, np.where(removed, 0.0, 1.0))


@pytest.mark.parametrize('shared', [False, True])
def test_mixup_uses_one_weight_for_image_label_and_logits(key, images, shared):
    labels = np.arange(SHAPE[0], dtype=np.int32) % 3
    logits = np.random.default_rng(1).normal(size=(SHAPE[0], 3)).astype(np.float32)
    batch = {'input': images, 'label': labels, 'logits': logits}
    batch['index'] = np.arange(SHAPE[0])
    mix = functools.partial(mixing.mixup, alpha=0.7, num_classes=3, shared=shared)
    mixed = jax.device_get(jax.jit(mix)(key, batch))
    # Recovers weight and partner of each example from the logits and predicts the rest.
    weights = []
    for index in range(SHAPE[0]):
        direction = logits - logits[index]
        moved = np.asarray(mixed['logits'][index]) - logits[index]
        length = np.maximum((direction**2).sum(-1), 1e-12)
        share = (direction * moved).sum(-1) / length
        error = np.abs(moved - share[:, None] * direction).max(-1)
        error[(share < -1e-6) | (share > 1 + 1e-6)] = np.inf
        partner = int(np.argmin(error))
        weight = 1 - share[partner]
        if partner == index or np.abs(moved).max() < 1e-3:
            continue
        expected = weight * images[index] + (1 - weight) * images[partner]
        np.testing.assert_allclose(mixed['input'][index], expected, atol=2e-5)
        one_hot = weight * np.eye(3)[labels[index]] + (1 - weight) * np.eye(3)[labels[partner]]
        np.testing.assert_allclose(mixed['label'][index], one_hot, atol=2e-5)
        weights.append(weight)
    assert len(weights) > 30
    assert (np.ptp(weights) < 1e-3) == shared
    np.testing.assert_allclose(mixed['label'].sum(-1), 1.0, rtol=1e-6)
    np.testing.assert_array_equal(mixed['index'], batch['index'])


def test_mixup_with_extreme_weights_returns_one_of_the_pair(images):
    # Beta(1e-3, 1e-3) lies at 0 or 1 for all practical purposes.
    labels = jnp.arange(SHAPE[0], dtype=jnp.int32)
    batch = {'input': jnp.asarray(images), 'label': labels}
    mixed = mixing.mixup(jax.random.key(3), batch, 1e-3, num_classes=SHAPE[0])
    certain = np.asarray(mixed['label'].max(-1)) == 1.0
    assert certain.sum() > SHAPE[0] // 2
    chosen = np.asarray(mixed['label'].argmax(-1))
    np.testing.assert_array_equal(np.asarray(mixed['input'])[certain], images[chosen[certain]])


def test_mixup_mixes_logits_and_not_probabilities():
    logits = jnp.asarray([[4.0, 0.0], [0.0, 1.0]])
    batch = {'input': jnp.zeros((2, 1, 1, 1)), 'logits': logits}
    for seed in range(8):  # until the permutation swaps the two
        mixed = mixing.mixup(jax.random.key(seed), batch, 1.0, shared=True)['logits']
        if not np.allclose(mixed, logits):
            break
    weight = (mixed[0, 0] / 4.0).item()
    np.testing.assert_allclose(mixed[0], weight * logits[0] + (1 - weight) * logits[1], rtol=1e-6)
    mixed_probabilities = weight * jax.nn.softmax(logits[0]) + (1 - weight) * jax.nn.softmax(
        logits[1]
    )
    assert float(jnp.abs(jax.nn.softmax(mixed[0]) - mixed_probabilities).max()) > 0.01


@pytest.mark.parametrize('field', ['teacher_logits', 'teacher_indices', 'teacher_tokens', 'noise'])
@pytest.mark.parametrize('entry', [('crop', 1), 'flip', ('mixup', 0.4), ('siamese', 'flip')])
def test_what_belongs_to_the_inputs_as_they_are_forbids_augmentation(key, images, field, entry):
    batch = {'input': images, 'label': jnp.zeros(SHAPE[0], int), field: images}
    message = f'^inputs of a batch that brings {field} cannot be augmented, for these belong to'
    with pytest.raises(errors.UserError, match=message):
        augment.augment(key, batch, (entry,), num_classes=3)
    assert augment.augment(key, batch, (), num_classes=3) is batch


def test_labels_that_are_no_classes_do_not_vanish_in_a_mixture(key, images):
    labels = jnp.full(SHAPE[0], -1)
    mixed = mixing.mixup(key, {'input': images, 'label': labels}, 0.4, num_classes=3)
    assert np.isnan(mixed['label']).all()


def test_composition_folds_the_key_with_the_place(key, images):
    batch = {'input': jnp.asarray(images), 'label': jnp.zeros(SHAPE[0], jnp.int32)}
    spec = (('crop', 1, {'fill': 0.0}), 'flip', ('mixup', 0.4, {'shared': True}))
    made = jax.jit(augment.compose(spec, num_classes=3))(key, batch)
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    expected = augment.random_crop(keys[0], batch['input'], 1, fill=0.0)
    expected = augment.random_flip(keys[1], expected)
    by_hand = {'input': expected, 'label': batch['label']}
    by_hand = mixing.mixup(keys[2], by_hand, 0.4, num_classes=3, shared=True)
    np.testing.assert_allclose(made['input'], by_hand['input'], atol=1e-6)
    assert augment.augment(key, batch, ()) == batch


@pytest.mark.parametrize(
    ('call', 'message'),
    [
        (lambda k, x: augment.random_flip(k, x[0]), r'\[B, H, W, C\], got \[6, 5, 2\]'),
        (lambda k, x: augment.random_flip(k, x, 1.5), r'lies in \[0, 1\], got 1.5'),
        (lambda k, x: augment.random_crop(k, x, -1), 'got -1'),
        (lambda k, x: augment.random_crop(k, x, 5, fill=None), '0..4 pixels, got 5'),
        (lambda k, x: augment.cutout(k, x, 0), 'got 0'),
        (lambda k, x: augment.random_resized_crop(k, x, (0.0, 1.0)), r'area are 0 < low .* <= 1'),
        (lambda k, x: augment.random_resized_crop(k, x, aspect=(2, 1)), r'aspect .*got \(2, 1\)'),
        (lambda k, x: mixing.mixup(k, {'input': x}, 0.0), 'alpha must be above 0'),
        (lambda k, x: augment.augment(k, {'input': x}, ('flpi',)), "Did you mean 'flip'"),
        (lambda k, x: mixing.mixup(k, {'input': x.astype(int)}, 1.0), 'int.* cannot be mixed'),
        (
            lambda k, x: mixing.mixup(k, {'input': x, 'teacher_tail': x}, 1.0),
            'teacher_tail cannot',
        ),
        (
            lambda k, x: mixing.mixup(k, {'input': x, 'label': jnp.zeros(64, int)}, 1.0),
            'num_classes',
        ),
    ],
)
def test_bad_input_is_named(key, images, call, message):
    with pytest.raises(ValueError, match=message):
        call(key, images)


@pytest.mark.parametrize(
    ('entry', 'message'),
    [
        (('blur', 3), 'known: crop, cutmix'),
        ('crop', "'crop': missing a required argument: 'padding'"),
        (('crop', 4, {'fil': 0.0}), "unexpected keyword argument 'fil'"),
    ],
)
def test_wrong_entry_is_a_user_error_before_any_batch(entry, message):
    with pytest.raises(errors.UserError, match=message):
        augment.compose((entry,))
