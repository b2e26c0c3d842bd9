"""Synthetic sets in files, standardised data, groups and pairs."""

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds

from kd.config import Recipe
from kd.data import catalogue
from kd.data.context import SourceContext
from kd.data.distilled import export, groups, synthetic
from kd.data.sources import DataError
from kd.data.transforms import pairs, standardised


@pytest.fixture(scope='module')
def raw():
    return standardised.everything(catalogue.load('digits', 'train[:300]'))['input']


def made(soft):
    rng = np.random.default_rng(0)
    label = rng.dirichlet(np.ones(3), 6).astype(np.float32) if soft else np.arange(6) // 2
    images = rng.normal(size=(6, 8, 8, 3)).astype(np.float32)
    label = label if soft else label.astype(np.int32)
    return synthetic.SyntheticSet(images, label, np.float32(0.03)), 0.5 * images


@pytest.mark.parametrize('soft', [False, True])
def test_a_set_comes_back_from_its_npz_bit_for_bit(tmp_path, soft):
    one, images = made(soft)
    export.write_npz(tmp_path / 'set.npz', one, images)
    for stored, given in zip(export.read_npz(tmp_path / 'set.npz'), one, strict=True):
        np.testing.assert_array_equal(stored, given)
        assert stored.dtype == given.dtype
    assert not list(tmp_path.glob('*.partial'))


def test_a_set_can_be_loaded_by_tfds_and_by_our_sources(tmp_path):
    one, images = made(soft=True)
    folder = export.write_tfds(tmp_path, 'tiny_set', one, images, 3, ('ant', 'bee', 'cat'))
    stored = tfds.builder_from_directory(folder).as_data_source('train')
    assert len(stored) == 6
    for i, example in enumerate(stored):
        np.testing.assert_array_equal(example['input'], one.input[i])
        np.testing.assert_array_equal(example['soft_label'], one.label[i])
        assert example['label'] == one.label[i].argmax()
    source = catalogue.load('tiny_set', 'train', data_dir=tmp_path)
    assert (source.num_classes, source.class_names) == (3, ('ant', 'bee', 'cat'))
    # Pixels are rounded to 8 bits and clipped.
    np.testing.assert_allclose(
        source.fetch(np.arange(6))['input'], np.clip(images, -1, 1), atol=0.5 / 127.5 + 1e-6
    )
    # Writing again replaces.
    other, images = made(soft=False)
    export.write_tfds(tmp_path, 'tiny_set', other, images, 3)
    again = catalogue.load('tiny_set', 'train', data_dir=tmp_path)
    np.testing.assert_array_equal(again.fetch(np.arange(6))['label'], other.label)


@pytest.mark.parametrize('kind', standardised.KINDS)
def test_standardisation_has_the_moments_it_promises_and_an_inverse(raw, kind):
    source = standardised.standardised(
        SourceContext('train[:300]'), of='digits', kind=kind, fit_on='train[:300]'
    )
    images = standardised.everything(source)['input']
    np.testing.assert_allclose(source.to_pixels(images), raw, atol=2e-4)
    flat, plain = images.reshape(300, -1), raw.reshape(300, -1)
    if kind == 'none':
        np.testing.assert_array_equal(images, raw)
    if kind == 'mean':
        np.testing.assert_allclose(flat, plain - plain.mean(0), atol=1e-5)
    if kind == 'channels':
        assert images.mean() == pytest.approx(0, abs=1e-5)
        assert images.std() == pytest.approx(1, rel=1e-4)
    if kind == 'zca':
        variances, axes = np.linalg.eigh(np.cov(plain.T.astype(np.float64)))
        shrunk = (axes * (variances / (variances + 0.4))) @ axes.T
        np.testing.assert_allclose(np.cov(flat.T), shrunk, atol=1e-4)


def test_other_splits_are_standardised_by_the_training_split(raw):
    source = standardised.standardised(
        SourceContext('test'), of='digits', kind='mean', fit_on='train[:300]'
    )
    plain = catalogue.load('digits', 'test').fetch([0, 1])['input']
    np.testing.assert_allclose(source.fetch([0, 1])['input'], plain - raw.mean(0), atol=1e-5)
    assert source.num_classes == 10
    with pytest.raises(ValueError, match='standardised by one of zca'):
        standardised.standardised(SourceContext('test'), of='digits', kind='pca')


