"""Training from scratch on a set: against the same training in NumPy, and at its limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd import network
from kd.data.distilled import synthetic
from kd.evaluators import synthetic_set
from kd.evaluators.fresh_training import Protocol
from kd.models import convnet, mlp

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES = 3


def blobs(rng, count, spread):
    """Points of a few shapes about three centres, as 4x4 images."""
    centres = np.random.default_rng(7).normal(size=(CLASSES, 4, 4, 1))
    labels = np.arange(count) % CLASSES
    images = centres[labels] + spread * rng.normal(size=(count, 4, 4, 1))
    return {'input': images.astype(np.float32), 'label': labels.astype(np.int32)}


@pytest.fixture(scope='module')
def sets():
    rng = np.random.default_rng(0)
    return blobs(rng, 9, 1.0), blobs(rng, 300, 1.5)


@pytest.fixture(scope='module')
def linear():
    module = mlp.MLP(widths=(), num_classes=CLASSES)
    return network.from_linen(module, jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32))


@pytest.fixture(scope='module')
def evaluate(linear):
    phases = synthetic_set.sgd_phases(
        30, momentum=0.9, weight_decay=0.05, drop=0.1, late_momentum=0.5
    )
    return synthetic_set.fresh_networks(linear, phases, test_batch_size=128)


def numpy_accuracy(variables, train, test, rate):
    """Full-batch softmax regression: 15 steps, then 15 at a tenth of the rate from rest."""
    head = variables['params']['head']
    params = [np.asarray(head[name], np.float64) for name in ('kernel', 'bias')]
    x, one_hot = train['input'].reshape(9, -1).astype(np.float64), np.eye(CLASSES)[train['label']]
    for scale, momentum in ((1.0, 0.9), (0.1, 0.5)):
        velocity = [np.zeros_like(p) for p in params]
        for _ in range(15):
            logits = x @ params[0] + params[1]
            probs = np.exp(logits - logits.max(-1, keepdims=True))
            error = (probs / probs.sum(-1, keepdims=True) - one_hot) / 9
            grads = [x.T @ error, error.sum(0)]
            for p, v, g in zip(params, velocity, grads, strict=True):
                v *= momentum
                v += g + 0.05 * p
                p -= rate * scale * v
    logits = test['input'].reshape(300, -1) @ params[0] + params[1]
    return np.mean(logits.argmax(-1) == test['label'])


def test_the_protocol_is_that_of_numpy_for_every_network(evaluate, linear, sets):
    keys = jax.random.split(jax.random.key(0), 3)
    for rate in (0.01, 0.5):
        accuracies = evaluate(keys, *sets, rate)
        expected = [numpy_accuracy(linear.init(key), *sets, rate) for key in keys]
        np.testing.assert_allclose(accuracies, expected, atol=1e-6)


def test_one_hot_labels_are_hard_labels(evaluate, sets):
    keys = jax.random.split(jax.random.key(1), 3)
    train, test = sets
    soft = {**train, 'label': np.eye(CLASSES, dtype=np.float32)[train['label']]}
    np.testing.assert_array_equal(evaluate(keys, soft, test, 0.1), evaluate(keys, train, test, 0.1))


def test_sets_on_the_host_give_the_numbers_of_those_on_the_device(linear, sets):
    phases = synthetic_set.sgd_phases(7, weight_decay=0.05)
    train, test = sets
    evaluate = synthetic_set.fresh_networks(
        linear, phases, batch_size=4, test_batch_size=128,
        transform=lambda key, batch: {
            **batch, 'input': batch['input'] + jax.random.normal(key, batch['input'].shape)
        },
    )  # fmt: skip
    keys = jax.random.split(jax.random.key(2), 3)
    device = [{name: jnp.asarray(x) for name, x in one.items()} for one in (train, test)]
    accuracies = evaluate(keys, train, test, 0.1)
    np.testing.assert_allclose(accuracies, evaluate(keys, *device, 0.1), atol=1e-6)
    assert len(np.unique(accuracies)) > 1


def test_relabelled_batches_train_on_what_the_teacher_says_of_the_transformed_images(linear, sets):
    train, test = sets
    keys = jax.random.split(jax.random.key(3), 2)
    phases = synthetic_set.sgd_phases(20)
    turn = {'transform': lambda key, batch: {**batch, 'input': -batch['input']}}

    def relabel(teacher, inputs):
        return jnp.argmax(inputs.reshape(len(inputs), -1) @ teacher, -1)

    teacher = np.random.default_rng(4).normal(size=(16, CLASSES)).astype(np.float32)
    teach = synthetic_set.fresh_networks(linear, phases, relabel=relabel, **turn)
    plain = synthetic_set.fresh_networks(linear, phases, **turn)
    said = {**train, 'label': np.asarray(relabel(teacher, -train['input']))}
    wrong = {**train, 'label': (said['label'] + 1) % CLASSES}
    found = teach(keys, wrong, test, 0.1, teacher)
    np.testing.assert_array_equal(found, plain(keys, said, test, 0.1))
    assert np.abs(found - plain(keys, wrong, test, 0.1)).max() > 0.02


def test_training_in_uneven_batches_with_batch_norm_learns_and_none_is_chance():
    module = convnet.ConvNet(depth=1, width=8, num_classes=CLASSES, norm='batch')
    net = network.from_linen(module, jax.ShapeDtypeStruct((1, 4, 4, 1), jnp.float32))
    rng = np.random.default_rng(1)
    train, test = blobs(rng, 30, 0.2), blobs(rng, 300, 0.2)
    seen = []

    def transform(key, batch):
        seen.append(batch['input'].shape)
        return {**batch, 'input': batch['input'] + 0.01 * jax.random.normal(key, ())}

    def accuracies(epochs):
        phases = [synthetic_set.Phase(epochs, lambda rate: optax.adam(rate))]
        run = synthetic_set.fresh_networks(net, phases, batch_size=12, transform=transform)
        return run(jax.random.split(jax.random.key(0), 2), train, test, 0.01)

    assert (accuracies(20) > 0.98).all()
    assert seen == [(12, 4, 4, 1)]  # traced once, for all networks, epochs and batches
    assert (accuracies(0) < 0.9).all()


def test_scores_are_one_at_the_greatest_gain_and_fixed_at_none():
    neutral = (1 - math.exp(-1)) / (math.e - math.exp(-1))
    label = synthetic_set.label_robust_score
    np.testing.assert_allclose(label(0.5, 0.5, 0.8, 0.8), neutral)
    np.testing.assert_allclose(label(1.0, 0.0, 0.8, 0.8, weight=1.0), 1.0)
    np.testing.assert_allclose(label(0.5, 0.5, 0.0, 1.0, weight=0.0), 0.0, atol=1e-12)
    assert label(0.6, 0.5, 0.5, 0.8) > label(0.6, 0.5, 0.4, 0.8)
    augmented = synthetic_set.augmentation_robust_score
    np.testing.assert_allclose(augmented(0.4, 0.4, 0.3, 0.3), neutral)
    gain = 0.25 * 0.2 - 0.75 * 0.1
    expected = (math.exp(gain) - math.exp(-1)) / (math.e - math.exp(-1))
    np.testing.assert_allclose(augmented(0.6, 0.4, 0.3, 0.4, weight=0.25), expected)


def test_sets_that_do_not_fit_are_named(evaluate, sets):
    train, test = sets
    keys = jax.random.split(jax.random.key(0), 3)
    with pytest.raises(ValueError, match='training set has 9 inputs and 8 labels'):
        evaluate(keys, {**train, 'label': train['label'][:8]}, test, 0.1)
    for part, labels in (('training', train['label'] - 1), ('test', test['label'] + 100)):
        changed = {**{'training': train, 'test': test}[part], 'label': labels}
        given = (changed, test) if part == 'training' else (train, changed)
        with pytest.raises(ValueError, match=f'Labels of the {part} set lie in'):
            evaluate(keys, *given, 0.1)
    with pytest.raises(ValueError, match=r'examples are \[4, 4, 1\], test examples \[4, 3, 1\]'):
        evaluate(keys, train, {**test, 'input': test['input'][:, :, :3]}, 0.1)


def test_the_step_size_with_the_best_number_is_taken(monkeypatch, linear):
    judge = Protocol(linear, epochs=1)
    accuracies = {0.1: 0.3, 0.2: np.nan, 0.3: 0.7, 0.4: 0.5}
    monkeypatch.setattr(Protocol, '__call__', lambda *args: np.full(2, accuracies[args[-1]]))
    made = synthetic.SyntheticSet(np.zeros((1, 2)), np.zeros(1), np.nan)
    assert judge.best(None, made, {}, (0.1, 0.2, 0.3, 0.4))[1] == 0.3
    assert judge.best(None, made, {}, (0.2, 0.1))[1] == 0.1
