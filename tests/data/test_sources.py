"""Data sources: values, splits, caching, and what each mistake is told."""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits, make_moons

from kd.data import catalogue, sources
from kd.data.builders import described, digits, mnist1d, prepared, toys


@pytest.fixture(scope='module')
def data_dir(tmp_path_factory):
    """A folder in which two processes prepared `digits` at the same time."""
    root = tmp_path_factory.mktemp('tfds')
    command = [sys.executable, '-m', 'kd.data.prepare', 'digits', f'--data_dir={root}']
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [run.communicate(timeout=300)[0].split()[-1] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    assert printed == [str(root / 'digits/1.0.0')] * 2
    return root


@pytest.fixture(scope='module')
def folders(data_dir, tmp_path_factory):
    """Copies of the digits files under other names, in the layouts that tfds knows."""
    root = tmp_path_factory.mktemp('layouts')
    original = data_dir / 'digits/1.0.0'
    for place in ('mnist/1.0.0', 'mnist/1.2.0', 'resized/8x8/1.0.0', 'resized/9x9/1.0.0'):
        shutil.copytree(original, root / place)
    for name, changes in {
        'records': {'fileFormat': 'tfrecord'},
        'unversioned/not_a_version': {},
    }.items():
        place = root / name / '1.0.0' if name == 'records' else root / name
        shutil.copytree(original, place)
        info = json.loads((place / 'dataset_info.json').read_text())
        (place / 'dataset_info.json').write_text(json.dumps({**info, **changes}))
    return root


def message(call, *args, **kwargs):
    with pytest.raises(sources.DataError) as caught:
        call(*args, **kwargs)
    text = str(caught.value)
    assert '\n' not in text
    return text


def test_digits_prepared_by_two_processes_at_once_leave_one_whole_copy(data_dir):
    assert os.listdir(data_dir) == ['digits']
    assert os.listdir(data_dir / 'digits') == ['1.0.0']


def test_digits_prepared_second_give_way_to_the_copy_that_was_there_first(
    data_dir, tmp_path, monkeypatch
):
    original = data_dir / 'digits/1.0.0'
    final = tmp_path / 'digits/1.0.0'

    def download_and_prepare(builder):
        shutil.copytree(original, builder.data_dir)
        shutil.copytree(original, final)  # The other process finishes meanwhile.
        (final / 'first').touch()

    monkeypatch.setattr(digits.Digits, 'download_and_prepare', download_and_prepare)
    assert str(digits.prepare(str(tmp_path))) == str(final)
    assert (final / 'first').exists()
    assert os.listdir(tmp_path) == ['digits']


def test_digits_equal_scikit_learns_in_value_and_order(data_dir):
    expected = load_digits()
    for split, rows in digits.split_positions().items():
        source = catalogue.load('digits', split, data_dir=data_dir)
        batch = source.fetch(np.arange(len(source)))
        np.testing.assert_array_equal(batch['input'][..., 0], expected.images[rows] / 8 - 1)
        np.testing.assert_array_equal(batch['label'], expected.target[rows])
        np.testing.assert_array_equal(batch['index'], np.arange(len(source)))
        assert {key: value.dtype for key, value in batch.items()} == {
            key: field.dtype for key, field in source.spec.items()
        }
        assert batch['input'].shape[1:] == source.spec['input'].shape == (8, 8, 1)
        assert (batch['input'].min(), batch['input'].max()) == (-1, 1)
        assert source.num_classes == 10


def test_digits_split_is_a_stratified_partition():
    target = load_digits().target
    rows = digits.split_positions()
    assert {split: len(r) for split, r in rows.items()} == {'train': 1500, 'test': 297}
    np.testing.assert_array_equal(np.sort(np.concatenate(list(rows.values()))), np.arange(1797))
    share = np.bincount(target) * 297 / 1797
    assert np.abs(np.bincount(target[rows['test']]) - share).max() < 1


def test_fetch_delivers_the_positions_asked_for_in_their_order_with_repeats(data_dir):
    source = catalogue.load('digits', 'test', data_dir=data_dir)
    everything = catalogue.load('digits', 'test', data_dir=data_dir).fetch(np.arange(297))
    picked = np.array([5, 0, 296, 5, 17])
    for _ in range(2):  # The second time from memory.
        batch = source.fetch(picked)
        for key in ('input', 'label', 'index'):
            np.testing.assert_array_equal(batch[key], everything[key][picked])


@pytest.mark.parametrize('split', ['test', 'test[10:20]'])
def test_fetch_refuses_positions_outside_the_split(data_dir, split):
    source = catalogue.load('digits', split, data_dir=data_dir)
    for position in (-1, len(source)):
        with pytest.raises(IndexError, match=f'valid ones are 0..{len(source) - 1}'):
            source.fetch([0, position])


@pytest.mark.parametrize('name', ['digits', 'checkerboard', 'mnist1d'])
def test_slices_of_a_split_are_disjoint_and_complete(data_dir, name):
    whole = catalogue.load(name, 'train', data_dir=data_dir)
    batch = whole.fetch(np.arange(len(whole)))
    parts = [
        catalogue.load(name, split, data_dir=data_dir)
        for split in ('train[:33%]', 'train[33%:67%]', 'train[67%:-7%]', 'train[-7%:]')
    ]
    assert sum(map(len, parts)) == len(whole)
    pieces = [part.fetch(np.arange(len(part))) for part in parts]
    for key in ('input', 'label'):
        np.testing.assert_array_equal(np.concatenate([p[key] for p in pieces]), batch[key])


def test_sum_of_splits_is_their_concatenation(data_dir):
    joined = catalogue.load('digits', 'test[5:9]+train[:3]+test[:2]', data_dir=data_dir)
    train, test = (
        catalogue.load('digits', split, data_dir=data_dir).fetch(np.arange(9))
        for split in ('train', 'test')
    )
    order = np.random.default_rng(0).permutation(len(joined))
    batch = joined.fetch(order)
    for key in ('input', 'label'):
        expected = np.concatenate([test[key][5:9], train[key][:3], test[key][:2]])
        np.testing.assert_array_equal(batch[key], expected[order])
    np.testing.assert_array_equal(batch['index'], order)


@pytest.mark.parametrize(
    ('split', 'segments'),
    [
        ('train', [('train', 0, 1503)]),
        ('train[:90%]', [('train', 0, 1353)]),  # 1352.7
        ('train[90%:]', [('train', 1353, 1503)]),
        ('train[-10%:]', [('train', 1353, 1503)]),
        ('train[:-3]', [('train', 0, 1500)]),
        ('test[-297:297]', [('test', 0, 297)]),
        ('test[5:5]', [('test', 5, 5)]),
        ('train[50%:10%]', [('train', 752, 752)]),  # 751.5, half to even
        ('test[:10%]+train[99%:]', [('test', 0, 30), ('train', 1488, 1503)]),
        ('train[:2.5%]', [('train', 0, 38)]),  # 37.575
        ('train[33.3%:66.6%]', [('train', 500, 1001)]),
        ('train[-12.5%:]', [('train', 1315, 1503)]),
        ('train[:1_000]', [('train', 0, 1000)]),
        ('train[10%:100]', [('train', 150, 1503)]),  # One unit for both ends.
        ('all', [('train', 0, 1503), ('test', 0, 297)]),
        ('test + train[2shard]', [('test', 0, 297), ('train', 1100, 1503)]),
        ('train[1shard:2shard]', [('train', 600, 1100)]),
        ('test[:1shard]', [('test', 0, 297)]),
    ],
)
def test_splits_are_sliced_joined_and_rounded_as_in_tfds(split, segments):
    sizes, shards = {'train': 1503, 'test': 297}, {'train': [600, 500, 403]}
    assert sources.parse_split(split, sizes, shards=shards) == segments


def test_shards_of_a_prepared_copy_are_its_files(folders, tmp_path):
    info = json.loads((folders / 'mnist/1.2.0/dataset_info.json').read_text())
    train = next(one for one in info['splits'] if one['name'] == 'train')
    # Described only: nothing is read.
    train['shardLengths'] = ['900', '600']
    place = shutil.copytree(folders / 'mnist/1.2.0', tmp_path / 'mnist/1.2.0')
    (place / 'dataset_info.json').write_text(json.dumps(info))
    source = catalogue.load('mnist', 'train[1shard:]', data_dir=tmp_path)
    assert len(source) == 600


def test_described_data_have_every_split_that_is_asked_for():
    for split, size in (('train[:1%]', 1), ('all', 100), ('train[:2.5%]+test', 102.5)):
        source = catalogue.load('digits', split, data_dir=catalogue.DESCRIBED)
        assert len(source) == size * described.EXAMPLES // 100


class Records(list):
    """A record source that counts what it decodes."""

    decoded = 0

    def __getitems__(self, keys):
        self.decoded += len(keys)
        return [self[key] for key in keys]


def make_records(size=10, dtype=np.uint8):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (size, 4, 4, 3)).astype(dtype)
    images.reshape(-1)[:2] = (0, 255)
    return images, Records({'image': image, 'label': i % 3} for i, image in enumerate(images))