def test_channels_are_standardised_by_given_moments_of_pixels_from_0_to_1(raw):
    given = dict(of='digits', mean=(0.3,), deviation=(0.2,))
    context = SourceContext('train[:300]')
    source = standardised.standardised(context, kind='channels', **given)
    images = source.fetch(np.arange(300))['input']
    np.testing.assert_allclose(images, ((raw + 1) / 2 - 0.3) / 0.2, atol=1e-5)
    np.testing.assert_allclose(source.to_pixels(images), raw, atol=1e-5)
    with pytest.raises(ValueError, match="kind='channels', 1 numbers each; got 1 and 1 for kind="):
        standardised.standardised(context, kind='mean', **given)
    with pytest.raises(ValueError, match='got 0 and 1'):
        standardised.standardised(context, kind='channels', of='digits', deviation=(0.2,))


def test_groups_hold_one_image_of_each_class(tmp_path):
    recipe = Recipe(stages={}, data=dict(name='digits', train='train[:300]'))
    source = groups.one_of_each_class(SourceContext('train[:300]', recipe, tmp_path))
    real = standardised.everything(catalogue.load('digits', 'train[:300]'))
    assert len(source) == np.bincount(real['label']).min()
    batch = source.fetch([2, 0])
    for place, number in enumerate((2, 0)):
        for k in range(10):
            wanted = real['input'][real['label'] == k][number]
            np.testing.assert_array_equal(batch['input'][place, k], wanted)
    abstract = groups.one_of_each_class(SourceContext('train[:300]', recipe))
    assert abstract.spec == source.spec


def test_groups_of_data_without_a_class_name_it(tmp_path):
    labels = catalogue.load('digits', 'train[:8]').fetch(np.arange(8))['label']
    absent = min(set(range(10)) - set(labels.tolist()))
    recipe = Recipe(stages={}, data=dict(name='digits', train='train'))
    with pytest.raises(DataError, match=f"^class {absent} has no example in split 'train.:8.' of"):
        groups.one_of_each_class(SourceContext('train[:8]', recipe, tmp_path))


def test_pairs_are_two_digits_of_their_own_split():
    source = pairs.digit_pairs(SourceContext('test'))
    batch = standardised.everything(source)
    assert np.bincount(batch['label']).tolist() == [15] * 100
    digits = standardised.everything(catalogue.load('digits', 'test'))
    known = {x.tobytes(): y for x, y in zip(digits['input'], digits['label'], strict=True)}
    for i in (0, 37, 199):
        sides = batch['input'][i, :, :8], batch['input'][i, :, 8:]
        left, right = (known[np.ascontiguousarray(side).tobytes()] for side in sides)
        assert batch['label'][i] == 10 * left + right


def test_learned_labels_and_step_sizes_decode_to_what_they_started_from():
    images, labels = np.zeros((4, 1, 1, 1)), np.array([0, 0, 1, 2])
    params = synthetic.parameters(images, labels, step_size=0.03, log=True, num_classes=3)
    one = jax.device_get(synthetic.decode(params, labels))
    assert one.step_size == pytest.approx(0.03, rel=1e-6)
    np.testing.assert_allclose(one.label.max(-1), 0.9, rtol=1e-6)
    np.testing.assert_array_equal(one.label.argmax(-1), labels)
    assert np.isnan(synthetic.decode({'images': images}, labels).step_size)


@pytest.mark.parametrize(
    ('labels', 'options', 'message'),
    [
        ([0, 3], dict(num_classes=3), r'Labels lie in 0\.\.3; the classes are 0\.\.2'),
        ([-1, 0], dict(num_classes=3), r'Labels lie in -1\.\.0'),
        ([0, 0], dict(num_classes=1), 'at least 2 classes, got 1'),
        ([0, 1], dict(step_size=-0.1), 'step_size must be positive'),
        ([0, 1], dict(step_size=0.0, log=True), 'step_size must be positive'),
    ],
)
def test_sets_that_cannot_be_trained_are_refused(labels, options, message):
    with pytest.raises(ValueError, match=message):
        synthetic.parameters(np.zeros((2, 1, 1, 1)), np.array(labels), **options)
