"""Accuracy under attacks against closed forms, masked gradients that are noticed, and searches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kd.claims import seeds
from kd.evaluators import architecture_search as search
from kd.evaluators.robustness import masking, robustness
from kd.evaluators.sub_networks import draw, sub_networks
from kd.models import elastic
from kd.models.elastic_mlp import ElasticMLP
from kd.models.mlp import MLP
from kd.network import from_linen
from kd.networks import sliced
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')

N, D = 200, 6
ROW = jax.ShapeDtypeStruct((1, D), jnp.float32)
RNG = np.random.default_rng(0)
X = RNG.uniform(-0.8, 0.8, (N, D)).astype(np.float32)
W = RNG.normal(size=(D, 2)).astype(np.float32)
THREAT = dict(epsilon=0.1, step=0.02)


class Rounded(nn.Module):
    """A linear network of inputs that are rounded: its gradient is 0, and it is not robust."""

    num_classes: int = 2

    @nn.compact
    def __call__(self, x, *, train=False):
        return nn.Dense(self.num_classes, name='head')(jnp.round(8 * x) / 8)


def state_of(variables, **frozen):
    return State.create(jax.random.key(0), variables, frozen=frozen)


LINEAR = {'params': {'head': {'kernel': jnp.asarray(W), 'bias': jnp.array([0.1, 0.0])}}}
LABELS = ((X @ W + np.array([0.1, 0.0])).argmax(-1) ^ (RNG.random(N) < 0.1)).astype(np.int32)
MASK = np.arange(N) < 150
BATCH = {'input': jnp.asarray(X), 'label': jnp.asarray(LABELS), 'mask': jnp.asarray(MASK)}


def evaluated(module, teacher=None, **options):
    network = from_linen(module, ROW)
    if teacher is not None:
        teacher = from_linen(teacher, ROW)
    context = seeds.context(network=network, teacher=teacher, num_classes=2)
    evaluator = robustness(context, **THREAT | options)
    sums = jax.jit(evaluator.update)(state_of(LINEAR, teacher=LINEAR), BATCH)
    return evaluator.finish(jax.device_get(sums))


def test_a_linear_network_is_as_robust_as_its_margin_says():
    found = evaluated(MLP((), num_classes=2), restarts=2)
    d = W[:, 1] - W[:, 0]
    margin = (2 * LABELS - 1) * (X @ d - 0.1)
    robust = (margin > 0.1 * np.abs(d).sum())[MASK].mean()
    assert found['clean'] == pytest.approx((margin > 0)[MASK].mean(), abs=1e-6)
    for attack in ('one_step', 'pgd', 'worst'):
        assert found[attack] == pytest.approx(robust, abs=1e-6)
    assert found['unbounded'] == 0.0
    assert found['noise'] > found['pgd'] + 0.1
    assert found['masking'] == 0.0
    assert robust < found['clean'] - 0.1


def test_masked_gradients_are_noticed():
    """The same network, rounding what it sees: projected gradients find nothing, noise does."""
    found = evaluated(Rounded(), teacher=MLP((), num_classes=2), restarts=1)
    assert found['pgd'] > found['clean'] - 0.05
    assert found['transfer'] < found['pgd'] - 0.1
    assert found['unbounded'] > 0.5
    assert found['masking'] >= 2
    told = dict(pgd=0.5, one_step=0.49, noise=0.6, unbounded=0.0)
    assert masking(told) == 0
    assert masking(told | dict(transfer=0.4)) == 1
    assert masking(told | dict(noise=0.4, unbounded=0.2)) == 2


def test_stronger_attacks_leave_no_more():
    """Of a network with a bend: 20 steps and restarts against 10 steps."""
    network = from_linen(MLP((16,), num_classes=2), ROW)
    context = seeds.context(network=network, num_classes=2)
    state = state_of(jax.jit(network.init)(jax.random.key(3)))
    labels = network.apply(state.variables(), X).logits.argmax(-1)
    values = []
    for steps, restarts in ((10, 0), (20, 3)):
        evaluator = robustness(context, epsilon=0.3, step=0.06, steps=steps, restarts=restarts)
        sums = jax.jit(evaluator.update)(state, {**BATCH, 'label': labels})
        values.append(evaluator.finish(jax.device_get(sums)))
    weak, strong = values
    assert strong['worst'] <= weak['worst'] < weak['clean'] == 1.0
    assert strong['worst'] <= strong['pgd']
    assert strong['unbounded'] <= 0.05


# Parts of elastic networks

NET = from_linen(ElasticMLP((4, 6), (1, 2), (2, 5), num_classes=2), ROW)
CONTEXT = seeds.context(network=NET, num_classes=2)


def test_parts_are_measured_as_the_networks_they_are():
    variables = jax.jit(NET.init)(jax.random.key(0))
    probe = sub_networks(CONTEXT, random=3, steps=3, together=2, batch=64, **THREAT)
    found = probe.run(state_of(variables), [BATCH])
    space, drawn = NET.module.space(), draw(NET, np.arange(3))
    each = [{name: x[i] for name, x in drawn.items()} for i in range(3)]
    accuracy = []
    for arch in (space.smallest(), space.largest(), *each):
        small = sliced(NET, arch)
        logits = small.apply(elastic.slice_variables(NET, variables, arch), X).logits
        accuracy.append((np.asarray(logits).argmax(-1) == LABELS)[MASK].mean())
    assert found['smallest_clean'] == pytest.approx(accuracy[0], abs=1e-6)
    assert found['largest_clean'] == pytest.approx(accuracy[1], abs=1e-6)
    assert found['random_clean'] == pytest.approx(np.mean(accuracy[2:]), abs=1e-6)
    for name in ('smallest', 'largest', 'random'):
        assert found[f'{name}_robust'] < found[f'{name}_clean']


def test_a_predictor_explains_architectures_it_has_not_seen():
    """Of 1,053: sums of a value for every choice and a product, which no linear one could."""
    space = ElasticMLP(depths=(3, 4, 5)).space()
    archs = space.architectures(np.random.default_rng(0).integers(0, 3, (600, 7)))
    features = np.asarray(jax.jit(jax.vmap(space.one_hot))(archs))
    kernel = np.random.default_rng(1).uniform(0, 0.1, (features.shape[1], 2))
    targets = 0.5 + features @ kernel + 0.1 * features[:, :1] * features[:, 3:4]
    apart = search._apart(features, 0.2)
    assert not {tuple(x) for x in features[apart]} & {tuple(x) for x in features[~apart]}
    predict = search.fit(jax.random.key(0), features[~apart], targets[~apart], epochs=250, width=48)
    r2 = search.explained(targets[apart], predict(features[apart]))
    assert (r2 > 0.8).all()
    np.testing.assert_allclose(search.explained(targets, targets), 1.0)
    mean = np.broadcast_to(targets.mean(0), targets.shape)
    np.testing.assert_allclose(search.explained(targets, mean), 0.0, atol=1e-9)


def test_a_search_stays_within_its_budgets_and_says_what_it_found():
    variables = jax.jit(NET.init)(jax.random.key(0))
    probe = search.architecture_search(
        CONTEXT, architectures=12, budgets=(0.01, 0.6, 1.0), population=8, generations=3, epochs=4,
        steps=2, examples=60, together=4, **THREAT,
    )  # fmt: skip
    found = probe.run(state_of(variables), [BATCH])
    assert set(found) == {
        'r2_clean', 'r2_robust', 'robust_at_0.6', 'robust_at_1', 'predictions', 'students'
    }  # fmt: skip
    rows = [
        [cell.strip() for cell in line.split('|')[1:-1]]
        for line in found['students'].splitlines()[2:]
    ]
    assert [row[0] for row in rows] == ['0.01', '0.6', '1']
    assert rows[0][1:] == [''] * 5  # nothing is so small
    assert float(rows[1][1]) <= 0.6
    assert rows[2][5].startswith('width ')
    measured = float(rows[1][3].split(', ')[1])
    assert measured == pytest.approx(found['robust_at_0.6'], abs=6e-4)
