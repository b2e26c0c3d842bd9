"""Generations of self-distillation: the loss, its penalty, and the automatic weight, by NumPy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

from kd.claims import seeds
from kd.data import catalogue, sources
from kd.data.context import SourceContext
from kd.data.transforms import label_noise
from kd.errors import UserError
from kd.methods.vision import self_distillation as module
from kd.models.mlp import MLP
from kd.network import from_linen
from kd.theory import kernel_regression

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES, BATCH, LR = 3, 8, 0.1


@pytest.fixture(scope='module')
def network():
    shape = jax.ShapeDtypeStruct((1, 4), jnp.float32)
    return from_linen(MLP(widths=(), num_classes=CLASSES), shape)


@pytest.fixture(scope='module')
def data():
    rng = np.random.default_rng(0)
    return {
        'input': rng.normal(size=(21, 4)).astype(np.float32),
        'label': rng.integers(0, CLASSES, 21).astype(np.int32),
    }


def context(network, data, **fields):
    def source(split):
        spec = sources.example_spec((4,))
        made = sources.DataSet(
            'table', {'validation': 21}, lambda _: sources.in_memory(data), spec, CLASSES
        )
        return sources.Source(made, split)

    made = seeds.context(
        network=network, tx=optax.sgd(LR), teacher=network, num_classes=CLASSES, batch_size=BATCH
    )
    return dataclasses.replace(made, source=source, spec=source('validation').spec, **fields)


def variables(network, seed):
    return jax.jit(network.init)(jax.random.key(seed))


def logits(variables, x):
    head = variables['params']['head']
    return np.asarray(x, np.float64) @ np.asarray(head['kernel'], np.float64) + head['bias']


def test_a_step_is_numpys_gradient_of_squares_and_norms(network, data):
    alpha, penalty = 0.3, 0.05
    method = module.self_distillation(context(network, data), alpha=alpha, penalty=penalty)
    teacher = variables(network, 1)
    state = method.init(jax.random.key(0), {'teacher': teacher})
    batch = {name: value[:BATCH] for name, value in data.items()}
    before = jax.device_get(state.params['network']['head'])
    state, metrics = jax.jit(method.step)(state, batch)

    def objective(kernel, bias):
        q = scipy.special.softmax(batch['input'].astype(float) @ kernel + bias, -1)
        y = np.eye(CLASSES)[batch['label']]
        p = scipy.special.softmax(logits(teacher, batch['input']), -1)
        mse = alpha * np.mean((q - y) ** 2) + (1 - alpha) * np.mean((q - p) ** 2)
        return mse, mse + penalty * (np.linalg.norm(kernel) + np.linalg.norm(bias))

    kernel, bias = before['kernel'].astype(float), before['bias'].astype(float)
    mse, value = objective(kernel, bias)
    np.testing.assert_allclose(metrics['mse'].total / BATCH, mse, rtol=1e-5)
    np.testing.assert_allclose(metrics['loss'].total / BATCH, value, rtol=1e-5)
    slope = np.zeros_like(kernel)
    for place in np.ndindex(*kernel.shape):
        shift = np.zeros_like(kernel)
        shift[place] = 1e-5
        up, down = objective(kernel + shift, bias)[1], objective(kernel - shift, bias)[1]
        slope[place] = (up - down) / 2e-5
    moved = (kernel - np.asarray(state.params['network']['head']['kernel'])) / LR
    np.testing.assert_allclose(moved, slope, atol=1e-5)


def test_the_first_generation_is_plain_mse_whatever_alpha(network, data):
    alone = context(network, data, optional_teacher=None)
    batch = {name: value[:BATCH] for name, value in data.items()}
    losses = []
    for alpha in (0.0, 1.0):
        method = module.self_distillation(alone, alpha=alpha, penalty=0.0)
        state = method.init(jax.random.key(0), {})
        start = state.params['network']
        losses.append(float(jax.jit(method.step)(state, batch)[1]['loss'].total) / BATCH)
    q = scipy.special.softmax(logits({'params': start}, batch['input']), -1)
    expected = np.mean((q - np.eye(CLASSES)[batch['label']]) ** 2)
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


@pytest.mark.parametrize('bounds', [(-100.0, 100.0), (0.4, 0.6)])
def test_the_automatic_weight_is_numpys_optimum_over_the_whole_split(network, data, bounds):
    references = {'first': network, 'pure': network}
    made = context(network, data, references=references)
    frozen = {n: variables(network, i) for i, n in enumerate(('teacher', 'first', 'pure'), 1)}
    method = module.self_distillation(made, alpha='auto', bounds=bounds)
    state = jax.jit(method.init)(jax.random.key(0), frozen)
    first, pure = (
        scipy.special.softmax(logits(frozen[n], data['input']), -1) for n in ('first', 'pure')
    )
    y = np.eye(CLASSES)[data['label']]
    # Least squares of y - pure on first - pure: the last batch of 5 is padded to 8.
    expected = np.linalg.lstsq((first - pure).reshape(-1, 1), (y - pure).ravel())[0][0]
    np.testing.assert_allclose(state.extra['alpha'], np.clip(expected, *bounds), rtol=1e-4)
    np.testing.assert_allclose(kernel_regression.optimal_alpha(first, pure, y), expected, rtol=1e-4)


def test_an_automatic_weight_needs_its_two_references(network, data):
    with pytest.raises(UserError, match=r"needs stage.references of 'first'"):
        module.self_distillation(context(network, data), alpha='auto')


def test_the_norms_have_a_finite_gradient_at_zero():
    grads = jax.grad(module.sum_of_norms)({'bias': jnp.zeros(3), 'kernel': jnp.full((2, 2), 2.0)})
    np.testing.assert_array_equal(grads['bias'], np.zeros(3))
    np.testing.assert_allclose(grads['kernel'], np.full((2, 2), 0.5), rtol=1e-6)


def test_label_noise_is_of_its_rate_and_leaves_the_test_split_and_inputs_alone():
    def labels(split, **options):
        return label_noise.noisy_labels(SourceContext(split), dataset='mnist1d', **options)

    source = catalogue.load('mnist1d', 'train')
    rows = np.arange(len(source))
    clean, noisy = source.fetch(rows), labels('train', fraction=0.4).fetch(rows)
    np.testing.assert_array_equal(clean['input'], noisy['input'])
    wrong = np.mean(clean['label'] != noisy['label'])
    # 0.4 * 9/10 with standard error sqrt(0.36 * 0.64 / 4000) = 0.0076
    assert abs(wrong - 0.36) < 4 * 0.0076
    again = labels('train', fraction=0.4).fetch(rows[::-1])
    np.testing.assert_array_equal(again['label'][::-1], noisy['label'])
    test = catalogue.load('mnist1d', 'test').fetch([0, 1, 2])
    np.testing.assert_array_equal(labels('test', fraction=1.0).fetch([0, 1, 2])['label'],
                                  test['label'])  # fmt: skip
    with pytest.raises(sources.DataError, match='fraction must lie in'):
        labels('train', fraction=1.5)
