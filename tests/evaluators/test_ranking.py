"""Areas under curves, against scikit-learn and by counting pairs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn import metrics

from kd.claims import seeds
from kd.errors import UserError
from kd.evaluators import ranking
from kd.models.mlp import MLP
from kd.network import from_linen
from kd.state import State

pytestmark = pytest.mark.usefixtures('compiled_quickly')


@pytest.mark.parametrize('distinct', [2, 5, 1000])
def test_areas_are_those_of_scikit_learn_ties_and_all(distinct):
    rng = np.random.default_rng(distinct)
    scores = rng.integers(distinct, size=200) - 3.0
    positive = rng.random(200) < 0.3
    assert ranking.roc_auc(scores, positive) == pytest.approx(
        metrics.roc_auc_score(positive, scores), abs=1e-12
    )
    assert ranking.average_precision(scores, positive) == pytest.approx(
        metrics.average_precision_score(positive, scores), abs=1e-12
    )
    pairs = np.subtract.outer(scores[positive], scores[~positive])
    counted = np.mean((pairs > 0) + 0.5 * (pairs == 0))
    assert ranking.roc_auc(scores, positive) == pytest.approx(counted, abs=1e-12)


def test_limits():
    scores, positive = np.array([3.0, np.inf, 1.0, -np.inf]), np.array([1, 1, 0, 0], bool)
    assert ranking.roc_auc(scores, positive) == ranking.average_precision(scores, positive) == 1.0
    assert ranking.roc_auc(-scores, positive) == 0.0
    assert ranking.roc_auc(np.zeros(4), positive) == 0.5
    assert ranking.average_precision(np.zeros(4), positive) == 0.5
    for same in (np.ones(4, bool), np.zeros(4, bool)):
        assert np.isnan(ranking.roc_auc(scores, same))
    assert np.isnan(ranking.roc_auc([0.0, np.nan], [True, False]))
    with pytest.raises(ValueError, match=r'scores \(2, 1\) and positive \(2,\) must be one row'):
        ranking.roc_auc(np.zeros((2, 1)), np.zeros(2, bool))


def batches(rng, classes):
    """Two, the second half padding, which must not count."""
    for part in range(2):
        yield {
            'input': jnp.asarray(rng.normal(size=(20, 3)), jnp.float32),
            'label': jnp.asarray(rng.integers(classes, size=20)),
            'mask': jnp.arange(20) < (20, 11)[part],
        }


@pytest.mark.parametrize('classes', [2, 4])
def test_a_network_is_ranked_by_what_it_says_of_each_class(classes):
    network = from_linen(
        MLP(widths=(5,), num_classes=classes), jax.ShapeDtypeStruct((1, 3), jnp.float32)
    )
    context = seeds.context(network=network, num_classes=classes)
    state = State.create(jax.random.key(0), network.init(jax.random.key(1)))
    given = list(batches(np.random.default_rng(0), classes))
    found = ranking.classes(context).run(state, given)
    x, label, mask = (
        np.concatenate([batch[name] for batch in given]) for name in ('input', 'label', 'mask')
    )
    p = np.asarray(jax.nn.softmax(network.apply(state.variables(), x[mask]).logits), np.float64)
    p /= p.sum(1, keepdims=True)
    if classes == 2:
        wanted = metrics.roc_auc_score(label[mask], p[:, 1])
    else:
        wanted = metrics.roc_auc_score(label[mask], p, multi_class='ovr')
    assert found['roc_auc'] == pytest.approx(wanted, abs=1e-6)
    truth = np.eye(classes)[label[mask]][:, 1 if classes == 2 else slice(None)]
    wanted = metrics.average_precision_score(truth, p[:, 1] if classes == 2 else p)
    assert found['average_precision'] == pytest.approx(wanted, abs=1e-6)


def test_fields_are_ranked_without_padding():
    rng = np.random.default_rng(1)
    given = [
        {**batch, 'weight': jnp.asarray(rng.random(20)), 'wrong': jnp.asarray(rng.random(20) < 0.4)}
        for batch in batches(rng, 2)
    ]
    spec = {name: jax.ShapeDtypeStruct((), np.float32) for name in ('weight', 'wrong')}
    probe = ranking.fields(seeds.context(spec=spec), score='weight', positive='wrong', lower=True)
    weight, wrong, mask = (
        np.concatenate([batch[name] for batch in given]) for name in ('weight', 'wrong', 'mask')
    )
    assert probe.run(None, given)['roc_auc'] == pytest.approx(
        metrics.roc_auc_score(wrong[mask], -weight[mask]), abs=1e-12
    )
    with pytest.raises(UserError, match="stage: its data have no field 'weigth', only "):
        ranking.fields(seeds.context(spec=spec), score='weigth', positive='wrong')