def test_rows_are_decoded_once_and_pixels_0_to_255_become_minus_1_to_1():
    images, records = make_records()
    image = tfds.features.Image(shape=(4, 4, 3))
    reader = prepared.RecordReader(records, image, labelled=True, white=None)
    for rows in ([0, 3, 3], [3, 9, 1], [9, 1, 0]):
        batch = reader(np.array(rows))
        expected = images[rows].astype(np.float64) / 127.5 - 1
        np.testing.assert_allclose(batch['input'], expected, atol=1e-7)
        np.testing.assert_array_equal(batch['label'], np.array(rows) % 3)
    assert records.decoded == 4
    assert reader(np.array([0]))['input'].reshape(-1)[:2].tolist() == [-1, 1]


def test_rows_of_a_split_too_large_for_memory_are_decoded_each_time(monkeypatch):
    images, records = make_records()
    monkeypatch.setattr(sources, 'CACHE_BYTES', images.nbytes - 1)
    image = tfds.features.Image(shape=(4, 4, 3))
    reader = prepared.RecordReader(records, image, labelled=False, white=None)
    for _ in range(2):
        batch = reader(np.array([2, 2, 7]))
        np.testing.assert_allclose(batch['input'], images[[2, 2, 7]] / 127.5 - 1, atol=1e-6)
    assert records.decoded == 6
    assert set(batch) == {'input'}


