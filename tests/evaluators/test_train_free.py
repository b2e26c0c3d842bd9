"""Scores of untrained students, rank correlations, regularised evolution, and a space of them."""

import dataclasses
import itertools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from kd import config as kd_config
from kd.claims import seeds
from kd.data import sources
from kd.errors import UserError
from kd.evaluators import ranking, train_free
from kd.losses import train_free as losses
from kd.models.mlp import ResidualMLP
from kd.models.resnet import ResNet
from kd.network import from_linen, operations, parameter_count
from kd.search.regularised import evolve

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROOT = Path(__file__).parents[2]
B, C, D = 6, 4, 5


def row_norm(gram):
    return gram / np.maximum(np.linalg.norm(gram, axis=1, keepdims=True), 1e-12)


@pytest.fixture(scope='module')
def features():
    rng = np.random.default_rng(0)
    return rng.normal(size=(B, 3, 3, D)), rng.normal(size=(B, 2, 7))


@pytest.fixture(scope='module')
def gradients():
    return np.random.default_rng(1).normal(size=(2, C, D))


# Scores


def test_the_relation_score_is_a_distance_of_gram_matrices(features):
    s, t = (x.reshape(B, -1) for x in features)
    wanted = -np.sum((row_norm(s @ s.T) - row_norm(t @ t.T)) ** 2) / B**2
    score = jax.jit(losses.relation_score)
    assert float(score(*features)) == pytest.approx(wanted, rel=1e-5)
    assert float(score(features[0], features[0])) == pytest.approx(0.0, abs=1e-6)
    order = np.array([3, 0, 5, 1, 4, 2])
    turn = scipy.stats.ortho_group.rvs(s.shape[1], random_state=0)
    for changed in (3.0 * s, s @ turn):
        assert float(score(changed.reshape(features[0].shape), features[1])) == pytest.approx(
            wanted, rel=1e-4
        )
    shuffled = [x[order] for x in features]
    assert float(score(*shuffled)) == pytest.approx(wanted, rel=1e-5)
    # Rows of length 1 apart, and of right angles where nothing is negative.
    assert -4 / B <= wanted <= 0
    assert -2 / B <= float(score(*(np.abs(x) for x in features))) <= 0


def outer_products(s, t):
    """The score by [C, D, D] products, as the released code has it."""
    total = 0.0
    for a, b in zip(s, t, strict=True):
        total += np.sum((row_norm(np.outer(a, a)) - row_norm(np.outer(b, b))) ** 2)
    return -total / s.size


def test_the_semantic_score_is_that_of_outer_products(gradients):
    s, t = gradients
    score, wanted = jax.jit(losses.semantic_score), outer_products(s, t)
    assert float(score(s, t)) == pytest.approx(wanted, rel=1e-5)
    assert -4 <= wanted <= 0
    assert float(score(t, t)) == pytest.approx(0.0, abs=1e-6)
    assert float(score(s * np.arange(1, C + 1)[:, None], t)) == pytest.approx(wanted, rel=1e-5)
    assert float(score(-s, t)) == pytest.approx(wanted, rel=1e-5)
    holes = s.copy()
    holes[1, 2], holes[3] = 0.0, 0.0
    assert float(score(holes, t)) == pytest.approx(outer_products(holes, t), rel=1e-5)
    with pytest.raises(ValueError, match='class_semantic_score compares networks of other widths'):
        losses.semantic_score(s, t[:, 1:])


def test_classes_are_compared_where_widths_differ(gradients):
    s, t = gradients[0], gradients[1][:, :3]
    wanted = -np.sum((row_norm(s @ s.T) - row_norm(t @ t.T)) ** 2) / C
    assert float(jax.jit(losses.class_semantic_score)(s, t)) == pytest.approx(wanted, rel=1e-5)


def test_the_classifier_needs_no_derivative():
    """Of the mean cross-entropy by its kernel, the trunk differentiated or not."""
    net = from_linen(ResidualMLP(5, 1, C), jax.ShapeDtypeStruct((1, 7), jnp.float32))
    x, y = np.random.default_rng(2).normal(size=(B, 7)).astype(np.float32), np.arange(B) % C

    @jax.jit
    def both(variables):
        def loss(params):
            logits = net.apply({'params': params}, x).logits
            return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(B), y])

        output = net.apply(variables, x, capture=('features',))
        found = losses.classifier_gradient(output.features['features'], output.logits, y)
        return found, jax.grad(loss)(variables['params'])['head']['kernel'].T

    found, wanted = both(net.init(jax.random.key(0)))
    np.testing.assert_allclose(found, wanted, atol=1e-6)


# Ranks


