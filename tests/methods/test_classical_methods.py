"""CRD with its bank, CTKD's temperature, and SimKD's head, each held to a step by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kd.claims import seeds
from kd.errors import UserError
from kd.losses import contrastive
from kd.methods.vision.crd import crd
from kd.methods.vision.ctkd import ctkd, reversed_gradient
from kd.methods.vision.logit_kd import logit_kd
from kd.methods.vision.simkd import simkd
from kd.models.convnet import ConvNet
from kd.models.mlp import MLP
from kd.models.resnet import ResNet
from kd.models.reused import ReusedHead, reused_head
from kd.network import from_linen

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES, LR = 3, 0.1
ROW = jax.ShapeDtypeStruct((1, 4), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 1), jnp.float32)


def rows(size, labels):
    rng = np.random.default_rng(0)
    return {
        'input': rng.normal(size=(size, 4)).astype(np.float32),
        'label': np.array(labels, np.int32),
        'index': np.arange(size, dtype=np.int32),
    }


@pytest.fixture(scope='module')
def of_rows():
    student, teacher = (
        from_linen(MLP(widths=(width,), num_classes=CLASSES), ROW) for width in (5, 7)
    )
    return seeds.context(network=student, teacher=teacher, tx=optax.sgd(LR), num_classes=CLASSES)


def begun(method, context):
    return method.init(jax.random.key(0), {'teacher': context.teacher.init(jax.random.key(1))})


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def hidden(params, x):
    return np.maximum(x @ params['hidden0']['kernel'] + params['hidden0']['bias'], 0)


def test_crd_reads_its_bank_and_moves_it_afterwards(of_rows):
    """Two examples of two classes: all negatives of either are the other."""
    method = crd(of_rows, examples=2, size=3, negatives=4, weight=2.0, contrast_temperature=0.5)
    state, data = begun(method, of_rows), rows(2, [0, 1])
    before, memory = jax.device_get((state.params, state.mutables['embeddings']['memory']))
    teacher = jax.device_get(state.frozen['teacher']['params'])
    np.testing.assert_array_equal(memory['label'], [-1, -1])
    np.testing.assert_allclose(np.linalg.norm(memory['student'], axis=1), 1, rtol=1e-6)
    after, metrics = jax.jit(method.step)(state, data)

    def embedded(side, x):
        p = before['embeddings'][side]['linear']
        return unit(x @ p['kernel'] + p['bias'])

    ours = embedded('student', hidden(before['network'], data['input']))
    theirs = embedded('teacher', hidden(teacher, data['input']))
    value, scales = np.zeros(2), []
    for anchors, bank in ((ours, memory['teacher']), (theirs, memory['student'])):
        # The positive, and four times the other example.
        likelihood = np.exp(
            np.einsum('bd,bkd->bk', anchors, bank[[[0, 1, 1, 1, 1], [1, 0, 0, 0, 0]]]) / 0.5
        )
        scales.append(likelihood.mean() * 2)
        h = likelihood / scales[-1]
        value -= np.log(h[:, 0] / (h[:, 0] + 2 + 1e-7))
        value -= np.log(2 / (h[:, 1:] + 2 + 1e-7)).sum(1)
    np.testing.assert_allclose(metrics['crd'].total / 2, value.mean(), rtol=1e-5)
    total = metrics['hard_loss'].total + 2 * metrics['crd'].total
    np.testing.assert_allclose(metrics['loss'].total, total, rtol=1e-5)
    found = after.mutables['embeddings']['memory']
    np.testing.assert_array_equal(found['label'], data['label'])
    np.testing.assert_allclose(found['scale'], scales, rtol=1e-5)
    for side, new in (('student', ours), ('teacher', theirs)):
        wanted = unit(0.5 * memory[side] + 0.5 * new)
        np.testing.assert_allclose(found[side], wanted, rtol=1e-4, atol=1e-6)
        moved = np.abs(after.params['embeddings'][side]['linear']['kernel']
                       - before['embeddings'][side]['linear']['kernel'])  # fmt: skip
        assert moved.max() > 1e-5
    assert set(after.variables()) == {'params'}
    assert set(after.variables()['params']) == {'hidden0', 'head'}


def test_negatives_of_the_first_epoch_are_of_examples_seen():
    seen = jnp.array([0, -1, 1, -1, 1, 2], jnp.int32)
    drawn = contrastive.draw_negatives(jax.random.key(0), jnp.array([1, 0]), seen, 200)
    assert set(np.asarray(drawn[0]).tolist()) == {0, 5}
    assert set(np.asarray(drawn[1]).tolist()) == {2, 4, 5}


def test_crd_names_the_features_there_are(of_rows):
    with pytest.raises(UserError, match=r"^stage\.method\.teacher: there is no feature 'last'; th"):
        crd(of_rows, examples=2, teacher='last')


def test_the_gradient_of_reversed_is_turned_and_scaled():
    value, slope = jax.value_and_grad(lambda x: 3 * reversed_gradient(x, 0.25) ** 2)(2.0)
    assert (value, slope) == (12.0, -0.25 * 12.0)


def test_ctkd_teaches_as_softened_outputs_do_and_climbs_with_its_temperature(of_rows):
    data, theta = rows(6, [0, 1, 2, 0, 1, 2]), 0.3
    method = ctkd(of_rows, curriculum_steps=2, low=1.0, span=4.0, start=theta)
    state = begun(method, of_rows)
    teacher = jax.device_get(state.frozen['teacher']['params'])
    params = jax.device_get(state.params['network'])

    def soft(theta):
        temperature = 1 + 4 * scipy.special.expit(theta)
        q, p = (
            scipy.special.log_softmax(
                np.float64(hidden(x, data['input']) @ x['head']['kernel'] + x['head']['bias'])
                / temperature, -1,
            )
            for x in (params, teacher)
        )  # fmt: skip
        return 0.9 * temperature**2 * np.sum(np.exp(p) * (p - q), -1).mean()

    slope = (soft(theta + 1e-5) - soft(theta - 1e-5)) / 2e-5
    plain = logit_kd(of_rows, temperature=1 + 4 * scipy.special.expit(theta))
    step, plain_step = jax.jit(method.step), jax.jit(plain.step)
    for n, share in ((0, 0.0), (1, 0.5), (2, 1.0), (9, 1.0)):
        at = jnp.int32(n)
        after, metrics = step(state.replace(step=at), data)
        moved = (float(after.params['temperature']['theta']) - theta) / LR
        np.testing.assert_allclose(moved, share * slope, rtol=2e-3, atol=1e-6)
        np.testing.assert_allclose(metrics['temperature'].total, 1 + 4 * scipy.special.expit(theta))
    # The student descends as without a curriculum.
    other, _ = plain_step(state.replace(params={'network': state.params['network']},
                                        opt_state=plain.init(jax.random.key(0), {}).opt_state),
                          data)  # fmt: skip
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        after.params['network'], other.params['network'],
    )  # fmt: skip
    assert set(after.variables()['params']) == {'hidden0', 'head'}
    with pytest.raises(UserError, match='soft_weight must not be 0'):
        ctkd(of_rows, curriculum_steps=1, soft_weight=0.0)


def with_head(teacher, width, depth=1, **how):
    inner = ConvNet(depth=depth, width=3, norm='batch')
    student = ReusedHead(inner, width, CLASSES, f'block{depth - 1}', **how)
    student, teacher = (from_linen(module, IMAGE) for module in (student, teacher))
    return seeds.context(
        network=student, teacher=teacher, tx=optax.adamw(0.1, weight_decay=0.1),
        num_classes=CLASSES,
    )  # fmt: skip


def test_maps_that_do_not_fit_are_told():
    context = with_head(ResNet(8, CLASSES), 64)
    for name, shape in (('stage2', r'\(4, 4, 32\)'), ('map', r'\(2, 2, 64\)')):
        with pytest.raises(
            UserError, match=rf"maps are \(4, 4, 64\), the teacher's '{name}' {shape}"
        ):
            simkd(context, teacher=name)


def test_the_reused_head_has_the_mean_of_the_maps():
    context = with_head(ResNet(8, CLASSES), 64, depth=2)
    state = begun(simkd(context), context)
    head = jax.device_get(state.frozen['teacher']['params']['head'])
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 1)).astype(np.float32)
    output = context.network.apply(state.variables(), x, capture=('projected',))
    mean = np.mean(output.features['projected'], (1, 2))
    np.testing.assert_allclose(output.logits, mean @ head['kernel'] + head['bias'], rtol=1e-5)


def test_simkd_fits_the_maps_and_keeps_the_teachers_head():
    teacher = ConvNet(depth=1, width=6, num_classes=CLASSES, norm='batch')
    context, maps = with_head(teacher, 6, pool='flatten'), 'block0'
    method = simkd(context, teacher=maps)
    state = begun(method, context)
    head = jax.device_get(state.frozen['teacher']['params']['head'])
    rng = np.random.default_rng(0)
    data = {
        'input': rng.normal(size=(4, 8, 8, 1)).astype(np.float32),
        'label': np.zeros(4, np.int32),
    }
    step, losses = jax.jit(method.step), []
    ours = context.network.apply(
        state.variables(), data['input'], train=True, capture=('projected',)
    )
    theirs = context.teacher.apply(state.frozen['teacher'], data['input'], capture=(maps,))
    difference = ours.features['projected'] - theirs.features[maps]
    np.testing.assert_allclose(
        ours.logits,
        np.reshape(ours.features['projected'], (4, -1)) @ head['kernel'] + head['bias'],
        rtol=1e-4, atol=1e-5,
    )  # fmt: skip
    for _ in range(40):
        state, metrics = step(state, data)
        losses.append(float(metrics['loss'].total / metrics['loss'].count))
    np.testing.assert_allclose(losses[0], np.mean(np.square(difference)), rtol=1e-5)
    assert losses[-1] < losses[0] / 2
    jax.tree.map(np.testing.assert_array_equal, dict(state.params['network']['head']), dict(head))
    with pytest.raises(UserError, match='its `width` and `pool` must be those of the teacher'):
        begun(simkd(with_head(teacher, 6), teacher=maps), context)


def test_simkd_tells_what_it_trains_and_which_maps_there_are(of_rows):
    with pytest.raises(UserError, match=r"stage\.network is MLP, and simkd trains a 'kd\.models\."):
        simkd(of_rows)
    module = reused_head(
        network=dict(name='kd.models.mlp.MLP', widths=(5,)), width=7, num_classes=CLASSES
    )
    assert module.inner.num_classes == CLASSES
    with pytest.raises(ValueError, match=r"^MLP has no feature 'map'; there are: hidden0, feature"):
        jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 4)))
