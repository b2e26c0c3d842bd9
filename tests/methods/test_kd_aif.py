"""Weighted distillation, weights of influence as a stage, and the teacher that is told of them."""

from pathlib import Path

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kd import config as kd_config
from kd.claims import seeds
from kd.data import catalogue, sources
from kd.errors import UserError
from kd.io import columns
from kd.io.workdir import read_metrics
from kd.methods.vision.adapted_weight import weighted_kd
from kd.methods.vision.logit_kd import logit_kd
from kd.methods.vision.teacher_feedback import teacher_feedback
from kd.models.mlp import MLP
from kd.network import from_linen
from kd.networks import trained_network
from kd.parallel.mesh import make_mesh
from kd.training import loop
from kd.training.stage import prepare

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES, BATCH, WIDTH = 3, 8, 4
ROW = jax.ShapeDtypeStruct((1, 4), jnp.float32)
NET = from_linen(MLP(widths=(WIDTH,), num_classes=CLASSES), ROW)
NUMBER = jax.ShapeDtypeStruct((), jnp.float32)
CONFIG = Path('configs/vision/kd_aif.py')


def context(**more):
    given = dict(
        network=NET, teacher=NET, tx=optax.sgd(1.0), num_classes=CLASSES,
        spec={'weight': NUMBER, 'labelled_label': NUMBER},
    )  # fmt: skip
    return seeds.context(**(given | more))


def batch():
    rng = np.random.default_rng(0)
    return {
        'input': jnp.asarray(rng.normal(size=(BATCH, 4)), jnp.float32),
        'label': jnp.asarray(rng.integers(CLASSES, size=BATCH)),
        'weight': jnp.asarray(rng.random(BATCH), jnp.float32),
        'labelled_input': jnp.asarray(rng.normal(size=(BATCH, 4)), jnp.float32),
        'labelled_label': jnp.asarray(rng.integers(CLASSES, size=BATCH)),
    }


def begun(method):
    teacher = jax.jit(NET.init)(jax.random.key(1))
    return jax.jit(method.init)(jax.random.key(0), {'teacher': teacher})


def after(method, data):
    state = begun(method)
    moved, metrics = jax.jit(method.step)(state, data)
    step = jax.tree.map(lambda a, b: a - b, state.params, moved.params)
    return state, step, {k: float(m.total / m.count) for k, m in metrics.items()}


def close(a, b, **options):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, **options), a, b)


def test_a_step_is_that_of_the_weighted_mean():
    data = batch()
    state, step, metrics = after(weighted_kd(context(), temperature=2.0, soft_weight=0.7), data)

    def forward(params, x):
        hidden = np.maximum(x @ params['hidden0']['kernel'] + params['hidden0']['bias'], 0)
        return hidden @ params['head']['kernel'] + params['head']['bias']

    x = np.asarray(data['input'], np.float64)
    teacher = forward(state.frozen['teacher']['params'], x)
    log_p = scipy.special.log_softmax(teacher / 2, -1)
    w = np.asarray(data['weight'], np.float64)

    def risk(params):
        z = forward(params, x)
        hard = -scipy.special.log_softmax(z, -1)[np.arange(BATCH), data['label']]
        soft = 4 * (np.exp(log_p) * (log_p - scipy.special.log_softmax(z / 2, -1))).sum(-1)
        losses = 0.3 * hard + 0.7 * soft
        return (w * losses).sum() / w.sum(), losses.mean()

    params = jax.tree.map(np.float64, jax.device_get(state.params['network']))
    value, unweighted = risk(params)
    assert metrics['loss'] == pytest.approx(value, rel=1e-5)
    assert metrics['unweighted'] == pytest.approx(unweighted, rel=1e-5)
    rng = np.random.default_rng(1)
    along = jax.tree.map(lambda x: rng.normal(size=x.shape), params)
    high, low = (
        risk(jax.tree.map(lambda p, d, e=e: p + e * d, params, along))[0] for e in (1e-6, -1e-6)
    )
    found = jax.tree.map(lambda g, d: np.sum(g * d), step['network'], along)
    assert sum(jax.tree.leaves(found)) == pytest.approx((high - low) / 2e-6, rel=2e-4)


