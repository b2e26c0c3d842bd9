"""Linen modules as pure functions: against NumPy, with mutables, dropout and captured features."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd import network as network_lib

pytestmark = pytest.mark.usefixtures('compiled_quickly')


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.Dense(4, name='inner')(x)
        return nn.BatchNorm(use_running_average=not train, momentum=0.9, name='norm')(x)


class Net(nn.Module):
    num_classes: int = 3
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.tanh(Block(name='block')(x, train=train))
        x = nn.Dropout(self.rate, deterministic=not train)(x)
        return nn.Dense(self.num_classes, name='head')(x)


@pytest.fixture(scope='module')
def network():
    return network_lib.from_linen(Net(), jax.ShapeDtypeStruct((1, 5), jnp.float32))


@pytest.fixture(scope='module')
def variables(network):
    rng = np.random.default_rng(0)
    shapes = network.init(jax.random.key(0))
    # Running variances must be positive; nothing may be left at its trivial initial value.
    return jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope='module')
def x():
    return np.random.default_rng(1).normal(size=(6, 5)).astype(np.float32)


def by_hand(variables, x, *, train):
    """Logits, the block's dense output and the block's output, in float64."""
    v = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
    params, stats = v['params'], v['batch_stats']['block']['norm']
    inner = x @ params['block']['inner']['kernel'] + params['block']['inner']['bias']
    mean, var = (inner.mean(0), inner.var(0)) if train else (stats['mean'], stats['var'])
    norm = params['block']['norm']
    block = (inner - mean) / np.sqrt(var + 1e-5) * norm['scale'] + norm['bias']
    logits = np.tanh(block) @ params['head']['kernel'] + params['head']['bias']
    return logits, inner, block


def test_evaluation_is_the_forward_pass_and_changes_nothing(network, variables, x):
    output = network.apply(variables, x)
    np.testing.assert_allclose(output.logits, by_hand(variables, x, train=False)[0], rtol=1e-5)
    assert output.mutables == {}
    assert output.features == {}


def test_training_uses_and_returns_the_statistics_of_the_batch(network, variables, x):
    output = network.apply(variables, x, train=True)
    logits, inner, _ = by_hand(variables, x, train=True)
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4)
    assert set(output.mutables) == {'batch_stats'}
    old = variables['batch_stats']['block']['norm']
    new = output.mutables['batch_stats']['block']['norm']
    np.testing.assert_allclose(new['mean'], 0.9 * old['mean'] + 0.1 * inner.mean(0), rtol=1e-5)
    np.testing.assert_allclose(new['var'], 0.9 * old['var'] + 0.1 * inner.var(0), rtol=1e-5)


@pytest.mark.parametrize('train', [False, True])
def test_captured_features_are_the_intermediate_values(network, variables, x, train):
    names = ('block', 'block/inner')
    output = network.apply(variables, x, train=train, capture=names)
    logits, inner, block = by_hand(variables, x, train=train)
    assert tuple(output.features) == names
    np.testing.assert_allclose(output.features['block/inner'], inner, rtol=1e-5)
    np.testing.assert_allclose(output.features['block'], block, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(output.logits, logits, rtol=1e-4)
    assert set(output.mutables) == ({'batch_stats'} if train else set())


def test_feature_names_are_the_submodules_in_order_and_can_be_captured(network, variables, x):
    names = network_lib.feature_names(network)
    assert [name for name in names if not name.startswith('Dropout')] == [
        'block/inner', 'block/norm', 'block', 'head'
    ]  # fmt: skip
    output = network.apply(variables, x, capture=names)
    np.testing.assert_array_equal(output.features['head'], output.logits)
    assert set(output.features) == set(names)


def test_a_feature_that_is_not_there_is_named(network, variables, x):
    with pytest.raises(ValueError, match=r"Net has no feature \['blok'\]"):
        network.apply(variables, x, capture=('block', 'blok'))


def test_features_carry_gradients_like_the_logits(network, variables, x):
    def loss(kernel, capture):
        params = variables['params']
        params = {**params, 'head': {**params['head'], 'kernel': kernel}}
        output = network.apply({**variables, 'params': params}, x, capture=capture)
        return (output.features['head'] if capture else output.logits).sum()

    kernel = variables['params']['head']['kernel']
    through_feature, through_logits = (jax.grad(loss)(kernel, c) for c in (('head',), ()))
    np.testing.assert_allclose(through_feature, through_logits, rtol=1e-6)
    hidden = np.tanh(by_hand(variables, x, train=False)[2])
    np.testing.assert_allclose(through_logits, np.tile(hidden.sum(0)[:, None], 3), rtol=1e-4)


def test_dropout_is_a_function_of_the_key(variables, x):
    network = network_lib.from_linen(Net(rate=0.5), jax.ShapeDtypeStruct((1, 5), jnp.float32))
    first, again, other = (
        network.apply(variables, x, train=True, key=jax.random.key(k)).logits for k in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 0.1
    # Not in evaluation, whatever the key.
    np.testing.assert_array_equal(
        network.apply(variables, x, key=jax.random.key(1)).logits,
        network.apply(variables, x).logits,
    )


def test_parameters_are_counted_without_statistics(network, variables):
    assert network_lib.parameter_count(variables) == (5 * 4 + 4) + (4 + 4) + (4 * 3 + 3)


class Noted(nn.Module):
    """Notes its width whenever Flax runs through it."""

    width: int | list
    seen: ClassVar[list] = []

    @nn.compact
    def __call__(self, x, *, train=False):
        self.seen.append(self.width)
        return nn.Dense(np.sum(self.width))(x)


def test_equal_modules_are_traced_once(monkeypatch):
    monkeypatch.setattr(Noted, 'seen', [])
    one = jax.ShapeDtypeStruct((1, 5), jnp.float32)
    for width in (2, 2, 3, 2):
        assert network_lib.output_shape(network_lib.from_linen(Noted(width), one)) == (1, width)
    assert Noted.seen == [2, 3]
    # What cannot be compared is traced anew.
    for _ in range(2):
        network_lib.output_shape(network_lib.from_linen(Noted([1, 3]), one))
    assert len(Noted.seen) == 2 + 2
    wide = jax.ShapeDtypeStruct((1, 7), jnp.float32)
    variables = network_lib.from_linen(Noted(2), wide).init(jax.random.key(0))
    assert variables['params']['Dense_0']['kernel'].shape == (7, 2)