def test_prepared_copy_is_found_by_name_newest_version_and_configuration(folders):
    expected = load_digits().images[digits.split_positions()['test']][..., None]
    for name in ('mnist', 'mnist:1.0.0', 'resized/9x9', 'resized/8x8:1.0.0'):
        source = catalogue.load(name, 'test', data_dir=folders)
        images = source.fetch(np.arange(297))['input']
        # Pixels of every other data set are taken to reach up to 255.
        np.testing.assert_allclose(images, expected / 127.5 - 1, atol=1e-6)
    assert prepared._find('mnist', str(folders)).name == '1.2.0'
    assert prepared._find('mnist:1.0.0', str(folders)).name == '1.0.0'


def test_data_dir_comes_from_the_environment_unless_given(monkeypatch, folders, data_dir):
    monkeypatch.setenv('TFDS_DATA_DIR', str(folders))
    assert len(catalogue.load('mnist', 'test')) == 297
    assert 'is not under' in message(catalogue.load, 'mnist', 'test', data_dir=data_dir)


def test_unknown_name_is_told_what_there_is(folders):
    text = message(catalogue.load, 'two_moon', 'train', data_dir=folders)
    assert "unknown data set 'two_moon' (did you mean 'two_moons'?)" in text
    assert "'digits', 'mnist1d', 'checkerboard'" in text
    assert f"under {folders} lie 'mnist', 'records', 'resized'" in text
    assert "did you mean 'cifar10'" in message(catalogue.load, 'cifar01', 'train', data_dir=folders)