def test_kendall_is_that_of_scipy_with_ties_and_without():
    rng = np.random.default_rng(0)
    for a, b in (rng.normal(size=(2, 30)), rng.integers(0, 5, (2, 30))):
        wanted = scipy.stats.kendalltau(a, b).statistic
        assert ranking.kendall_tau(a, b) == pytest.approx(wanted, abs=1e-12)
        low, high = ranking.kendall_interval(a, b, draws=300)
        assert low < wanted < high
    line = np.arange(9)
    assert ranking.kendall_tau(line, line**3) == 1.0
    assert ranking.kendall_tau(line, -line) == -1.0
    assert ranking.kendall_interval(line, line, draws=50) == (1.0, 1.0)
    assert np.isnan(ranking.kendall_tau(line, 0 * line))
    with pytest.raises(ValueError, match='two rows of one length'):
        ranking.kendall_tau(line, line[1:])


def test_the_interval_covers_as_often_as_it_says():
    """Of normal pairs of correlation .5, whose tau is (2 / pi) asin(.5) = 1 / 3."""
    rng, held = np.random.default_rng(1), 0
    for draw in range(100):
        a, e = rng.normal(size=(2, 40))
        low, high = ranking.kendall_interval(a, 0.5 * a + 0.75**0.5 * e, draws=200, seed=draw)
        held += low <= 1 / 3 <= high
    assert 88 <= held <= 100


# Search


def bits(rng):
    return tuple(rng.integers(0, 2, 24))


def flip(rng, parent):
    place = rng.integers(24)
    return (*parent[:place], 1 - parent[place], *parent[place + 1 :])


@pytest.mark.parametrize('drop', ['oldest', 'worst'])
def test_evolution_finds_a_target_that_random_search_does_not(drop):
    """Minus the Hamming distance; the same number of candidates, ten seeds."""
    target = bits(np.random.default_rng(99))
    score = lambda of: -sum(a != b for a, b in zip(of, target, strict=True))  # noqa: E731
    won = hit = 0
    for seed in range(10):
        found = evolve(
            np.random.default_rng(seed), score, bits, flip,
            population=20, tournament=8, parents=1, steps=500, drop=drop,
        )  # fmt: skip
        rng = np.random.default_rng(seed)
        others = max(score(bits(rng)) for _ in range(520))
        assert len(found.history) == 520
        assert found.best.score == max(each.score for each in found.history)
        won += found.best.score > others
        hit += found.best.score == 0
    assert won >= 9
    assert hit >= 9


def test_a_score_that_is_not_a_number_never_wins():
    values = itertools.cycle([float('nan'), 1.0, 2.0])
    found = evolve(
        np.random.default_rng(0), lambda of: next(values), bits, flip,
        population=4, tournament=2, parents=1, steps=5,
    )  # fmt: skip
    assert found.best.score == 2.0
    with pytest.raises(ValueError, match='1 <= parents <= tournament <= population, got'):
        evolve(np.random.default_rng(0), len, bits, flip, population=4, tournament=5)


# A space


def digits(name, split):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(20, 6)).astype(np.float32), np.arange(20, dtype=np.int32) % C
    read = lambda rows: {'input': x[rows], 'label': y[rows]}  # noqa: E731
    spec = {
        'input': jax.ShapeDtypeStruct((6,), np.float32),
        'label': jax.ShapeDtypeStruct((), np.int32),
    }
    return sources.Source(sources.DataSet(name, {'train': 20}, lambda _: read, spec, C), split)


@pytest.fixture(scope='module')
def context():
    made = seeds.context(num_classes=C)
    return dataclasses.replace(made, recipe_source=lambda split: digits('toy', split))


BLOCK = dict(name='kd.models.mlp.ResidualMLP')
SPACE = dict(network=BLOCK, choices=dict(width=(3, 5), depth=(0, 1)), examples=16, inits=2)


def test_a_space_is_scored_beside_its_parameters(context):
    """Scored twice the same, and as by hand."""
    probe = train_free.score_space(context, teacher=dict(BLOCK, width=5, depth=1), **SPACE)
    found, again = probe.run(None, ()), probe.run(None, ())
    assert found['table'] == again['table']
    lines = found['table'].splitlines()
    head = '| width | depth | relation | semantic | sum | parameters | operations |'
    assert lines[0] == head
    assert len(lines) == 2 + 4
    (line,) = (line for line in lines if line.startswith('| 5 | 1 |'))
    assert line.split(' | ')[5] == f'{6 * 5 + 5 + 5 * 5 + 5 + 5 * C + C}'
    # By hand, of a network of another width.
    student, teacher = (
        from_linen(ResidualMLP(width, 1, C), jax.ShapeDtypeStruct((1, 6), jnp.float32))
        for width in (3, 5)
    )
    batch, values = digits('toy', 'train').fetch(np.arange(16)), []
    keys = [jax.random.split(jax.random.key(seed), 2) for seed in (0, 1)]
    for init in range(2):
        of = [
            net.apply(net.init(own[init]), batch['input'], capture=('features',))
            for net, own in zip((student, teacher), keys, strict=True)
        ]
        values.append(float(losses.relation_score(*(each.features['features'] for each in of))))
    (line,) = (line for line in lines if line.startswith('| 3 | 1 |'))
    assert line.split(' | ')[2] == f'{np.mean(values):.3g}'
    # Where one width is not the teacher's, all are compared by class: the scores are of two scales.
    seen = [train_free.views(teacher, 'features', batch, 2, seed=seed) for seed in (0, 1)]
    (line,) = (line for line in lines if line.startswith('| 5 | 1 |'))
    wanted = train_free.scores(*seen, by_class=True)['semantic']
    by_hand = [losses.class_semantic_score(s[1], t[1]) for s, t in zip(*seen, strict=True)]
    assert wanted == pytest.approx(float(np.mean(by_hand)), rel=1e-5)
    assert line.split(' | ')[3] == f'{wanted:.3g}'
    assert train_free.scores(*seen)['semantic'] != pytest.approx(wanted, rel=0.1)
    with pytest.raises(UserError, match=r'score_space: choices\.depth has no values'):
        train_free.score_space(
            context, teacher=BLOCK, network=BLOCK, choices=dict(width=(3,), depth=())
        )
    with pytest.raises(UserError, match='no network of the space has at most 10 parameters'):
        train_free.score_space(
            context, teacher=dict(BLOCK, width=5), most_parameters=10, **SPACE
        ).run(None, ())


