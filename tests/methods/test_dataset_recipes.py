"""The recipe of dataset distillation, shrunk and run: buffer, resumption, probes, report."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import scipy.special

from kd import config as kd_config
from kd.context import ReportContext
from kd.data import catalogue
from kd.data.distilled import export, synthetic
from kd.errors import Preempted, UserError
from kd.evaluators.fresh_training import Protocol
from kd.io import trajectories
from kd.io.workdir import Workdir
from kd.methods.dataset import recipes
from kd.networks import build_network
from kd.parallel.mesh import make_mesh
from kd.reports import dataset
from kd.training import loop
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROUNDS, TOGETHER, EPOCHS, PER_EPOCH = 2, 2, 2, 3


def shrunk():
    config = kd_config.load('configs/dataset/ftd.py:cpu')
    with config.unlocked():
        config.seed = 3
        config.stages = ('experts', 'random', 'distilled')
        del config['kmeans']
        config.data.train = config.data.source.fit_on = 'train[:120]'
        config.data.validation, config.data.test = 'train[120:160]', 'test[:50]'
        network = dict(name='kd.models.mlp.MLP', widths=(8,))
        config.experts.network = network
        config.experts.method.update(experts=4, together=TOGETHER, epochs=EPOCHS)
        config.experts.update(
            steps=ROUNDS * EPOCHS * PER_EPOCH, batch_size=40, eval_every=6, checkpoint_every=2,
            log_every=3,
        )  # fmt: skip
        config.experts.writers.snapshots.every = PER_EPOCH
        config.distilled.data.source.update(network=network, max_start_epoch=2, expert_epochs=1)
        config.distilled.method.update(student_steps=2, labels='learned')
        config.distilled.update(steps=4, eval_every=2, checkpoint_every=2, log_every=2)
        for name in ('validation', 'averaged'):
            config.distilled.evaluators[name].update(epochs=4, repeats=2)
        config.report.update(
            network=network, protocol=dict(epochs=4), repeats=2, step_sizes=(0.01, 0.1),
            full_epochs=1, rows=(
                ('random', 'random', ''), ('distilled', 'distilled', ''),
                ('distilled, averaged', 'distilled', 'average'),
            ),
        )  # fmt: skip
    return config


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    config = shrunk()
    config.mesh.update(data=1)
    report = loop.run(config, workdir)
    return config, workdir, report


def test_the_buffer_starts_every_expert_anew_and_moves_it(finished):
    buffer = trajectories.Buffer(finished[1] / 'experts')
    manifest = buffer.manifest
    assert (manifest.experts, manifest.together, manifest.epochs) == (4, TOGETHER, EPOCHS)
    assert manifest.parameters == 64 * 8 + 8 + 8 * 10 + 10
    starts = np.stack([buffer.snapshot(e, 0) for e in range(4)])
    assert len(np.unique(starts[:, -600:-90].round(6), axis=0)) == 4
    for expert in range(4):
        moved = [
            np.linalg.norm(buffer.snapshot(expert, t + 1) - buffer.snapshot(expert, t))
            for t in range(EPOCHS)
        ]
        assert 0 < max(moved) < np.linalg.norm(starts[0])


def test_an_interrupted_buffer_is_resumed_at_its_expert_bit_for_bit(finished, tmp_path):
    config, whole, _ = finished
    mesh = make_mesh({'data': 1})
    recipe = kd_config.parse(config)
    directory = Workdir(tmp_path / 'run', recipe)
    # Within the second round: its experts are half done.
    calls = iter(range(100))
    with pytest.raises(Preempted):
        loop.train_stage(recipe, 'experts', directory, mesh, stop=lambda: next(calls) == 7)
    with pytest.raises(UserError, match='holds no trajectories'):
        trajectories.Buffer(tmp_path / 'run' / 'experts')
    before = {f: f.stat().st_mtime_ns for f in directory.path.rglob('round_0000/*.npy')}
    assert len(before) == EPOCHS + 1
    loop.train_stage(recipe, 'experts', directory, mesh)
    directory.close()
    assert {f: f.stat().st_mtime_ns for f in before} == before
    ours, theirs = (trajectories.Buffer(p / 'experts') for p in (tmp_path / 'run', whole))
    for expert in range(4):
        for epoch in range(EPOCHS + 1):
            np.testing.assert_array_equal(
                ours.snapshot(expert, epoch), theirs.snapshot(expert, epoch)
            )


def test_the_report_has_every_row_and_the_set_of_its_files(finished):
    _, workdir, report = finished
    record = json.loads((workdir / 'report.json').read_text())
    rows = {'random', 'distilled', 'distilled, averaged', 'all real images'}
    assert set(record['accuracy']) == rows
    for row in record['accuracy'].values():
        accuracy = row['MLP']['accuracy'] * 50
        assert accuracy == pytest.approx(round(2 * accuracy) / 2, abs=1e-4)
    assert record['accuracy']['random']['MLP']['step_size'] in (0.01, 0.1)
    scores = record['scores']['distilled']
    assert set(scores) == {'augmentation_robust', 'label_robust'}
    assert '| distilled, averaged |' in report.read_text()
    one, average = (
        export.read_npz(workdir / 'synthetic' / f'{name}.npz')
        for name in ('distilled', 'distilled_averaged')
    )
    assert one.input.shape == (10, 8, 8, 1)
    assert record['accuracy']['distilled']['MLP']['step_size'] == pytest.approx(one.step_size)
    assert 0 < np.abs(one.input - average.input).max() < 0.1
    for name in ('random', 'distilled', 'distilled_averaged'):
        assert (workdir / 'figures' / f'{name}.png').stat().st_size > 2_000
        assert (workdir / 'synthetic' / 'tfds' / name / '1.0.0' / 'dataset_info.json').exists()


def test_every_further_architecture_learns_from_a_small_set():
    digits = catalogue.load('digits', 'train[:10]')
    train = digits.fetch(np.arange(10))
    made = synthetic.SyntheticSet(train['input'], train['label'], np.float32(0.05))
    trial = dataset.Trial(jax.random.split(jax.random.key(0), 1), train, train)
    networks = {'ConvNet': recipes.convnet(3, 16), **recipes.cross_architecture()}
    assert list(networks) == ['ConvNet', 'ResNet-20', 'MLP', 'ViT']
    # The same kinds, narrower.
    networks['ViT'] = networks['ViT'] | dict(width=48, depth=2)
    networks['ResNet-20'] = networks['ResNet-20'] | dict(depth=8)
    for name, block in networks.items():
        network = build_network(block, digits, where='network')
        cell = trial.cell(Protocol(network, epochs=30, batch_size=10), made, ())
        assert cell['accuracy'] > 0.5, name
        assert cell['step_size'] == pytest.approx(0.05)


def test_soft_sets_are_compared_under_the_labels_of_an_expert(finished):
    config, workdir, _ = finished
    recipe = kd_config.parse(config)
    context = ReportContext(recipe, workdir, make_mesh({'data': 1}))
    network = build_network(recipe.report['network'], context.source('train'), where='network')
    images = context.source('train').fetch(np.arange(7))['input']
    one = synthetic.SyntheticSet(images, np.zeros(7, int), np.float32(0.1))
    soft = dataset._labelled_by_expert(context, 'random', network, one)
    last = trajectories.Buffer(workdir / 'experts').snapshot(0, EPOCHS)
    # Leaves by name: bias and kernel of the classifier, then of the hidden layer.
    b1, k1, b0, k0 = np.split(last, np.cumsum([10, 8 * 10, 8]))
    hidden = np.maximum(images.reshape(7, 64) @ k0.reshape(64, 8) + b0, 0)
    expected = scipy.special.softmax(hidden @ k1.reshape(8, 10) + b1, axis=-1)
    np.testing.assert_allclose(soft, expected, atol=1e-6)
    alone = dataclasses.replace(recipe, stages={'random': recipe.stages['random']})
    context = dataclasses.replace(context, recipe=alone)
    assert dataset._labelled_by_expert(context, 'random', network, one) is None


def test_the_probe_judged_the_set_and_drew_it(finished):
    workdir = finished[1]
    lines = (workdir / 'distilled' / 'metrics.jsonl').read_text().splitlines()
    last = json.loads(lines[-1])
    assert 0 <= last['validation/accuracy'] <= 1
    assert last['validation/step_size'] == pytest.approx(0.03, rel=0.2)
    assert 'averaged/accuracy' in last
    assert (workdir / 'distilled' / 'figures' / 'validation_images_4.png').exists()


def test_a_buffer_serves_another_run_and_the_wrong_steps_are_said(finished):
    config, workdir, _ = finished
    other = config.copy_and_resolve_references()
    with other.unlocked():
        other.stages = ('distilled',)
        del other['experts'], other['random']
        other.distilled.data.source.experts = str(workdir / 'experts')
    source = prepare(kd_config.parse(other), 'distilled', make_mesh({'data': 1}), workdir / 'new')
    assert len(source.context.source('train')) == 8
    wrong = config.copy_and_resolve_references()
    wrong.experts.steps = 5
    with pytest.raises(UserError, match='with 3 steps take 12'):
        prepare(kd_config.parse(wrong), 'experts', make_mesh({'data': 1}))


def test_variants_are_parsed_and_what_is_not_there_is_said():
    assert recipes.parse('cifar10,ipc=50,shards=8') == ('cifar10', 50, 8)
    assert recipes.parse('cpu') == ('cpu', 1, 1)
    for text in ('cifar10,ipc=x', 'cifar10,pic=1', 'cifar10,ipc=0'):
        with pytest.raises(UserError, match='write for example'):
            recipes.parse(text)
    with pytest.raises(UserError, match=r"no variant 'cifar10,ipc=5'.*Did you mean"):
        kd_config.load('configs/dataset/mtt.py:cifar10,ipc=5')
    for name, wrong, told in (
        ('distribution_matching', 'cifar', "no variant 'cifar'.*Did you mean 'cifar10'"),
        ('distribution_matching', 'cpu_digits', 'Variants: cpu, cpu_mnist, mnist'),
        ('mtt', 'cpu_mnits', "Did you mean 'cpu_mnist'"),
        ('gradient_matching', 'dc_mnist,ipc=5', 'for ipc=1, ipc=10, ipc=50, not 5'),
    ):
        with pytest.raises(UserError, match=told):
            kd_config.load(f'configs/dataset/{name}.py:{wrong}')
    counts = [recipes.shared_out(recipes.DATA['cifar10'], 10, n) for n in (1, 4, 8, 64)]
    assert [(data.experts, k) for data, k in counts] == [(100, 10), (104, 8), (104, 8), (128, 64)]


@pytest.mark.parametrize(
    ('recipe', 'steps', 'start', 'epochs', 'batch', 'image_lr', 'rate_lr', 'rate'),
    [
        ('mtt.py:cifar10,ipc=10', 30, 20, 2, 0, 1e2, 1e-5, 1e-3),
        ('mtt.py:tiny,ipc=1', 10, 10, 2, 0, 1e4, 1e-4, 1e-2),
        ('mtt.py:tiny,ipc=10', 40, 20, 2, 200, 1e4, 1e-4, 1e-2),
        ('mtt.py:tiny,ipc=50', 40, 20, 2, 300, 1e4, 1e-4, 1e-2),
        # Half of the commands' rates: the released code applies half of the derivative.
        ('mtt.py:tesla_cifar10,ipc=1', 50, 5, 2, 0, 5e2, 1e-7, 1e-2),
        ('mtt.py:tesla_imagenet,ipc=1', 10, 10, 3, 100, 5e3, 1e-4, 1e-2),
        ('smooth_experts.py:readme_cifar100,ipc=1', 20, 20, 3, 0, 1e3, 1e-5, 1e-2),
    ],
)
def test_rows_have_the_published_numbers(
    recipe, steps, start, epochs, batch, image_lr, rate_lr, rate
):
    config = kd_config.load(f'configs/dataset/{recipe}')
    method, source = config.distilled.method, config.distilled.data.source
    assert (method.student_steps, method.inner_batch) == (steps, batch)
    assert (source.max_start_epoch, source.expert_epochs) == (start, epochs)
    assert config.distilled.optimizer.lr == image_lr
    assert (method.step_size_optimizer.lr, method.step_size) == (rate_lr, rate)
    if 'tiny' in recipe:
        assert (config.experts.network.depth, config.experts.network.width) == (4, 128)


def test_channels_are_divided_by_what_the_releases_divide_by():
    for recipe, deviation in (
        ('mtt.py:cifar10,ipc=50', (0.2023, 0.1994, 0.2010)),
        ('gradient_matching.py:dc_cifar10,ipc=1', (0.2023, 0.1994, 0.2010)),
        ('ftd.py:tiny,ipc=1', (0.229, 0.224, 0.225)),
    ):
        source = kd_config.load(f'configs/dataset/{recipe}').data.source
        assert (source.kind, tuple(source.deviation)) == ('channels', deviation)
    assert 'deviation' not in kd_config.load('configs/dataset/mtt.py:cifar10,ipc=10').data.source


def test_a_negative_step_size_is_told(finished, caplog):
    _, workdir, _ = finished
    one = export.read_npz(workdir / 'synthetic' / 'distilled.npz')
    digits = catalogue.load('digits', 'train[:10]')
    network = build_network(dict(name='kd.models.mlp.MLP', widths=()), digits, where='network')
    judge = Protocol(network, epochs=2, batch_size=10)
    keys, test = jax.random.split(jax.random.key(0), 1), digits.fetch(np.arange(10))
    judge.best(keys, one._replace(step_size=np.float32(-0.02)), test)
    assert 'The learned step size is -0.02: networks trained with it climb' in caplog.text
    caplog.clear()
    judge.best(keys, one._replace(step_size=np.float32(0.02)), test)
    assert not caplog.text


@pytest.mark.parametrize('name', ['mtt', 'ftd', 'smooth_experts'])
@pytest.mark.parametrize(('variant', 'count'), [('cpu', 20 * 20), ('cpu_mnist', 220 * 12)])
def test_experts_of_small_recipes_pass_over_all_the_data(name, variant, count):
    config = kd_config.load(f'configs/dataset/{name}.py:{variant}')
    # Rounds of experts together x epochs x batches of an epoch.
    assert config.experts.steps == count
    segments = config.distilled.data.source
    assert segments.max_start_epoch + segments.expert_epochs <= config.experts.method.epochs
    assert config.experts.network == segments.network == config.report.network


def test_a_sharded_recipe_places_images_and_experts_over_the_devices():
    config = kd_config.load('configs/dataset/mtt.py:cifar10,ipc=50,shards=4')
    assert config.mesh.tensor == 4
    small = kd_config.load('configs/dataset/mtt.py:cpu,ipc=10,shards=4')
    mesh = make_mesh({'data': 1, 'tensor': 4})
    for name, leaf in (('experts', 'hidden0'), ('distilled', 'images')):
        stage = prepare(kd_config.parse(small), name, mesh)
        where = stage.abstract_state().params['network'][leaf]
        where = jax.tree.leaves(where)[0].sharding
        assert where.spec[0] in ('tensor', ('data', 'tensor'))
