"""Meshes, sharding rules, and the same numbers on one device as on eight."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from kd import config as kd_config
from kd import metrics as metrics_lib
from kd.context import Evaluator
from kd.errors import UserError
from kd.losses import classification, divergence
from kd.method import Objective, minimize
from kd.metrics import mean
from kd.parallel import mesh as mesh_lib
from kd.parallel.sharding import tree_shardings
from kd.state import State, path_name
from kd.training import loop
from kd.training import step as step_lib
from kd.training.evaluation import Evaluation
from kd.training.repeats import repeats
from kd.training.stage import prepare


def make(**sizes):
    return mesh_lib.make_mesh(sizes)


# Meshes


@pytest.mark.parametrize('count', range(1, 9))
def test_the_rest_of_the_devices_goes_to_the_axis_of_minus_one(count):
    devices = jax.devices()[:count]
    for axis in mesh_lib.AXES:
        mesh = mesh_lib.make_mesh({'data': 1, axis: -1}, devices)
        assert dict(mesh.shape) == {'data': 1, 'fsdp': 1, 'tensor': 1, axis: count}
        assert mesh.devices.ravel().tolist() == devices


@pytest.mark.parametrize(
    ('sizes', 'shape'),
    [
        ({}, (1, 1, 1)),
        ({'data': 3}, (3, 1, 1)),
        ({'data': 2, 'fsdp': 2, 'tensor': 2}, (2, 2, 2)),
        ({'data': -1, 'tensor': 4}, (2, 1, 4)),
        ({'data': 2, 'fsdp': -1, 'tensor': 2}, (2, 2, 2)),
        ({'fsdp': 8, 'data': -1}, (1, 8, 1)),
    ],
)
def test_sizes_become_a_mesh_of_the_first_devices(sizes, shape):
    mesh = make(**sizes)
    assert tuple(mesh.shape[axis] for axis in mesh_lib.AXES) == shape
    assert mesh.devices.ravel().tolist() == jax.devices()[: np.prod(shape)]


@pytest.mark.parametrize(
    ('sizes', 'message'),
    [
        ({'model': 2}, r"mesh has axes \('data', 'fsdp', 'tensor'\), not \['model'\]"),
        ({'data': 3, 'fsdp': 3}, 'needs 9 devices, there are 8'),
        ({'data': -1, 'fsdp': 3}, '8 devices do not divide over mesh'),
        ({'data': -1, 'fsdp': -1}, 'at most one of them -1'),
        ({'data': 0}, 'must be positive'),
        ({'data': -2}, 'must be positive'),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes, message):
    with pytest.raises(UserError, match=message):
        make(**sizes)


def test_a_batch_must_divide_over_the_devices_that_share_it():
    mesh = make(data=2, fsdp=2, tensor=2)
    mesh_lib.check_batch_size(8, mesh, where='student.batch_size')
    mesh_lib.check_batch_size(8, mesh, where='student.batch_size', micro_batches=2)
    with pytest.raises(UserError, match=r'student\.batch_size=6 does not divide over 4 devices'):
        mesh_lib.check_batch_size(6, mesh, where='student.batch_size')
    with pytest.raises(UserError, match='4 devices x 4 micro-batches'):
        mesh_lib.check_batch_size(8, mesh, where='student.batch_size', micro_batches=4)


def test_one_device_of_a_cpu_is_fed_arrays_as_they_are_and_several_their_parts():
    rows = np.arange(16, dtype=np.float32).reshape(8, 2)
    fed = {
        count: mesh_lib.fed(
            {'x': rows},
            mesh_lib.batch_sharding(mesh_lib.make_mesh({'data': count}, jax.devices()[:count])),
        )['x']
        for count in (1, 2)
    }
    assert fed[1] is rows
    assert [part.data.tolist() for part in fed[2].addressable_shards] == [
        rows[:4].tolist(), rows[4:].tolist()
    ]  # fmt: skip


def test_a_batch_is_cut_over_data_and_fsdp_and_copied_over_tensor():
    mesh = make(data=2, fsdp=2, tensor=2)
    rows = np.arange(16).reshape(8, 2)
    [placed] = mesh_lib.put_batch({'x': rows}, mesh_lib.batch_sharding(mesh)).values()
    for shard in placed.addressable_shards:
        d, f, _ = np.argwhere(mesh.devices == shard.device)[0]
        start = 2 * (2 * d + f)
        np.testing.assert_array_equal(shard.data, rows[start : start + 2])


# Sharding rules


@pytest.fixture(scope='module')
def tree():
    return {
        'dense': {'kernel': jnp.zeros((16, 24)), 'bias': jnp.zeros(24)},
        'head': {'kernel': jnp.zeros((24, 10)), 'bias': jnp.zeros(10)},
        'step': jnp.zeros((), jnp.int32),
    }


def specs(tree, rules, mesh):
    found = jax.tree_util.tree_flatten_with_path(tree_shardings(tree, rules, mesh))[0]
    assert all(sharding.mesh == mesh for _, sharding in found)
    return {path_name(path): sharding.spec for path, sharding in found}


def test_leaves_without_a_rule_are_replicated(tree):
    assert set(specs(tree, (), make(fsdp=8)).values()) == {P()}
    found = specs(tree, [('head/kernel$', ('fsdp',))], make(fsdp=8))
    assert found.pop('head/kernel') == P('fsdp')
    assert set(found.values()) == {P()}


def test_the_first_rule_that_matches_decides(tree):
    rules = [('head', ()), ('kernel', (None, 'tensor')), ('.', 'fsdp')]
    assert specs(tree, rules, make(fsdp=2, tensor=4)) == {
        'dense/kernel': P(None, 'tensor'),
        'dense/bias': P('fsdp'),
        'head/kernel': P(),
        'head/bias': P(),
        'step': P(),
    }


def test_the_word_fsdp_takes_the_largest_dimension_that_divides(tree):
    rules = [('.', 'fsdp')]
    assert specs(tree, rules, make(fsdp=8)) == {
        'dense/kernel': P(None, 'fsdp'),
        'dense/bias': P('fsdp'),
        'head/kernel': P('fsdp'),
        'head/bias': P(),
        'step': P(),
    }
    # Only 10 of (24, 10) divides by 5.
    assert specs(tree, rules, make(fsdp=5))['head/kernel'] == P(None, 'fsdp')
    assert set(specs(tree, rules, make(data=8)).values()) == {P()}


def test_a_dimension_may_go_over_several_axes(tree):
    mesh = make(data=1, fsdp=2, tensor=4)
    spec = (None, ('fsdp', 'tensor'))
    assert specs(tree, [('dense/kernel', spec)], mesh)['dense/kernel'] == P(*spec)


@pytest.mark.parametrize(
    ('rules', 'message'),
    [
        ([('head/kernel', (None, 'tensor'))], r"'head/kernel' \(24, 10\): 10 does not divide ov"),
        ([('head/kernel', (None, ('fsdp', 'tensor')))], '10 does not divide over 8'),
        ([('kernel', ('model', None))], r"names mesh axis 'model'; axes: \('data', 'fsdp', "),
        ([('kernel', ('tensor', 'tensor'))], "'dense/kernel' names 'tensor' twice"),
        ([('kernel', 'tensor')], "'tensor' .*must be a tuple of mesh axes or 'fsdp'"),
        ([('kernel', None)], "must be a tuple of mesh axes or 'fsdp'"),
        ([('kernel(', 'fsdp')], r'must be \(regular expression, spec\) pairs'),
        ([('kernel',)], r'must be \(regular expression, spec\) pairs'),
    ],
)
def test_rules_that_cannot_be_are_refused(tree, rules, message):
    with pytest.raises(UserError, match=message):
        specs(tree, rules, mesh_lib.make_mesh({'fsdp': 1, 'tensor': 8}))


def test_the_optimiser_state_and_averages_lie_as_the_parameters_do(tree):
    params = {name: tree[name] for name in ('dense', 'head')}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    state = jax.eval_shape(
        lambda: State.create(
            jax.random.key(0),
            {'params': params},
            tx.init(params),
            ema={'slow': {'network': params}},
        )
    )
    rules = [('dense/kernel', (None, 'tensor')), ('.', 'fsdp')]
    found = specs(state, rules, make(fsdp=2, tensor=4))
    expected = {path: spec for path, spec in found.items() if path.startswith('params/')}
    assert expected['params/network/dense/kernel'] == P(None, 'tensor')
    assert expected['params/network/head/kernel'] == P('fsdp')
    for path, spec in expected.items():
        leaf = path.removeprefix('params/network/')
        copies = [name for name in found if name.endswith('/' + leaf) and name != path]
        assert len(copies) == 3  # Two moments and an average.
        assert {found[name] for name in copies} == {spec}
    assert {found[name] for name in ('step', 'key')} == {P()}


def test_a_spec_for_matrices_leaves_vectors_under_the_same_name_alone():
    # Factored optimisers keep a vector under the name of the matrix it stands for.
    tree = {'v_row': {'kernel': jnp.zeros(16)}, 'mu': {'kernel': jnp.zeros((16, 8))}}
    found = specs(tree, [('kernel', (None, 'tensor'))], make(tensor=8))
    assert found == {'v_row/kernel': P(), 'mu/kernel': P(None, 'tensor')}


# The same numbers, however the step is spread


class Net(nn.Module):
    """A small network with everything that could tell devices apart: statistics and dropout."""

    num_classes: int
    plain: bool = False

    @nn.compact
    def __call__(self, x, *, train=False):
        for i in range(2):
            x = nn.tanh(nn.Dense(16, name=f'hidden{i}')(x))
        if not self.plain:
            x = nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x)
            x = nn.Dropout(0.2, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name='head')(x)


def distil(context, *, micro_batches=1):
    """Labels, and a frozen teacher of the student's shape."""
    network = context.network

    def loss(params, state, batch, key):
        output = network.apply(state.variables(params=params), batch['input'], train=True, key=key)
        teacher = network.apply(state.frozen['teacher'], batch['input']).logits
        hard = classification.cross_entropy(output.logits, batch['label'])
        soft = divergence.forward_kl(output.logits, teacher)
        return Objective(mean(hard + soft), {'soft': mean(soft)}, output.mutables)

    return minimize(loss, context.tx, network.init, micro_batches=micro_batches)


