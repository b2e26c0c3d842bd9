"""Elastic networks: parts that are networks by themselves, and one program for all of them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kd.errors import UserError
from kd.models import elastic
from kd.models.elastic_mlp import ElasticMLP
from kd.models.elastic_mobilenet import ElasticMobileNetV3, MobileNetV3
from kd.models.elastic_resnet import BottleneckResNet, ElasticResNet
from kd.models.mlp import MLP
from kd.network import feature_names, from_linen, parameter_count
from kd.networks import sliced

pytestmark = pytest.mark.usefixtures('compiled_quickly')

ROW = jax.ShapeDtypeStruct((1, 6), jnp.float32)
IMAGE = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.float32)
NETS = {
    'mlp': from_linen(ElasticMLP((4, 6, 8), (1, 2, 3), (2, 3, 5), num_classes=3), ROW),
    'resnet': from_linen(
        ElasticResNet(
            (0.65, 1.0), (0, 1), (0.25, 0.5, 1.0), stem=16, stages=(24, 32), blocks=(1, 1),
            num_classes=3,
        ), IMAGE,
    ),
}  # fmt: skip
MOBILE = dict(
    stages=((8, 1, 'relu', False), (16, 2, 'hard_swish', True)), last=(16, 24), num_classes=3
)
NETS['mobilenet'] = from_linen(
    ElasticMobileNetV3(depths=(1, 2), kernels=(3, 5, 7), expansions=(1, 2, 3), **MOBILE), IMAGE
)
SLICES = {'mlp': 4, 'resnet': 1, 'mobilenet': 1}


def noisy(network, seed=1):
    """Variables without zeros and ones."""
    variables = jax.jit(network.init)(jax.random.key(0))
    leaves, tree = jax.tree.flatten(variables)
    rng = np.random.default_rng(seed)
    leaves = [
        x + (0.1 if x.ndim == 2 else 0.3) * np.abs(rng.normal(size=x.shape)).astype(np.float32)
        if x.ndim < 3
        else x
        for x in leaves
    ]
    return jax.tree.unflatten(tree, leaves)


@pytest.fixture(scope='module', params=NETS)
def case(request):
    """(name, network, variables, inputs, training and evaluation of any architecture)."""
    network = NETS[request.param]
    x = np.random.default_rng(0).normal(size=(5, *network.inputs[0].shape[1:])).astype(np.float32)

    @jax.jit
    def forward(variables, arch):
        evaluated = network.apply(variables, x, arch=arch).logits
        trained = network.apply(variables, x, arch=arch, train=True)
        return evaluated, trained.logits, trained.mutables

    return request.param, network, noisy(network), x, forward


def test_a_part_is_the_smaller_network_in_evaluation_and_in_training(case):
    """Logits and running statistics; what is left out says nothing, and keeps its statistics."""
    name, network, variables, x, forward = case
    space = network.module.space()
    for seed in range(SLICES[name]):
        arch = jax.device_get(space.sample(jax.random.key(seed)))
        small = sliced(network, arch)
        own = elastic.slice_variables(network, variables, arch)

        @jax.jit
        def alone(own, small=small):
            trained = small.apply(own, x, train=True)
            return small.apply(own, x).logits, trained.logits, trained.mutables

        evaluated, trained, mutables = forward(variables, arch)
        expected = alone(own)
        np.testing.assert_allclose(evaluated, expected[0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(trained, expected[1], rtol=1e-5, atol=1e-5)
        after = elastic.slice_variables(network, {**variables, **mutables}, arch)
        after = {collection: after[collection] for collection in mutables}
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), after, expected[2]
        )
    # Statistics of the rest are those before, bit for bit.
    if mutables:
        moved = jax.tree.map(lambda a, b: int((a != b).sum()), mutables, before(variables))
        live = jax.tree.map(lambda x: x.size, expected[2])
        total = sum(jax.tree.leaves(moved))
        assert 0 < total <= sum(jax.tree.leaves(live)) < parameter_count({'params': mutables})


def before(variables):
    return {'batch_stats': variables['batch_stats']}


def test_the_largest_part_is_the_whole_network(case):
    """Bit for bit where programs do not sum convolutions in another order."""
    name, network, variables, x, forward = case
    evaluated, trained, mutables = forward(variables, network.module.space().largest())

    @jax.jit
    def whole(variables):
        trained = network.apply(variables, x, train=True)
        return network.apply(variables, x).logits, trained.logits, trained.mutables

    expected = whole(variables)
    tolerance = 0 if name == 'mlp' else 2e-6
    for found, other in zip(
        jax.tree.leaves((evaluated, trained, mutables)), jax.tree.leaves(expected), strict=True
    ):
        np.testing.assert_allclose(found, other, rtol=tolerance, atol=tolerance)
    # It has the same names, the features too.
    assert feature_names(network)[-2:] == ('features', 'head')


def test_what_is_left_out_has_no_gradient(case):
    name, network, variables, x, _ = case
    if name == 'mobilenet':
        pytest.skip('it has the layers of the others')
    arch = network.module.space().smallest()

    @jax.jit
    def slopes(params):
        given = {**variables, 'params': params}
        return jax.grad(
            lambda p: (network.apply({**given, 'params': p}, x, train=True, arch=arch).logits ** 2)
            .sum()
        )(params)  # fmt: skip

    slope = slopes(variables['params'])
    inside = elastic.slice_variables(network, {**variables, 'params': slope}, arch)['params']
    norm = optax.tree.norm
    assert float(norm(slope)) == pytest.approx(float(norm(inside)), rel=1e-6)
    count = lambda tree: sum(int((np.asarray(x) != 0).sum()) for x in jax.tree.leaves(tree))  # noqa: E731
    assert count(slope) == count(inside) > 0


def test_sorting_leaves_the_largest_network_and_the_tiers_as_they_are(case):
    """And other parts are no longer the same (F5: with tiers those at a tier's end are)."""
    _, network, variables, _, forward = case
    space = network.module.space()
    options = dict(space.choices)['expansion'].options
    parts = {option: space.restrict({'expansion': (option,)}).largest() for option in options}
    logits = {option: forward(variables, arch)[0] for option, arch in parts.items()}
    whole = jax.jit(lambda v: elastic.sort_channels(network, v))(variables)
    tiered = jax.jit(lambda v: elastic.sort_channels(network, v, tiers=options[1:2]))(variables)
    for found, same in ((whole, options[-1:]), (tiered, options[1:])):
        for option, arch in parts.items():
            apart = np.abs(forward(found, arch)[0] - logits[option]).max()
            assert (apart < 2e-5 * (1 + np.abs(logits[option]).max())) == (option in same)
    # Channels stand by what reads them.
    for group in network.module.groups():
        kernel = whole['params']
        for key in group.into[0].split('/'):
            kernel = kernel[key]
        axes = tuple(i for i in range(kernel.ndim) if i != group.into[1])
        importance = np.abs(kernel).sum(axes)
        assert (np.diff(importance) <= 1e-5).all(), group.into[0]


def test_multiply_adds_are_those_of_the_kernels(case):
    name, network, _, _, _ = case
    space = network.module.space()
    count = jax.jit(jax.vmap(lambda key: elastic.multiply_adds(network, space.sample(key))))
    found = count(jax.random.split(jax.random.key(3), 3))
    for key, cost in zip(jax.random.split(jax.random.key(3), 3), found, strict=True):
        small = sliced(network, jax.device_get(space.sample(key)))
        assert float(cost) == by_hand(small, name)


def by_hand(network, name):
    """Sizes of kernels times the positions they are used at."""
    variables = jax.eval_shape(network.init, jax.random.key(0))
    total = 0
    for path, x in jax.tree_util.tree_flatten_with_path(variables['params'])[0]:
        where = '/'.join(key.key for key in path)
        if where.endswith('kernel'):
            # After the stride, which is in the middle of the first block of the second stage.
            first = 'block0/conv1' if name == 'resnet' else 'block0/expand'
            late = ('stage2' in where and first not in where) or 'last' in where
            once = name == 'mlp' or x.ndim == 2
            total += (1 if once else 16 if late else 64) * x.size
    return total


@pytest.mark.parametrize('seed', range(3))
def test_features_of_an_architecture_are_those_of_its_network(seed):
    """Blocks that are left out say nothing, and there are as many as `count` tells."""
    space = NETS['mlp'].module.space()
    assert space.count() == 3 * (3 + 9 + 27)
    arch = jax.device_get(space.sample(jax.random.key(seed)))
    hot = np.asarray(space.one_hot(arch))
    assert hot.shape == (3 + 3 + 9,)
    blocks = int(arch['depth'][0]) + 1
    assert hot.sum() == 2 + blocks
    other = dict(arch, expansion=np.where(np.arange(3) < blocks, arch['expansion'], 0))
    np.testing.assert_array_equal(space.one_hot(other), hot)


def test_every_coordinate_is_drawn_evenly_from_what_is_allowed():
    space = NETS['mlp'].module.space().restrict({'expansion': (2, 5), 'depth': (3,)})
    assert space.count() == 3 * 8
    drawn = jax.vmap(space.sample)(jax.random.split(jax.random.key(0), 4000))
    assert set(np.unique(drawn['depth'])) == {2}
    assert set(np.unique(drawn['expansion'])) == {0, 2}
    together = np.asarray(drawn['expansion'] @ np.array([1, 3, 9]) + 27 * drawn['width'][:, 0])
    shares = np.unique(together, return_counts=True)[1] / 4000
    assert len(shares) == 24
    np.testing.assert_allclose(shares, 1 / 24, atol=0.015)
    genes = np.random.default_rng(0).integers(0, space.genes(), (5, 5))
    found = space.architectures(genes)
    np.testing.assert_array_equal(found['expansion'], 2 * genes[:, 2:])
    assert space.describe({name: x[0] for name, x in space.architectures(genes * 0).items()}) == (
        'width 4, depth 3, expansion 2 2 2'
    )


def test_recalibrated_statistics_are_means_over_batches():
    network = NETS['resnet']
    variables, space = noisy(network), network.module.space()
    arch = space.smallest()
    small = sliced(network, arch)
    x = np.random.default_rng(0).normal(size=(2, 5, 8, 8, 3)).astype(np.float32)
    again = jax.jit(lambda v: elastic.recalibrate(network, v, x, arch))(variables)
    found = elastic.slice_variables(network, again, arch)['batch_stats']
    own = elastic.slice_variables(network, variables, arch)
    stem = own['params']['stem0']['conv']['kernel']
    each = [
        jax.lax.conv_general_dilated(
            batch, stem, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
        )
        for batch in x
    ]
    means = np.mean([batch.mean((0, 1, 2)) for batch in each], 0)
    variances = np.mean([batch.var((0, 1, 2)) for batch in each], 0)
    np.testing.assert_allclose(found['stem0']['norm']['mean'], means, atol=1e-4)
    np.testing.assert_allclose(found['stem0']['norm']['var'], variances, rtol=1e-3)
    # Dropout, which recipes have, is no matter.
    dropping = from_linen(network.module.clone(dropout=0.5), IMAGE)
    other = jax.jit(lambda v: elastic.recalibrate(dropping, v, x, arch))(variables)
    jax.tree.map(np.testing.assert_array_equal, other['batch_stats'], again['batch_stats'])
    # A plain network is recalibrated alike, and one without norms not at all.
    plain = jax.jit(lambda v: elastic.recalibrate(small, v, x, {}))(own)['batch_stats']
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), found, plain)
    row = noisy(NETS['mlp'])
    assert elastic.recalibrate(NETS['mlp'], row, x, {}) is row