def test_only_the_ratios_of_weights_count_and_equal_ones_are_plain_distillation():
    data = batch()
    method = weighted_kd(context(), temperature=2.0, soft_weight=0.7)
    _, step, metrics = after(method, data)
    half = {**data, 'weight': 0.5 * data['weight']}
    close(after(method, half)[1], step)
    # Sums and counts are added up apart: parts of other weights do not count alike.
    parts = weighted_kd(context(), temperature=2.0, soft_weight=0.7, micro_batches=2)
    close(after(parts, data)[1], step)
    even = {**data, 'weight': jnp.full(BATCH, 0.3)}
    plain = after(logit_kd(context(), temperature=2.0, soft_weight=0.7), data)
    close(after(method, even)[1], plain[1])
    uniform = weighted_kd(context(), temperature=2.0, soft_weight=0.7, weight='')
    close(after(uniform, data)[1], plain[1])
    # An example of no weight, whatever it is.
    one = {**data, 'weight': data['weight'].at[0].set(0.0)}
    other = {**one, 'input': one['input'].at[0].set(100.0)}
    close(after(method, one)[1], after(method, other)[1])
    assert metrics['weight'] == pytest.approx(float(data['weight'].mean()), rel=1e-5)


def test_no_label_is_read_where_none_counts():
    data = batch()
    method = weighted_kd(context(), temperature=1.0, soft_weight=1.0)
    unlabelled = {name: x for name, x in data.items() if name != 'label'}
    close(after(method, unlabelled)[1], after(method, data)[1])


def test_data_without_weights_or_labels_are_refused():
    with pytest.raises(UserError, match=r"data have no field 'weight', only .*joins the columns"):
        weighted_kd(context(spec={'input': ROW}))
    with pytest.raises(UserError, match="data have no field 'labelled_label'"):
        teacher_feedback(context(spec={'input': ROW}))


def test_a_teacher_moves_by_what_its_labels_did_to_the_student():
    """One step of both players, from dense algebra."""
    data, damping, kappa = batch(), 0.3, 2.0
    method = teacher_feedback(context(), damping=damping, kappa=kappa, iterations=60, feedback=0.5)
    state, step, metrics = after(method, data)
    # The teacher begins as the stage's.
    close(state.params['teacher'], state.frozen['teacher']['params'])
    student, unravel = jax.flatten_util.ravel_pytree(state.params['network'])
    logits = lambda p, x: NET.apply({'params': p}, x).logits  # noqa: E731

    def ce(p, x, y):
        return -jax.nn.log_softmax(logits(p, x))[jnp.arange(BATCH), y]

    @jax.jit
    def parts(flat, teacher):
        y = logits(teacher, data['input']).argmax(-1)
        held = data['labelled_input'], data['labelled_label']
        return (
            y,
            jax.grad(lambda f: ce(unravel(f), *held).mean())(flat),
            jax.jacrev(lambda f: ce(unravel(f), data['input'], y))(flat),
            jax.jacrev(lambda f: logits(unravel(f), data['input']))(flat),
            jax.nn.softmax(logits(unravel(flat), data['input'])),
        )

    y, slope, each, jacobian, p = (
        np.asarray(x, np.float64) if x.dtype == jnp.float32 else x
        for x in parts(student, state.params['teacher'])
    )
    curved = np.einsum('nc,cd->ncd', p, np.eye(CLASSES)) - np.einsum('nc,nd->ncd', p, p)
    g = np.einsum('nai,nab,nbj->ij', jacobian, curved, jacobian) / BATCH
    influence = -each @ np.linalg.solve(g + damping * np.eye(len(g)), slope)
    scaled = influence / influence.std()
    w = scipy.special.expit(-kappa * scaled)
    assert metrics['network/residual'] < 1e-4
    assert metrics['network/weight'] == pytest.approx(w.mean(), rel=1e-3)
    taught = unravel(jnp.asarray(w @ each / w.sum(), jnp.float32))
    close(step['network'], taught, rtol=2e-3)

    def teaching(p):
        labelled = ce(p, data['labelled_input'], data['labelled_label'])
        return jnp.mean(labelled - 0.5 * jnp.asarray(scaled) * ce(p, data['input'], y))

    close(step['teacher'], jax.jit(jax.grad(teaching))(state.params['teacher']), rtol=2e-3)
    # The unit of influences is that of the batch, not of its parts.
    parts = teacher_feedback(
        context(), damping=damping, kappa=kappa, iterations=60, feedback=0.5, micro_batches=4
    )
    close(after(parts, data)[1], step, rtol=1e-4)