ACCURACY = 'kd.evaluators.classification.classification'


def a_recipe(
    mesh,
    *,
    method='distil',
    sharding=(),
    frozen_sharding=(),
    teacher='',
    micro_batches=1,
    plain=False,
    steps=5,
):
    """A teacher and a student, alike."""
    config = kd_config.recipe(
        stages=('teacher', 'student'),
        data={'name': 'two_moons', 'train': 'train'},
        mesh=mesh,
        sharding=sharding,
        frozen_sharding=frozen_sharding,
    )
    method = {'name': f'{__name__}.{method}'}
    if micro_batches > 1:
        method['micro_batches'] = micro_batches
    for name in config.stages:
        config[name] = kd_config.stage(
            network={'name': f'{__name__}.Net', 'plain': plain},
            method=method,
            optimizer={'lr': 0.01, 'weight_decay': 0.01, 'clip_norm': 1.0},
            ema={'slow': 0.5},
            steps=steps,
            batch_size=32,
            teacher=teacher if name == 'student' else '',
        )
    return config


def a_stage(mesh, *, frozen_sharding=(), teacher='', **options):
    """A stage on a mesh; without the name of a teacher, it gets one that is drawn at random."""
    config = a_recipe(mesh, frozen_sharding=frozen_sharding, teacher=teacher, **options)
    stage = prepare(kd_config.parse(config), 'student', mesh_lib.make_mesh(mesh))
    if teacher:
        return stage
    rng = np.random.default_rng(7)
    variables = jax.tree.map(
        lambda x: rng.uniform(0.1, 0.5, x.shape).astype(x.dtype),
        jax.eval_shape(stage.context.network.init, jax.random.key(0)),
    )
    shardings = tree_shardings(variables, frozen_sharding, stage.mesh)
    return dataclasses.replace(stage, frozen={'teacher': jax.device_put(variables, shardings)})


