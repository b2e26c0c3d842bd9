"""Training and evaluation pipelines: order, epochs, hosts, resumption, padding."""

import itertools
import json

import grain
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from scipy import stats

from kd.data import pipeline, sources
from kd.data.sources import DataError


@pytest.fixture(scope='module')
def source():
    """Ten examples whose input tells their position."""
    positions = np.arange(10)
    arrays = {'input': positions[:, None] / np.float32(10), 'label': positions.astype(np.int32)}
    data = sources.DataSet(
        name='ten',
        sizes={'train': 10},
        reader=lambda split: sources.in_memory(arrays),
        spec=sources.example_spec((1,)),
        num_classes=10,
    )
    return sources.Source(data, 'train')


@pytest.mark.parametrize('wrong', [-1, 10, 255])
def test_labels_outside_the_classes_are_refused_before_they_are_read_or_when_they_are(wrong):
    label = np.arange(10)
    label[7] = wrong
    arrays = {'input': np.zeros((10, 1), np.float32), 'label': label.astype(np.int32)}

    def make(split, reader, num_classes):
        spec = sources.example_spec((1,))
        data = sources.DataSet('ten', {'train': 10}, lambda _: reader, spec, num_classes)
        return sources.Source(data, split)

    message = (
        f"^split 'train' of data set 'ten' has an example with label {wrong}, and its 10 classes "
        r'are 0\.\.9; leave out'
    )
    with pytest.raises(DataError, match=message):
        make('train', sources.in_memory(arrays), 10)
    assert len(make('train[:7]+train[8:]', sources.in_memory(arrays), 10)) == 9
    # A reader of files finds out as it reads.
    read = make('train', lambda rows: {k: v[rows] for k, v in arrays.items()}, 10)
    read.fetch(np.arange(7))
    with pytest.raises(DataError, match=message):
        next(pipeline.train_iterator(read, 10, seed=0))
    # What is no class may be anything, and so may what a mask leaves out.
    make('train', sources.in_memory(arrays), None).fetch([7])
    masked = arrays | {sources.MASK: np.arange(10) != 7}
    make('train', sources.in_memory(masked), 10)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def positions(batches):
    return [batch['index'].tolist() for batch in batches]


def assert_same(ours, theirs):
    assert len(ours) == len(theirs)
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


@pytest.mark.parametrize('batch_size', [1, 4, 5, 10])
def test_batches_cut_the_concatenated_epoch_permutations(source, batch_size):
    count = 40 // batch_size
    batches = take(pipeline.train_iterator(source, batch_size, seed=3), count)
    rng = [np.random.Generator(np.random.Philox(np.random.SeedSequence([3, e]))) for e in range(4)]
    order = np.concatenate([r.permutation(10) for r in rng])
    for i, batch in enumerate(batches):
        expected = order[i * batch_size : (i + 1) * batch_size]
        np.testing.assert_array_equal(batch['index'], expected)
        np.testing.assert_array_equal(batch['label'], expected)
        np.testing.assert_array_equal(batch['input'][:, 0], expected / np.float32(10))


def test_every_epoch_visits_each_example_once_in_an_order_of_its_own(source):
    seen = np.concatenate(positions(take(pipeline.train_iterator(source, 4, seed=0), 50)))
    epochs = seen.reshape(20, 10)
    np.testing.assert_array_equal(np.sort(epochs, axis=1), np.tile(np.arange(10), (20, 1)))
    assert len({tuple(epoch) for epoch in epochs}) == 20
    other = np.concatenate(positions(take(pipeline.train_iterator(source, 4, seed=1), 5)))
    assert not np.array_equal(other, seen[:20])


def test_permutations_are_uniform_over_epochs():
    """Each of the six orders of three examples comes up 1/6 of the time (5 standard deviations)."""
    epochs = 3000
    orders = [tuple(pipeline.epoch_permutation(0, epoch, 3)) for epoch in range(epochs)]
    counts = np.array([orders.count(p) for p in itertools.permutations(range(3))])
    assert np.abs(counts - epochs / 6).max() < 5 * np.sqrt(epochs * 5 / 36)


def test_without_shuffling_the_split_repeats_in_order(source):
    batches = take(pipeline.train_iterator(source, 4, seed=0, shuffle=False), 5)
    np.testing.assert_array_equal(np.concatenate(positions(batches)), np.tile(np.arange(10), 2))


@pytest.mark.parametrize('prefetch', [1, 3, 64])
def test_prefetching_changes_nothing(source, prefetch):
    plain = pipeline.train_iterator(source, 4, seed=5, prefetch=0)
    ahead = pipeline.train_iterator(source, 4, seed=5, prefetch=prefetch)
    assert_same(take(ahead, 100), take(plain, 100))


@pytest.mark.parametrize('prefetch', [0, 8])
def test_resumed_from_json_state_the_batches_go_on_bit_for_bit(source, prefetch):
    def make():
        return pipeline.train_iterator(source, 4, seed=2, prefetch=prefetch)

    whole = take(make(), 30)
    first = make()
    take(first, 13)
    state = json.loads(json.dumps(first.get_state()))
    second = make()
    second.set_state(state)
    assert_same(take(second, 17), whole[13:])
    # Rewinding drops what was prefetched.
    second.set_state({'next_index': 4})
    assert_same(take(second, 3), whole[4:7])