def test_missing_data_is_told_where_it_was_looked_for_and_how_to_prepare_it(tmp_path):
    text = message(catalogue.load, 'cifar10', 'train', data_dir=tmp_path)
    assert f"'cifar10' is not under {tmp_path}" in text
    assert '--data_dir or TFDS_DATA_DIR' in text
    assert f'python -m kd.data.prepare cifar10 --data_dir={tmp_path}' in text


def test_unreadable_copies_are_told_apart(folders):
    text = message(catalogue.load, 'records', 'train', data_dir=folders)
    assert 'is in format tfrecord, and only array_record' in text
    assert "name one of 'resized/8x8', 'resized/9x9'" in message(
        catalogue.load, 'resized', 'train', data_dir=folders
    )
    assert "has no version '3.0.1'" in message(
        catalogue.load, 'mnist:3.0.1', 'train', data_dir=folders
    )


def test_unwritable_data_dir_is_told_what_to_name_instead(tmp_path):
    (tmp_path / 'file').write_text('')
    text = message(catalogue.load, 'digits', 'train', data_dir=tmp_path / 'file')
    assert f"'digits' cannot be written under {tmp_path / 'file'}" in text
    assert '--data_dir or TFDS_DATA_DIR' in text


def test_data_set_without_fixed_shape_images_is_refused():
    class Info:
        splits = {'train': None}  # noqa: RUF012

        def __init__(self, **features):
            self.features = features

    class Builder:
        def __init__(self, **features):
            self.info = Info(**features)

    text = message(prepared.describe, 'glue', Builder(sentence=tfds.features.Text()))
    assert "has no feature 'image'; it has sentence" in text
    varying = Builder(image=tfds.features.Image(shape=(None, None, 3)))
    assert 'vary in size' in message(prepared.describe, 'imagenet2012', varying)


@pytest.mark.parametrize('name', ['digits', 'rings', 'mnist1d'])
@pytest.mark.parametrize(
    'split', ['validation', 'train[', 'train[:ten]', 'train[:101%]', 'all[:3]', '']
)
def test_wrong_split_is_told_the_splits_there_are(data_dir, name, split):
    text = message(catalogue.load, name, split, data_dir=data_dir)
    assert f'data set {name!r} has no split {split!r}' in text
    assert "'train' (" in text
    assert "'test' (" in text
    assert 'train[:90%]' in text


def test_empty_and_overreaching_slices_are_errors():
    assert 'has no examples' in message(catalogue.load, 'rings', 'train[50%:10%]')
    for split in ('train[:100001]', 'train[-100001:]'):
        assert 'reaches beyond its 100,000' in message(catalogue.load, 'rings', split)


def test_mnist1d_is_the_published_data_set_and_leaves_global_random_states_alone():
    mnist1d.make.cache_clear()
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    train, test = (catalogue.load('mnist1d', split) for split in ('train', 'test'))
    assert (len(train), len(test), train.num_classes) == (4000, 1000, 10)
    signals = np.concatenate([s.fetch(np.arange(len(s)))['input'] for s in (train, test)])
    assert signals.shape == (5000, 40, 1)
    # The generator standardises over all signals at once.
    np.testing.assert_allclose([signals.mean(), signals.std()], [0, 1], atol=1e-5)
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_missing_mnist1d_package_is_told_how_to_install_it(monkeypatch):
    mnist1d.make.cache_clear()
    monkeypatch.setitem(sys.modules, 'mnist1d.data', None)
    assert 'pip install mnist1d' in message(catalogue.load, 'mnist1d', 'train')