@pytest.mark.parametrize(('ways', 'waits'), [(1, []), (2, [8, 16])])
def test_the_host_runs_ahead_of_several_devices_of_a_cpu_by_few_steps(ways, waits, monkeypatch):
    waited = []
    monkeypatch.setattr(jax, 'block_until_ready', waited.append)
    pace = mesh_lib.Pace(mesh_lib.make_mesh({'data': ways}))
    for step in range(1, 21):
        pace(step)
    assert waited == waits


def test_training_evaluation_and_further_seeds_keep_the_pace(monkeypatch, tmp_path):
    kept = []

    class Counted(mesh_lib.Pace):
        def __call__(self, value):
            kept.append(value)
            super().__call__(value)

    monkeypatch.setattr(mesh_lib, 'Pace', Counted)
    config = a_recipe({'data': 2}, steps=3)
    config.stages = ('teacher',)
    del config['student']
    config.data.test = 'test[:64]'
    config.teacher.method = {'name': 'kd.methods.vision.supervised.supervised'}
    config.teacher.evaluators = {'test': {'name': ACCURACY, 'split': 'test'}}
    loop.run(config, tmp_path / 'run')
    # The first step is waited for, two go ahead; two batches are evaluated.
    assert len(kept) == 2 + 2
    stage = prepare(kd_config.parse(config), 'teacher', mesh_lib.make_mesh({'data': 2}))
    list(repeats(stage, (1,)))
    assert len(kept) == 2 + 2 + 3


