"""Buffers of trajectories and their segments, written by hand."""

import dataclasses

import numpy as np
import pytest

from kd import config as kd_config
from kd.data.context import SourceContext
from kd.data.distilled import trajectories as source_lib
from kd.errors import UserError
from kd.io import trajectories

NETWORK = dict(name='kd.models.mlp.MLP', widths=())
SIZE = 40 * 10 + 10
EXPERTS, TOGETHER, EPOCHS = 4, 2, 3


def config(**experts):
    made = kd_config.recipe(
        stages=('experts',), data=dict(name='mnist1d', train='train', test='test')
    )
    method = dict(name='x', experts=EXPERTS, together=TOGETHER, epochs=EPOCHS, **experts)
    made.experts = kd_config.stage(method=method, steps=1, batch_size=1, network=NETWORK)
    return kd_config.parse(made)


def value(expert, epoch):
    return np.full(SIZE, 10 * expert + epoch, np.float32)


@pytest.fixture
def buffer(tmp_path):
    """Expert e after t epochs is 10 e + t everywhere."""
    for number in range(EXPERTS // TOGETHER):
        for epoch in range(EPOCHS + 1):
            experts = range(TOGETHER * number, TOGETHER * (number + 1))
            values = np.stack([value(e, epoch) for e in experts])
            trajectories.write_snapshot(tmp_path / 'experts', number, epoch, values)
    made = trajectories.fingerprint(
        network=NETWORK, data=source_lib.training_data(config()), method={}
    )
    trajectories.write_manifest(
        tmp_path / 'experts', trajectories.Manifest(EXPERTS, TOGETHER, EPOCHS, SIZE, made)
    )
    return tmp_path


def opened(buffer, split='train', recipe=None, **options):
    options = dict(network=NETWORK, max_start_epoch=2, expert_epochs=2) | options
    return source_lib.segments(SourceContext(split, recipe or config(), buffer), **options)


def test_examples_are_all_segments_of_all_experts(buffer):
    source = opened(buffer)
    assert len(source) == EXPERTS * 2
    batch = source.fetch([0, 1, 5, 7])
    assert batch['epoch'].tolist() == [0, 1, 1, 1]
    assert batch['start'][:, 0].tolist() == [0, 1, 21, 31]
    assert batch['targets'][:, :, -1].tolist() == [[1, 2], [2, 3], [22, 23], [32, 33]]
    for name, field in source.spec.items():
        assert batch[name].shape[1:] == field.shape
        assert batch[name].dtype == field.dtype


def test_slices_go_through_the_experts(buffer):
    held = opened(buffer, 'train[75%:]')
    assert held.fetch(np.arange(len(held)))['start'][:, 0].tolist() == [30, 31]


def test_a_recipe_that_is_only_checked_has_the_shapes_and_the_length(buffer):
    abstract, real = opened(None), opened(buffer)
    assert (abstract.spec, len(abstract)) == (real.spec, len(real))


def test_snapshots_are_mapped_and_not_read(buffer):
    snapshot = trajectories.Buffer(buffer / 'experts').snapshot(3, 1)
    assert isinstance(snapshot, np.memmap)
    np.testing.assert_array_equal(snapshot, value(3, 1))


@pytest.mark.parametrize('workdir', [True, False])
@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(expert_epochs=0), 'expert_epochs must be at least 1'),
        (dict(max_start_epoch=3), r'end at 4, but the experts trained for 3 epochs; lower .* to 2'),
        (dict(max_start_epoch=0), 'max_start_epoch is exclusive and at least 1'),
    ],
)
def test_segments_that_cannot_be_are_said(buffer, workdir, options, message):
    with pytest.raises(ValueError, match=message):
        opened(buffer if workdir else None, **options)


def test_a_buffer_of_another_network_or_data_set_is_refused(buffer):
    with pytest.raises(UserError, match=r'made with another network: network\.widths was \[\]'):
        opened(buffer, network=NETWORK | dict(widths=(3,)))
    other = config()
    other = dataclasses.replace(other, data={**other.data, 'train': 'train[:1000]'})
    with pytest.raises(UserError, match=r"made with another data: data\.train was 'train' and is"):
        opened(buffer, recipe=other)


def test_a_buffer_that_is_not_there_or_not_finished_is_said(buffer):
    (buffer / 'experts' / 'trajectories' / 'round_0001' / 'epoch_002.npy').unlink()
    with pytest.raises(UserError, match=r'1 of 8 snapshots.*epoch_002\.npy of round_0001'):
        opened(buffer)
    with pytest.raises(UserError, match='holds no trajectories'):
        opened(buffer, experts=str(buffer / 'elsewhere'))


@pytest.mark.parametrize('damage', ['short', 'empty', 'garbage', 'shape', 'manifest', 'fields'])
def test_a_damaged_file_of_a_buffer_is_told_by_its_name(buffer, damage):
    folder = buffer / 'experts' / 'trajectories'
    file = folder / 'round_0001' / 'epoch_002.npy'
    whole = file.read_bytes()
    if damage in ('manifest', 'fields'):
        file = folder / 'manifest.json'
        file.write_text('{"experts": 4' if damage == 'manifest' else '{"experts": 4}')
    elif damage == 'shape':
        trajectories.write_snapshot(buffer / 'experts', 1, 2, np.zeros((1, SIZE)))
    else:
        file.write_bytes({'short': whole[:-8], 'empty': b'', 'garbage': b'x' * 99}[damage])
    told = rf'{file.name} (is damaged|cannot be read).*delete .*experts and run its recipe again'
    with pytest.raises(UserError, match=told):
        opened(buffer).fetch(range(EXPERTS * 2))