@pytest.fixture(scope='module')
def toy():
    def read(name, split='train'):
        source = catalogue.load(name, split)
        batch = source.fetch(np.arange(len(source)))
        assert batch['input'].dtype == np.float32
        # Components are equally likely: within 5 standard deviations of a multinomial count.
        counts = np.bincount(batch['label'], minlength=source.num_classes)
        p = 1 / source.num_classes
        spread = np.sqrt(len(source) * p * (1 - p))
        assert np.abs(counts - len(source) * p).max() < 5 * spread
        return batch['input'].astype(np.float64), batch['label']

    return read


def test_checkerboard_is_uniform_on_the_eight_even_squares(toy):
    points, label = toy('checkerboard')
    cell = np.floor((points + 1) / 0.5).astype(int)
    assert ((cell >= 0) & (cell < 4)).all()
    assert (cell.sum(axis=1) % 2 == 0).all()
    assert len(np.unique(cell @ [4, 1])) == 8
    # One label, one square; and uniform inside: mean 1/2 and variance 1/12 of the side.
    assert len({tuple(row) for row in np.column_stack([cell, label])}) == 8
    inside = (points + 1) / 0.5 - cell
    np.testing.assert_allclose(inside.mean(axis=0), 0.5, atol=0.005)
    np.testing.assert_allclose(inside.var(axis=0), 1 / 12, atol=0.002)
    # Deviation of the whole per coordinate is that of the uniform on [-1, 1]: 1 / sqrt(3).
    np.testing.assert_allclose(points.std(axis=0), 3**-0.5, atol=0.005)


def test_two_moons_are_scikit_learns_moved_to_the_origin(toy):
    points, label = toy('two_moons')
    reference, reference_label = make_moons(100_000, noise=toys.MOONS_STD, random_state=0)
    reference -= [0.5, 0.25]
    for moon in (0, 1):
        ours, theirs = points[label == moon], reference[reference_label == moon]
        np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=0.02)
        np.testing.assert_allclose(np.cov(ours.T), np.cov(theirs.T), atol=0.02)
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=0.02)


def test_gaussian_mixture_has_the_stated_means_and_deviations(toy):
    points, label = toy('gaussian_mixture')
    for k in range(8):
        part = points[label == k]
        np.testing.assert_allclose(
            part.mean(axis=0), [np.cos(k * np.pi / 4), np.sin(k * np.pi / 4)], atol=0.005
        )
        np.testing.assert_allclose(np.cov(part.T), 0.01 * np.eye(2), atol=5e-4)


def test_rings_have_the_stated_radii_and_uniform_angles(toy):
    points, label = toy('rings')
    for k, radius in enumerate((0.25, 0.5, 0.75, 1.0)):
        part = points[label == k]
        distance = np.linalg.norm(part, axis=1)
        # The mean of |r e + noise| is r + sigma^2 / 2r to second order.
        np.testing.assert_allclose(distance.mean(), radius + 0.02**2 / (2 * radius), atol=6e-4)
        np.testing.assert_allclose(distance.std(), 0.02, atol=1e-3)
        angle = np.arctan2(part[:, 1], part[:, 0])
        assert abs(np.exp(1j * angle).mean()) < 5 / np.sqrt(len(part))


def test_toy_splits_are_fixed_and_independent(toy):
    again = toys.make('rings', 'test')['input']
    points = toy('rings', 'test')[0]
    np.testing.assert_array_equal(points.astype(np.float32), again)
    assert not np.isin(points[:, 0], toy('rings', 'train')[0][:, 0]).all()


def test_embedded_arrays_do_not_import_tfds_or_tensorflow():
    code = (
        'import sys; from kd.data import catalogue, pipeline; catalogue.load("rings", "train"); '
        'print("tensorflow_datasets" in sys.modules, "tensorflow" in sys.modules)'
    )
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ['False', 'False']
