"""The recipe of compensators, shrunk and run under dynamic labels; its variants and its report."""

import json

import numpy as np
import pytest

from kd import config as kd_config
from kd.data.distilled import export
from kd.errors import UserError
from kd.training import loop

RECIPE = 'configs/dataset/infer_ufc.py'


@pytest.fixture(scope='module')
def finished(tmp_path_factory, quick_compilation):
    """Two small networks, three steps of their compensators, two kinds of students, two of each."""
    config = kd_config.load(f'{RECIPE}:cpu,ipc=2,dynamic')
    small = dict(name='kd.models.convnet.ConvNet', depth=1, width=4, norm='batch')
    with config.unlocked():
        config.mesh.update(data=1)
        config.stages = ('narrow', 'middle', 'distilled')
        del config['wide']
        config.distilled.references = dict(narrow='narrow', middle='middle')
        for name in ('narrow', 'middle'):
            config[name].update(network=small, steps=4, eval_every=4)
        config.distilled.steps = 3
        for name in config.stages:
            config[name].evaluators = {}
        config.report.network = dict(name='kd.models.mlp.MLP', widths=())
        config.report.networks = {'perceptron': dict(name='kd.models.mlp.MLP', widths=(8,))}
        config.report.repeats = 2
        config.report.protocol.update(epochs=3, batch_size=100)
    workdir = tmp_path_factory.mktemp('infer') / 'run'
    with quick_compilation():
        return loop.run(config, workdir), workdir


def test_the_report_compares_three_sets_for_every_student(finished):
    report, workdir = finished
    record = json.loads((workdir / 'report.json').read_text())['accuracy']
    assert list(record) == ['compensated', 'its real images alone', 'random real images']
    for row in record.values():
        assert list(row) == ['MLP', 'perceptron']
        for cell in row.values():
            assert 0 <= cell['accuracy'] <= 1
            assert cell['std'] >= 0
    lines = report.read_text().splitlines()
    assert '| training set | MLP | perceptron |' in lines
    wanted = record['compensated']['perceptron']
    text = f'{wanted["accuracy"]:.4f} ± {wanted["std"]:.4f}'
    assert any(line.startswith('| compensated |') and text in line for line in lines)


def test_the_set_holds_each_real_image_and_its_two_variants(finished):
    made = export.read_npz(finished[1] / 'synthetic' / 'compensated.npz')
    # One group of 100 classes fits the storage of 2 x 100 images, with 2 compensators.
    assert made.input.shape == (300, 8, 16, 1)
    np.testing.assert_allclose(made.label.sum(-1), 1.0, rtol=1e-5)
    real, *variants = np.split(np.asarray(made.input), 3)
    assert np.abs(made.input).max() <= 1
    for variant in variants:
        # Where nothing is clipped the difference is one image for all classes.
        inside = np.abs(variant) < 1
        difference = np.ma.masked_where(~inside, variant - real)
        assert difference.std(0).max() < 1e-6
        assert np.abs(difference).max() > 0.01


def test_variants_are_the_papers_and_others_are_said():
    config = kd_config.load(f'{RECIPE}:imagenet,ipc=50,dynamic')
    stage = config.distilled
    assert stage.steps == 2000
    assert stage.optimizer.lr == pytest.approx(0.25 * 0.45)
    assert stage.method.statistics_weight == 0.01
    assert stage.method.shift == 32
    assert len(stage.references) == 3
    assert stage.evaluators.validation.labels == 'dynamic'
    assert config.report.protocol.labels == 'dynamic'
    assert set(config.report.networks) == {'ResNet50', 'ResNet101'}
    static = kd_config.load(f'{RECIPE}:cifar100,ipc=50')
    assert len(static.distilled.references) == 4
    assert static.report.protocol.labels == 'static'
    assert list(static.report.networks) == ['ResNet18']
    smallest = kd_config.load(f'{RECIPE}:cpu,dynamic')
    assert smallest.distilled.method.images_per_class == 2
    assert smallest.report.protocol.labels == 'dynamic'
    with pytest.raises(UserError, match=r'no shards here; use --config\.mesh\.data=N'):
        kd_config.load(f'{RECIPE}:cifar100,ipc=10,shards=4')
    for variant in ('cifar100,ipc=1', 'imagenett,ipc=10', 'cpu,ipc=2,shards=2,static'):
        with pytest.raises(UserError, match=r'imagenet,ipc=50|is not ipc=N'):
            kd_config.load(f'{RECIPE}:{variant}')