def test_a_search_comes_to_the_best_of_the_space(context):
    probe = train_free.score_space(
        context, teacher=dict(BLOCK, width=5, depth=1), search='relation', population=4, steps=20,
        **SPACE,
    )  # fmt: skip
    whole = train_free.score_space(
        context,
        teacher=dict(BLOCK, width=5, depth=1),
        **SPACE,
    )
    values = [float(line.split(' | ')[2]) for line in whole.run(None, ())['table'].splitlines()[2:]]
    found = probe.run(None, ())
    assert found['relation'] == pytest.approx(max(values), rel=1e-2)
    assert found['networks'] <= 4


def test_operations_are_those_of_the_products():
    net = from_linen(ResidualMLP(50, 2, 10), jax.ShapeDtypeStruct((1, 300), jnp.float32))
    products = 2 * (300 * 50 + 2 * 50 * 50 + 50 * 10)
    assert products < operations(net) < 1.05 * products


def test_a_network_padded_with_zeros_trains_as_itself():
    """What lets 24 networks train in the shapes of one: gradients keep the zeros."""
    claim = kd_config.load_module(ROOT / 'configs/claims/diswot.py')
    large = from_linen(ResidualMLP(6, 2, 3), jax.ShapeDtypeStruct((1, 4), jnp.float32))
    small = from_linen(ResidualMLP(3, 1, 3), jax.ShapeDtypeStruct((1, 4), jnp.float32))
    padded = jax.jit(lambda key: claim.initial(large, key, 3, 1))(jax.random.key(0))
    own = jax.tree.map(
        lambda leaf, whole: whole[tuple(slice(n) for n in leaf.shape)],
        small.init(jax.random.key(1)),
        {'params': {name: padded['params'][name] for name in ('stem', 'block0', 'head')}},
    )
    assert parameter_count(own) == 4 * 3 + 3 + 9 + 3 + 9 + 3
    x = jax.random.normal(jax.random.key(2), (8, 4))

    @jax.jit
    def trained(padded, own):
        def step(net, variables):
            def loss(v):
                return jnp.mean(jnp.square(net.apply(v, x).logits - 1.0))

            return jax.tree.map(lambda a, g: a - 0.1 * g, variables, jax.grad(loss)(variables))

        for _ in range(3):
            padded, own = step(large, padded), step(small, own)
        return padded, large.apply(padded, x).logits, small.apply(own, x).logits

    after, logits, wanted = trained(padded, own)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)
    assert (after['params']['stem']['kernel'][:, 3:] == 0).all()
    assert (after['params']['block1']['kernel'] == 0).all()
    # Scales are those of the small network's own start.
    many = jax.vmap(lambda key: claim.initial(large, key, 3, 1)['params'])(
        jax.random.split(jax.random.key(3), 400)
    )
    theirs = jax.vmap(lambda key: small.init(key)['params'])(
        jax.random.split(jax.random.key(4), 400)
    )
    for name in ('stem', 'block0', 'head'):
        spread = theirs[name]['kernel'].std()
        rows, columns = theirs[name]['kernel'].shape[1:]
        found = many[name]['kernel'][:, :rows, :columns].std()
        assert float(found) == pytest.approx(float(spread), rel=0.06)


def test_stages_of_a_resnet_may_differ():
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    count = lambda net: parameter_count(jax.eval_shape(net.init, jax.random.key(0), image))  # noqa: E731
    assert count(ResNet(blocks=(3, 3, 3))) == count(ResNet(20))
    more = count(ResNet(blocks=(3, 4, 3))) - count(ResNet(20))
    assert more == 2 * (9 * 32**2 + 2 * 32)