def test_the_teacher_learns_from_labelled_images_that_are_augmented_too():
    """Influences do not: the student moves as without."""
    image = jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32)
    net = from_linen(MLP(widths=(3,), num_classes=CLASSES), image)
    given, rng = context(network=net, teacher=net), np.random.default_rng(3)
    data = batch() | {
        name: jnp.asarray(rng.normal(size=(BATCH, 4, 4, 1)), 'f4')
        for name in ('input', 'labelled_input')
    }
    mirrored = {name: data[name][:, :, ::-1] for name in ('input', 'labelled_input')}
    method = teacher_feedback(given, feedback=0.0, augmentation=(('flip', 1.0),))
    plain = teacher_feedback(given, feedback=0.0)
    frozen = {'teacher': net.init(jax.random.key(1))}
    state = method.init(jax.random.key(0), frozen)
    flipped, of_both, of_inputs = (
        jax.jit(of.step)(state, x)[0].params
        for of, x in (
            (method, data), (plain, data | mirrored),
            (plain, data | {'input': mirrored['input']}),
        )
    )  # fmt: skip
    close(flipped['teacher'], of_both['teacher'])
    close(flipped['network'], of_inputs['network'])
    apart = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), of_both, of_inputs)
    assert max(jax.tree.leaves(apart['teacher'])) > 1e-4
    assert max(jax.tree.leaves(apart['network'])) > 1e-5


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """One round of the small recipe, with smaller networks and a few steps."""
    module = kd_config.load_module(CONFIG)
    plain = kd_config.to_plain(module.get_config('cpu'))
    network = dict(name='kd.models.mlp.MLP', widths=(WIDTH,))
    run = dict(network=network, optimizer=dict(name='adamw', lr=1e-2), batch_size=30)
    data = dict(plain['data'], train='train[100:190]', validation='train[700:740]')
    config = module.recipe(
        data=data,
        teacher=dict(run, steps=20, data=dict(train='train[:100]')),
        noise=plain['student']['data']['source']['of'],
        student=run,
        steps=(20, 20),
        rounds=2,
        distilled=dict(temperature=1.0, soft_weight=1.0),
        weighing=dict(damping=0.1, iterations=60),
        alone=None,
        evaluated='validation',
    )
    config.stages = tuple(name for name in config.stages if name != 'uniform')
    del config.uniform
    config.report, config.mesh.data = {}, 1
    workdir = tmp_path_factory.mktemp('aif') / 'run'
    loop.run(config, workdir)
    return kd_config.parse(config), workdir


