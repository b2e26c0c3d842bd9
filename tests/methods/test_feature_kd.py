"""Mixtures of losses on features: their values and gradient, what is left out, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kd.claims import seeds
from kd.errors import UserError
from kd.losses import feature_maps, relation
from kd.methods.vision.feature_kd import feature_kd
from kd.methods.vision.supervised import supervised
from kd.models.convnet import ConvNet
from kd.models.mlp import MLP
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES, BATCH, LR = 3, 8, 0.1
IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)
ROW = jax.ShapeDtypeStruct((1, 4), jnp.float32)
RKD = dict(loss='kd.losses.relation.rkd_distance', student='features')


def batch(shape):
    rng = np.random.default_rng(0)
    return {
        'input': rng.normal(size=(BATCH, *shape[1:])).astype(np.float32),
        'label': rng.integers(0, CLASSES, BATCH).astype(np.int32),
    }


def context(student, teacher, shape, tx):
    student, teacher = (from_linen(module, shape) for module in (student, teacher))
    return seeds.context(
        network=student, teacher=teacher, tx=tx, num_classes=CLASSES, batch_size=BATCH, spec={}
    )


@pytest.fixture(scope='module')
def rows():
    """Of MLPs, with a narrower student."""
    modules = (MLP(widths=(width,), num_classes=CLASSES) for width in (9, 12))
    return context(*modules, ROW, optax.sgd(LR))


@pytest.fixture(scope='module')
def maps():
    """Of convolutional networks with batch norms, the teacher wider."""
    modules = (ConvNet(depth=2, width=width, num_classes=CLASSES, norm='batch') for width in (4, 6))
    return context(*modules, IMAGE, optax.adamw(1e-3, weight_decay=0.1))


def begun(method, context):
    teacher = context.teacher.init(jax.random.key(1))
    return method.init(jax.random.key(0), {'teacher': teacher})


def test_all_weights_zero_is_supervised_bit_for_bit(maps):
    off = dict(RKD, weight=0.0)
    hint = dict(
        loss='kd.losses.feature.hint', student='block0', weight=0,
        projector=dict(name='kd.models.projectors.ConvNorm'),
    )  # fmt: skip
    data, final = batch(IMAGE.shape), []
    for method in (supervised(maps), feature_kd(maps, terms={'rkd': off, 'hint': hint})):
        state, step = begun(method, maps), jax.jit(method.step)
        for _ in range(3):
            state, metrics = step(state, data)
        final.append((state.params, state.mutables, state.opt_state, metrics['accuracy']))
    jax.tree.map(np.testing.assert_array_equal, *final)


def objective(params, teacher, data, weights):
    """In float64: labels, softened outputs at 2, a projected hint and InfoNCE."""
    x, labels = data['input'].astype(np.float64), data['label']
    network, projectors = params['network'], params['projectors']

    def forward(p):
        hidden = np.maximum(x @ p['hidden0']['kernel'] + p['hidden0']['bias'], 0)
        return hidden, hidden @ p['head']['kernel'] + p['head']['bias']

    hidden, logits = forward(network)
    taught, teacher_logits = forward(teacher)
    log_q = scipy.special.log_softmax(logits, -1)
    q, p = (scipy.special.log_softmax(z / 2, -1) for z in (logits, teacher_logits))
    linear = projectors['hint']['linear']
    hint = ((hidden @ linear['kernel'] + linear['bias'] - taught) ** 2).sum(-1) / 2
    linear = projectors['nce']['linear']
    a, b = (
        z / np.linalg.norm(z, axis=-1, keepdims=True)
        for z in (hidden @ linear['kernel'] + linear['bias'], taught)
    )
    nce = -np.diagonal(scipy.special.log_softmax(a @ b.T / 0.5, -1))
    parts = {
        'hard_loss': -log_q[np.arange(BATCH), labels].mean(),
        'soft_loss': 4 * np.sum(np.exp(p) * (p - q), -1).mean(),
        'hint': hint.mean(),
        'nce': nce.mean(),
    }
    return sum(weights[name] * value for name, value in parts.items()), parts


def test_a_step_is_the_gradient_of_the_weighted_sum(rows):
    linear = dict(name='kd.models.projectors.Linear')
    terms = {
        'hint': dict(
            loss='kd.losses.feature.hint', student='features', weight=0.3, projector=linear
        ),
        'nce': dict(
            loss='kd.losses.contrastive.info_nce', student='features', weight=2.0,
            projector=linear, temperature=0.5,
        ),
    }  # fmt: skip
    method = feature_kd(rows, terms=terms, hard_weight=0.5, soft_weight=0.7, temperature=2.0)
    state, data = begun(method, rows), batch(ROW.shape)
    teacher = jax.device_get(state.frozen['teacher']['params'])
    before = jax.device_get(state.params)
    # With one optimiser for both parts.
    state, metrics = jax.jit(method.step)(state, data)
    weights = {'hard_loss': 0.5, 'soft_loss': 0.7, 'hint': 0.3, 'nce': 2.0}
    loss, parts = objective(before, teacher, data, weights)
    for name, value in {**parts, 'loss': loss}.items():
        np.testing.assert_allclose(metrics[name].total / metrics[name].count, value, rtol=1e-5)
    moved = jax.tree.map(lambda a, b: (np.float64(a) - b) / LR, before, state.params)
    rng = np.random.default_rng(1)
    for part in ('network', 'projectors'):
        along = jax.tree.map(np.zeros_like, before)
        along[part] = jax.tree.map(lambda x: rng.normal(size=x.shape), before[part])
        high, low = (
            objective(
                jax.tree.map(lambda x, d, e=e: np.float64(x) + e * d, before, along),
                teacher, data, weights,
            )[0]
            for e in (1e-6, -1e-6)
        )  # fmt: skip
        dot = sum(jax.tree.leaves(jax.tree.map(lambda g, d: np.sum(g * d), moved, along)))
        np.testing.assert_allclose(dot, (high - low) / 2e-6, rtol=2e-4)
    assert state.variables()['params'].keys() == {'hidden0', 'head'}  # no projector


def test_terms_of_every_form_have_the_value_of_their_loss(maps):
    """Tuples out of a projector, several inputs of one, batch norms, resized maps."""
    at = 'kd.losses.feature_maps.'
    projector = lambda name, **rest: dict(name=f'kd.models.projectors.{name}', **rest)  # noqa: E731
    terms = {
        'vid': dict(loss=f'{at}variational_information', student='block1',
                    projector=projector('Gaussian')),
        'review': dict(loss=f'{at}hierarchical_context', student=('block0', 'block1'),
                       teacher='block0', projector=projector('Fusion', middle=3)),
        'nst': dict(loss=f'{at}neuron_selectivity', student='block0', teacher='block1',
                    resize='larger'),
        'mgd': dict(loss='kd.losses.feature.hint', student='block1', teacher='block0',
                    resize='teacher', projector=projector('Masked', hidden=0.0)),
        'rkd': dict(RKD, weight=25.0),
        'wsld': dict(loss='kd.losses.classification.weighted_soft_label', student='logits',
                     temperature=2.0),
    }  # fmt: skip
    method = feature_kd(maps, terms=terms)
    state, data = begun(method, maps), batch(IMAGE.shape)
    # What the step is to find, from the same networks called here.
    names = ('block0', 'block1', 'features')

    @jax.jit
    def expected(state, data):
        student = maps.network.apply(state.variables(), data['input'], train=True, capture=names)
        teacher = maps.teacher.apply(state.frozen['teacher'], data['input'], capture=names)
        f, g = student.features, teacher.features
        params = state.params['projectors']
        scale = params['vid']['log_scale']
        mean = f['block1']
        for i in range(3):
            mean = mean @ params['vid'][f'linear{i}']['kernel']
            mean = mean if i == 2 else jnp.maximum(mean, 0)
        small = f['block0'].reshape(BATCH, 2, 2, 2, 2, 4).mean((2, 4))
        return {
            'vid': feature_maps.variational_information(mean, scale, g['block1']),
            'nst': feature_maps.neuron_selectivity(small, g['block1']),
            'rkd': relation.rkd_distance(f['features'], g['features']),
        }

    values = expected(state, data)
    before = state.mutables['projectors']['batch_stats']['review']
    weights = {label: term.get('weight', 1.0) for label, term in terms.items()}
    state, metrics = jax.jit(method.step)(state, data)
    found = {name: float(m.total / m.count) for name, m in metrics.items()}
    for label, value in values.items():
        np.testing.assert_allclose(found[label], np.mean(value), rtol=2e-5)
    total = found['hard_loss'] + sum(weights[label] * found[label] for label in terms)
    np.testing.assert_allclose(found['loss'], total, rtol=1e-5)
    after = state.mutables['projectors']['batch_stats']['review']
    assert np.abs(before['out_norm']['mean'] - after['out_norm']['mean']).max() > 0
    assert set(state.params['projectors']) == {'vid', 'review', 'mgd'}


@pytest.mark.parametrize(
    ('term', 'message'),
    [
        (
            dict(loss='kd.losses.relation.channel_correlation', student='head', teacher='head'),
            r"^stage\.method\.terms\.mine: its gradient with respect to the student's head is 0 on "
            r'random features, so it would teach nothing; choose other features or another loss\.$',
        ),
        (
            dict(loss='kd.losses.feature.hint', student='features'),
            r"^stage\.method\.terms\.mine: hint needs features of one shape.* Its student's "
            r"features are 'features' \(9,\), its teacher's 'features' \(12,\): a `projector` "
            r'changes channels, `resize` positions\.$',
        ),
        (dict(RKD, student='feature'), r"^stage\.method\.terms\.mine\.student: there is no feature "
         r"'feature'\. Did you mean 'features'\? There are: logits, hidden0, features, head\.$"),
        (dict(RKD, resize='both'), r"\.mine\.resize must be '', 'student', 'teacher' or 'larg"),
        (dict(RKD, weight=-1.0), r'\.mine\.weight must be a number from 0, got -1\.0\.$'),
        (dict(RKD, temperature=4.0), r"\.mine has an unknown key 'temperature'"),
        (dict(student='features'), r"\.mine must be a block with 'loss' and 'student', got"),
    ],
)  # fmt: skip
def test_a_term_that_cannot_teach_is_refused_by_name(rows, term, message):
    with pytest.raises(UserError, match=message):
        feature_kd(rows, terms={'mine': term})


def test_what_compares_examples_refuses_parts_of_a_batch(rows):
    with pytest.raises(ValueError, match='rkd_distance compares the examples of a batch'):
        feature_kd(rows, terms={'rkd': RKD}, micro_batches=2)