def test_resnet_50_with_a_deep_stem_has_its_parameters_and_the_space_its_size():
    network = from_linen(BottleneckResNet(), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
    variables = jax.eval_shape(network.init, jax.random.key(0))
    assert parameter_count(variables) == 25_576_264
    space = ElasticResNet().space()
    assert space.count() == 3**6 * 2 * (9 + 27 + 81) ** 3 * (81 + 243 + 729)


def test_smaller_kernels_are_mixed_middles_of_larger_ones():
    """5x5 and 3x3 from 7x7, as a network by itself computes them, with matrices of any kind."""
    network = NETS['mobilenet']
    variables, space = noisy(network), network.module.space()
    arch = {**space.largest(), 'kernel': np.array([0, 1, 2, 0], np.int32)}
    own = elastic.slice_variables(network, variables, arch)['params']
    kernels = [own[f'stage{i}_block{j}']['depthwise']['kernel'] for i in (1, 2) for j in (0, 1)]
    assert [len(k) for k in kernels] == [3, 5, 7, 3]
    params = variables['params']['stage1_block0']['depthwise']
    middle = np.asarray(params['kernel'])[1:-1, 1:-1].reshape(25, -1)
    five = (np.asarray(params['to5']) @ middle).reshape(5, 5, 1, -1)
    three = (np.asarray(params['to3']) @ five[1:-1, 1:-1].reshape(9, -1)).reshape(3, 3, 1, -1)
    np.testing.assert_allclose(kernels[0], three, rtol=1e-5)
    assert isinstance(sliced(network, arch).module, MobileNetV3)
    assert ElasticMobileNetV3().space().count() == (9**2 + 9**3 + 9**4) ** 5 > 10**19


def test_bad_spaces_and_networks_are_refused():
    space = NETS['mlp'].module.space()
    with pytest.raises(UserError, match=r"method\.space has no choice 'widht', only width, depth"):
        space.restrict({'widht': (4,)}, where='method.space')
    with pytest.raises(UserError, match=r'space\.width must name some of \(4, 6, 8\), got \(5,\)'):
        space.restrict({'width': (5,)})
    with pytest.raises(UserError, match=r'must be an elastic network.*not MLP'):
        elastic.elastic(from_linen(MLP((4,), num_classes=2), ROW), 'student.network')
