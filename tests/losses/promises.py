"""What all losses promise, as fixtures and tests to be imported by a module that has them:

LOSSES = {name: (loss, oracle)}     each of student [B, V] and teacher [B, V]
ON_FEATURES                         those for which -inf is no input
WEIGHT_HELD                         those that hold a weight of theirs constant
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from kd.losses import OF_BATCH

B, V = 8, 6
LABELS = np.random.default_rng(0).integers(0, V, B).astype(np.int32)


def pytest_generate_tests(metafunc):
    if 'name' in metafunc.fixturenames:
        module = metafunc.module
        held = module.WEIGHT_HELD if 'finite_difference' in metafunc.function.__name__ else ()
        metafunc.parametrize('name', [name for name in module.LOSSES if name not in held])


@pytest.fixture(scope='module')
def losses(request):
    return request.module.LOSSES


def values_and_gradients(losses, student, teacher, argnums=0):
    """Of all losses, in one compilation: the values and the gradients of their sums."""

    def summed(s, t, loss):
        value = loss(s, t)
        return jnp.sum(value), value

    results = {
        name: jax.grad(summed, argnums, has_aux=True)(student, teacher, loss)
        for name, (loss, _) in losses.items()
    }
    return (
        {name: value for name, (_, value) in results.items()},
        {name: gradient for name, (gradient, _) in results.items()},
    )


@pytest.fixture(scope='module')
def logits():
    return np.random.default_rng(1).normal(size=(2, B, V)) * 2


@pytest.fixture(scope='module')
def in_float64(losses, logits, quick_compilation):
    with jax.enable_x64(True), quick_compilation():
        values, gradients = jax.jit(partial(values_and_gradients, losses))(
            *map(jnp.asarray, logits)
        )
    return jax.device_get((values, gradients))


def test_value_is_that_of_an_independent_float64_computation(losses, name, logits, in_float64):
    value = in_float64[0][name]
    assert value.dtype == np.float64
    np.testing.assert_allclose(value, losses[name][1](*logits), rtol=1e-10, atol=1e-12)


def test_gradient_is_the_finite_difference_of_the_oracle(losses, name, logits, in_float64):
    oracle, step = losses[name][1], 1e-5
    student, teacher = logits
    expected = np.zeros((B, V))
    for index in np.ndindex(B, V):
        shift = np.zeros((B, V))
        shift[index] = step
        difference = oracle(student + shift, teacher) - oracle(student - shift, teacher)
        expected[index] = np.sum(difference) / (2 * step)
    np.testing.assert_allclose(in_float64[1][name], expected, rtol=1e-6, atol=1e-8)


def test_what_compares_examples_with_each_other_is_known_as_of_the_batch(losses, name, logits):
    student, teacher = logits
    shift = 0.5 * (np.arange(B) == 0)[:, None] * np.arange(V)
    before = losses[name][1](student, teacher)
    after = losses[name][1](student + shift, teacher - shift)
    apart = np.shape(before) == (B,) and np.array_equal(before[1:], after[1:])
    assert apart == (name not in {loss.__name__ for loss in OF_BATCH})


def extreme_logits():
    """Rows of both sides: agreement and opposition at +-1e4, and -inf in the same places."""
    student, teacher = np.random.default_rng(2).normal(size=(2, B, V)) * 3
    student[0], teacher[0] = 1e4, -1e4  # two uniform distributions
    student[1, :3], teacher[1, 3:] = 1e4, 1e4
    student[2, LABELS[2]], teacher[2, LABELS[2]] = 1e4, -1e4
    student[3, LABELS[3]], teacher[3, LABELS[3]] = -1e4, 1e4
    masked = np.zeros((B, V), bool)
    masked[4:] = np.arange(V) >= 4
    masked[7] = True
    masked[np.arange(B), LABELS] = False
    return student, teacher, masked


@pytest.fixture(scope='module')
def compiled(losses):
    """One compilation for the next two fixtures."""
    return jax.jit(partial(values_and_gradients, losses, argnums=(0, 1)))


@pytest.fixture(scope='module')
def at_extremes(compiled):
    student, teacher, masked = extreme_logits()
    plain = compiled(jnp.asarray(student), jnp.asarray(teacher))
    student[masked], teacher[masked] = -np.inf, -np.inf
    inputs = (student, teacher)
    return plain, compiled(*map(jnp.asarray, inputs)), inputs, masked


def test_value_and_gradients_are_finite_at_extreme_logits(losses, name, request, at_extremes):
    on_features = name in request.module.ON_FEATURES
    plain, with_mask, (student, teacher), masked = at_extremes
    for values, gradients in (plain,) if on_features else (plain, with_mask):
        assert np.all(np.isfinite(values[name]))
        for gradient in gradients[name]:
            assert np.all(np.isfinite(gradient))
    if on_features:
        return
    values, gradients = with_mask
    for gradient in gradients[name]:
        assert np.all(np.asarray(gradient)[masked] == 0)
    if 'correlation' not in name:  # scipy has no correlation of constants
        np.testing.assert_allclose(
            values[name], losses[name][1](student, teacher), rtol=3e-5, atol=3e-5
        )


@pytest.fixture(scope='module')
def transformed(losses, compiled, quick_compilation):
    """Values and student gradients of 8 batches: one by one, and by each transformation at once."""
    batches = np.random.default_rng(3).normal(size=(2, 8, B, V)).astype(np.float32) * 2
    student, teacher = map(jnp.asarray, batches)
    mesh = jax.make_mesh((8,), ('batch',), axis_types=(jax.sharding.AxisType.Auto,))
    over_batch = PartitionSpec('batch')
    each = partial(values_and_gradients, losses)
    by_name = {
        'vmap': jax.jit(jax.vmap(each)),
        'pmap': jax.pmap(each),
        'shard_map': jax.jit(
            jax.shard_map(
                lambda s, t: jax.tree.map(lambda x: x[None], each(s[0], t[0])),
                mesh=mesh,
                in_specs=over_batch,
                out_specs=over_batch,
            )
        ),
    }
    results = {'jit': jax.tree.map(lambda *x: np.stack(x), *map(compiled, student, teacher))}
    with quick_compilation():
        for name, f in by_name.items():
            results[name] = jax.device_get(f(student, teacher))
    return batches, results


def test_all_transformations_give_the_same_numbers(losses, name, transformed):
    batches, results = transformed
    expected = np.stack([losses[name][1](*pair) for pair in np.swapaxes(batches, 0, 1)])
    np.testing.assert_allclose(results['jit'][0][name], expected, rtol=2e-4, atol=2e-5)
    scale = np.abs(results['jit'][1][name][0]).max() + 1e-3
    for transformation in ('vmap', 'pmap', 'shard_map'):
        value, gradient = (tree[name] for tree in results[transformation])
        np.testing.assert_allclose(value, results['jit'][0][name], rtol=2e-5, atol=2e-6)
        np.testing.assert_allclose(gradient, results['jit'][1][name][0], atol=2e-5 * scale)


@pytest.fixture(scope='module')
def in_bfloat16(losses, logits, quick_compilation):
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in logits]
    with quick_compilation():
        values = jax.jit(lambda s, t: {name: f(s, t) for name, (f, _) in losses.items()})(*rounded)
    return [np.asarray(x, np.float64) for x in rounded], values


def test_bfloat16_input_is_computed_in_float32(losses, name, in_bfloat16):
    rounded, values = in_bfloat16
    assert values[name].dtype == jnp.float32
    np.testing.assert_allclose(values[name], losses[name][1](*rounded), rtol=1e-4, atol=1e-5)
