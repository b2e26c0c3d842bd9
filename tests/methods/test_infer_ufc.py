"""Compensators: augmentation before the shift, groups in parts, and classes on several devices."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kd.claims import seeds
from kd.data import sources
from kd.losses.batch_statistics import statistics_of
from kd.methods.dataset import infer_ufc
from kd.models.efficientnet import EfficientNet
from kd.models.mobilenet import MobileNetV2
from kd.network import from_linen
from kd.parallel.mesh import make_mesh
from kd.parallel.sharding import tree_shardings

pytestmark = pytest.mark.usefixtures('compiled_quickly')

CLASSES, SHAPE, GROUPS = 8, (8, 8, 2), 3
INPUTS = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
RATE = 0.1


class Linear(nn.Module):
    """A linear network behind a batch norm: its gradients can be written down."""

    @nn.compact
    def __call__(self, x, *, train=False):
        x = nn.BatchNorm(use_running_average=not train, name='norm')(x)
        return nn.Dense(CLASSES, name='head')(x.reshape(len(x), -1))


@pytest.fixture(scope='module')
def network():
    return from_linen(Linear(), INPUTS)


@pytest.fixture(scope='module')
def context(network):
    rng = np.random.default_rng(0)
    arrays = {
        'input': rng.normal(size=(4 * CLASSES, *SHAPE)).astype(np.float32),
        'label': np.tile(np.arange(CLASSES, dtype=np.int32), 4),
    }
    data = sources.DataSet(
        'random', {'train': len(arrays['label'])}, lambda split: sources.in_memory(arrays),
        sources.example_spec(SHAPE), CLASSES,
    )  # fmt: skip
    return dataclasses.replace(
        seeds.context(tx=optax.sgd(RATE), num_classes=CLASSES),
        recipe_source=lambda split: sources.Source(data, split),
        references={'a': network},
        locate=lambda reference: reference,
    )


def stepped(context, **options):
    """A state, the state one step later, and its metrics."""
    method = infer_ufc.infer_ufc(
        context, images_per_class=4, groups=GROUPS, statistics_weight=0.0, shift=0, **options
    )
    frozen = {name: net.init(jax.random.key(1)) for name, net in context.references.items()}
    state = method.init(jax.random.key(0), frozen)
    return state, *jax.jit(method.step)(state, {})


def by_hand(state, groups, back):
    """-RATE d loss / d u, [k, 1, ...]: softmax minus one-hot through the head, summed by class."""
    variables = jax.tree.map(lambda x: np.asarray(x, np.float64), state.frozen['a'])
    kernel, bias = (variables['params']['head'][name] for name in ('kernel', 'bias'))
    moves = []
    for images in np.asarray(groups, np.float64):
        # The normalisation starts as the identity, up to its epsilon.
        logits = images.reshape(CLASSES, -1) @ kernel / np.sqrt(1 + 1e-5) + bias
        probs = np.exp(logits - logits.max(1, keepdims=True))
        error = probs / probs.sum(1, keepdims=True) - np.eye(CLASSES)
        grads = (error / CLASSES) @ kernel.T / np.sqrt(1 + 1e-5)
        moves.append(-RATE * back(grads.reshape(CLASSES, *SHAPE)).sum(0, keepdims=True))
    return np.stack(moves)


def test_without_augmentation_a_compensator_moves_by_the_gradients_of_its_classes(context):
    state, new, metrics = stepped(context)
    assert state.mutables['network']['groups'].shape == (GROUPS, CLASSES, *SHAPE)
    wanted = by_hand(state, state.mutables['network']['groups'], lambda grads: grads)
    np.testing.assert_allclose(new.params['network']['a'], wanted, rtol=1e-4, atol=1e-7)
    norm = np.sqrt((np.square(wanted) / RATE**2).sum())
    assert float(metrics['grad_norm'].total) == pytest.approx(norm, rel=1e-4)


def test_the_gradient_passes_back_through_the_augmentation(context):
    state, new, _ = stepped(context, augmentation=(('flip', 1.0, {'shared': True}),))
    mirrored = np.asarray(state.mutables['network']['groups'])[:, :, :, ::-1]
    wanted = by_hand(state, mirrored, lambda grads: grads[:, :, ::-1])
    np.testing.assert_allclose(new.params['network']['a'], wanted, rtol=1e-4, atol=1e-7)
    # A crop: some pixels are never seen, and their compensator stays.
    crop = (('resized_crop', (0.1, 0.2), {'shared': True}),)
    _, new, _ = stepped(context, augmentation=crop)
    still = (np.asarray(new.params['network']['a']) == 0).all((1, 4))
    assert (still.sum((1, 2)) >= 0.5 * 64).all()
    assert (still.sum((1, 2)) < 64).all()


def test_real_images_are_no_part_of_the_program_that_starts_the_state(context):
    method = infer_ufc.infer_ufc(context, images_per_class=4, groups=GROUPS)
    frozen = {'a': context.references['a'].init(jax.random.key(1))}
    program = jax.make_jaxpr(method.init)(jax.random.key(0), frozen)
    assert sum(np.size(x) for x in program.consts) < 100
    mesh = make_mesh({'data': 8})
    places = tree_shardings(
        jax.eval_shape(method.init, jax.random.key(0), frozen),
        ((r'groups$', (None, 'data')),), mesh,
    )  # fmt: skip
    state = jax.jit(method.init, out_shardings=places)(jax.random.key(0), frozen)
    groups = np.asarray(state.mutables['network']['groups'])
    real = context.recipe_source('train').fetch(np.arange(4 * CLASSES))
    for label in range(CLASSES):
        of_class = real['input'][real['label'] == label]
        found = [np.abs(of_class - image).max((1, 2, 3)).argmin() for image in groups[:, label]]
        np.testing.assert_array_equal(groups[:, label], of_class[found])
        assert len(set(found)) == GROUPS


@pytest.mark.parametrize('together', [1, 2])
def test_groups_in_parts_give_the_numbers_of_all_at_once(context, together):
    options = {'augmentation': (('resized_crop', {'shared': True}),)}
    _, whole, metrics = stepped(context, **options)
    _, parts, others = stepped(context, together=together, **options)
    np.testing.assert_allclose(
        parts.params['network']['a'], whole.params['network']['a'], rtol=1e-5, atol=1e-8
    )
    name = 'a/cross_entropy'
    assert float(others[name].total) == pytest.approx(float(metrics[name].total), rel=1e-5)


def test_classes_on_eight_devices_give_the_numbers_of_one(context):
    method = infer_ufc.infer_ufc(
        context, images_per_class=4, groups=GROUPS, shift=1,
        augmentation=(('resized_crop', {'shared': True}),),
    )  # fmt: skip
    frozen = {'a': context.references['a'].init(jax.random.key(1))}
    state = method.init(jax.random.key(0), frozen)
    step = jax.jit(method.step)
    mesh = make_mesh({'data': 8})
    places = tree_shardings(
        jax.eval_shape(lambda s: s, state), ((r'groups$', (None, 'data')),), mesh
    )
    spread = jax.device_put(state, places)
    batch = jax.device_put({}, NamedSharding(mesh, PartitionSpec()))
    assert spread.mutables['network']['groups'].addressable_shards[0].data.shape[1] == 1
    for _ in range(2):
        state, spread = step(state, {})[0], step(spread, batch)[0]
    assert float(jnp.abs(state.params['network']['a']).max()) > 1e-4
    np.testing.assert_allclose(
        spread.params['network']['a'], state.params['network']['a'], rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ('module', 'last', 'norms'),
    [
        # Stem, last, and three norms a block, but two where nothing is expanded.
        (MobileNetV2(CLASSES, 0.1, 'cifar'), 'last', 2 + 17 * 3 - 1),
        (EfficientNet(CLASSES, 0.1, 1.0, 'cifar'), 'last', 2 + 16 * 3 - 1),
    ],
)
def test_every_normalisation_of_a_deep_network_is_seen_once_and_in_order(module, last, norms):
    net = from_linen(module, INPUTS)
    made = jax.eval_shape(net.init, jax.random.key(0))
    rng = np.random.default_rng(3)
    # Running means number the layers, in the order of computation.
    variables = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype) / 4, made)
    order = ['stem_norm', *(f'block{i}' for i in range(len(made['params']) - 5)), f'{last}_norm']
    found, expected = 0, []
    for name in order:
        part = variables['batch_stats'][name]
        inner = [part] if 'mean' in part else [
            part[f'{key}_norm'] for key in ('expand', 'depthwise', 'project')
            if f'{key}_norm' in part
        ]  # fmt: skip
        for statistics in inner:
            statistics['mean'] = jnp.full_like(statistics['mean'], found)
            statistics['var'] = jnp.full_like(statistics['var'], 1.0)
            expected.append(found)
            found += 1
    images = jnp.asarray(rng.normal(size=(3, *SHAPE)), jnp.float32)

    @jax.jit
    def run(variables, images):
        _, seen = infer_ufc.normalisation_inputs(net, variables, images)
        return [(layer.mean, layer.running_mean) for layer in seen], net.apply(
            variables, images, capture=(last, 'stem')
        ).features

    seen, features = run(variables, images)
    assert len(seen) == norms
    assert [float(running[0]) for _, running in seen] == expected
    for place, name in ((0, 'stem'), (-1, last)):
        np.testing.assert_allclose(
            seen[place][0], statistics_of(features[name])[0], rtol=1e-4, atol=1e-5
        )
