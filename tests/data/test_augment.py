"""Crop, flip, cutout and mixup against NumPy, image by image."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd import errors
from kd.data import augment

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
    mix = functools.partial(augment.mixup, alpha=0.7, num_classes=3, shared=shared)
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
    mixed = augment.mixup(jax.random.key(3), batch, 1e-3, num_classes=SHAPE[0])
    certain = np.asarray(mixed['label'].max(-1)) == 1.0
    assert certain.sum() > SHAPE[0] // 2
    chosen = np.asarray(mixed['label'].argmax(-1))
    np.testing.assert_array_equal(np.asarray(mixed['input'])[certain], images[chosen[certain]])


def test_mixup_mixes_logits_and_not_probabilities():
    logits = jnp.asarray([[4.0, 0.0], [0.0, 1.0]])
    batch = {'input': jnp.zeros((2, 1, 1, 1)), 'logits': logits}
    for seed in range(8):  # until the permutation swaps the two
        mixed = augment.mixup(jax.random.key(seed), batch, 1.0, shared=True)['logits']
        if not np.allclose(mixed, logits):
            break
    weight = (mixed[0, 0] / 4.0).item()
    np.testing.assert_allclose(mixed[0], weight * logits[0] + (1 - weight) * logits[1], rtol=1e-6)
    mixed_probabilities = weight * jax.nn.softmax(logits[0]) + (1 - weight) * jax.nn.softmax(
        logits[1]
    )
    assert float(jnp.abs(jax.nn.softmax(mixed[0]) - mixed_probabilities).max()) > 0.01


def test_composition_folds_the_key_with_the_place(key, images):
    batch = {'input': jnp.asarray(images), 'label': jnp.zeros(SHAPE[0], jnp.int32)}
    spec = (('crop', 1, {'fill': 0.0}), 'flip', ('mixup', 0.4, {'shared': True}))
    made = jax.jit(augment.compose(spec, num_classes=3))(key, batch)
    keys = [jax.random.fold_in(key, i) for i in range(3)]
    expected = augment.random_crop(keys[0], batch['input'], 1, fill=0.0)
    expected = augment.random_flip(keys[1], expected)
    by_hand = {'input': expected, 'label': batch['label']}
    by_hand = augment.mixup(keys[2], by_hand, 0.4, num_classes=3, shared=True)
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
        (lambda k, x: augment.mixup(k, {'input': x}, 0.0), 'alpha must be above 0'),
        (lambda k, x: augment.augment(k, {'input': x}, ('flpi',)), "Did you mean 'flip'"),
        (
            lambda k, x: augment.mixup(k, {'input': x, 'label': jnp.zeros(64, int)}, 1.0),
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
        (('blur', 3), 'known: crop, cutout'),
        ('crop', "'crop': missing a required argument: 'padding'"),
        (('crop', 4, {'fil': 0.0}), "unexpected keyword argument 'fil'"),
    ],
)
def test_wrong_entry_is_a_user_error_before_any_batch(entry, message):
    with pytest.raises(errors.UserError, match=message):
        augment.compose((entry,))
