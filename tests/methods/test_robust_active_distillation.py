"""Robust active distillation: what a student learns of, and what a teacher is asked."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kd import config as kd_config
from kd.claims import seeds
from kd.data import columns as data_columns
from kd.data import selection
from kd.data.context import SourceContext
from kd.errors import UserError
from kd.io import columns
from kd.methods.vision.robust_active_distillation import acquired_kd, query
from kd.models.mlp import MLP
from kd.network import from_linen
from kd.networks import trained_network
from kd.parallel.mesh import make_mesh
from kd.training import loop
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CONFIG = 'configs/vision/robust_active_distillation.py'
CLASSES, BATCH = 3, 8
ROW = jax.ShapeDtypeStruct((1, 4), jnp.float32)
NET = from_linen(MLP(widths=(), num_classes=CLASSES), ROW)
TRUTH = jax.ShapeDtypeStruct((), np.bool_)


def test_a_step_is_that_of_two_means_over_what_is_there():
    rng = np.random.default_rng(0)
    data = {
        'input': jnp.asarray(rng.normal(size=(BATCH, 4)), jnp.float32),
        'label': jnp.asarray(rng.integers(CLASSES, size=BATCH)),
        'answer': jnp.asarray(rng.normal(size=(BATCH, CLASSES)), jnp.float32),
        'queried': jnp.arange(BATCH) >= 3,
        'mask': jnp.arange(BATCH) < 7,
    }
    context = seeds.context(
        network=NET, tx=optax.sgd(1.0), num_classes=CLASSES, spec={'queried': TRUTH}
    )
    method = acquired_kd(context)
    state, step = jax.jit(method.init)(jax.random.key(0), {}), jax.jit(method.step)
    moved, metrics = step(state, data)
    head = state.params['network']['head']
    x = np.asarray(data['input'], np.float64)
    q = scipy.special.softmax(x @ np.asarray(head['kernel']) + np.asarray(head['bias']), -1)
    p = scipy.special.softmax(np.asarray(data['answer'], np.float64), -1)
    target = np.where(np.arange(BATCH)[:, None] < 3, np.eye(CLASSES)[data['label']], p)
    # Three labelled, four answers, one row of padding.
    w = np.array([1 / 3] * 3 + [1 / 4] * 4 + [0])
    slope = x.T @ (w[:, None] * (q - target))
    found = np.asarray(head['kernel']) - np.asarray(moved.params['network']['head']['kernel'])
    np.testing.assert_allclose(found, slope, rtol=1e-4, atol=1e-6)
    hard = -np.log(q[np.arange(3), data['label'][:3]]).mean()
    soft = (p * np.log(p / q)).sum(-1)[3:7].mean()
    loss = metrics['loss'].total / metrics['loss'].count
    np.testing.assert_allclose(loss, hard + soft, rtol=1e-5)
    # Neither padding nor what a teacher would have said of a labelled example counts.
    other = {**data, 'answer': data['answer'].at[:3].set(9.0).at[7].set(-9.0)}
    jax.tree.map(np.testing.assert_array_equal, step(state, other)[0].params, moved.params)
    # A batch of one kind alone.
    alone = step(state, {**data, 'queried': jnp.zeros(BATCH, bool)})[1]['loss']
    assert np.isfinite(alone.total)
    with pytest.raises(UserError, match=r"no field 'queried'; name kd\.data\.columns\.acquired"):
        acquired_kd(seeds.context(network=NET, num_classes=CLASSES, spec={'input': ROW}))


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """Two rounds of ten, of a pool of 60."""
    module = kd_config.load_module(Path(CONFIG))
    network, adam = dict(name='kd.models.mlp.MLP', widths=(8,)), dict(name='adamw', lr=1e-2)
    config = module.recipe(
        data=dict(
            name='digits', labelled='train[:30]', train='train[30:90]',
            validation='train[1200:1300]', test='test',
        ),
        teacher=dict(
            network=network, optimizer=adam, steps=20, batch_size=80,
            data=dict(train='train[1000:1080]'),
        ),
        student=dict(network=network, optimizer=adam, steps=20),
        arms=('rad',),
        labelled=30,
        count=10,
        rounds=2,
        batch_size=None,
        asking=16,
    )  # fmt: skip
    config.report, config.mesh.data = {}, 1
    workdir = tmp_path_factory.mktemp('rad') / 'run'
    loop.run(config, workdir)
    return kd_config.parse(config), workdir


def stage_of(run, name):
    recipe, workdir = run
    return prepare(recipe, name, make_mesh({'data': 1}), workdir)


def test_a_teacher_says_of_what_it_is_asked_alone(run):
    recipe, workdir = run
    stage = stage_of(run, 'rad_query_2')
    source = stage.context.source('train')
    spec = columns.spec_of(query, source)
    first, second = (columns.Columns(workdir / f'rad_query_{r}', spec).all() for r in (1, 2))
    pool = source.fetch(np.arange(len(source)))
    net = stage.context.teacher

    def outputs(name):
        trained = trained_network(
            recipe, name, workdir, make_mesh({'data': 1}), source, where='test'
        )
        return np.asarray(trained.network.apply(trained.restore(), pool['input']).logits)

    said = outputs('teacher')
    assert net.module.widths == (8,)
    for found, count in ((first, 10), (second, 20)):
        asked = found['queried']
        assert asked.sum() == count
        np.testing.assert_allclose(found['answer'][asked], said[asked], atol=1e-5)
        np.testing.assert_array_equal(found['answer'][~asked], 0.0)
    assert (second['queried'] >= first['queried']).all()
    # The second round plays the game of what the first has left, with its student.
    left = ~first['queried']
    probs = scipy.special.softmax(outputs('rad_1').astype(np.float64), -1)
    game = selection.rad_hard(selection.margin_gain(probs), 0.6 * left.sum(), where=left)
    new = second['queried'] & left
    inside = np.asarray(game.q) > 0
    assert (new & inside).sum() == min(10, inside.sum())


def test_what_was_not_asked_can_be_anything(run, tmp_path):
    """Trap: a peek at outputs that nobody has paid for."""
    source = stage_of(run, 'rad_2').context.source('train')
    assert len(source) == 30 + 20
    given = source.fetch(np.array([49, 0, 31, 29, 30]))
    np.testing.assert_array_equal(given['queried'], [True, False, True, False, True])
    np.testing.assert_array_equal(given['index'], [49, 0, 31, 29, 30])
    labels = given['label'][given['queried']]
    np.testing.assert_array_equal(labels, given['answer'][given['queried']].argmax(-1))
    pool = stage_of(run, 'rad_query_2').context.source('train')
    spec = columns.spec_of(query, pool)
    stored = columns.Columns(run[1] / 'rad_query_2', spec).all()
    own = stage_of(run, 'first').context.source('train')

    def every(values, directory):
        columns.Writer(directory, spec, len(pool), {}).write(values)
        rows = np.flatnonzero(values['queried'])
        joined = data_columns.Joined(pool, spec, columns.Columns(directory, spec))
        made = data_columns._Acquired(own, data_columns.Rows(joined, rows, 'some'))
        return made.fetch(np.arange(len(made)))

    other = dict(stored, answer=stored['answer'].copy())
    other['answer'][~stored['queried']] = 7.0
    a, b = (every(v, tmp_path / name) for v, name in ((stored, 'a'), (other, 'b')))
    jax.tree.map(np.testing.assert_array_equal, a, b)
    np.testing.assert_array_equal(a['input'][:30], own.fetch(np.arange(30))['input'])


def test_columns_are_joined_by_the_index_of_an_example(run):
    recipe, workdir = run
    context = SourceContext(recipe.data['train'], recipe, workdir)
    spec = columns.spec_of(query, context.recipe_data('test'))
    stored = columns.Columns(workdir / 'rad_query_1', spec).all()
    every = data_columns.joined(context, stage='rad_query_1', names=('queried',))
    found = every.fetch(np.array([5, 0, 59]))
    np.testing.assert_array_equal(found['queried'], stored['queried'][[5, 0, 59]])
    assert 'answer' not in every.spec
    kept = data_columns.joined(context, stage='rad_query_1', keep='queried')
    assert len(kept) == 10
    found = kept.fetch(np.arange(10))
    np.testing.assert_array_equal(found['index'], np.flatnonzero(stored['queried']))
    np.testing.assert_array_equal(found['answer'], stored['answer'][found['index']])
    # Other splits stay, and so does what only is checked.
    test = SourceContext('test', recipe, workdir)
    assert 'queried' not in data_columns.joined(test, stage='rad_query_1').spec
    checked = SourceContext(recipe.data['train'], recipe)
    assert len(data_columns.joined(checked, stage='rad_query_1', keep='queried')) == 60
    for arguments, told in (
        (dict(stage='rad_query_9'), r"data\.source\.stage='rad_query_9' is no stage"),
        (dict(stage='teacher'), "stage 'teacher' has no writer of columns"),
        (
            dict(stage='rad_query_1', names=('asked',)),
            r"names: there is no column 'asked', only que",
        ),
    ):
        with pytest.raises(UserError, match=told):
            data_columns.joined(context, **arguments)


def test_labelled_examples_stand_beside_others(run):
    recipe, workdir = run
    context = SourceContext(recipe.data['train'], recipe, workdir)
    source = data_columns.beside(context, split=recipe.data['labelled'])
    found = source.fetch(np.array([3, 33, 59]))
    own = context.recipe_data(recipe.data['labelled']).fetch(np.array([3, 3, 29]))
    for name in ('input', 'label', 'index'):
        np.testing.assert_array_equal(found[f'labelled_{name}'], own[name])
        assert source.spec[f'labelled_{name}'].shape == own[name].shape[1:]
    np.testing.assert_array_equal(found['index'], [3, 33, 59])
    test = SourceContext('test', recipe, workdir)
    assert 'labelled_input' not in data_columns.beside(test, split=recipe.data['labelled']).spec


def test_no_more_is_asked_than_is_left(run):
    stage = stage_of(run, 'rad_query_2')
    recipe, workdir = run
    writer = dict(recipe.stages['rad_query_2'].writers['query'], count=51)
    write = kd_config.build(writer, stage.context, where='writer')
    state = jax.jit(stage.method.init)(stage.key(), {}).replace(frozen=stage.frozen)
    with pytest.raises(UserError, match='count=51 is more than the 50 examples that nobody has'):
        write(state, 1, workdir / 'elsewhere')


@pytest.mark.parametrize('kind', ['k_center', 'margin'])
def test_others_ask_by_features_or_by_margin(run, kind, tmp_path):
    stage = stage_of(run, 'rad_query_2')
    recipe, _ = run
    writer = dict(recipe.stages['rad_query_2'].writers['query'], kind=kind, count=5)
    write = kd_config.build(writer, stage.context, where='writer')
    state = jax.jit(stage.method.init)(stage.key(), {}).replace(frozen=stage.frozen)
    write(state, 1, tmp_path)
    source = stage.context.source('train')
    spec = columns.spec_of(query, source)
    found = columns.Columns(tmp_path, spec).all()['queried']
    before = columns.Columns(run[1] / 'rad_query_1', spec).all()['queried']
    x = source.fetch(np.arange(len(source)))['input']
    student = stage.context.references['student']
    output = student.apply(stage.frozen['student'], x, capture=('features',))
    if kind == 'margin':
        gain = np.asarray(selection.margin_gain(jax.nn.softmax(output.logits)))
        wanted = np.argsort(np.where(before, np.inf, -gain))[:5]
    else:
        wanted = np.asarray(selection.k_center(output.features['features'], before, 5))
    assert set(np.flatnonzero(found & ~before)) == set(wanted)