def a_run(mesh, *, steps=5, **options):
    """The state and metrics of a few steps of the loop's own train step on a mesh."""
    stage = a_stage(mesh, steps=steps, **options)
    step, state = step_lib.make_train_step(stage), step_lib.initial_state(stage)
    _, _, window, _ = step_lib.abstract_arguments(stage)
    window = jax.tree.map(lambda x: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding), window)
    batches = stage.batches()
    for _ in range(steps):
        batch = mesh_lib.put_batch(next(batches), stage.batch_sharding())
        state, window = step(state, stage.frozen, window, batch)
    return state, window


@pytest.fixture(scope='module')
def on_one_device():
    return a_run({'data': 1})


def assert_same_numbers(run, reference):
    (state, window), (expected, expected_window) = run, reference
    for name in ('params', 'mutables', 'ema', 'opt_state'):
        ours, theirs = getattr(state, name), getattr(expected, name)
        jax.tree.map(
            lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5), ours, theirs
        )
    found, wanted = metrics_lib.divide(window), metrics_lib.divide(expected_window)
    assert set(found) == set(wanted) == {'loss', 'soft', 'grad_norm', 'nonfinite'}
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-6)
    assert window['loss'].count == 5 * 32
    assert int(state.step) == 5


TENSOR = (('hidden./kernel', (None, 'tensor')), ('hidden./bias|norm/', ('tensor',)),
          ('head/kernel', ('tensor', None)))  # fmt: skip


@pytest.mark.parametrize(
    ('mesh', 'sharding', 'cut'),
    [
        ({'data': 8}, (), {'params/network/hidden1/kernel': (16, 16)}),
        ({'data': 1, 'fsdp': 8}, (('.', 'fsdp'),), {
            'params/network/hidden1/kernel': (2, 16),
            'opt_state/1/0/nu/hidden0/kernel': (2, 2),
            'ema/slow/network/head/kernel': (2, 2),
            'mutables/network/batch_stats/norm/mean': (2,),
        }),
        ({'data': 1, 'tensor': 8}, TENSOR, {
            'params/network/hidden1/kernel': (16, 2),
            'opt_state/1/0/mu/hidden1/bias': (2,),
            'params/network/head/kernel': (2, 2),
        }),
        ({'data': 2, 'fsdp': 2, 'tensor': 2}, (*TENSOR, ('.', 'fsdp')), {
            'params/network/hidden0/kernel': (2, 8),
            'mutables/network/batch_stats/norm/var': (8,),
        }),
    ],
    ids=['data', 'fsdp', 'tensor', 'all'],
)  # fmt: skip
def test_eight_devices_give_the_numbers_of_one(on_one_device, mesh, sharding, cut):
    run = a_run(mesh, sharding=sharding, frozen_sharding=sharding)
    assert_same_numbers(run, on_one_device)
    # And the work was spread: each device holds the part that the rules give it.
    leaves = jax.tree_util.tree_flatten_with_path(run[0])[0]
    leaves = {path_name(path): leaf for path, leaf in leaves}
    for name, shape in cut.items():
        shards = leaves[name].addressable_shards
        assert {shard.data.shape for shard in shards} == {shape}
        assert len({shard.device for shard in shards}) == 8