def test_the_columns_of_a_run_are_the_influences_of_its_student(run):
    recipe, workdir = run
    stage = prepare(recipe, 'weights_2', make_mesh({'data': 1}), workdir)
    source = stage.context.source('train')
    pool = source.fetch(np.arange(len(source)))
    held = stage.context.source('validation').fetch(np.arange(40))
    variables = trained_network(
        recipe, 'student_1', workdir, make_mesh({'data': 1}), source, where='test'
    ).restore()
    net = stage.context.references['student']
    flat, unravel = jax.flatten_util.ravel_pytree(variables['params'])

    @jax.jit
    def parts(flat):
        def log_q(f, x):
            return jax.nn.log_softmax(net.apply({'params': unravel(f)}, x).logits)

        p = jax.nn.softmax(pool['teacher_logits'])
        each = jax.jacrev(lambda f: -(p * log_q(f, pool['input'])).sum(-1))(flat)
        on_held = lambda f: -log_q(f, held['input'])[jnp.arange(40), held['label']].mean()  # noqa: E731
        jacobian = jax.jacrev(lambda f: log_q(f, pool['input']))(flat)
        return each, jax.grad(on_held)(flat), jacobian, jnp.exp(log_q(flat, pool['input']))

    each, slope, jacobian, q = (np.asarray(x, np.float64) for x in parts(flat))
    # The weights of the round before are those of the risk.
    w = pool['weight'] / pool['weight'].sum()
    curved = np.einsum('nc,cd->ncd', q, np.eye(10)) - np.einsum('nc,nd->ncd', q, q)
    g = np.einsum('n,nai,nab,nbj->ij', w, jacobian, curved, jacobian, optimize=True)
    wanted = -each @ np.linalg.solve(g + 0.1 * np.eye(len(g)), slope)
    spec = dict.fromkeys(('weight', 'influence'), columns.NUMBER)
    found = columns.Columns(workdir / 'weights_2', spec).all()
    np.testing.assert_allclose(found['influence'], wanted, rtol=1e-2, atol=2e-3 * wanted.std())
    weights = scipy.special.expit(-3.0 * wanted / wanted.std())
    np.testing.assert_allclose(found['weight'], weights, atol=1e-2)
    # The last student saw them, and the area is that of its data.
    student = prepare(recipe, 'student', make_mesh({'data': 1}), workdir).context.source('train')
    seen = student.fetch(np.arange(len(student)))
    np.testing.assert_array_equal(seen['weight'], found['weight'])
    assert 0 < seen['wrong'].mean() < 1
    last = [line for line in read_metrics(workdir / 'student') if 'wrong/roc_auc' in line][-1]
    pairs = np.subtract.outer(-seen['weight'][seen['wrong']], -seen['weight'][~seen['wrong']])
    assert last['wrong/roc_auc'] == pytest.approx(np.mean((pairs > 0) + 0.5 * (pairs == 0)))


def test_what_is_not_solved_is_not_written(run):
    recipe, workdir = run
    stage = prepare(recipe, 'weights_1', make_mesh({'data': 1}), workdir)
    writer = dict(recipe.stages['weights_1'].writers['weights'], iterations=1, damping=1e-4)
    write = kd_config.build(writer, stage.context, where='writer')
    state = jax.jit(stage.method.init)(stage.key(), {}).replace(frozen=stage.frozen)
    told = (
        r"^weights_1: the influences' linear system is solved up to a relative residual of .* more"
    )
    with pytest.raises(UserError, match=told):
        write(state, 1, workdir / 'elsewhere')
    assert not list((workdir / 'elsewhere').rglob('*.array_record'))


def test_columns_of_another_training_are_refused(run, tmp_path):
    recipe, workdir = run
    done = workdir / 'student_1' / 'done.json'
    before = done.read_text()
    done.write_text(before.replace('"step": 20', '"step": 21'))
    try:
        with pytest.raises(UserError, match='was made from another training of student'):
            prepare(recipe, 'student', make_mesh({'data': 1}), workdir).context.source('train')
    finally:
        done.write_text(before)


@pytest.mark.parametrize('variant', ['cpu', 'cifar100', 'cifar10_4k', 'svhn_1k'])
def test_no_example_that_is_weighed_is_one_that_it_is_weighed_by(variant):
    """Trap: validation or test images in the pool."""
    data = kd_config.load(f'{CONFIG}:{variant}').data.to_dict()
    sizes = {'digits': 1_500, 'svhn_cropped': 73_257}.get(data['name'], 50_000)
    taken = np.zeros(sizes, int)
    names = [name for name in ('labelled', 'train', 'validation', 'held') if name in data]
    for name in names:
        for base, start, stop in sources.parse_split(data[name], {'train': sizes, 'test': 1}):
            assert base == 'train'
            taken[start:stop] += 1
    assert taken.max() == 1
    assert data['test'] == 'test'
    if variant == 'cpu':
        assert len(catalogue.load('digits', 'train')) == sizes