def test_resumed_from_an_orbax_checkpoint_the_batches_go_on(source, tmp_path):
    whole = take(pipeline.train_iterator(source, 4, seed=2), 12)
    first = pipeline.train_iterator(source, 4, seed=2)
    take(first, 7)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointSave(first)))
        manager.wait_until_finished()
        second = pipeline.train_iterator(source, 4, seed=2)
        manager.restore(7, args=ocp.args.Composite(data=grain.checkpoint.CheckpointRestore(second)))
    assert_same(take(second, 5), whole[7:])


@pytest.mark.parametrize('host_count', [2, 4])
def test_parts_of_the_hosts_concatenate_to_the_global_batch(source, host_count):
    whole = take(pipeline.train_iterator(source, 8, seed=1), 20)
    hosts = [
        take(pipeline.train_iterator(source, 8, seed=1, host_index=h, host_count=host_count), 20)
        for h in range(host_count)
    ]
    joined = [
        jax.tree.map(lambda *parts: np.concatenate(parts), *parts)
        for parts in zip(*hosts, strict=True)
    ]
    assert_same(joined, whole)


def test_order_far_into_training_costs_no_replay(source):
    iterator = pipeline.train_iterator(source, 4, seed=0, prefetch=0)
    iterator.set_state({'next_index': 10**12})
    expected = pipeline.epoch_permutation(0, 4 * 10**11, 10)[:4]
    np.testing.assert_array_equal(next(iterator)['index'], expected)


@pytest.mark.parametrize('host_count', [1, 2])
@pytest.mark.parametrize('batch_size', [2, 4, 10, 16])
def test_evaluation_sees_each_example_once_in_order_and_masks_the_padding(
    source, batch_size, host_count
):
    hosts = [
        pipeline.eval_batches(source, batch_size, host_index=h, host_count=host_count)
        for h in range(host_count)
    ]
    assert {len(batches) for batches in hosts} == {-(-10 // batch_size)}
    seen = []
    for parts in zip(*hosts, strict=True):
        batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
        assert batch['input'].shape == (batch_size, 1)
        assert batch['mask'].dtype == bool
        seen += batch['label'][batch['mask']].tolist()
        # Padding, where there is any, comes last.
        assert not np.any(np.diff(batch['mask'].astype(int)) > 0)
    assert seen == list(range(10))


def test_batch_sizes_that_cannot_be_had_are_refused(source):
    with pytest.raises(DataError, match="batch_size=11 exceeds the 10 examples of split 'train'"):
        pipeline.train_iterator(source, 11, seed=0)
    with pytest.raises(DataError, match='batch_size=0 must be a positive multiple'):
        pipeline.train_iterator(source, 0, seed=0)
    for call in (
        lambda **kw: pipeline.train_iterator(source, 9, seed=0, **kw),
        lambda **kw: pipeline.eval_batches(source, 9, **kw),
    ):
        with pytest.raises(DataError, match=r'batch_size=9 must be a positive multiple of the 2'):
            call(host_index=0, host_count=2)
        with pytest.raises(DataError, match=r'host_index=3 must lie in 0..2'):
            call(host_index=3, host_count=3)


def coins(source, **options):
    return pipeline.train_iterator(source, 8, poisson=3, seed=1, **options)


def test_by_coins_every_batch_takes_every_example_with_the_same_probability(source):
    batches = take(coins(source), 4000)
    assert all(batch['mask'].shape == (8,) for batch in batches)
    taken = np.zeros((4000, 10), bool)
    for row, batch in zip(taken, batches, strict=True):
        chosen = batch['index'][batch['mask']]
        assert len(set(chosen)) == len(chosen)
        # Rows of examples come first, and padding is example 0.
        np.testing.assert_array_equal(batch['mask'], np.arange(8) < len(chosen))
        assert (batch['index'][~batch['mask']] == 0).all()
        row[chosen] = True
    deviation = np.sqrt(0.3 * 0.7 / 4000)
    assert np.abs(taken.mean(0) - 0.3).max() < 4 * deviation
    # Independent of each other, and of the batch before: counts vary as binomials do.
    assert np.abs(np.corrcoef(taken.T) - np.eye(10)).max() < 5 / np.sqrt(4000)
    assert np.abs((taken[1:] & taken[:-1]).mean() - 0.09) < 0.01
    counts = np.bincount(taken.sum(1), minlength=9) / 4000
    expected = stats.binom.pmf(np.arange(9), 10, 0.3)
    np.testing.assert_allclose(counts, expected, atol=4 * np.sqrt(0.25 / 4000))
    assert counts[0] > 0.015


def test_batches_by_coins_resume_and_are_shared_by_hosts(source):
    whole = take(coins(source), 20)
    later = coins(source)
    later.set_state({'next_index': 7})
    assert_same(take(later, 13), whole[7:])
    parts = [take(coins(source, host_index=h, host_count=2), 20) for h in (0, 1)]
    joined = [
        {name: np.concatenate([one[name], other[name]]) for name in one}
        for one, other in zip(*parts, strict=True)
    ]
    assert_same(joined, whole)


def test_of_more_examples_than_rows_some_are_left_out(source):
    batches = take(pipeline.train_iterator(source, 4, poisson=4, seed=0), 300)
    full = [batch for batch in batches if batch['mask'].all()]
    assert 0.5 < len(full) / 300 < 0.72
    assert set(np.concatenate([batch['index'] for batch in full])) == set(range(10))