def test_micro_batches_on_four_devices_give_the_numbers_of_one():
    reference = a_run({'data': 1}, plain=True)
    run = a_run({'data': 2, 'fsdp': 2}, plain=True, micro_batches=4, sharding=(('.', 'fsdp'),))
    assert_same_numbers(run, reference)


def initialised_from_teacher(context):
    """A student that starts where its teacher is."""
    method = distil(context)

    def init(key, frozen):
        state = method.init(key, frozen)
        start = jax.tree.map(lambda x: 2 * x, frozen['teacher']['params'])
        return state.with_params(start)

    return method._replace(init=init)


def of_no_field(context):
    def update(state, batch):
        raise ValueError('no such field')

    return Evaluator(update, dict)


def test_a_student_may_start_from_its_teacher():
    stage = a_stage({'data': 1, 'fsdp': 2}, method='initialised_from_teacher')
    state = step_lib.initial_state(stage)
    teacher = stage.frozen['teacher']['params']
    jax.tree.map(
        lambda x, y: np.testing.assert_array_equal(x, 2 * y), state.params['network'], teacher
    )
    assert state.frozen == {}


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'evaluators': {'test': {'name': ACCURACY, 'split': 'test'}}},
            r"config\.data has no split 'test', only \['train'\]",
        ),
        (
            {'evaluators': {'train': {'name': ACCURACY, 'split': 'train', 'top_k': -1}}},
            r'^student\.evaluators\.train\.top_k must be an integer from 0 .*, got -1',
        ),
        (
            {'evaluators': {'train': {'name': f'{__name__}.of_no_field', 'split': 'train'}}},
            '^student: the evaluator train fails: ',
        ),
        ({'batch_size': 1 << 20}, 'batch_size=1048576 exceeds the'),
        ({'network': {'widths': (4,)}}, "'' is not an import path"),
        ({'method': {'name': f'{__name__}.distil', 'micro_batches': 3}}, 'distil fails: .* of 32 '),
    ],
)
def test_what_is_wrong_with_a_stage_is_found_before_anything_runs(change, message):
    config = a_recipe({'data': 1}, teacher='teacher')
    with config.ignore_type(), config.unlocked():
        for name, value in change.items():
            config.student[name] = value
    with pytest.raises(UserError, match=message):
        step_lib.check(kd_config.parse(config), 'student', make(data=1))


@pytest.mark.parametrize(
    ('best', 'message'),
    [
        ('-train/loss', None),
        ('-test/nll', None),
        ('test/acuracy', r"student\.best='test/acuracy' is none of: test/accuracy, test/nll\."),
    ],
)
def test_a_best_metric_must_be_one_there_is(best, message, tmp_path):
    config = a_recipe({'data': 1}, plain=True)
    config.data.test = 'test[:64]'
    evaluators = {'test': {'name': ACCURACY, 'split': 'test'}}
    with config.ignore_type():
        config.student.update(best=best, evaluators=evaluators)
    stage = prepare(kd_config.parse(config), 'student', make(data=1))
    evaluate, state = Evaluation(stage), step_lib.initial_state(stage)
    if message is None:
        assert set(evaluate(state, 0, tmp_path)) == {'test/accuracy', 'test/nll'}
    else:
        with pytest.raises(UserError, match=message):
            evaluate(state, 0, tmp_path)


def test_a_teacher_lies_where_its_rules_say_and_the_step_takes_it_there():
    rules = (('^params/hidden1', 'fsdp'), ('head', (None, 'data')))
    stage = a_stage({'data': 2, 'fsdp': 4}, frozen_sharding=rules, teacher='teacher')
    found = jax.tree.map(lambda x: x.sharding.spec, stage.frozen['teacher']['params'])
    assert found['hidden0']['kernel'] == P()
    assert found['hidden1']['kernel'] == P('fsdp')
    assert found['head']['kernel'] == P(None, 'data')
    expected = stage.abstract_state().frozen['teacher']['params']
    assert jax.tree.map(lambda x: x.sharding.spec, expected) == found
